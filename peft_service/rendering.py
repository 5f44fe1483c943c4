"""Rows as text with the characters that are to be learned: by a chat template, or as they are.

How the targets of a conversation are found. For every trained message i, the template renders the messages
before i with the generation prompt, which is what the model will see when it is asked; and the messages up to
i. The first must be a prefix of the second, and the second of the whole conversation; the difference is what
the model is to say. A second, independent method must agree with it. Where the template marks answers itself
with {% generation %}, those marks; elsewhere one more rendering with a placeholder in every message's place,
which shows what is the template's text and what is a message's: all of a trained message must be a target,
and nothing of an untrained one. If they do not agree, or a rendering is no prefix (templates that rewrite
earlier turns, for example by removing their <think> blocks), training would teach something that serving
never asks: that is an error. A template that changes the messages' own text leaves the first method alone;
such rows are counted in `statistics["unchecked_masks"]`.
"""

import re
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from peft_service.columns import Columns
from peft_service.containers import Record
from peft_service.formats import Example, Problem, clean, shown

TooLong = Literal["error", "drop", "right", "left", "split"]
LISTED = 100


@dataclass(frozen=True)
class Reading:
    """How rows become text and targets, where it is not as usual."""

    columns: Columns | None = None
    documents: Literal["line", "paragraph", "file"] = "line"
    """What is a document in a plain text file."""
    limit: int | None = None
    """Only so many good rows from the beginning."""
    train_on: Literal["assistant", "last_assistant", "all"] = "assistant"
    eos: Literal["turn", "last", "all"] = "turn"
    """The end tokens that are targets: after every trained turn, only the last one, or all in the row."""
    turns: Literal["together", "apart"] = "together"
    """apart: a conversation becomes a row for each trained turn, which ends there: for templates that write a
    turn otherwise once more follow."""
    tools: tuple[dict[str, Any], ...] = ()
    """Tools for rows that bring none of their own."""


class Unteachable(Exception):
    """A row that cannot be trained on, found where its line is not known."""

    def __init__(self, code: str, message: str, hint: str = "", path: str = "") -> None:
        super().__init__(message)
        self.problem = Problem(path, code, message, hint)


@dataclass
class Notes:
    """What happened to rows on the way; the first 100 of each kind by line."""

    too_long: TooLong
    max_seq_len: int
    problems: list[Problem] = field(default_factory=list)
    problem_count: int = 0
    found_by: str = "text"
    counts: dict[str, int] = field(default_factory=dict)
    where: dict[str, list[int]] = field(default_factory=dict)
    lost_tokens: int = 0

    @property
    def dropped(self) -> int:
        return self.counts.get("dropped", 0)

    def note(self, what: str, line: Record) -> None:
        self.counts[what] = self.counts.get(what, 0) + 1
        at = self.where.setdefault(what, [])
        if len(at) < LISTED and at[-1:] != [line.number]:
            at.append(line.number)

    def bad(self, line: Record, problem: Problem) -> None:
        self.problem_count += 1
        if len(self.problems) < LISTED:
            excerpt = clean(line.raw[:400].decode(errors="replace")[:80])
            self.problems.append(
                replace(problem, line=line.number, byte_offset=line.byte_offset, excerpt=excerpt)
            )

    def statistics(self) -> dict[str, Any]:
        kinds = (
            *("dropped", "truncated", "split", "merged_boundaries", "eos_appended", "rewritten_content"),
            *("unchecked_masks", "trailing_messages"),
        )
        made = {
            kind: {"count": self.counts.get(kind, 0), "lines": self.where.get(kind, [])} for kind in kinds
        }
        return {**made, "lost_tokens": self.lost_tokens}


@dataclass(frozen=True)
class Text:
    """A sequence as text. `spans` are the characters [start, end) that are targets."""

    text: str
    spans: tuple[tuple[int, int], ...]
    plain: bool
    """Plain text: the tokenizer's own special tokens are added. Otherwise the template wrote them."""
    append_eos: bool
    ids: tuple[int, ...] = ()
    """Tokenised by somebody else."""
    targets: tuple[bool, ...] = ()


_PLACEHOLDER = re.compile(r"qzPLACE(\d+)HOLDERqz")
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")


