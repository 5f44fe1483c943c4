"""Poly: a task of one skill is that LoRA, mixed tasks are single ones, a draw depends on the step alone."""

import pytest
import torch
from peft import LoraConfig, get_peft_model

from peft_service import artifact, methods
from peft_service.errors import InvalidRequest
from peft_service.methods.poly import Poly
from peft_service.tuners.poly import StepRouter, drawn
from tests.methods.checks import Live, Trial, case_of, directory_of, shape_of

SMALL = Poly(rank=4, skills=3, splits=1, targets=("q_proj", "v_proj", "down_proj"))


def stirred(root, method=SMALL, base="llama", task="causal_lm", **options):
    """Some steps in, so that no B is zero."""
    live = Live(Trial(method, base, task), root, rate=0.05, **options)
    for step in range(2):
        live.step(step)
    return live


def said(model, batch, tasks):
    model.eval()
    with torch.no_grad():
        return model(**batch.inputs | {"task_ids": torch.tensor(tasks)}).logits


@pytest.mark.parametrize("skill", [0, 2])
def test_a_task_that_has_one_skill_is_that_lora(root, skill):
    live = stirred(root)
    for router in live.attached.routers:
        router.module_logits.data[1] = -60.0
        router.module_logits.data[1, skill] = 60.0
    base = artifact.load_base(directory_of("llama", root), "causal_lm", dtype=torch.float32)
    config = LoraConfig(r=4, lora_alpha=1, target_modules=list(SMALL.targets))
    lora = get_peft_model(base, config)
    for name, layer in live.attached.model.named_modules():
        if hasattr(layer, "poly_lora_A"):
            theirs = lora.get_submodule(name)
            theirs.lora_A["default"].weight.data.copy_(layer.poly_lora_A["default"][0, skill].T)
            theirs.lora_B["default"].weight.data.copy_(layer.poly_lora_B["default"][0, skill].T)
    batch = live.batch(range(4))
    with torch.no_grad():
        wanted = lora.eval()(**batch.inputs).logits
    found = said(live.attached.model, batch, [1, 1, 1, 1])
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    assert (found - said(live.attached.model, batch, [0, 0, 0, 0])).abs().max() > 1e-3


def test_one_skill_is_a_lora_of_scale_one_by_rank_whatever_the_logits(root):
    """S = 1: w = z / z, but for peft's 1e-12; evaluated twice it is the same, and training draws nothing."""
    live = stirred(root, Poly(rank=4, skills=1, splits=1, targets=SMALL.targets))
    base = artifact.load_base(directory_of("llama", root), "causal_lm", dtype=torch.float32)
    with torch.no_grad():
        for name, layer in live.attached.model.named_modules():
            if hasattr(layer, "poly_lora_A"):
                a, b = (getattr(layer, f"poly_lora_{part}")["default"][0, 0].double() for part in "AB")
                weight = base.get_submodule(name.removeprefix("base_model.model.")).weight
                weight.copy_(weight.double() + (a @ b).T / 4)
        batch = live.batch(range(4))
        wanted = base.eval()(**batch.inputs).logits
    found = said(live.attached.model, batch, [0, 1, 0, 1])
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=2e-5)
    assert torch.equal(found, said(live.attached.model, batch, [0, 1, 0, 1]))


@pytest.mark.parametrize(("base", "task"), [("llama", "causal_lm"), ("bert", "sequence_classification")])
def test_a_batch_of_mixed_tasks_is_the_rows_of_single_tasks(root, base, task):
    live = stirred(root, Poly(rank=4, skills=3, splits=2), base, task)
    batch, order = live.batch(range(4)), [1, 0, 0, 1]
    for router in live.attached.routers:
        router.module_logits.data += torch.tensor([[3.0], [-3.0]]) * torch.arange(6)
    mixed = said(live.attached.model, batch, order)
    for row, number in enumerate(order):
        alone = said(live.attached.model, batch, [number] * 4)
        torch.testing.assert_close(alone[row], mixed[row], rtol=1e-5, atol=1e-5)
    assert (mixed - said(live.attached.model, batch, [1 - task for task in order])).abs().max() > 1e-3


