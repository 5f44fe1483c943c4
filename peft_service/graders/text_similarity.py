"""Text similarity: how much of a reference a text has, by a published measure, from 0 to 1.

OpenAI says which measures there are, not how each cuts text into words. Here:

| Measure | Definition | Same as |
|---|---|---|
| fuzzy_match | 2 LCS / (n + m) over characters | `rapidfuzz.fuzz.ratio` / 100 |
| bleu | Papineni et al. 2002, up to 4-grams, exponential smoothing (Chen, Cherry 2014, method 3), orders that the text is too short for left out; words by mteval-v13a | `sacrebleu.sentence_bleu` / 100 |
| gleu | Wu et al. 2016, arXiv:1609.08144, §5.2: the smaller of precision and recall over all 1- to 4-grams; words by mteval-v13a | `nltk.translate.gleu_score` |
| meteor | Banerjee, Lavie 2005, stages exact and Porter stem (no synonyms), α 0.9, β 3, γ 0.5; words by mteval-v13a, lower case | `nltk.translate.meteor_score` without WordNet |
| rouge_1 … rouge_5, rouge_l | Lin 2004, F1; words are runs of letters and digits, lower case, no stemming | `rouge_score`, on ASCII text |
"""  # noqa: E501 - a table

import math
import re
from collections import Counter
from collections.abc import Callable, Collection, Hashable, Iterator, Sequence
from itertools import pairwise
from typing import Literal

from peft_service.formats import Problem
from peft_service.graders import Allowed, Grader, Judge, Outcome, Pair, template
from peft_service.graders.porter import stem

MAX_CHARACTERS = 20_000
"""Of what is compared; measures by longest common subsequences take time n * m."""


class TextSimilarity(Grader):
    type: Literal["text_similarity"] = "text_similarity"

    input: str
    """A template; mostly `{{sample.output_text}}`."""
    reference: str
    """A template; mostly `{{item.…}}`."""
    evaluation_metric: Literal[
        "cosine", "fuzzy_match", "bleu", "gleu", "meteor",
        "rouge_1", "rouge_2", "rouge_3", "rouge_4", "rouge_5", "rouge_l",
    ]  # fmt: skip

    def problems(self, columns: Collection[str] | None, allowed: Allowed) -> Iterator[Problem]:
        yield from template.problems(self.input, "input", columns)
        yield from template.problems(self.reference, "reference", columns)
        if self.evaluation_metric == "cosine":
            yield Problem(
                "evaluation_metric",
                "not_supported",
                "cosine compares embeddings, and this service has no embedding model.",
                "take fuzzy_match, bleu, gleu, meteor or rouge_l, or a score_model",
            )

    def grade(self, pairs: Sequence[Pair], judge: Judge) -> list[Outcome]:
        return [self._grade(pair) for pair in pairs]

    def _grade(self, pair: Pair) -> Outcome:
        try:
            found, wanted = template.rendered(self.input, pair), template.rendered(self.reference, pair)
        except template.Unfilled as error:
            return Outcome(0.0, error.fault, error.detail)
        if max(len(found), len(wanted)) > MAX_CHARACTERS:
            return Outcome(0.0, "other_error", f"a text has more than {MAX_CHARACTERS} characters")
        return Outcome(MEASURES[self.evaluation_metric](found, wanted))


def fuzzy_match(text: str, reference: str) -> float:
    total = len(text) + len(reference)
    return 2 * _lcs(text, reference) / total if total else 1.0


def bleu(text: str, reference: str) -> float:
    found, wanted = words_13a(text), words_13a(reference)
    smallest, logs = 1.0, []
    for order in range(1, 5):
        grams = _grams(found, order)
        if not grams:  # the text is shorter than the order
            break
        right = (grams & _grams(wanted, order)).total()
        if not right:
            if order == 1:
                return 0.0
            smallest *= 2
        logs.append(math.log((right or 1 / smallest) / grams.total()))
    if not logs:
        return 0.0
    brevity = min(0.0, 1 - len(wanted) / len(found))
    return math.exp(brevity + sum(logs) / len(logs))


