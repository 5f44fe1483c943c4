"""Record what other libraries say of how alike two texts are, as a golden file for the tests of our graders.

Run with an environment of its own, because they are no part of this project:

    python3 -m venv TEXT
    TEXT/bin/pip install rapidfuzz==3.14.6 rouge-score==0.1.2 nltk==3.10.4 sacrebleu==2.6.0
    TEXT/bin/python tools/golden_graders.py        writes tests/golden/similarity.json

Imports nothing of peft_service: what the file says must not depend on what it judges.
"""

import json
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path

import sacrebleu
from nltk.stem.porter import PorterStemmer
from nltk.translate.gleu_score import sentence_gleu
from nltk.translate.meteor_score import single_meteor_score
from rapidfuzz import fuzz
from rouge_score import rouge_scorer
from sacrebleu.tokenizers.tokenizer_13a import Tokenizer13a

TEXTS = [
    "the cat sat on the mat",
    "on the mat sat the cat",
    "The cat, sitting on its mat, is happily sleeping.",
    "A happy cat sleeps on mats.",
    'It costs $1,234.50 (or 5% more) - e.g. in 2024-25; "really"!',
    "It costs $1,234.5, or 5 % more, in 2024.",
    "yes",
    "Yes.",
    "no no no no",
    "no",
    "one two three four five six seven eight nine ten",
    "one two three four six five seven eight nine ten eleven",
    "The relational conditions were hopefully generalized by the national organizations' decisiveness",
    "Relations of conditional hopefulness generalise nationally; organized and decisive",
    "zero one two three four five six seven ten eleven",
    "zero one two three four five nine ten eleven twelve",
    "tokens &amp; entities &lt;b&gt; with-hyphens and under_scores",
    "token & entity <b> with hyphen and under scores",
    "x",
    "!!!",
    "a b c d",
    "a b c d",
    "Flying flies died; dying ties tied agreed feed bled conflated troubled sized hopping tanned falling",
    "fly die tie agree feed bleed conflate trouble size hop tan fall",
]
WORDS = """
caresses ponies ties caress cats feed agreed plastered bled motoring sing conflated troubled sized
hopping tanned falling hissing fizzed failing filing happy sky relational conditional rational
valenci hesitanci digitizer conformabli radicalli differentli vileli analogousli vietnamization
predication operator feudalism decisiveness hopefulness callousness formaliti sensitiviti
sensibiliti triplicate formative formalize electriciti electrical hopeful goodness revival allowance
inference airliner gyroscopic adjustable defensible irritant replacement adjustment dependent
adoption homologou communism activate angulariti homologous effective bowdlerize probate rate cease
controll roll generalizations oscillators yes y toy toys crying cries eye eyed bee a as is ion ions
skies dying agreement abilities universally organization multidimensional queue syzygy
""".split()  # noqa: SIM905


class NoSynonyms:
    """WordNet's place in METEOR, empty."""

    @staticmethod
    def synsets(word: str) -> list[str]:
        return []


def main() -> None:
    cut = Tokenizer13a()
    stemmer = PorterStemmer(mode="ORIGINAL_ALGORITHM")
    orders = ["rouge1", "rouge2", "rouge3", "rouge4", "rouge5", "rougeL"]
    rouge = rouge_scorer.RougeScorer(orders)
    cases = []
    for text, reference in [*pairwise(TEXTS), *((b, a) for a, b in pairwise(TEXTS[::3]))]:
        words, wanted = cut(text).split(), cut(reference).split()
        small = cut(text.lower()).split(), cut(reference.lower()).split()
        found = rouge.score(reference, text)
        cases.append(
            {
                "text": text,
                "reference": reference,
                "fuzzy_match": fuzz.ratio(text, reference) / 100,
                "bleu": sacrebleu.sentence_bleu(text, [reference]).score / 100,
                "gleu": sentence_gleu([wanted], words),
                "meteor": single_meteor_score(
                    small[1], small[0], preprocess=str, stemmer=stemmer, wordnet=NoSynonyms, gamma=0.5
                ),
                **{f"rouge_{order[5:].lower()}": found[order].fmeasure for order in orders},
            }
        )
    told = {
        "versions": {name: version(name) for name in ("rapidfuzz", "rouge-score", "nltk", "sacrebleu")},
        "cases": cases,
        "stems": {word: stemmer.stem(word) for word in WORDS},
    }
    path = Path(__file__).resolve().parents[1] / "tests" / "golden" / "similarity.json"
    path.write_text(json.dumps(told, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
