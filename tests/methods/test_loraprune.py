"""LoRAPrune: its gradient estimate, its schedule, what goes first, a smaller model that answers the same."""

import math

import pytest
import torch

from peft_service import artifact, base_model, methods
from peft_service.errors import InvalidRequest
from peft_service.gate import weights_of
from peft_service.methods import Case, Material
from peft_service.methods.loraprune import LoRAPrune
from peft_service.spec import Training
from peft_service.train import LocalEngine
from peft_service.tuners.loraprune import estimated_gradient, importance
from peft_service.tuners.low_rank import base_weight, down, lora_layers, names_of, up
from tests.methods import checks
from tests.methods.checks import Live, Trial


def live_of(root, steps=20, task="causal_lm", **fields):
    method = LoRAPrune.model_validate({"rank": 4, "alpha": 8, "every": 2, **fields})
    return Live(Trial(method, "llama", task), root, steps=steps, rate=1e-2)


def test_lora_gradients_are_those_of_the_whole_weight_and_so_is_the_estimate():
    torch.manual_seed(0)
    x, weight = torch.randn(9, 6, dtype=torch.float64), torch.randn(5, 6, dtype=torch.float64)
    a = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)
    b = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    whole = (weight + 2.0 * (b @ a).detach()).requires_grad_()
    (x @ (weight + 2.0 * b @ a).T).tanh().sum().backward()
    (x @ whole.T).tanh().sum().backward()
    assert torch.allclose(a.grad, 2.0 * b.detach().T @ whole.grad, atol=1e-12)
    assert torch.allclose(b.grad, 2.0 * whole.grad @ a.detach().T, atol=1e-12)
    # A step of rate 1 moves B A by -ĝ.
    with torch.no_grad():
        moved = (b - b.grad) @ (a - a.grad) - b @ a
        assert float((estimated_gradient(a, b, a.grad, b.grad) + moved).abs().max()) < 1e-12


@pytest.mark.parametrize("dim", [0, 1])
def test_importance_of_a_group_is_the_sum_over_its_weights(dim):
    torch.manual_seed(0)
    weight, gradient = torch.randn(2, 12, 12, dtype=torch.float64)
    wanted = []
    for group in range(4):
        lines = range(group * 3, group * 3 + 3)
        pairs = [(line, other) if dim == 0 else (other, line) for line in lines for other in range(12)]
        wanted.append(sum(abs(float(weight[i, j]) * float(gradient[i, j])) for i, j in pairs))
    length = math.sqrt(sum(value**2 for value in wanted))
    found = importance(weight, gradient, 4, dim).tolist()
    assert found == pytest.approx([value / length for value in wanted], rel=1e-7)


def test_scores_of_a_live_model_are_the_formula(root):
    """Also: the rows of q and columns of o of a group are those of all of its query heads."""
    live = live_of(root)
    live.step(0)
    found = {}

    class Spy(LocalEngine):
        def step(self, rate):
            for block in live.attached.blocks:
                found[block.name] = live.attached.scores(self, block)
                grads = {name: p.grad.clone() for name, p in self.parameters.items()}
            found["gradients"] = grads
            found["values"] = {name: p.detach().clone() for name, p in self.parameters.items()}
            return super().step(rate)

    live.engine.__class__ = Spy
    live.step(1)
    for block in live.attached.blocks:
        total = torch.zeros(block.groups)
        for name, layer in block.layers.items():
            (a, b), (g_a, g_b) = ([found[k][n] for n in names_of(name)] for k in ("values", "gradients"))
            score = ((g_b @ a + b @ g_a - g_b @ g_a) * (base_weight(layer) + 2.0 * b @ a)).abs()
            if name.endswith(("o_proj", "down_proj")):
                score = score.T
            by_row = score.sum(1)
            heads = 8 * 2 if name.endswith(("q_proj", "o_proj")) else 8
            size = heads if block.attention else 1
            groups = torch.stack(
                [by_row[start : start + size].sum() for start in range(0, len(by_row), size)]
            )
            total += groups / groups.norm()
        assert torch.allclose(found[block.name], total, rtol=1e-4)


