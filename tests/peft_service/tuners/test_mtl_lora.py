"""Tests of MTL-LoRA: AdapterHub's numbers, count, tasks in one batch, LoRA as the special case."""

import re

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

from peft_service.tuners.mtl_lora import MTLLoRAConfig
from tests import golden
from tests.peft_service.tuners import bases


@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_output_and_gradients_are_adapterhubs(kind):
    recorded = golden.load(f"mtl-lora-{kind}")
    theirs = recorded.config
    tasks = sorted({m.group(1) for n in recorded.adapter if (m := re.search(r"\.loras\.(\w+)\.", n))})
    config = MTLLoRAConfig(
        tasks=len(tasks),
        rank=theirs["r"],
        alpha=theirs["alpha"],
        ups=theirs["n_up_projection"],
        temperature=theirs["weights_sharpness"],
    )
    model = get_peft_model(recorded.base(), config).eval()
    parameters = {
        name.removeprefix("base_model.model."): p for name, p in model.named_parameters() if p.requires_grad
    }
    places = {}
    for name in recorded.adapter:
        layer, end = re.match(r"(.*)\.(?:loras|shared_parameters)\.(.*)", name).groups()
        ours = f"{layer}.mtl_lora_parts.default."
        if end.endswith("lora_A"):
            places[name] = (ours + "down", ...)
        elif end.endswith("lora_B"):
            places[name] = (ours + "ups", ...)
        else:
            row = tasks.index(end.split(".")[0])
            places[name] = (ours + ("task_mix" if end.endswith(".weights") else "task_scale"), row)
    assert {place for place, _ in places.values()} == set(parameters)
    for name, (place, row) in places.items():
        parameters[place].data[row] = recorded.adapter[name]
    model.base_model.set_tasks(recorded.inputs["task_ids"])
    output = golden.output_of(model, recorded.inputs)
    assert (recorded.output - recorded.base_output).abs().max() > 1e-2
    torch.testing.assert_close(output, recorded.output, rtol=1e-5, atol=2e-5)
    (output**2).sum().backward()
    for name, (place, row) in places.items():
        if name in recorded.gradients:
            grad = parameters[place].grad[row]
            torch.testing.assert_close(grad, recorded.gradients[name], rtol=1e-3, atol=1e-3, msg=name)


@pytest.mark.parametrize("kind", bases.KINDS)
def test_count_is_the_formulas(kind):
    r, n, tasks = 3, 2, 4
    model = get_peft_model(bases.base(kind), MTLLoRAConfig(tasks=tasks, rank=r, ups=n))
    wanted = 0
    for _, wrapper in model.base_model.wrappers():
        weight = wrapper.get_base_layer().weight
        d_in, d_out = weight.shape if kind == "gpt2" else weight.T.shape
        wanted += r * d_in + n * r * d_out + tasks * (r + n)
    assert bases.trainable(model) == wanted > 0


def logits(model, given):
    with torch.no_grad():
        return model(**given).logits


def adapted(kind, **options):
    model = get_peft_model(bases.base(kind), MTLLoRAConfig(rank=4, **options)).eval()
    bases.stir(model, scale=0.2)
    return model


@pytest.mark.parametrize("kind", ["bert", "llama", "t5"])
def test_a_batch_of_mixed_tasks_is_the_rows_of_single_tasks(kind):
    model = adapted(kind, tasks=3)
    given = bases.inputs(kind, rows=4)
    order = [2, 0, 1, 2]
    with model.base_model.tasks(order):
        mixed = logits(model, given)
    for row, task in enumerate(order):
        with model.base_model.tasks([task] * 4):
            torch.testing.assert_close(logits(model, given)[row], mixed[row], rtol=1e-5, atol=1e-5)
    assert not torch.allclose(mixed[0], mixed[1])


def test_one_task_and_one_up_projection_is_lora():
    mtl = adapted("llama", tasks=1, ups=1, alpha=8)
    lora = get_peft_model(
        bases.base("llama"), LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"])
    ).eval()
    for name, wrapper in mtl.base_model.wrappers():
        part, theirs = wrapper.part("default"), lora.base_model.model.get_submodule(name)
        part.task_scale.data.fill_(1.0)
        theirs.lora_A["default"].weight.data.copy_(part.down.data)
        theirs.lora_B["default"].weight.data.copy_(part.ups.data[0])
    given = bases.inputs("llama")
    mtl.base_model.set_tasks([0, 0, 0])
    torch.testing.assert_close(logits(mtl, given), logits(lora, given), rtol=1e-5, atol=1e-5)


def test_beams_keep_their_rows_task():
    model = adapted("llama", tasks=2)
    given = bases.inputs("llama", rows=2)
    kept = {"max_new_tokens": 6, "num_beams": 3, "do_sample": False, "eos_token_id": None}
    with model.base_model.tasks([1, 0]):
        both = model.generate(**given, **kept)
    for row, task in enumerate([1, 0]):
        one = {name: value[row : row + 1] for name, value in given.items()}
        with model.base_model.tasks([task]):
            assert torch.equal(model.generate(**one, **kept)[0], both[row])


def test_tasks_are_checked_and_survive_a_reload(tmp_path):
    model = adapted("bert", tasks=2)
    given = bases.inputs("bert")
    with pytest.raises(ValueError, match="call set_tasks"):
        model(**given)
    with pytest.raises(ValueError, match="from 0 to 1"):
        model.base_model.set_tasks([0, 2, 1])
    model.base_model.set_tasks([0, 1])
    with pytest.raises(ValueError, match="3 rows"):
        model(**given)
    model.base_model.set_tasks([0, 1, 1])
    model.save_pretrained(tmp_path, save_embedding_layers=False)
    again = PeftModel.from_pretrained(bases.base("bert"), tmp_path).eval()
    again.base_model.set_tasks([0, 1, 1])
    assert torch.equal(logits(again, given), logits(model, given))