def gleu(text: str, reference: str) -> float:
    found, wanted = words_13a(text), words_13a(reference)
    mine = sum((_grams(found, order) for order in range(1, 5)), Counter[Hashable]())
    theirs = sum((_grams(wanted, order) for order in range(1, 5)), Counter[Hashable]())
    most = max(mine.total(), theirs.total())
    return (mine & theirs).total() / most if most else 0.0


def meteor(text: str, reference: str) -> float:
    found, wanted = words_13a(text.lower()), words_13a(reference.lower())
    # Stages: each word that an earlier one has not matched is matched from the end of both texts, as the
    # reference implementation does; chunks are counted in the order of the text.
    left, right = list(enumerate(found)), list(enumerate(wanted))
    matches: list[tuple[int, int]] = []
    for form in (str, stem):
        for place in range(len(left) - 1, -1, -1):
            for other in range(len(right) - 1, -1, -1):
                if form(left[place][1]) == form(right[other][1]):
                    matches.append((left.pop(place)[0], right.pop(other)[0]))
                    break
    if not matches:
        return 0.0
    matches.sort()
    chunks = 1 + sum((a + 1, b + 1) != following for (a, b), following in pairwise(matches))
    precision, recall = len(matches) / len(found), len(matches) / len(wanted)
    mean = precision * recall / (0.9 * precision + 0.1 * recall)
    return mean * (1 - 0.5 * (chunks / len(matches)) ** 3)


def rouge_n(order: int) -> Callable[[str, str], float]:
    def measure(text: str, reference: str) -> float:
        found, wanted = _grams(_plain(text), order), _grams(_plain(reference), order)
        return _f1((found & wanted).total(), found.total(), wanted.total())

    return measure


def rouge_l(text: str, reference: str) -> float:
    found, wanted = _plain(text), _plain(reference)
    return _f1(_lcs(found, wanted), len(found), len(wanted))


MEASURES: dict[str, Callable[[str, str], float]] = {
    "fuzzy_match": fuzzy_match,
    "bleu": bleu,
    "gleu": gleu,
    "meteor": meteor,
    **{f"rouge_{order}": rouge_n(order) for order in range(1, 6)},
    "rouge_l": rouge_l,
}


def words_13a(text: str) -> list[str]:
    """The words of a text as mteval-v13a cuts them: punctuation apart, but not inside numbers."""
    text = text.replace("<skipped>", "").replace("-\n", "").replace("\n", " ")
    if "&" in text:
        for entity, character in (("&quot;", '"'), ("&amp;", "&"), ("&lt;", "<"), ("&gt;", ">")):
            text = text.replace(entity, character)
    text = re.sub(r"([{-~\[-` -&(-+:-@/])", r" \1 ", f" {text} ")
    text = re.sub(r"([^0-9])([.,])", r"\1 \2 ", text)
    text = re.sub(r"([.,])([^0-9])", r" \1 \2", text)
    text = re.sub(r"([0-9])(-)", r"\1 \2 ", text)
    return text.split()


def _plain(text: str) -> list[str]:
    return re.findall(r"[^\W_]+", text.lower())


def _grams(words: Sequence[str], order: int) -> Counter[Hashable]:
    return Counter(tuple(words[start : start + order]) for start in range(len(words) - order + 1))


def _f1(common: int, found: int, wanted: int) -> float:
    return 2 * common / (found + wanted) if common else 0.0


def _lcs(one: Sequence[Hashable], other: Sequence[Hashable]) -> int:
    """Length of the longest common subsequence: a row of the table is the bits of a number (Hyyrö 2004)."""
    places: dict[Hashable, int] = {}
    for place, element in enumerate(one):
        places[element] = places.get(element, 0) | 1 << place
    ones = (1 << len(one)) - 1
    row = ones
    for element in other:
        matched = row & places.get(element, 0)
        row = ((row + matched) | (row - matched)) & ones
    return len(one) - row.bit_count()
