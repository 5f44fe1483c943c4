"""Operations on adapters against explicit sums in float64, and one through its whole attempt."""

import dataclasses
import hashlib
import json

import pytest
import torch
from peft import PeftModel, get_peft_model
from peft.tuners.lora import convert_to_lora
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from peft_service import adapter, artifact, base_model, updates
from peft_service.errors import InvalidRequest, RunFailed
from peft_service.methods import Case
from peft_service.methods.lora import LoRA
from peft_service.operate import OperationInput, operate
from peft_service.operations import Described, Work
from peft_service.operations.combine import Combine
from peft_service.operations.convert import Convert
from peft_service.operations.merge import Merge
from peft_service.operations.truncate import Truncate
from peft_service.operations.unmerge import Unmerge
from peft_service.run import run_locally
from peft_service.spec import Base, OperationSpec, Source
from tests.peft_service.runs import a_run
from tests.tiny import save_tiny_base

TOKENS = torch.arange(24).reshape(2, 12) + 20


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_tiny_base(tmp_path_factory.mktemp("base"))


def plain(base):
    return AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()


def made(base, directory, config, seed=0):
    """An adapter of this peft config with random values everywhere, saved."""
    torch.manual_seed(seed)
    model = get_peft_model(plain(base), config)
    with torch.no_grad():
        for _name, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape) * 0.1)
    model.save_pretrained(directory)
    artifact.write_task(directory, "causal_lm", ())
    return directory


def lora(base, directory, seed=0, **options):
    from peft import LoraConfig

    settings = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "down_proj"], "task_type": "CAUSAL_LM"}
    return made(base, directory, LoraConfig(**settings | options), seed)


def work(base, out, *sources, quantize=None):
    out.mkdir(parents=True, exist_ok=True)
    return Work(base, "tiny/llama", None, quantize, "causal_lm", (), tuple(sources), out)


def logits(model):
    with torch.no_grad():
        return model(TOKENS).logits


def on_base(base, directory):
    return logits(PeftModel.from_pretrained(plain(base), directory).eval())


def deltas(base, directory):
    """Layer -> ΔW in float64 by the formula, from the file alone."""
    config = json.loads((directory / "adapter_config.json").read_text())
    file = load_file(directory / "adapter_model.safetensors")
    found = {}
    for name in file:
        if name.endswith("lora_A.weight"):
            layer = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            a, b = file[name].double(), file[name.replace("lora_A", "lora_B")].double()
            alpha = (config.get("alpha_pattern") or {}).get(layer, config["lora_alpha"])
            size = len(a) ** 0.5 if config["use_rslora"] else len(a)
            found[layer] = alpha / size * b @ a
    return found


def apart(found, expected):
    assert found.keys() == expected.keys()
    error = sum(float((found[name] - expected[name]).norm()) ** 2 for name in expected) ** 0.5
    return error / sum(float(value.norm()) ** 2 for value in expected.values()) ** 0.5


def digest(directory):
    return hashlib.sha256(
        b"".join(path.read_bytes() for path in sorted(directory.glob("*.safetensors")))
    ).hexdigest()


def described(directory, method="lora", operation=None, sources=()):
    record = {
        "spec": {
            "method": {"kind": method},
            "operation": operation,
            "sources": list(sources),
        }
    }
    path = directory / "adapter_config.json"
    return Described(f"{directory.name}@1", record, json.loads(path.read_text()) if path.exists() else None)


# ----------------------------------------------------------------------------------------------------- merge


def configs():
    import peft

    targets = ["q_proj", "down_proj"]
    return {
        "lora": peft.LoraConfig(r=4, lora_alpha=8, target_modules=targets, task_type="CAUSAL_LM"),
        "dora": peft.LoraConfig(r=4, target_modules=targets, use_dora=True, task_type="CAUSAL_LM"),
        "vera": peft.VeraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM"),
        "loha": peft.LoHaConfig(r=2, target_modules=targets, task_type="CAUSAL_LM"),
        "lokr": peft.LoKrConfig(r=4, target_modules=targets, task_type="CAUSAL_LM"),
        "ia3": peft.IA3Config(
            target_modules=targets, feedforward_modules=["down_proj"], task_type="CAUSAL_LM"
        ),
        "oft": peft.OFTConfig(oft_block_size=8, target_modules=["q_proj"], task_type="CAUSAL_LM"),
    }


