"""First values of a LoRA: PiSSA, OLoRA, EVA, LoftQ and orthogonal, without a change of the base.

Shapes: W is (d_out, d_in), A (r, d_in), B (d_out, r); s is the LoRA's scaling.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from peft_service.attached import Attached
from peft_service.errors import InvalidRequest
from peft_service.methods import Case, Material
from peft_service.tuners.low_rank import base_weight, broadcast, down, lora_layers, up
from peft_service.tuners.reference import Referenced

EXACT_UP_TO = 1024
"""Above this size the leading singular vectors come from 16 rounds of subspace iteration: seconds a layer
instead of minutes, and nothing depends on how exact they are."""
EVA_ROWS = 64


def started(model: Any, init: str, scaling: float, case: Case, material: Material) -> Attached:
    """The PeftModel `model` (LoRA everywhere, B = 0) with the first values that `init` names.

    Raises:
        InvalidRequest: EVA with too little text for its rank.
    """
    layers = lora_layers(model)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(case.seed)
        if init == "eva":
            values = _eva(model, layers, material)
        elif init == "loftq":
            values = _loftq(model, layers, scaling, case)
        else:
            make: Callable[[Any, float], tuple[Tensor, Tensor]] = {
                "pissa": pissa, "olora": olora, "orthogonal": orthogonal
            }[init]  # fmt: skip
            values = {name: make(layer, scaling) for name, layer in layers.items()}
        for name, (a, b) in values.items():
            down(layers[name]).weight.copy_(a)
            up(layers[name]).weight.copy_(b)
    broadcast([module.weight.data for layer in layers.values() for module in (down(layer), up(layer))])
    if init in ("pissa", "olora"):
        return Referenced(model, scaling)
    return Attached(model)


def pissa(layer: Any, scaling: float) -> tuple[Tensor, Tensor]:
    """A = sqrt(S_r / s) V_rᵀ and B = U_r sqrt(S_r / s) of W = U S Vᵀ.  Meng et al. 2024, arXiv:2404.02948."""
    left, size, right = _leading(base_weight(layer), down(layer).weight.shape[0])
    root = (size / scaling).sqrt()
    return root[:, None] * right, left * root


def olora(layer: Any, scaling: float) -> tuple[Tensor, Tensor]:
    """A = R_r and B = Q_r of W = Q R.  Büyükakyüz 2024, arXiv:2406.01775."""
    rank = down(layer).weight.shape[0]
    q, r = torch.linalg.qr(base_weight(layer))
    return r[:rank], q[:, :rank]


def orthogonal(layer: Any, scaling: float) -> tuple[Tensor, Tensor]:
    """A and B random in complementary halves of the r dimensions, so that B A = 0 though neither is."""
    rank, d_in = down(layer).weight.shape
    d_out = up(layer).weight.shape[0]
    basis, _ = torch.linalg.qr(torch.randn(rank, rank, dtype=torch.float64))
    a = basis[0::2].T @ torch.randn(rank // 2, d_in, dtype=torch.float64) / 10
    b = torch.randn(d_out, rank // 2, dtype=torch.float64) @ basis[1::2] / 10
    return a, b


def _leading(weight: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """(U, S, Vᵀ) of the `rank` largest singular values."""
    if min(weight.shape) <= EXACT_UP_TO:
        left, size, right = torch.linalg.svd(weight, full_matrices=False)
        return left[:, :rank], size[:rank], right[:rank]
    left, size, right = torch.svd_lowrank(weight, rank, niter=16)
    return left, size, right.T


def _loftq(
    model: Any, layers: dict[str, Any], scaling: float, case: Case
) -> dict[str, tuple[Tensor, Tensor]]:
    """s B A = the leading part of W - Q(W), what 4 bits have lost.  Li et al. 2023, arXiv:2310.08659.

    One round, on top of the base's own NF4 (as peft's replace_lora_weights_loftq, which needs CUDA and leaves
    s out).
    """
    from peft_service import base_model

    whole: Any = base_model.load(
        Path(model.get_base_model().name_or_path),
        precision="fp32",
        task=case.task,
        labels=case.labels,
        seed=case.seed,
    )
    made = {}
    for name, layer in layers.items():
        quantised = base_weight(layer)
        original = whole.get_submodule(name.removeprefix("base_model.model.")).weight
        lost = original.to(quantised.device) - quantised
        left, size, right = _leading(lost, down(layer).weight.shape[0])
        root = size.sqrt()
        made[name] = (root[:, None] * right, left * root / scaling)
    return made


def _eva(model: Any, layers: dict[str, Any], material: Material) -> dict[str, tuple[Tensor, Tensor]]:
    """A = the r leading directions of what comes into the layer, B = 0.  Paischer et al. 2024,
    arXiv:2410.07170.

    peft's incremental decomposition, over a fixed number of rows instead of until it settles, and with as
    many directions a layer as its rank (the paper's rho = 1).
    """
    from peft.utils.incremental_pca import IncrementalPCA

    if material.sample is None:
        raise InvalidRequest(
            "init eva reads rows of the training file, and there are none.", param="adapter.init"
        )
    found: dict[str, Any] = {}
    waiting: dict[str, list[Tensor]] = {name: [] for name in layers}

    def see(name: str, rank: int) -> Callable[[Any, tuple[Tensor, ...]], None]:
        def hook(module: Any, args: tuple[Tensor, ...]) -> None:
            waiting[name].append(args[0].detach().float().flatten(0, -2))
            # The decomposition takes twice as many directions as it keeps.
            if sum(map(len, waiting[name])) >= 2 * rank:
                known = found.setdefault(
                    name, IncrementalPCA(n_components=rank, copy=True, lowrank=True, lowrank_seed=42)
                )
                known.partial_fit(torch.cat(waiting[name]))
                waiting[name].clear()

        return hook

    handles = [
        layer.register_forward_pre_hook(see(name, len(down(layer).weight))) for name, layer in layers.items()
    ]
    was_training = model.training
    model.eval()
    for batch in material.sample(EVA_ROWS):  # one row each, so nothing is padding
        model(**batch.inputs)
    model.train(was_training)
    for handle in handles:
        handle.remove()
    rank = len(down(next(iter(layers.values()))).weight)
    if missing := [name for name in layers if name not in found]:
        raise InvalidRequest(
            f"init eva with rank {rank} needs {2 * rank} tokens in {EVA_ROWS} rows, and {missing[0]} saw "
            f"{sum(map(len, waiting[missing[0]]))}: take a smaller rank, more text, or another init.",
            param="adapter.init",
        )
    return {
        name: (found[name].components_, torch.zeros_like(up(layer).weight)) for name, layer in layers.items()
    }
