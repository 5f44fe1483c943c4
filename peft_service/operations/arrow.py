"""Arrow: several LoRAs in one artifact, with a router that needs no training.  arXiv:2405.11157."""

from collections.abc import Sequence
from typing import ClassVar, Literal

from pydantic import Field

from peft_service.errors import InvalidRequest
from peft_service.methods import Case, Method
from peft_service.methods.arrow import Arrow
from peft_service.operations import Described, Done, Operation, Work, nothing_besides, plain_lora


class RouteByArrow(Operation):
    kind: Literal["arrow"] = "arrow"
    top_k: int = Field(3, ge=1, le=64)
    temperature: float = Field(1.0, gt=0, le=100)
    general: int = Field(0, ge=0, le=62)
    """As in the method arrow."""

    title: ClassVar[str] = "Arrow"
    summary: ClassVar[str] = "Several LoRAs in one artifact; a token goes to those whose direction it has."
    exact: ClassVar[bool] = True
    takes: ClassVar[tuple[int, int]] = (2, 64)

    def check(self, sources: Sequence[Described]) -> None:
        for source in sources:
            plain_lora(source, "arrow")
            nothing_besides(source, "arrow")
            mine, theirs = (_targets(each) for each in (source, sources[0]))
            if mine != theirs:
                raise InvalidRequest(
                    f"{source.reference} adapts {', '.join(mine)}, and {sources[0].reference} "
                    f"{', '.join(theirs)}: arrow routes among LoRAs on the same layers. combine takes any",
                    code="invalid_value",
                    param="adapters",
                )
        if self.general > len(sources) - 2:
            raise InvalidRequest(
                f"general {self.general} of {len(sources)} adapters leaves less than two to route among: set "
                f"general to {len(sources) - 2}",
                code="invalid_value",
                param="operation.general",
            )

    def makes(self, sources: Sequence[Described]) -> Method:
        return self._method(tuple(source.reference for source in sources))

    def _method(self, sources: tuple[str, ...]) -> Arrow:
        return Arrow(sources=sources, top_k=self.top_k, temperature=self.temperature, general=self.general)

    def run(self, work: Work) -> Done:
        from peft_service import updates
        from peft_service.tuners.arrow import attach_arrow

        method = self._method(tuple(path.name for path in work.sources))
        made = attach_arrow(updates.base_of(work), Case(task=work.task), method, work.sources)
        made.save({}, work.out, (work.base_id, work.revision))
        inputs, answers = updates.asked(work, work.out)
        return Done({"experts": float(len(work.sources) - self.general)}, inputs, answers)


def _targets(source: Described) -> list[str]:
    targets = (source.config or {}).get("target_modules") or []
    return sorted([targets] if isinstance(targets, str) else targets)