def test_the_running_mean_is_of_every_step_not_only_of_those_that_prune(root):
    live = live_of(root, every=5, memory=0.7)
    told, scores = {}, live.attached.scores

    def spy(engine, block):
        found = scores(engine, block)
        told.setdefault(block.name, []).append(found.clone())
        return found

    live.attached.scores = spy
    for number in range(7):
        live.step(number)
    for block in live.attached.blocks:
        assert len(told[block.name]) == 7
        wanted = sum(0.3 * 0.7 ** (6 - step) * part for step, part in enumerate(told[block.name]))
        torch.testing.assert_close(live.attached.mean[block.name], wanted)


def test_the_estimate_on_a_live_model_is_made_of_the_weights_own_gradient(root):
    """The base's weights are made to train, and autograd asked: with their gradient G, whole and in float64,
    ĝ = s (G Aᵀ A + B Bᵀ G) - s² G Aᵀ Bᵀ G."""
    live = live_of(root)
    live.step(0)
    layers = lora_layers(live.attached.model)
    live.attached.model.double()
    for layer in layers.values():
        layer.base_layer.weight.requires_grad_(True)
    live.objective.loss_sum(live.engine.model, live.batch(range(4)))[0].backward()
    for name, layer in layers.items():
        a, b = down(layer).weight, up(layer).weight
        whole = layer.base_layer.weight.grad
        with torch.no_grad():
            torch.testing.assert_close(a.grad, 2.0 * b.T @ whole, rtol=1e-9, atol=1e-12, msg=name)
            torch.testing.assert_close(b.grad, 2.0 * whole @ a.T, rtol=1e-9, atol=1e-12, msg=name)
            wanted = 2 * (whole @ a.T @ a + b @ b.T @ whole) - 4 * (whole @ a.T) @ (b.T @ whole)
            found = estimated_gradient(a, b, a.grad, b.grad)
        assert float(whole.abs().max()) > 0
        torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-12, msg=name)


def test_sparsity_is_the_schedule_at_every_step(root):
    live = live_of(root, steps=20)
    method = live.trial.method
    seen = []
    for number in range(20):
        live.step(number)
        done = number + 1
        at = max((look for look in method.looks(20) if look <= done), default=0)
        wanted = round((1 - method.share(at, 20)) * 64)
        for block in live.attached.blocks:
            left = int(block.mask.sum())
            if block.attention:
                assert left == (1 if method.share(at, 20) >= 0.5 else 2)
            else:
                assert left == wanted
        seen.append(wanted)
    assert seen[0] == 64
    assert seen[-1] == 32
    assert sorted(seen, reverse=True) == seen
    assert len(set(seen)) > 4


def test_the_schedule_is_cubic_between_warm_up_and_cool_down():
    method = LoRAPrune(sparsity=0.6, warmup=0.2, cooldown=0.3)
    assert [method.share(done, 100) for done in (0, 10, 20, 70, 85, 100)] == [0, 0, 0, 0.6, 0.6, 0.6]
    for done in (30, 45, 69):
        t = (done - 20) / 50
        assert method.share(done, 100) == pytest.approx(0.6 - 0.6 * (1 - t) ** 3)
    assert 70 in method.looks(100)


