"""A preview as people read it: for a terminal, in colour or with «marks», and as one page of HTML.

What is shown is text of strangers: control characters, which could move a terminal's cursor or turn the order
of a line around, are written as escapes, and HTML is escaped.
"""

from collections.abc import Iterator, Mapping
from html import escape
from itertools import groupby
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

Found = Mapping[str, Any]

HAPPENED = {
    "dropped": "dropped: it is too long",
    "truncated": "cut: it was too long",
    "split": "split into several rows: it was too long",
    "merged_boundaries": "a token holds the end of the prompt and the beginning of the answer; it is learned",
    "eos_appended": "an end token was put behind it",
    "rewritten_content": "the template changes the answer's text",
    "unchecked_masks": "the template changes texts, so that the targets were found in one way only",
    "trailing_messages": "messages behind the last answer are read by nobody",
}


def printable(text: str) -> str:
    """Text that no terminal and no browser can take for anything else; line ends stay, and are marked."""
    if text.isprintable():
        return text
    return "".join(map(_character, text))


def _character(character: str) -> str:
    if character == "\n":
        return "⏎\n"
    if character == "\t":
        return "⇥"
    if character.isprintable():
        return character
    return f"\\u{ord(character):04x}"


def pieces(sequence: Found) -> Iterator[tuple[str, bool, bool, list[Found]]]:
    """(text, whether it is learned, whether a special token, its tokens), in the order of the text.

    Most pieces are one token. Where several hold bytes of the same character, they are one piece, which is
    shown as learned if any of them is.
    """
    text, at = sequence["text"], 0
    # Special tokens that are in no text have no width, and stand where the token before them ends.
    places = (
        (token["end"], index if token.get("special") else -1, token)
        for index, token in enumerate(sequence["tokens"])
    )
    for _, same in groupby(places, key=lambda place: place[:2]):
        tokens = [token for *_, token in same]
        start, end = max(at, tokens[0]["start"]), tokens[-1]["end"]
        if start > at:
            yield text[at:start], False, False, []
        special = any(token.get("special") for token in tokens)
        shown = text[start:end] or "".join(token["text"] for token in tokens if token.get("special"))
        yield shown, any(token["trained"] for token in tokens), special, tokens
        at = max(at, end)
    if at < len(text):
        yield text[at:], False, False, []


def outside(sequence: Found) -> tuple[str, str]:
    """What to write before and behind a sequence: text that is not in it."""
    before = f"✂ {sequence['before']:,} characters ✂" if sequence["before"] else ""
    if sequence["tokens_left_out"]:
        return before, f"… {sequence['tokens_left_out']:,} more tokens"
    return before, f"✂ {sequence['after']:,} characters ✂" if sequence["after"] else ""


def heading(row: Found, sequence: Found | None) -> str:
    """Which row this is, and what became of it."""
    words = f"{row['file']}, line {row['line']}" if row["file"] else f"line {row['line']}"
    if sequence is None:
        return words
    if sequence["row"]:
        words += f", row {sequence['row'] + 1} of it"
    if sequence["name"]:
        words += f", {sequence['name']}"
    counts = sequence["counts"]
    words += f": {counts['tokens']:,} tokens, {counts['trained']:,} learned"
    if sequence["label"] is not None:
        words += f", label {sequence['label']}"
    return words


def remarks(row: Found) -> list[str]:
    """What happened to a row, in words."""
    found = [HAPPENED.get(kind, kind.replace("_", " ")) for kind in row["happened"]]
    if row["lost_tokens"]:
        found.append(f"{row['lost_tokens']:,} tokens are lost")
    return found


def problems(row: Found) -> list[str]:
    return [
        f"{problem['code']}{' at ' + problem['path'] if problem['path'] else ''}: {problem['message']}"
        + (f" ({problem['hint']})" if problem["hint"] else "")
        for problem in row["problems"]
    ]


def figures(statistics: Found) -> list[tuple[str, str]]:
    """The statistics of a file, a line each."""
    length, packing = statistics["length"], statistics["packing"]
    told = [
        ("rows", f"{statistics['rows']:,}"),
        ("tokens", f"{statistics['tokens']:,}"),
        ("learned", f"{statistics['target_tokens']:,} ({statistics['trained_share']:.1%})"),
        ("length", f"p50 {length['p50']:,}, p95 {length['p95']:,}, max {length['max']:,}"),
        ("targets found by", statistics["targets_found_by"]),
    ]
    for kind in HAPPENED:
        count = statistics.get(kind, {"count": 0, "lines": []})
        if count["count"]:
            lines = ", ".join(map(str, count["lines"][:8])) + (", …" if len(count["lines"]) > 8 else "")
            told.append((kind.replace("_", " "), f"{count['count']:,} (lines {lines})"))
    if statistics["lost_tokens"]:
        told.append(("lost tokens", f"{statistics['lost_tokens']:,}"))
    ends = ", ".join(
        f"{name or 'no end token'} {count:,}" for name, count in statistics["last_targets"].items()
    )
    told += [
        ("last targets", ends),
        ("packed", f"{packing['full']:.1%} full, {packing['lines']:,} lines"),
        ("steps", f"{statistics['steps']:,}"),
        ("template", statistics["template_sha256"] or "none"),
    ]
    return told


