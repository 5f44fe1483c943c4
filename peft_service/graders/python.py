"""Python: a script of the user's with `grade(sample, item) -> float`, run where it can do no harm."""

from collections.abc import Collection, Iterator, Sequence
from typing import Literal

from pydantic import Field

from peft_service.errors import RunFailed
from peft_service.formats import Problem
from peft_service.graders import Allowed, Grader, Judge, Outcome, Pair, template
from peft_service.graders.sandbox import NoSandbox, Sandbox, missing


class Python(Grader):
    type: Literal["python"] = "python"

    source: str = Field(min_length=1, max_length=256 * 1024)
    """Defines `grade(sample, item)`; sample has output_text, output_json and output_tools. It has the
    standard library, 1 GiB of memory and 10 seconds for a call; no files, no network (`graders.sandbox`)."""
    image_tag: str | None = None
    """OpenAI's choice of installed packages; there is one here."""

    def problems(self, columns: Collection[str] | None, allowed: Allowed) -> Iterator[Problem]:
        if self.image_tag is not None:
            hint = "leave it out; scripts have the standard library"
            yield Problem("image_tag", "not_supported", "There are no images to choose from.", hint)
        if allowed.python == "off":
            yield Problem(
                "type",
                "python_graders_off",
                "This service runs no scripts of its users.",
                "its operator sets PEFT_SERVICE_PYTHON_GRADERS=isolated",
            )
            return
        if allowed.python == "isolated" and missing():
            yield Problem(
                "type",
                "no_sandbox",
                f"This machine cannot shut a script in: it lacks {missing()}.",
                "its operator may set PEFT_SERVICE_PYTHON_GRADERS=trusted where users are trusted",
            )
            return
        with Sandbox(self.source, trusted=allowed.python == "trusted") as sandbox:
            if wrong := sandbox.problem():
                yield Problem("source", "script_fails", f"The script fails before any call: {wrong}.")

    def grade(self, pairs: Sequence[Pair], judge: Judge) -> list[Outcome]:
        sandbox = judge.sandbox(self.source)
        made = []
        for pair in pairs:
            try:
                reply = sandbox.grade(template.namespace_of(pair.sample), pair.item)
            except NoSandbox as error:
                raise RunFailed(
                    f"the worker cannot shut the script of grader {self.name} in: it lacks {error}. The "
                    "operator may set PEFT_SERVICE_PYTHON_GRADERS=trusted where users are trusted",
                    code="no_sandbox",
                ) from error
            fault = "python_grader_runtime_error" if reply.problem else ""
            made.append(Outcome(reply.score, fault, reply.problem))  # type: ignore[arg-type]
        return made
