"""LoRA-FA: A never moves, B's gradient is the best one for the whole weight, and inputs are not kept."""

import pytest
import torch

from peft_service.errors import InvalidRequest
from peft_service.methods import Case
from peft_service.methods.lora import LoRA
from peft_service.methods.lora_fa import LoRAFA
from peft_service.tuners.lora_fa import Projection
from peft_service.tuners.low_rank import down, lora_layers, up
from tests.methods import checks
from tests.methods.checks import Live, Trial


def _live(root, method):
    return Live(Trial(method, "llama", "causal_lm"), root, rate=0.01)


def test_the_projected_gradient_is_the_best_for_the_whole_weight():
    draw = torch.Generator().manual_seed(0)
    a, gradient = torch.randn(4, 12, generator=draw), torch.randn(7, 12, generator=draw).double()
    scaling = 2.5
    of_b = scaling * gradient @ a.double().T
    best = torch.linalg.lstsq(scaling * a.double().T, gradient.T).solution.T
    projected = Projection(a, scaling)(of_b.float()).double()
    torch.testing.assert_close(projected, best, rtol=1e-5, atol=1e-6)


def test_the_hook_gives_what_pefts_optimizer_computes(root):
    from peft.optimizers import create_lorafa_optimizer

    ours, theirs = _live(root, LoRAFA(rank=4, alpha=8)), _live(root, LoRA(rank=4, alpha=8))
    optimizer = create_lorafa_optimizer(theirs.attached.model, r=4, lora_alpha=8, lr=1e-3)
    for live in (ours, theirs):
        nll, _ = live.objective.loss_sum(live.engine.model, live.batch(range(8)))
        nll.backward()
    optimizer.step()
    seen = 0
    for name, layer in lora_layers(ours.attached.model).items():
        first_moment = optimizer.state[f"{name}.lora"]["exp_avg_B"]
        wanted, found = first_moment / (1 - 0.9), up(layer).weight.grad
        # peft multiplies in bfloat16
        assert (found - wanted).norm() < 0.01 * wanted.norm()
        raw = theirs.attached.model.get_submodule(name).lora_B["default"].weight.grad
        assert (found - raw).norm() > 0.1 * raw.norm()
        seen += 1
    assert seen == 14


def test_a_is_where_it_was_and_goes_into_the_file(root, tmp_path):
    from safetensors.torch import load_file

    live, lora = _live(root, LoRAFA(rank=4)), _live(root, LoRA(rank=4))
    for step in range(4):
        live.step(step)
    saved = load_file(live.save(tmp_path / "artifact") / "adapter_model.safetensors")
    for name, layer in lora_layers(lora.attached.model).items():
        a = down(live.attached.model.get_submodule(name)).weight
        assert torch.equal(a, down(layer).weight)
        assert torch.equal(saved[f"{name}.lora_A.weight"], a)
    assert not any("lora_A" in name for name in live.engine.parameters)


def test_the_inputs_of_the_layers_are_not_kept_for_the_backward_pass(root):
    def kept(method):
        live = _live(root, method)
        sizes = {}

        def pack(tensor):
            sizes[tensor.data_ptr()] = tensor.numel()
            return tensor

        batch = live.batch(range(8))
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            live.objective.loss_sum(live.engine.model, batch)
        return sum(sizes.values())

    assert kept(LoRAFA(rank=1)) < kept(LoRA(rank=1))


def test_without_projection_it_is_lora_s_gradient(root):
    plain, lora = _live(root, LoRAFA(rank=4, project=False)), _live(root, LoRA(rank=4))
    for live in (plain, lora):
        live.objective.loss_sum(live.engine.model, live.batch(range(8)))[0].backward()
    for name, layer in lora_layers(plain.attached.model).items():
        other = lora.attached.model.get_submodule(name)
        torch.testing.assert_close(up(layer).weight.grad, up(other).weight.grad)


def test_a_rank_above_the_inputs_has_no_inverse(root):
    with pytest.raises(InvalidRequest, match="singular"):
        LoRAFA(rank=33).check(checks.shape_of("llama", root), Case())
    LoRAFA(rank=33, project=False).check(checks.shape_of("llama", root), Case())