@pytest.mark.parametrize("task", ["causal_lm", "sequence_classification"])
def test_plain_transformers_loads_the_smaller_model_and_it_answers_as_the_masked_one(root, tmp_path, task):
    import transformers

    live = live_of(root, task=task)
    for number in range(20):
        live.step(number)
    said = live.answers()
    directory = live.save(tmp_path / "a")
    model, again = checks.load(live, directory)
    assert checks.difference(said, again, live.probe) < 1e-5
    config = transformers.AutoConfig.from_pretrained(directory)
    assert (config.num_attention_heads, config.num_key_value_heads, config.head_dim) == (2, 1, 8)
    assert config.intermediate_size == 32
    assert model.model.layers[0].self_attn.q_proj.weight.shape == (16, 32)
    assert model.model.layers[1].mlp.down_proj.weight.shape == (32, 32)
    # Masks are what makes it so: without them the trained model says something else.
    for block in live.attached.blocks:
        block.mask.fill_(True)
    assert checks.difference(live.answers(), said, live.probe) > 1e-3
    shape = checks.shape_of("llama", root)
    count = sum(tensor.numel() for tensor in weights_of(directory).values())
    assert count == methods.stored(live.trial.method, shape, live.case)
    assert live.attached.model.get_base_model().config.intermediate_size == 64
    if task == "causal_lm":
        ids = live.probe.tokens_BT[:1]
        cached = model.generate(input_ids=ids, max_new_tokens=5, do_sample=False)
        assert torch.equal(
            cached, model.generate(input_ids=ids, max_new_tokens=5, do_sample=False, use_cache=False)
        )


def test_a_checkpoint_on_the_way_is_a_model_too(root, tmp_path):
    live = live_of(root)
    for number in range(8):
        live.step(number)
    widths = {int(block.mask.sum()) for block in live.attached.blocks if not block.attention}
    assert len(widths) == 1
    assert 32 < widths.pop() < 64
    _, again = checks.load(live, live.save(tmp_path / "a"))
    assert checks.difference(live.answers(), again, live.probe) < 1e-5


def test_dead_heads_and_channels_go_first(root):
    """Their weights are a millionth of the others': nothing that they compute is felt."""
    live = live_of(root)
    dead = (3, 17, 40, 41, 60)
    with torch.no_grad():
        for name, layer in lora_layers(live.attached.model).items():
            weight = layer.get_base_layer().weight
            if name.endswith(("gate_proj", "up_proj")):
                weight[list(dead)] *= 1e-6
                up(layer).weight[list(dead)] *= 1e-6
            elif name.endswith("down_proj"):
                weight[:, list(dead)] *= 1e-6
            elif name.endswith("o_proj"):
                weight[:, :16] *= 1e-6
            elif name.endswith(("q_proj", "k_proj", "v_proj")):
                weight[: len(weight) // 2] *= 1e-6
    for number in range(20):
        live.step(number)
        for block in live.attached.blocks:
            gone = set((~block.mask).nonzero().flatten().tolist())
            if block.attention:
                assert gone <= {0}
            else:
                assert gone <= set(dead) or gone > set(dead)
    assert all(not block.mask[0] for block in live.attached.blocks if block.attention)


def test_a_masked_group_stays_masked_and_masks_are_resumed(root):
    one = live_of(root)
    before = {}
    for number in range(20):
        one.step(number)
        for block in one.attached.blocks:
            assert not bool((block.mask & ~before.get(block.name, block.mask)).any())
            before[block.name] = block.mask.clone()
        if number == 9:
            state = {name: tensor.clone() for name, tensor in one.engine.state().items()}
            kept = {name: tensor.clone() for name, tensor in one.attached.state().items()}
    two = live_of(root)
    two.attached.load_state(kept)
    two.engine.load_state(state)
    assert any(not bool(block.mask.all()) for block in two.attached.blocks)
    for number in range(10, 20):
        two.step(number)
    ends = two.attached.state()
    assert all(torch.equal(tensor, ends[name]) for name, tensor in one.attached.state().items())
    for name, tensor in one.engine.trainable().items():
        assert torch.equal(tensor, two.engine.trainable()[name])


def test_heads_can_be_left_alone(root, tmp_path):
    live = live_of(root, heads=False, sparsity=0.25)
    for number in range(20):
        live.step(number)
    model, again = checks.load(live, live.save(tmp_path / "a"))
    assert checks.difference(live.answers(), again, live.probe) < 1e-5
    assert (model.config.num_attention_heads, model.config.intermediate_size) == (4, 48)


@pytest.mark.parametrize("kind", ["Mistral", "Qwen2", "Qwen3", "Gemma", "Llama"])
def test_other_decoders_lose_whole_key_value_heads(kind, tmp_path):
    import transformers

    torch.manual_seed(0)
    more = {"attention_bias": True, "mlp_bias": True} if kind == "Llama" else {}
    config = getattr(transformers, f"{kind}Config")(
        hidden_size=48, intermediate_size=40, num_hidden_layers=3, num_attention_heads=8,
        num_key_value_heads=4, head_dim=8, vocab_size=100, max_position_embeddings=64, bos_token_id=0,
        eos_token_id=1, pad_token_id=2, tie_word_embeddings=kind == "Gemma", **more,
    )  # fmt: skip
    made = getattr(transformers, f"{kind}ForCausalLM")(config)
    for name, parameter in made.named_parameters():
        if "norm" not in name:
            parameter.data.normal_(std=0.2)
    made.save_pretrained(tmp_path / "base")
    shape, case = base_model.shape_of_directory(tmp_path / "base"), Case(steps=4)
    method = LoRAPrune(rank=2, alpha=4, every=1, sparsity=0.25)
    methods.admit(method, shape, case)
    found = method.attach(base_model.load(tmp_path / "base", precision="fp32"), case, Material())
    engine = LocalEngine(found, Training(learning_rate=1e-2, batch_size=1))
    ids = torch.randint(3, 100, (2, 12))
    for step in range(4):
        engine.backward(found.model.train()(input_ids=ids, labels=ids).loss)
        found.before_update(engine, step)
        engine.step(1e-2)
    # 6 query heads: a number that divides 48, which Llama asks for.
    assert method.final(shape) == (3, 30)
    found.save(engine.trainable(), tmp_path / "a", ("tiny", None))
    artifact.write_task(tmp_path / "a", "causal_lm", ())
    count = sum(tensor.numel() for tensor in weights_of(tmp_path / "a").values())
    assert count == methods.stored(method, shape, case)
    small = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "a", dtype=torch.float32).eval()
    assert small.config.num_key_value_heads == 3
    with torch.no_grad():
        gap = small(input_ids=ids).logits - found.model.eval()(input_ids=ids).logits
    assert float(gap.abs().max()) < 1e-4


