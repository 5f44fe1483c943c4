"""Named chat templates, for bases whose tokenizer has none or another one; each marks what is learned."""

import difflib
import hashlib
from pathlib import Path

from peft_service.errors import InvalidRequest
from peft_service.spec import Template

MAX_CHARACTERS = 65_536


def names() -> list[str]:
    """What there is."""
    return sorted(path.stem for path in Path(__file__).parent.glob("*.jinja"))


def named(name: str) -> Template:
    """
    Raises:
        InvalidRequest: there is none of that name.
    """
    known = names()
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(known)}"
        raise InvalidRequest(
            f"data.template.name: there is no template {name[:60]!r}; {hint}",
            code="template_not_found",
            param="data.template.name",
        )
    jinja = (Path(__file__).parent / f"{name}.jinja").read_text(encoding="utf-8")
    return _template(name, jinja)


def inline(jinja: str) -> Template:
    """A template of the request's own, looked at as far as that goes without a tokenizer.

    Raises:
        InvalidRequest: it is no Jinja, names what no sandbox gives, or does not ask for an answer.
    """
    import jinja2
    from jinja2.ext import Extension
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """`{% generation %}`, as transformers knows it; here only its syntax."""

        tags = {"generation"}  # noqa: RUF012 - Jinja's own protocol

        def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node | list[jinja2.nodes.Node]:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    environment = ImmutableSandboxedEnvironment(extensions=[Generation, "jinja2.ext.loopcontrols"])
    try:
        tree = environment.parse(jinja)
    except jinja2.TemplateSyntaxError as error:
        raise InvalidRequest(
            f"data.template.jinja: line {error.lineno}: {error.message}",
            code="template_error",
            param="data.template.jinja",
        ) from None
    except RecursionError:
        raise InvalidRequest(
            "data.template.jinja is nested too deeply", code="template_error", param="data.template.jinja"
        ) from None
    if any(True for _ in tree.find_all((jinja2.nodes.Include, jinja2.nodes.Import, jinja2.nodes.Extends))):
        raise InvalidRequest(
            "data.template.jinja includes another file: write everything into one template",
            code="template_error",
            param="data.template.jinja",
        )
    used = {node.name for node in tree.find_all(jinja2.nodes.Name)}
    if "messages" not in used or "add_generation_prompt" not in used:
        missing = "messages" if "messages" not in used else "add_generation_prompt"
        raise InvalidRequest(
            f"data.template.jinja never uses `{missing}`: a chat template writes the messages, and with "
            "add_generation_prompt what stands before the assistant's answer",
            code="template_error",
            param="data.template.jinja",
        )
    return _template(None, jinja)


def _template(name: str | None, jinja: str) -> Template:
    return Template(name=name, jinja=jinja, sha256=hashlib.sha256(jinja.encode()).hexdigest())
