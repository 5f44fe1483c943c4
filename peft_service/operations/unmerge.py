"""Unmerge: from a merged model back to base and adapter, bit for bit.

W' - ΔW is not W in floating point. So nothing is subtracted: merging changed neither base nor adapter, both
are in the lineage with their digests, and this proves that they are still those.
"""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar, Literal

from peft_service.errors import InvalidRequest, RunFailed
from peft_service.methods import Method
from peft_service.operations import Described, Done, Operation, Work
from peft_service.operations.merge import TOLERANCE

MADE_ANEW = ("README.md", "SHA256SUMS", "manifest.json")


class Unmerge(Operation):
    kind: Literal["unmerge"] = "unmerge"

    title: ClassVar[str] = "Unmerge"
    summary: ClassVar[str] = (
        "The adapter that a merged model was made with, the same bytes again; its base is the registered "
        "one, and both together answer what the merged model does."
    )
    exact: ClassVar[bool] = True

    def check(self, sources: Sequence[Described]) -> None:
        operation = sources[0].record["spec"].get("operation") or {}
        if operation.get("kind") != "merge":
            raise InvalidRequest(
                f"{sources[0].reference} was not made by merging (it is a {sources[0].method}): only a "
                "merged model has an adapter to go back to",
                code="not_a_merge",
                param="adapters",
            )

    def also(self, sources: Sequence[Described]) -> tuple[str, ...]:
        return tuple(source["id"] for source in sources[0].record["spec"]["sources"])

    def makes(self, sources: Sequence[Described]) -> Method:
        from pydantic import TypeAdapter

        from peft_service.methods import AnyMethod

        method: Method = TypeAdapter(AnyMethod).validate_python(sources[1].record["spec"]["method"])
        return method

    def run(self, work: Work) -> Done:
        from peft_service import gate, updates
        from peft_service.methods import Case

        whole, adapter = work.sources
        inputs, answers = updates.asked(work, adapter)
        model = gate.load_base(whole, Case(task=work.task, labels=work.labels), "fp32", None)
        said = updates.answers(model, inputs)
        facts = {"unmerge_error": updates.apart(said, answers)}
        expected = answers
        if _stored_in_bf16(whole):
            again = updates.merged(updates.base_of(work), adapter)
            expected = updates.answers(updates.rounded(again), inputs)
        if not (wrong := updates.apart(said, expected)) <= TOLERANCE:
            raise RunFailed(
                f"base and adapter together differ from the merged model by {wrong:.2e} of the largest "
                f"logit, more than {TOLERANCE:.0e}: it is not what they were merged into",
                code="unmerge_not_exact",
            )
        shutil.copytree(adapter, work.out, dirs_exist_ok=True, ignore=shutil.ignore_patterns(*MADE_ANEW))
        return Done(facts, inputs, answers)


def _stored_in_bf16(directory: Path) -> bool:
    told = json.loads((directory / "config.json").read_text())
    return bool((told.get("dtype") or told.get("torch_dtype")) == "bfloat16")