@pytest.mark.parametrize("kind", ["lora", "dora", "vera", "loha", "lokr", "ia3", "oft"])
def test_a_merged_model_is_base_and_adapter_and_needs_no_peft(base, tmp_path, kind):
    source = made(base, tmp_path / "a", configs()[kind])
    before = digest(base), digest(source)
    done = Merge().run(work(base, tmp_path / "out", source))
    merged = plain(tmp_path / "out")
    assert not any("lora" in name or "base_layer" in name for name, _ in merged.named_modules())
    expected = on_base(base, source)
    scale = max(1.0, float(expected.abs().max()))
    assert float((logits(merged) - expected).abs().max()) / scale <= 1e-5
    assert float((logits(merged) - logits(plain(base))).abs().max()) > 1e-2
    assert done.facts["merge_error"] <= 1e-5
    assert (digest(base), digest(source)) == before


def test_a_merge_in_bf16_says_what_rounding_costs(base, tmp_path):
    source = lora(base, tmp_path / "a")
    done = Merge(dtype="bf16").run(work(base, tmp_path / "out", source))
    assert {tensor.dtype for tensor in load_file(tmp_path / "out" / "model.safetensors").values()} == {
        torch.bfloat16
    }
    assert done.facts["merge_error"] <= 1e-5 < done.facts["rounding_error"] < 0.1
    # Whoever loads it gets the answers that are told: rotary positions are not rounded.
    with torch.no_grad():
        again = plain(tmp_path / "out")(**done.inputs).logits
    torch.testing.assert_close(again, done.outputs["logits"], rtol=1e-5, atol=1e-5)
    back = Unmerge().run(work(base, tmp_path / "back", tmp_path / "out", source))
    assert back.facts["unmerge_error"] == pytest.approx(done.facts["rounding_error"], rel=0.01)
    other = lora(base, tmp_path / "b", seed=1)
    with pytest.raises(RunFailed, match="not what they were merged into"):
        Unmerge().run(work(base, tmp_path / "wrong", tmp_path / "out", other))


def attached(base, directory, method, **case):
    """The artifact of one of our methods with random values in all that trains."""
    from peft_service.methods import Material

    made = method.attach(base_model.load(base, precision="fp32"), Case(**case), Material())
    torch.manual_seed(7)
    with torch.no_grad():
        values = {
            name: parameter.detach() + torch.randn(parameter.shape) * 0.1
            for name, parameter in made.model.named_parameters()
            if parameter.requires_grad
        }
    directory.mkdir()
    made.save(values, directory, ("tiny/llama", None))
    artifact.write_task(directory, "causal_lm", ())
    return directory


@pytest.mark.parametrize("merged", [False, True])
def test_a_quantised_base_of_qa_lora_is_written_out_as_plain_weights(base, tmp_path, merged):
    from peft_service.methods.qa_lora import QALoRA

    source = attached(base, tmp_path / "a", QALoRA(rank=4, alpha=8, group=8, merged=merged))
    done = Merge().run(work(base, tmp_path / "out", source))
    expected = logits(artifact.load(plain(base), source))
    assert float((logits(plain(tmp_path / "out")) - expected).abs().max()) <= 1e-4
    assert done.facts["merge_error"] <= 1e-5


def test_a_longer_context_goes_into_what_is_merged(base, tmp_path):
    from peft_service.methods.longlora import LongLoRA

    length = 2 * json.loads((base / "config.json").read_text())["max_position_embeddings"]
    source = attached(base, tmp_path / "a", LongLoRA(rank=4, alpha=8), max_seq_len=length)
    assert json.loads((source / artifact.COMPOSITE).read_text())["rope"]
    done = Merge().run(work(base, tmp_path / "out", source))
    assert done.facts["merge_error"] <= 1e-5
    expected = logits(artifact.load(plain(base), source))
    torch.testing.assert_close(logits(plain(tmp_path / "out")), expected, rtol=1e-5, atol=1e-4)