def test_the_draw_is_a_relaxed_bernoulli_variable():
    logits = torch.tensor([[-1.5, 0.0, 2.0]])
    ours = torch.sigmoid(logits + torch.stack([drawn(0, step, 0, (1, 3)) for step in range(4000)]).logit())
    torch.manual_seed(0)
    law = torch.distributions.RelaxedBernoulli(torch.tensor(1.0), logits=logits)
    theirs = law.sample((20000,))
    quantiles = torch.tensor([0.1, 0.25, 0.5, 0.75, 0.9])
    for place in range(3):
        torch.testing.assert_close(
            ours[:, 0, place].quantile(quantiles), theirs[:, 0, place].quantile(quantiles), rtol=0, atol=0.03
        )
    assert len({float(drawn(0, 1, layer, (1, 1))) for layer in range(20)}) == 20


def test_a_steps_gradient_does_not_depend_on_the_microbatches(root):
    """Nor does the noise on any running generator."""
    live = stirred(root)
    live.attached.before_step(7)
    gradients = []
    for parts in ([range(4)], [[0], [1], [2], [3]]):
        torch.manual_seed(len(parts))
        for rows in parts:
            batch = live.batch(rows)
            batch.extra = live.attached.inputs(batch)
            live.objective.loss_sum(live.engine.model.train(), batch)[0].backward()
        gradients.append({name: p.grad.clone() for name, p in live.engine.parameters.items()})
        live.engine.model.zero_grad()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-4, atol=1e-5, msg=name)
    before = live.attached.routers[0].uniform
    live.attached.before_step(8)
    assert not torch.equal(before, live.attached.routers[0].uniform)


def test_gradient_checkpointing_replays_with_the_tasks(root):
    gradients = []
    for checkpointed in (False, True):
        live = stirred(root)
        if checkpointed:
            live.attached.model.gradient_checkpointing_enable({"use_reentrant": False})
            live.attached.model.enable_input_require_grads()
        live.attached.before_step(3)
        batch = live.batch(range(4))
        batch.extra = live.attached.inputs(batch)
        live.objective.loss_sum(live.engine.model.train(), batch)[0].backward()
        gradients.append({name: p.grad for name, p in live.engine.parameters.items()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-5, atol=1e-7, msg=name)


def test_the_file_is_pefts_own_and_generates_by_task(root, tmp_path):
    live = stirred(root)
    base = artifact.load_base(directory_of("llama", root), "causal_lm", dtype=torch.float32)
    loaded = artifact.load(base, live.save(tmp_path / "a"))
    assert not any(isinstance(module, StepRouter) for module in loaded.modules())
    torch.manual_seed(0)
    for name, parameter in loaded.named_parameters():
        if "poly_" in name:
            parameter.data = torch.randn_like(parameter) * (9.0 if name.endswith("logits") else 0.5)
    inputs = live.batch([0]).inputs
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 2}
    one, two = (loaded.generate(**inputs, **options, task_ids=torch.tensor([task])) for task in (0, 1))
    tokens = inputs["input_ids"]
    for _ in range(8):
        with torch.no_grad():
            logits = loaded(input_ids=tokens, task_ids=torch.tensor([1])).logits
        tokens = torch.cat([tokens, logits[:, -1:].argmax(-1)], 1)
    assert torch.equal(two, tokens)
    assert not torch.equal(one, two)
    with pytest.raises(ValueError, match="task_ids"):
        loaded(**inputs)


def test_what_cannot_work_is_refused(root):
    shape, case = shape_of("llama", root), case_of(Trial(SMALL, "llama", "causal_lm"))
    with pytest.raises(InvalidRequest, match="divisor") as refused:
        Poly(splits=3).check(shape, case)
    assert refused.value.param == "adapter.splits"
    with pytest.raises(InvalidRequest, match="mtl_lora"):
        methods.admit(SMALL, shape.model_copy(update={"model_type": "gpt2"}), case)
    with pytest.raises(InvalidRequest, match='"task"'):
        methods.admit(SMALL, shape, case.model_copy(update={"tasks": ()}))


def test_gradient_checkpointing_is_refused_as_peft_forgets_the_tasks(root):
    """With it, the second step's loss is already another: the gradients of the first were wrong."""
    case = methods.Case(tasks=("a", "b"), gradient_checkpointing=True)
    with pytest.raises(InvalidRequest, match="mtl_lora") as caught:
        methods.admit(SMALL, shape_of("llama", root), case)
    assert caught.value.param == "training.gradient_checkpointing"