# ------------------------------------------------------------------------------------------------- terminal


def show(found: Found, console: "Console") -> None:
    """Print a preview: learned text green, other text dim, special tokens reversed; without colours what is
    learned stands between « and »."""
    from rich.text import Text

    plain = console.color_system is None
    for row in found["rows"]:
        for sequence in row["sequences"] or [None]:
            console.print(Text(printable(heading(row, sequence)), style="bold"))
            if sequence is not None:
                console.print(_text(sequence, plain), soft_wrap=plain)
        for words in remarks(row):
            console.print(Text(printable(words), style="yellow"))
        for words in problems(row):
            console.print(Text(printable(words), style="red"))
        console.print()
    if found["statistics"] is not None:
        told = figures(found["statistics"])
        width = max(len(name) for name, _ in told)
        for name, value in told:
            console.print(Text.assemble((f"{name:{width}}  ", "dim"), printable(value)), soft_wrap=True)


def _text(sequence: Found, plain: bool) -> Any:
    from rich.text import Text

    before, after = outside(sequence)
    # Not Text(before, style=…): that would be the style of all that is appended, too.
    made, inside = Text(overflow="fold").append(before, style="red"), False
    for text, learned, special, _ in pieces(sequence):
        if plain and learned != inside:
            made.append("«" if learned else "»")
            inside = learned
        colour = "green" if learned else "dim"
        made.append(printable(text), style=f"{colour} reverse" if special else colour)
    if plain and inside:
        made.append("»")
    return made.append(after, style="red")


# ----------------------------------------------------------------------------------------------------- HTML

STYLE = """
:root { color-scheme: light dark; }
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 72rem; padding: 0 1rem; }
h1 { font-size: 1.3rem; } h2 { font-size: 1rem; margin: 1.6rem 0 .3rem; }
pre { font: 14px/1.9 ui-monospace, monospace; white-space: pre-wrap; overflow-wrap: anywhere; margin: 0;
  border: 1px solid #8886; border-radius: 6px; padding: .6rem .8rem; }
i { font-style: normal; border-left: 1px solid #8889; opacity: .62; }
i.y { opacity: 1; background: #2ea04344; border-left-color: #2ea043; }
b { font-weight: normal; }
i.s { font-weight: 600; background: #8883; } i.s.y { background: #2ea04388; }
p { margin: .3rem 0; } .w { color: #9a6700; } .e { color: #d1242f; }
table { border-collapse: collapse; } td { padding: .1rem 1.2rem .1rem 0; vertical-align: top; }
td:first-child { opacity: .65; }
"""
CONTENT_SECURITY = "default-src 'none'; style-src 'unsafe-inline'; frame-ancestors 'none'; base-uri 'none'"
"""Of the page: nothing is loaded and nothing runs, whatever the rows hold."""


def page(found: Found, title: str) -> str:
    """A preview as a page that needs nothing but itself: tokens with their borders, learned ones green, the
    number of a token when the mouse is over it."""
    body = [f"<h1>{_html(title)}</h1>"]
    body += [f'<p class="w">{_html(words)}</p>' for words in found["warnings"]]
    for row in found["rows"]:
        for sequence in row["sequences"] or [None]:
            body.append(f"<h2>{_html(heading(row, sequence))}</h2>")
            if sequence is not None:
                spans = "".join(_span(*piece) for piece in pieces(sequence))
                before, after = (f'<b class="e">{words}</b>' if words else "" for words in outside(sequence))
                body.append(f"<pre>{before}{spans}{after}</pre>")
        body += [f'<p class="w">{_html(words)}</p>' for words in remarks(row)]
        body += [f'<p class="e">{_html(words)}</p>' for words in problems(row)]
    if found["statistics"] is not None:
        cells = "".join(
            f"<tr><td>{_html(name)}</td><td>{_html(value)}</td></tr>"
            for name, value in figures(found["statistics"])
        )
        body.append(f"<h2>All rows</h2><table>{cells}</table>")
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{_html(title)}</title>'
        f"<style>{STYLE}</style><body>{''.join(body)}</body></html>"
    )


def _span(text: str, learned: bool, special: bool, tokens: list[Found]) -> str:
    if not tokens:
        return _html(text)
    kinds = "".join(letter for letter, yes in (("y", learned), ("s", special)) if yes)
    marked = f' class="{" ".join(kinds)}"' if kinds else ""
    tags = [token["tag"] for token in tokens if "tag" in token]
    title = " ".join([*(str(token["id"]) for token in tokens), *tags[:1]])
    return f'<i{marked} title="{_html(title)}">{_html(text)}</i>'


def _html(text: str) -> str:
    return escape(printable(text))