def test_what_trains_besides_the_updates_is_never_left_behind_in_silence(base, tmp_path):
    """LongLoRA within the base's own context is a LoRA with embeddings and norms, which no LoRA can hold."""
    from peft_service.methods.longlora import LongLoRA

    source = described(attached(base, tmp_path / "a", LongLoRA(rank=4, alpha=8), max_seq_len=64), "longlora")
    assert source.ranks == (4,)
    for operation in (Convert(), Truncate(rank=2), Combine()):
        with pytest.raises(InvalidRequest, match=r"embed_tokens.*besides its updates.*merge it"):
            operation.check([source])


def test_an_adapter_of_a_4_bit_base_is_merged_into_the_weights_it_was_made_from(base, tmp_path):
    source = lora(base, tmp_path / "a")
    done = Merge().run(work(base, tmp_path / "out", source, quantize="nf4"))
    merged, original = (
        load_file(tmp_path / "out" / "model.safetensors"),
        load_file(base / "model.safetensors"),
    )
    for name, change in deltas(base, source).items():
        expected = original[f"{name}.weight"].double() + change
        torch.testing.assert_close(merged[f"{name}.weight"].double(), expected, rtol=0, atol=1e-6)
    untouched = "model.layers.0.self_attn.k_proj.weight"
    assert torch.equal(merged[untouched], original[untouched])
    assert done.facts["merge_error"] <= 1e-5
    # A share of the largest logit: of random weights in 4 bits it is large, and on another processor another;
    # two sets of logits are never further apart than twice the largest.
    assert 1e-3 < done.facts["quantised_base_difference"] < 2


def test_a_delta_is_merged_by_being_applied(base, tmp_path):
    from peft_service import delta

    weight = load_file(base / "model.safetensors")["model.layers.1.mlp.up_proj.weight"] * 1.5
    delta.save(delta.Delta({"model.layers.1.mlp.up_proj.weight": weight}), tmp_path / "a")
    Merge().run(work(base, tmp_path / "out", tmp_path / "a"))
    assert torch.equal(
        load_file(tmp_path / "out" / "model.safetensors")["model.layers.1.mlp.up_proj.weight"], weight
    )


def test_what_is_no_change_of_weights_is_not_merged(base, tmp_path):
    from peft import PromptTuningConfig

    source = made(base, tmp_path / "a", PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"))
    with pytest.raises(RunFailed, match="cannot be merged") as caught:
        Merge().run(work(base, tmp_path / "out", source))
    assert caught.value.code == "not_mergeable"


def test_unmerging_gives_the_adapter_back_bit_for_bit_and_checks_that_it_is_the_one(base, tmp_path):
    source, other = lora(base, tmp_path / "a"), lora(base, tmp_path / "b", seed=1)
    whole = tmp_path / "whole"
    Merge().run(work(base, whole, source))
    done = Unmerge().run(work(base, tmp_path / "out", whole, source))
    assert digest(tmp_path / "out") == digest(source)
    assert done.facts["unmerge_error"] <= 1e-5
    with pytest.raises(RunFailed, match="not what they were merged into"):
        Unmerge().run(work(base, tmp_path / "wrong", whole, other))
    with pytest.raises(InvalidRequest, match="was not made by merging"):
        Unmerge().check([described(source)])
    record = described(source, "full", {"kind": "merge"}, [{"id": "adapter_7"}])
    Unmerge().check([record])
    assert Unmerge().also([record]) == ("adapter_7",)


# --------------------------------------------------------------------------------------------------- combine


@pytest.fixture(scope="module")
def pair(base, tmp_path_factory):
    """Two of one rank that adapt different layers, one of them with rsLoRA."""
    directory = tmp_path_factory.mktemp("pair")
    return (
        lora(base, directory / "a", 1, use_rslora=True),
        lora(base, directory / "b", 2, target_modules=["q_proj", "v_proj"]),
    )


def weighted(base, pair, weights):
    total = {}
    for weight, directory in zip(weights, pair, strict=True):
        for name, change in deltas(base, directory).items():
            total[name] = total.get(name, 0) + weight * change
    return total


@pytest.mark.parametrize("weights", [(0.7, 0.5), (1.0, -0.4)])
@pytest.mark.parametrize("how", ["cat", "svd"])
def test_the_exact_ways_are_the_weighted_sum(base, pair, tmp_path, how, weights):
    done = Combine(how=how, weights=weights).run(work(base, tmp_path, *pair))
    expected = weighted(base, pair, weights)
    assert apart(deltas(base, tmp_path), expected) <= 1e-6
    model = updates.added(plain(base), expected)
    assert float((on_base(base, tmp_path) - logits(model)).abs().max()) <= 1e-5 * float(
        logits(model).abs().max()
    )
    assert done.facts["update_error"] <= 1e-6
    assert done.facts["logits_error"] <= 1e-5


def test_a_smaller_svd_is_the_nearest_of_its_rank(base, pair, tmp_path):
    done = Combine(how="svd", weights=(1.0, 1.0), rank=3).run(work(base, tmp_path, *pair))
    expected, found = weighted(base, pair, (1.0, 1.0)), deltas(base, tmp_path)
    for name, change in expected.items():
        left_out = torch.linalg.svdvals(change)[3:].norm()
        torch.testing.assert_close((change - found[name]).norm(), left_out, rtol=1e-4, atol=1e-6)
    measured = apart(found, expected)
    assert done.facts["update_error"] == pytest.approx(measured, rel=1e-3)
    assert measured > 0.1


def test_an_svd_of_a_larger_rank_than_some_layer_has_is_still_of_one_rank_for_servers(base, pair, tmp_path):
    Combine(how="svd", weights=(1.0, 1.0), rank=24).run(work(base, tmp_path, *pair))  # v_proj has 16
    assert apart(deltas(base, tmp_path), weighted(base, pair, (1.0, 1.0))) <= 1e-6
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["r"], config["rank_pattern"]) == (24, {})
    assert adapter.compatibility_of(config, LoRA())["vllm"]["ok"]
    on_base(base, tmp_path)


