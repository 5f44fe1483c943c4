"""Convert: the LoRA of a given rank that is nearest to what an adapter of any kind does.

ΔW of each layer is what merging adds to its weight, so it also holds for changes that depend on W (DoRA,
(IA)³, OFT). B A is its best approximation of that rank (Eckart and Young 1936). What is lost is measured,
by layer and on logits, and a limit of the user's decides whether it is published.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from peft_service.errors import InvalidRequest, RunFailed
from peft_service.methods import Method
from peft_service.methods.lora import LoRA
from peft_service.operations import Described, Done, Operation, Work, mergeable, nothing_besides

if TYPE_CHECKING:
    from torch import Tensor

MAX_RANK = 512


class Convert(Operation):
    kind: Literal["convert"] = "convert"
    rank: int = Field(16, ge=1, le=MAX_RANK)
    """Of the LoRA. A change of full rank (OFT, (IA)³) needs a large one."""
    max_error: float = Field(0.05, ge=1e-6, le=1)
    """What may be lost: Frobenius norm of ΔW - B A over all layers, as a share of that of ΔW. Above it the
    job fails, and says which rank would do. No float32 is nearer than 1e-6 for certain."""

    title: ClassVar[str] = "Convert to LoRA"
    summary: ClassVar[str] = (
        "The nearest LoRA of this rank, for servers that read nothing else; its error is measured."
    )
    exact: ClassVar[bool] = False

    def check(self, sources: Sequence[Described]) -> None:
        mergeable(sources[0])
        nothing_besides(sources[0], "convert", head=True)
        if sources[0].config is None:
            raise InvalidRequest(
                f"{sources[0].reference} ({sources[0].method}) is no PEFT adapter, and only those are "
                "converted: merge makes a model of it",
                code="not_convertible",
                param="adapters",
            )

    def makes(self, sources: Sequence[Described]) -> Method:
        return LoRA(rank=self.rank, alpha=self.rank)

    def run(self, work: Work) -> Done:
        from peft_service import artifact, updates

        source = work.sources[0]
        model = artifact.load(updates.base_of(work), source)
        inputs = updates.probe_of(model, work)
        expected = updates.answers(model, inputs)
        changes = updates.updates_of(model)
        factors, lost, spectra = {}, {}, []
        for name, change in changes.items():
            a_RI, b_OR, values = updates.svd(change, self.rank)
            factors[name] = (a_RI, b_OR, float(self.rank))
            lost[name] = change - b_OR.double() @ a_RI.double()
            spectra.append(values)
        error, worst = updates.relative(lost, changes)
        if error > self.max_error:
            enough = _rank_for(spectra, self.max_error)
            raise RunFailed(
                f"a LoRA of rank {self.rank} loses {error:.4g} of what this adapter changes, more than "
                f"max_error {self.max_error:g}"
                + (f"; rank {enough} is enough" if enough <= MAX_RANK else f"; it would need rank {enough}"),
                code="conversion_error_too_large",
                param="operation.max_error",
            )
        del model
        updates.write_lora(updates.base_of(work), factors, work, heads=source)
        return updates.measured(work, (error, worst), inputs, expected)


def _rank_for(spectra: "list[Tensor]", max_error: float) -> int:
    """The smallest rank at which all layers together lose no more than this."""
    import torch

    width = max(len(values) for values in spectra)
    energy_R = torch.zeros(width, dtype=torch.float64)
    for values in spectra:
        energy_R[: len(values)] += values**2
    left_R = energy_R.sum() - energy_R.cumsum(0)
    enough = (left_R.clamp(min=0) <= max_error**2 * energy_R.sum()).nonzero()
    return int(enough[0]) + 1 if len(enough) else width