@dataclass
class ChatTemplate:
    """The tokenizer's chat template, and its words for the end of a turn."""

    tokenizer: Any
    reading: Reading
    end_marks: tuple[str, ...]
    """Every special token: the end of a turn is one of them in all templates that have such a mark."""

    @classmethod
    def of(cls, tokenizer: Any, reading: Reading) -> "ChatTemplate":
        special = {str(token) for token in tokenizer.all_special_tokens}
        special |= {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
        return cls(tokenizer, reading, tuple(sorted(special)))

    def render(self, line: Record, example: Example, report: Notes) -> Text:
        """Raises Unteachable where the row and the template do not go together."""
        if example.token_ids:
            return self._given(example)
        if example.segments:
            return self._segments(example)
        if example.document is not None:
            self._end_token()
            return Text(example.document, ((0, len(example.document)),), plain=True, append_eos=True)
        if example.messages and self.tokenizer.chat_template is not None:
            return self._conversation(line, example, report)
        if example.completion is None:
            raise self._no_template()
        self._end_token()
        start = 0 if self.reading.train_on == "all" else len(example.prompt)
        text = example.prompt + example.completion
        return Text(text, ((start, len(text)),), plain=True, append_eos=True)

    def question(self, line: Record, example: Example, report: Notes) -> Text:
        """A prompt that the model is to answer, without the answer that the row may have."""
        if example.messages and self.tokenizer.chat_template is not None:
            messages = list(example.messages)
            while messages and messages[-1]["role"] == "assistant":
                messages.pop()
            if not messages:
                raise Unteachable(
                    "no_prompt", "The row has no message before the assistant's.", "", "messages"
                )
            text = self._text(self._said_as(messages), list(example.tools), ask=True)
            return Text(text, (), plain=False, append_eos=False)
        if not example.prompt:
            raise self._no_template()
        return Text(example.prompt, (), plain=True, append_eos=False)

    def asked(self, example: Example) -> tuple[str, str]:
        """(what an encoder reads, what its decoder is to write). Raises Unteachable."""
        if not example.messages:
            if example.completion is None:
                raise Unteachable(
                    "one_answer",
                    "An encoder-decoder learns from a prompt and an answer, and this row has none.",
                    "write prompt and completion strings",
                )
            return example.prompt, example.completion
        *before, last = example.messages
        if not example.trained[-1] or any(example.trained[:-1]):
            message = "An encoder-decoder learns one answer a row: the last message, of the assistant."
            raise Unteachable(
                "one_answer", message, "split the conversation, or set weight 0 on earlier answers"
            )
        if self.tokenizer.chat_template is not None:
            return self._text(before, list(example.tools), ask=True), last["content"]
        if len(before) > 1 or example.tools:
            raise self._no_template()
        return before[0]["content"], last["content"]

    def _no_template(self) -> Unteachable:
        return Unteachable(
            "no_chat_template",
            "The row is a conversation, but the base model's tokenizer has no chat template.",
            "choose the instruction-tuned variant of the base, give a data.template, or write plain prompt "
            "and completion strings",
        )

    def _given(self, example: Example) -> Text:
        vocab = len(self.tokenizer)
        bad = next((at for at, token in enumerate(example.token_ids) if not 0 <= token < vocab), None)
        if bad is not None:
            raise Unteachable(
                "token_out_of_range",
                f"The token {example.token_ids[bad]} is not in the tokenizer, which has {vocab:,}.",
                "tokenise with the base's own tokenizer",
                f"input_ids[{bad}]",
            )
        targets = example.token_targets
        if self.reading.train_on == "all":
            targets = (True,) * len(example.token_ids)
        return Text("", (), plain=False, append_eos=False, ids=example.token_ids, targets=targets)

    def _segments(self, example: Example) -> Text:
        text, spans = "", []
        for piece, trained in example.segments:
            if (trained or self.reading.train_on == "all") and piece:
                spans.append((len(text), len(text) + len(piece)))
            text += piece
        return Text(text, tuple(spans), plain=False, append_eos=False)

    def _end_token(self) -> None:
        if self.tokenizer.eos_token_id is None:
            raise Unteachable(
                "no_eos_token",
                "The tokenizer has no EOS token, so a model could never learn to stop.",
                "set eos_token in the base's tokenizer_config.json",
            )

    def _said_as(self, messages: list[dict[str, Any]], tools: bool = False) -> list[dict[str, Any]]:
        """Messages in the words that this template knows."""
        jinja = self.tokenizer.get_chat_template(None, [{}] if tools else None)
        made = []
        for message in messages:
            if message["role"] == "developer" and "developer" not in jinja:
                # OpenAI's newer name for system; most templates drop what they do not know.
                message = {**message, "role": "system"}
            if message.get("reasoning_content") and "reasoning_content" not in jinja:
                # Models that reason write it so; templates for others would leave it out in silence.
                message = dict(message)
                reasoning = message.pop("reasoning_content").strip()
                message["content"] = f"<think>\n{reasoning}\n</think>\n\n{message['content']}"
            made.append(message)
        return made

    def _conversation(self, line: Record, example: Example, report: Notes) -> Text:
        trained, tools = list(example.trained), list(example.tools)
        if self.reading.train_on == "last_assistant":
            last = max((index for index, yes in enumerate(trained) if yes), default=-1)
            trained = [index == last for index in range(len(trained))]
        messages = self._said_as(list(example.messages), bool(tools))
        if any(trained) and messages[-1]["role"] != "assistant" and self.reading.train_on != "all":
            # Nobody learns from what comes after the last answer.
            until = max(index for index, yes in enumerate(trained) if yes) + 1
            messages, trained = messages[:until], trained[:until]
            report.note("trailing_messages", line)
        jinja = self.tokenizer.get_chat_template(None, tools or None)
        whole = self._text(messages, tools)
        self._nothing_dropped(whole, messages, tools)
        ended = whole.rstrip().endswith(self.end_marks)
        if self.reading.train_on == "all":
            append_eos = not ended
            turns = [(0, len(whole))]
            report.found_by = "all tokens"
        else:
            turns = self._turns(line, whole, messages, tools, trained, jinja, report)
            append_eos = trained[-1] and not ended
        if append_eos:
            self._end_token()
            report.note("eos_appended", line)
        return Text(whole, tuple(turns), plain=False, append_eos=append_eos)

    def _turns(
        self,
        line: Record,
        whole: str,
        messages: list[dict[str, Any]],
        tools: list[dict[str, Any]],
        trained: list[bool],
        jinja: str,
        report: Notes,
    ) -> list[tuple[int, int]]:
        """The characters of every trained turn, by two methods that agree."""
        spans: list[tuple[int, int]] = []
        for index, yes in enumerate(trained):
            if yes:
                start, end = self._said(whole, messages, tools, index)
                if messages[index]["content"].strip() not in whole[start:end]:
                    report.note("rewritten_content", line)
                spans.append((start, end))
        turns = [(start, self._trimmed(whole, start, end)) for start, end in spans]
        if _GENERATION.search(jinja):
            others = any(
                message["role"] == "assistant" and not yes
                for message, yes in zip(messages, trained, strict=True)
            )
            turns = self._agreed(whole, messages, tools, jinja, spans, turns, others)
            report.found_by = "prefixes and {% generation %}"
        else:
            report.found_by = "prefixes and placeholders"
            contents = self._contents(whole, messages, tools)
            if contents is None:
                report.note("unchecked_masks", line)
            else:
                self._same(whole, turns, contents, trained)
        return self._with_ends(whole, turns)

    def _contents(
        self, whole: str, messages: list[dict[str, Any]], tools: list[dict[str, Any]]
    ) -> list[tuple[int, int, int]] | None:
        """(message, start, end): the characters of messages' own texts, wherever the template writes them,
        found by rendering placeholders; None: it changes texts, so that nothing can be said."""
        marked = [
            {**message, "content": f"qzPLACE{index}HOLDERqz"} if message["content"].strip() else message
            for index, message in enumerate(messages)
        ]
        try:
            skeleton = self._text(marked, tools)
        except Unteachable:
            return None
        # Texts of the template, and between them the numbers of the messages.
        pieces = _PLACEHOLDER.split(skeleton)
        found: list[tuple[int, int, int]] = []
        if not whole.startswith(pieces[0]):
            return None
        at = len(pieces[0])
        for number, following in zip(pieces[1::2], pieces[2::2], strict=True):
            text = messages[int(number)]["content"]
            for candidate in (text, text.strip(), text.rstrip(), text.lstrip()):
                if whole.startswith(candidate, at) and whole.startswith(following, at + len(candidate)):
                    found.append((int(number), at, at + len(candidate)))
                    at += len(candidate) + len(following)
                    break
            else:
                return None
        return found if at == len(whole) else None

    def _same(
        self,
        whole: str,
        turns: list[tuple[int, int]],
        contents: list[tuple[int, int, int]],
        trained: list[bool],
    ) -> None:
        """Raises Unteachable where a trained message is nowhere wholly among the targets, or an untrained one
        is."""
        inside = {
            index
            for index, start, end in contents
            if any(first <= start and end <= last for first, last in turns)
        }
        for index, start, end in contents:
            touched = any(first < end and start < last for first, last in turns)
            if index in inside if trained[index] else not touched:
                continue
            seen = " ".join(shown(whole[first:last], 60) for first, last in turns)
            raise Unteachable(
                "masks_disagree",
                f"The message's own text is {shown(whole[start:end], 60)}, which is "
                f"{'not all' if trained[index] else 'partly'} in what follows the generation prompts: "
                f"{seen}.",
                "the template puts messages into another order or place than it asks for them",
                f"messages[{index}]",
            )

    def _with_ends(self, whole: str, turns: list[tuple[int, int]]) -> list[tuple[int, int]]:
        """The turns with the end marks that `eos` wants as targets."""
        if self.reading.eos == "last":
            return [(start, self._unended(whole, start, end)) for start, end in turns[:-1]] + turns[-1:]
        if self.reading.eos == "all" and (eos := self.tokenizer.eos_token):
            ends = [(found.start(), found.end()) for found in re.finditer(re.escape(eos), whole)]
            return _merged([*turns, *ends])
        return turns

    def _unended(self, whole: str, start: int, end: int) -> int:
        """The end of a turn without its end mark."""
        said = whole[start:end].rstrip()
        mark = max((mark for mark in self.end_marks if said.endswith(mark)), key=len, default="")
        return start + len(said) - len(mark) if mark else end

    def _text(self, messages: list[dict[str, Any]], tools: list[dict[str, Any]], ask: bool = False) -> str:
        """The template's text for these messages; `ask` adds the generation prompt."""
        import jinja2

        try:
            text: str = self.tokenizer.apply_chat_template(
                messages, tools=tools or None, tokenize=False, add_generation_prompt=ask
            )
        # A template is a program from the base model: it may end with any error of plain expressions.
        except (
            jinja2.TemplateError,
            TypeError,
            ValueError,
            LookupError,
            AttributeError,
            ArithmeticError,
            RecursionError,
        ) as error:
            message = f"The chat template refuses the row: {clean(str(error))[:300]}"
            hint = "the order and kinds of the messages must be such as this base model was made for"
            raise Unteachable("template_error", message, hint) from error
        return text

    def _said(
        self, whole: str, messages: list[dict[str, Any]], tools: list[dict[str, Any]], index: int
    ) -> tuple[int, int]:
        """The characters of `whole` that the model says in message `index`."""
        until = whole if index == len(messages) - 1 else self._text(messages[: index + 1], tools)
        if index:
            asked = self._text(messages[:index], tools, ask=True)
            start = len(asked)
        else:
            # Nothing to render before the first message: the generation prompt is found by itself.
            asked = self._text(messages[:1], tools, ask=True)
            header = asked[len(until) :] if asked.startswith(until) else ""
            start = until.find(header) + len(header) if header in until else 0
            asked = until[:start]
        path = f"messages[{index}]"
        if not until.startswith(asked):
            raise Unteachable(
                "not_a_prefix",
                "The chat template does not go on from its own generation prompt in this turn: after "
                f"{shown(_tail(asked, until))} it writes {shown(until[_common(asked, until) :], 40)}.",
                "this template cannot be trained on as it is; use one that renders turn after turn",
                path,
            )
        if not whole.startswith(until):
            shared = _common(until, whole)
            raise Unteachable(
                "not_a_prefix",
                "The chat template writes this turn otherwise once more messages follow it: "
                f"{shown(until[shared:], 40)} becomes {shown(whole[shared:], 40)}.",
                'set data.turns to "apart" (a row for each turn), or give "weight": 0 to all assistant '
                "messages but the last",
                path,
            )
        return start, len(until)

    def _trimmed(self, whole: str, start: int, end: int) -> int:
        """The end of a turn without the blanks after its end mark: at serving nobody asks for those."""
        said = whole[start:end].rstrip()
        return start + len(said) if said.endswith(self.end_marks) else end

    def _agreed(
        self,
        whole: str,
        messages: list[dict[str, Any]],
        tools: list[dict[str, Any]],
        jinja: str,
        spans: list[tuple[int, int]],
        turns: list[tuple[int, int]],
        others: bool,
    ) -> list[tuple[int, int]]:
        """The turns, compared with what the template itself marks. `others`: there are untrained answers too.

        Both must start at the same character and end at the same one, blanks after the end mark aside; of
        those the template's choice is taken.
        """
        from transformers.utils.chat_template_utils import render_jinja_template

        # apply_chat_template gives these marks only after mapping them to tokens, and loses blanks there.
        texts, marks = render_jinja_template(
            conversations=[messages],
            tools=tools or None,
            chat_template=jinja,
            return_assistant_tokens_mask=True,
            **self.tokenizer.special_tokens_map,
        )
        marked = _merged([(start, end) for start, end in marks[0] if end > start])
        agreed = []
        for (start, end), (_, trimmed) in zip(spans, turns, strict=True):
            inside = [mark for mark in marked if mark[0] < end and mark[1] > start]
            marked = [mark for mark in marked if mark not in inside]
            same = len(inside) == 1 and inside[0][0] == start and texts[0] == whole
            until = inside[0][1] if inside else start
            if not same or not (
                until == trimmed or not whole[min(until, trimmed) : max(until, trimmed)].strip()
            ):
                seen = whole[inside[0][0] : inside[-1][1]] if inside else ""
                raise Unteachable(
                    "masks_disagree",
                    f"The template's {{% generation %}} marks {shown(seen, 120)} in a turn, but what follows "
                    f"its generation prompt is {shown(whole[start:trimmed], 120)}.",
                    "{% generation %} must hold the whole answer with its end token, and nothing else",
                )
            agreed.append((start, until))
        if marked and not others:
            seen = whole[marked[0][0] : marked[0][1]]
            raise Unteachable(
                "masks_disagree", f"The template's {{% generation %}} marks {shown(seen)}, no answer."
            )
        return agreed

    def _nothing_dropped(
        self, whole: str, messages: list[dict[str, Any]], tools: list[dict[str, Any]]
    ) -> None:
        """A template skips in silence what it was not written for: tools, tool messages, unknown roles."""
        for tool in tools:
            name = tool["function"]["name"]
            if name not in whole:
                raise Unteachable(
                    "template_drops_tools",
                    f"The base's chat template does not mention the tool {shown(name)}.",
                    "it was made without tools: choose a base that knows them, or remove tools from the rows",
                    "tools",
                )
        for index, message in enumerate(messages):
            for call in message.get("tool_calls", ()):
                name = call["function"]["name"]
                if name not in whole:
                    raise Unteachable(
                        "template_drops_tools",
                        f"The base's chat template does not write the call of {shown(name)}.",
                        "choose a base whose template knows tools, or write the call into the content",
                        f"messages[{index}].tool_calls",
                    )
            content = message["content"].strip()
            if content and content not in whole and self._same_without(whole, messages, tools, index):
                raise Unteachable(
                    "template_drops_message",
                    f"The base's chat template leaves out this message of the role {message['role']}.",
                    "put the text into a message that the template knows",
                    f"messages[{index}]",
                )

    def _same_without(
        self, whole: str, messages: list[dict[str, Any]], tools: list[dict[str, Any]], index: int
    ) -> bool:
        try:
            return len(messages) > 1 and self._text(messages[:index] + messages[index + 1 :], tools) == whole
        except Unteachable:
            return False


def _merged(spans: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Sorted spans, those that touch made one."""
    made: list[tuple[int, int]] = []
    for start, end in sorted(spans):
        if made and start <= made[-1][1]:
            made[-1] = (made[-1][0], max(made[-1][1], end))
        else:
            made.append((start, end))
    return made


def _common(one: str, other: str) -> int:
    """How many first characters two strings share."""
    for index, (a, b) in enumerate(zip(one, other, strict=False)):
        if a != b:
            return index
    return min(len(one), len(other))


def _tail(one: str, other: str) -> str:
    """The last characters that two strings share at their start."""
    end = _common(one, other)
    return one[max(0, end - 40) : end]