def test_linear_is_not_the_sum_and_says_by_how_much(base, pair, tmp_path):
    done = Combine(how="linear", weights=(0.5, 0.5)).run(work(base, tmp_path, *pair))
    measured = apart(deltas(base, tmp_path), weighted(base, pair, (0.5, 0.5)))
    assert done.facts["update_error"] == pytest.approx(measured, rel=1e-3)
    assert measured > 0.1
    assert not Combine.ways["linear"][0]
    assert Combine.ways["cat"][0]


@pytest.mark.parametrize("how", ["cat", "svd", "linear"])
def test_one_adapter_with_weight_1_is_itself(base, pair, tmp_path, how):
    for number, source in enumerate(pair):
        done = Combine(how=how, weights=(1.0,)).run(work(base, tmp_path / str(number), source))
        assert apart(deltas(base, tmp_path / str(number)), deltas(base, source)) <= 1e-6
        assert done.facts["update_error"] <= 1e-6


def test_ties_is_the_papers_trim_elect_and_disjoint_mean(base, pair, tmp_path):
    Combine(how="ties_svd", weights=(1.0, 1.0), density=0.3, rank=32).run(work(base, tmp_path, *pair))
    parts = [deltas(base, directory) for directory in pair]
    for name, found in deltas(base, tmp_path).items():
        trimmed = []
        for part in parts:
            if name in part:
                least = (
                    part[name].abs().flatten().sort(descending=True).values[int(0.3 * part[name].numel()) - 1]
                )
                trimmed.append(torch.where(part[name].abs() >= least, part[name], 0))
        stacked = torch.stack(trimmed)
        elected = torch.where(stacked.sum(0) >= 0, 1, -1)
        agree = stacked.sign() == elected
        expected = (stacked * agree).sum(0) / agree.sum(0).clamp(min=1)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_dare_is_the_same_for_the_same_seed_and_keeps_the_generator(base, pair, tmp_path):
    def run(seed, place):
        way = Combine(how="dare_linear", density=0.5, seed=seed)
        torch.manual_seed(5)
        way.run(work(base, tmp_path / place, *pair))
        return digest(tmp_path / place), torch.rand(1).item()

    first = run(0, "x")
    assert run(0, "y") == first
    assert run(1, "z")[0] != first[0]


