"""Truncate: a LoRA cut down to rank b.

`first` keeps the first b rows of A and columns of B with the scaling alpha / b, which is what a DyLoRA has
trained (arXiv:2210.07558). `svd` is the nearest LoRA of rank b to any LoRA. Cutting the first b out of a LoRA
that was not trained for it loses what happens to stand behind: then `svd` is the right one.
"""

from collections.abc import Sequence
from typing import ClassVar, Literal

from pydantic import Field

from peft_service.errors import InvalidRequest
from peft_service.methods import Method
from peft_service.methods.lora import LoRA
from peft_service.operations import Described, Done, Operation, Work, nothing_besides, plain_lora


class Truncate(Operation):
    kind: Literal["truncate"] = "truncate"
    rank: int = Field(ge=1, le=512)
    """b"""
    how: Literal["first", "svd"] = "svd"

    title: ClassVar[str] = "Truncate"
    summary: ClassVar[str] = "A LoRA of a smaller rank from a larger one."
    exact: ClassVar[bool] = False
    ways: ClassVar[dict[str, tuple[bool, str]]] = {
        "first": (
            False,
            "A[:b] and B[:, :b], scaled by alpha / b (an rsLoRA by alpha / sqrt(b)); of a DyLoRA exactly "
            "what it trained at rank b",
        ),
        "svd": (False, "the nearest B A of rank b in every layer; exact where b is the rank it has"),
    }

    def check(self, sources: Sequence[Described]) -> None:
        source = sources[0]
        plain_lora(source, "truncate")
        nothing_besides(source, "truncate", head=True)
        if self.rank > source.ranks[-1]:
            raise InvalidRequest(
                f"{source.reference} has rank {source.ranks[-1]}: there is no rank {self.rank} in it. Give "
                f"{source.ranks[-1]} or less",
                code="invalid_value",
                param="operation.rank",
            )

    def makes(self, sources: Sequence[Described]) -> Method:
        return LoRA(rank=self.rank, alpha=self.rank)

    def run(self, work: Work) -> Done:
        from peft_service import artifact, updates

        source = work.sources[0]
        model = artifact.load(updates.base_of(work), source)
        inputs = updates.probe_of(model, work)
        expected = updates.answers(model, inputs)
        made, lost, whole = {}, {}, {}
        for name, (a_RI, b_OR, scaling, alpha) in updates.factors_of(model).items():
            b = min(self.rank, len(a_RI))
            whole[name] = scaling * b_OR.double() @ a_RI.double()
            if self.how == "first":
                # Of an rsLoRA the scaling is alpha / sqrt(b), and the file has no key of rsLoRA.
                root = scaling * len(a_RI) != alpha
                a, c, size = a_RI[:b], b_OR[:, :b], alpha * b**0.5 if root else alpha
            else:
                a, c, _ = updates.svd(whole[name], b)
                size = float(b)
            made[name] = (a, c, size)
            lost[name] = whole[name] - size / b * c.double() @ a.double()
        del model
        updates.write_lora(updates.base_of(work), made, work, heads=source)
        return updates.measured(work, updates.relative(lost, whole), inputs, expected)