def test_a_llama_keeps_a_number_of_heads_that_its_config_takes():
    method = LoRAPrune(sparsity=0.4)
    assert method.kept(0.4, "llama", 4096, 32, 8, 100) == (
        8,
        60,
    )  # 5 groups are 20 heads, 8 the next that divide
    assert method.kept(0.5, "llama", 4096, 32, 8, 100) == (4, 50)
    assert method.kept(0.4, "mistral", 4096, 32, 8, 100) == (5, 60)


def test_what_it_refuses_says_what_works(root):
    shape = checks.shape_of("llama", root)
    with pytest.raises(InvalidRequest, match="does not work on opt models"):
        methods.admit(LoRAPrune(), checks.shape_of("opt", root), Case())
    with pytest.raises(InvalidRequest, match="on encoder models"):
        methods.admit(LoRAPrune(), checks.shape_of("bert", root), Case(task="token_classification"))
    with pytest.raises(InvalidRequest, match=r"Leave base\.quantize out"):
        methods.admit(LoRAPrune(), shape, Case(quantize="nf4"))
    with pytest.raises(InvalidRequest, match="removes nothing"):
        methods.admit(LoRAPrune(sparsity=0.001), shape, Case())
    with pytest.raises(InvalidRequest, match="no steps to prune in"):
        methods.admit(LoRAPrune(warmup=0.5, cooldown=0.5), shape, Case())


def test_a_and_b_are_peft_s(root):
    """What `scores` reads is what trains."""
    live = live_of(root)
    for name, layer in lora_layers(live.attached.model).items():
        of_a, of_b = names_of(name)
        assert live.engine.parameters[of_a] is down(layer).weight
        assert live.engine.parameters[of_b] is up(layer).weight