@pytest.mark.parametrize("how", sorted(Combine.ways))
def test_every_way_is_what_peft_makes_of_the_same_adapters(base, tmp_path, how):
    """Loaded and combined by peft alone, with the same draw."""
    sources = [lora(base, tmp_path / str(n), n, lora_alpha=8 + 4 * n) for n in range(3)]
    weights, prunes = (0.9, 0.4, 0.6), how.startswith(("ties", "dare", "magnitude"))
    way = Combine(how=how, weights=weights, density=0.6 if prunes else None, seed=3)
    done = way.run(work(base, tmp_path / "out", *sources))
    oracle = PeftModel.from_pretrained(plain(base), sources[0], "0")
    for number in (1, 2):
        oracle.load_adapter(sources[number], str(number))
    torch.manual_seed(3)
    oracle.add_weighted_adapter(
        ["0", "1", "2"], list(weights), "all", combination_type=how, density=0.6 if prunes else None,
        svd_rank=12 if how.endswith("svd") else None,
    )  # fmt: skip
    oracle.set_adapter("all")
    expected = logits(oracle.eval())
    found = on_base(base, tmp_path / "out")
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    measured = apart(deltas(base, tmp_path / "out"), weighted(base, sources, weights))
    assert done.facts["update_error"] == pytest.approx(measured, rel=1e-3, abs=1e-6)
    assert (measured <= 1e-6) == Combine.ways[how][0]


