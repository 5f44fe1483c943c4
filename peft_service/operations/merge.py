"""Merge: W + ΔW, a model of its own that needs neither base nor peft.

From the base's own weights in float32, also where the adapter was trained beside a base of 4 bits: then what
the result answers differs from what was trained by what 4 bits lose, and that is measured too.
"""

from collections.abc import Sequence
from typing import ClassVar, Literal

from peft_service.errors import RunFailed
from peft_service.methods import Method
from peft_service.operations import Described, Done, Operation, Work, mergeable

TOLERANCE = 1e-4
"""Of a logit, as a share of the largest: float32 sums in another order are some 1e-6 apart."""


class Merge(Operation):
    kind: Literal["merge"] = "merge"
    dtype: Literal["fp32", "bf16"] = "fp32"
    """What the merged weights are stored in. They are added in float32 in any case; bf16 then rounds them."""

    title: ClassVar[str] = "Merge"
    summary: ClassVar[str] = (
        "The adapter written into the base's weights: a whole model, no slower than the base."
    )
    exact: ClassVar[bool] = True
    ways: ClassVar[dict[str, tuple[bool, str]]] = {
        "fp32": (True, "the sum in float32, from the unquantised base"),
        "bf16": (False, "that sum, rounded to 8 bits of precision"),
    }

    def check(self, sources: Sequence[Described]) -> None:
        mergeable(sources[0])

    def makes(self, sources: Sequence[Described]) -> Method:
        from peft_service.methods.full import Full

        return Full()

    def run(self, work: Work) -> Done:
        import torch

        from peft_service import updates

        inputs, expected = updates.asked(work, work.sources[0])
        model = updates.merged(updates.base_of(work), work.sources[0])
        answers = updates.answers(model, inputs)
        facts = {"merge_error": updates.apart(answers, expected)}
        if not facts["merge_error"] <= TOLERANCE:
            raise RunFailed(
                f"the merged model's logits differ from the adapter's by {facts['merge_error']:.2e} of the "
                f"largest, more than {TOLERANCE:.0e}: nothing is published",
                code="merge_not_exact",
            )
        if self.dtype == "bf16":
            answers = updates.answers(updates.rounded(model), inputs)
            facts["rounding_error"] = updates.apart(answers, expected)
            model = model.to(torch.bfloat16)
        model.save_pretrained(work.out, safe_serialization=True)
        if work.quantize:
            del model
            _, trained = updates.asked(work, work.sources[0], quantize=work.quantize)
            facts["quantised_base_difference"] = updates.apart(answers, trained)
        return Done(facts, inputs, answers)