def test_pruning_by_magnitude_is_the_sum_of_the_largest_values(base, pair, tmp_path):
    Combine(how="magnitude_prune_svd", weights=(0.7, 0.5), density=0.3).run(work(base, tmp_path, *pair))
    found, expected = deltas(base, tmp_path), {}
    for weight, directory in zip((0.7, 0.5), pair, strict=True):
        for name, change in deltas(base, directory).items():
            kept = change.abs().flatten().sort(descending=True).values[int(0.3 * change.numel()) - 1]
            pruned = torch.where(change.abs() >= kept, change, 0)
            expected[name] = expected.get(name, 0) + weight * pruned
    for name, change in expected.items():
        a, b = torch.linalg.svd(change)[1], found[name]
        left_out = a[8:].norm()  # ranks 4 and 4 is what the result has
        torch.testing.assert_close((change - b).norm(), left_out, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("how", sorted(set(Combine.ways) - {"cat", "svd", "linear"}))
def test_every_pruning_way_gives_an_adapter_that_loads(base, pair, tmp_path, how):
    done = Combine(how=how, density=0.5).run(work(base, tmp_path, *pair))
    assert torch.isfinite(on_base(base, tmp_path)).all()
    assert 0.01 < done.facts["update_error"] < 10


def test_what_cannot_be_combined_is_refused_with_what_can(base, pair, tmp_path):
    a, b = (described(directory) for directory in pair)
    big = described(lora(base, tmp_path / "big", r=8))
    vera = described(made(base, tmp_path / "vera", configs()["vera"]), "vera")
    dora = described(made(base, tmp_path / "dora", configs()["dora"]), "dora")
    for way, sources, words in [
        (Combine(), [a, vera], "no LoRA but a vera.*convert"),
        (Combine(), [a, dora], "is a DoRA"),
        (Combine(weights=(1.0,)), [a, b], "1 weights for 2 adapters"),
        (Combine(how="ties"), [a, b], "needs density"),
        (Combine(density=0.5), [a, b], "keeps all values"),
        (Combine(how="linear"), [a, big], "one rank.*4.*8.*cat and the ways"),
        (Combine(rank=2), [a, b], "rank is for the ways that end in svd"),
        (Combine(how="ties", density=0.5), [a], "prunes nothing"),
        (Combine(how="svd", rank=2), [a], "truncate"),
        (Combine(weights=(0.0, 0.0)), [a, b], "all weights are 0"),
    ]:
        with pytest.raises(InvalidRequest, match=words):
            way.check(sources)
    Combine().check([a, b])
    assert Combine().makes([a, big]).rank == 12


# ---------------------------------------------------------------------------------------- convert, truncate


@pytest.mark.parametrize("kind", ["vera", "loha", "lokr"])
def test_converting_agrees_with_peft(base, tmp_path, kind):
    source = made(base, tmp_path / "a", configs()[kind])
    done = Convert(rank=4, max_error=1).run(work(base, tmp_path / "out", source))
    _, told = convert_to_lora(PeftModel.from_pretrained(plain(base), source), rank=4)
    found = deltas(base, tmp_path / "out")
    for name, change in found.items():
        key = f"base_model.model.{name}"
        theirs = told[f"{key}.lora_B.weight"].double() @ told[f"{key}.lora_A.weight"].double()
        torch.testing.assert_close(change, theirs, rtol=0, atol=1e-5)
    measured = float((on_base(base, tmp_path / "out") - on_base(base, source)).abs().max())
    assert (done.facts["logits_error"] < 1e-5) == (measured < 1e-4)


@pytest.mark.parametrize("kind", ["vera", "dora", "ia3", "oft"])
def test_converting_at_full_rank_is_the_adapter(base, tmp_path, kind):
    source = made(base, tmp_path / "a", configs()[kind])
    done = Convert(rank=64, max_error=1e-4).run(work(base, tmp_path / "out", source))
    expected = on_base(base, source)
    assert float((on_base(base, tmp_path / "out") - expected).abs().max()) <= 1e-4 * float(
        expected.abs().max()
    )
    assert done.facts["update_error"] <= 1e-6
    assert done.facts["worst_layer_error"] <= 1e-6


def test_a_conversion_above_the_limit_fails_and_names_the_rank_that_would_do(base, tmp_path):
    source = made(base, tmp_path / "a", configs()["oft"])
    with pytest.raises(RunFailed, match=r"rank 2 loses 0\.\d+.*rank (\d+) is enough") as caught:
        Convert(rank=2, max_error=0.1).run(work(base, tmp_path / "out", source))
    assert caught.value.code == "conversion_error_too_large"
    assert not list((tmp_path / "out").iterdir())
    enough = int(caught.value.message.split("; rank ")[1].split()[0])
    done = Convert(rank=enough, max_error=0.1).run(work(base, tmp_path / "enough", source))
    assert 0 < done.facts["update_error"] <= 0.1
    with pytest.raises(RunFailed):
        Convert(rank=enough - 1, max_error=0.1).run(work(base, tmp_path / "less", source))


def test_what_no_lora_can_be_is_refused(base, tmp_path):
    from peft import LNTuningConfig, PromptTuningConfig

    norm = made(
        base, tmp_path / "ln", LNTuningConfig(target_modules=["input_layernorm"], task_type="CAUSAL_LM")
    )
    prompt = made(base, tmp_path / "p", PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"))
    for source, words in [(norm, "no linear layer"), (prompt, "changes no layer")]:
        with pytest.raises(RunFailed, match=words) as caught:
            Convert(max_error=1).run(work(base, tmp_path / "out", source))
        assert caught.value.code == "not_convertible"


def test_truncating_to_the_first_b_is_what_dylora_computes(base, tmp_path):
    source = lora(base, tmp_path / "a")  # alpha 8, rank 4
    Truncate(rank=2, how="first").run(work(base, tmp_path / "out", source))
    file = load_file(source / "adapter_model.safetensors")
    for name, found in deltas(base, tmp_path / "out").items():
        key = f"base_model.model.{name}"
        a, b = file[f"{key}.lora_A.weight"].double(), file[f"{key}.lora_B.weight"].double()
        torch.testing.assert_close(found, 8 / 2 * b[:, :2] @ a[:2], rtol=0, atol=1e-7)


def test_truncating_by_svd_is_the_nearest_and_the_whole_rank_is_itself(base, tmp_path):
    source = lora(base, tmp_path / "a")
    done = Truncate(rank=2).run(work(base, tmp_path / "out", source))
    whole, found = deltas(base, source), deltas(base, tmp_path / "out")
    for name, change in whole.items():
        torch.testing.assert_close((change - found[name]).norm(), torch.linalg.svdvals(change)[2:].norm())
    assert done.facts["update_error"] == pytest.approx(apart(found, whole), rel=1e-3)
    for how in ("first", "svd"):
        Truncate(rank=4, how=how).run(work(base, tmp_path / how, source))
        assert apart(deltas(base, tmp_path / how), whole) <= 1e-6
    scaled = lora(base, tmp_path / "rs", use_rslora=True)
    Truncate(rank=4, how="first").run(work(base, tmp_path / "same", scaled))
    assert apart(deltas(base, tmp_path / "same"), deltas(base, scaled)) <= 1e-6
    Truncate(rank=2, how="first").run(work(base, tmp_path / "half", scaled))
    file = load_file(scaled / "adapter_model.safetensors")
    for name, value in deltas(base, tmp_path / "half").items():
        a, b = (file[f"base_model.model.{name}.lora_{part}.weight"].double() for part in "AB")
        torch.testing.assert_close(value, 8 / 2**0.5 * b[:, :2] @ a[:2], rtol=0, atol=1e-6)
    with pytest.raises(InvalidRequest, match="no rank 5"):
        Truncate(rank=5).check([described(source)])


def test_a_dylora_cut_to_b_is_the_one_that_it_would_have_served(base, tmp_path):
    from peft_service.methods import Material
    from peft_service.methods.dylora import DyLoRA

    def saved(place, **more):
        """The artifact of the same values, with another serve_rank."""
        attached = DyLoRA(rank=4, alpha=8, **more).attach(
            base_model.load(base, precision="fp32"), Case(), Material()
        )
        torch.manual_seed(0)
        values = {
            n: torch.randn(p.shape) * 0.1 for n, p in attached.model.named_parameters() if p.requires_grad
        }
        place.mkdir()
        attached.save(values, place, ("tiny/llama", None))
        return place

    Truncate(rank=2, how="first").run(work(base, tmp_path / "out", saved(tmp_path / "whole")))
    expected = deltas(base, saved(tmp_path / "served", serve_rank=2))
    found = deltas(base, tmp_path / "out")
    assert found.keys() == expected.keys()
    assert apart(found, expected) <= 1e-6


def test_a_head_goes_with_what_is_merged_converted_or_truncated(base, tmp_path):
    from peft import LoraConfig

    labels = ("x", "y", "z")
    model = base_model.load(base, precision="fp32", task="sequence_classification", labels=labels, seed=1)
    config = LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["score"], task_type="SEQ_CLS")
    adapted = get_peft_model(model, config)
    torch.manual_seed(3)
    for _name, parameter in adapted.named_parameters():
        if parameter.requires_grad:
            parameter.data.normal_(std=0.2)
    source = tmp_path / "a"
    adapted.save_pretrained(source)
    artifact.write_task(source, "sequence_classification", labels)
    with torch.no_grad():
        expected = adapted.eval()(TOKENS).logits
    for operation in (Merge(), Convert(rank=4), Truncate(rank=4), Truncate(rank=4, how="first")):
        out = tmp_path / f"{operation.kind}-{getattr(operation, 'how', '')}"
        place = work(base, out, source)
        place = dataclasses.replace(place, task="sequence_classification", labels=labels)
        operation.run(place)
        if operation.kind == "merge":
            made = artifact.load_base(out, place.task, labels, dtype=torch.float32)
            assert made.config.id2label == {0: "x", 1: "y", 2: "z"}
        else:
            made = artifact.load(updates.base_of(place), out)
        made.config.pad_token_id = adapted.config.pad_token_id
        with torch.no_grad():
            torch.testing.assert_close(made.eval()(TOKENS).logits, expected, rtol=0, atol=1e-5)


# -------------------------------------------------------------------------------------------------- switching


def test_switching_is_bit_identical_and_never_touches_the_base(base, pair):
    model = PeftModel.from_pretrained(plain(base), pair[0], "a").eval()
    model.load_adapter(pair[1], "b")

    def frozen():
        state = {n: p for n, p in model.named_parameters() if "lora_" not in n}
        return hashlib.sha256(
            b"".join(p.detach().numpy().tobytes() for _, p in sorted(state.items()))
        ).digest()

    before, first = frozen(), logits(model)
    model.set_adapter("b")
    other = logits(model)
    model.set_adapter("a")
    assert torch.equal(logits(model), first)
    assert not torch.equal(first, other)
    for _ in range(500):
        model.set_adapter("b")
        model.set_adapter("a")
    assert frozen() == before
    assert torch.equal(logits(model), first)
    assert torch.equal(first, on_base(base, pair[0]))
    assert torch.equal(other, on_base(base, pair[1]))


def test_a_batch_of_rows_of_several_loras_is_each_row_alone(base, pair):
    model = PeftModel.from_pretrained(plain(base), pair[0], "a").eval()
    model.load_adapter(pair[1], "b")
    rows = TOKENS.repeat(2, 1)[:3]
    with torch.no_grad():
        mixed = model(rows, adapter_names=["a", "b", "__base__"]).logits
        alone = [logits(plain(base)), on_base(base, pair[1]), on_base(base, pair[0])]
    for row, expected in enumerate((alone[2][0], alone[1][1], alone[0][0])):
        torch.testing.assert_close(mixed[row], expected, rtol=1e-5, atol=1e-5)


# ------------------------------------------------------------------------------------- the attempt as a whole


@pytest.fixture(scope="module")
def published(base, tmp_path_factory):
    """(store, Source): a LoRA that was really trained and published."""
    directory = tmp_path_factory.mktemp("trained")
    run, store = a_run(directory, base, learning_rate=1e-2)
    outcome = run_locally(run, store, directory / "work")
    assert outcome.state == "succeeded"
    return store, _publish(store, run, outcome, "small", 1)


def _publish(store, run, outcome, name, number):
    key = f"p/adapters/tiny--llama/{name}-v0001-{number}"
    record = {
        "id": f"adapter_{number}", "project": "p", "name": name, "version": 1, "model": "m", "job": run.job,
        "attempt": 1, "created_at": 1.0, "spec": run.spec.model_dump(mode="json"), "plan": None,
        "step": outcome.step, "trained_tokens": outcome.trained_tokens, "metrics": outcome.metrics,
    }  # fmt: skip
    manifest = adapter.publish(store, f"{run.prefix}/adapter", key, record)
    adapter.verify(store, key)
    weights = [file["sha256"] for file in manifest["files"] if file["path"].endswith(".safetensors")]
    return Source(
        reference=f"{name}@1", id=f"adapter_{number}", key=key, digest=weights[0], method=run.spec.method.kind
    )


def attempt(base, operation, method, *sources, name="result"):
    spec = OperationSpec(
        name=name,
        base=Base(id="tiny/llama", uri=f"file://{base}", digest=base_model.digest_of_directory(base)),
        method=method,
        sources=sources,
        operation=operation,
    )
    return OperationInput(job=name, attempt=1, project="p", spec=spec)


def test_a_merge_and_its_unmerge_from_the_store_to_the_store(base, published, tmp_path):
    from peft_service.methods.full import Full

    store, source = published
    run = attempt(base, Merge(), Full(), source, name="whole")
    outcome = operate(run, store, tmp_path / "merge")
    assert (outcome.state, outcome.error) == ("succeeded", None)
    whole = _publish(store, run, outcome, "whole", 2)
    manifest = json.loads(store.get(f"{whole.key}/manifest.json"))
    assert [check["name"] for check in manifest["gate"]] == [
        "finite",
        "nonzero",
        "shapes_and_count",
        "logits_equal",
    ]
    assert manifest["record"]["spec"]["sources"][0]["digest"] == source.digest
    assert manifest["record"]["spec"]["operation"] == {"kind": "merge", "dtype": "fp32"}
    assert manifest["record"]["metrics"]["merge_error"] <= 1e-5
    assert manifest["compatibility"]["peft"]["ok"] is False
    paths = {file["path"] for file in manifest["files"]}
    assert {"model.safetensors", "config.json", "tokenizer.json", "task.json", "chat_template.jinja"} <= paths
    assert "adapter_config.json" not in paths
    card = store.get(f"{whole.key}/README.md").decode()
    assert source.id in card
    assert "merge_error" in card

    back = attempt(base, Unmerge(), LoRA(rank=4), whole, source, name="back")
    outcome = operate(back, store, tmp_path / "unmerge")
    again = _publish(store, back, outcome, "back", 3)
    assert again.digest == source.digest, "the same bytes"


def test_a_conversion_above_its_limit_publishes_nothing(base, published, tmp_path):

    store, source = published
    run = attempt(base, Convert(rank=1, max_error=0.01), LoRA(rank=1), source, name="lossy")
    outcome = operate(run, store, tmp_path)
    assert (outcome.state, outcome.error["code"]) == ("failed", "conversion_error_too_large")
    assert "loses 0." in outcome.error["message"]
    assert not list(store.list(f"{run.prefix}/adapter"))


def test_a_changed_base_is_no_base_of_the_adapter(base, published, tmp_path):
    from peft_service.methods.full import Full

    store, source = published
    run = attempt(base, Merge(), Full(), source, name="other")
    changed = run.spec.base.model_copy(update={"digest": "0" * 64})
    run = run.model_copy(update={"spec": run.spec.model_copy(update={"base": changed})})
    assert operate(run, store, tmp_path).error["code"] == "base_changed"
