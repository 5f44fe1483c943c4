"""Graders: OpenAI's meanings, other libraries' numbers, and scripts that cannot get out."""

import json
import math
import os
import random
import socket
from pathlib import Path

import pytest
from pydantic import TypeAdapter, ValidationError

from peft_service import graders
from peft_service.errors import InvalidRequest
from peft_service.graders import Allowed, AnyGrader, Judge, Outcome, Sample, check
from peft_service.graders.porter import stem
from peft_service.graders.sandbox import Sandbox, missing
from peft_service.graders.text_similarity import MEASURES

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "similarity.json").read_text())
ADAPTER = TypeAdapter(AnyGrader)
CHECK = {"type": "string_check", "name": "c", "input": "{{sample.output_text}}", "operation": "eq"}
needs_sandbox = pytest.mark.skipif(bool(missing()), reason=f"this machine lacks {missing()}")


def grader_of(told):
    return ADAPTER.validate_json(json.dumps(told))


def outcomes(told, pairs, allowed=Allowed()):
    with Judge(grader_of(told), allowed) as judge:
        return judge([item for item, _ in pairs], [Sample(text) for _, text in pairs])


def refused(told, columns=None, allowed=Allowed()):
    with pytest.raises(InvalidRequest) as caught:
        check(grader_of(told), columns, allowed)
    return caught.value


# ------------------------------------------------------------------------------------------------ templates


@pytest.mark.parametrize(
    ("template", "wanted"),
    [
        ("{{item.a}}", "x"),
        ("{{ item.a }}-{{item.n}}", "x-3"),
        ("{{item.deep.list[1].b}}", "y"),
        ("{{item.deep.list.1.b}}", "y"),
        ('{{item["a key"]}}', "z"),
        ("{{item.deep}}", '{"list": [0, {"b": "y"}]}'),
        ("{{item.no}}", "null"),
        ("{{item.curly}}", "{{item.a}}"),
        ("{{sample.output_text}}", '{"r": [true]}'),
        ("{{sample.output_json.r[0]}}", "true"),
        ("{{sample.output_tools}}", "[]"),
        ("plain { } text", "plain { } text"),
    ],
)
def test_a_place_is_filled(template, wanted):
    item = {"a": "x", "n": 3, "deep": {"list": [0, {"b": "y"}]}, "a key": "z", "no": None}
    item["curly"] = "{{item.a}}"
    told = CHECK | {"input": template, "reference": wanted.replace("{{item.a}}", "{{item.curly}}")}
    assert outcomes(told, [(item, '{"r": [true]}')]) == [Outcome(1.0)]


@pytest.mark.parametrize(
    ("template", "code", "words"),
    [
        ("{{item.anser}}", "unknown_variable", 'did you mean "answer"?'),
        ("{{item.b}}", "unknown_variable", "rows have answer, question"),
        ("{{sample.output_txt}}", "unknown_variable", 'did you mean "output_text"?'),
        ("{{sample.output_text.a}}", "unknown_variable", "is a string"),
        ("{{items.answer}}", "unknown_variable", 'did you mean "item"?'),
        ("{{item}}", "unknown_variable", "names no variable"),
        ("{{item.a b}}", "invalid_template", "is no path"),
        ("{{item.__class__()}}", "invalid_template", "is no path"),
        ("{{}}", "invalid_template", "is no path"),
        ("{{item.answer", "invalid_template", "has no }}"),
    ],
)
def test_a_place_that_can_never_be_filled_is_refused(template, code, words):
    error = refused(CHECK | {"reference": template}, {"question", "answer"})
    assert (error.code, error.param) == (code, "grader.reference")
    assert words in error.message


def test_a_place_without_a_value_costs_that_text_alone():
    told = CHECK | {"input": "{{sample.output_json.a}}", "reference": "{{item.a}}"}
    pairs = [({"a": "1"}, '{"a": 1}'), ({"a": "1"}, "no json"), ({"a": "1"}, '{"b": 1}'), ({}, '{"a": 1}')]
    assert [(o.score, o.fault) for o in outcomes(told, pairs)] == [
        (1.0, ""), (0.0, "sample_parse_error"), (0.0, "sample_parse_error"), (0.0, "invalid_variable_error"),
    ]  # fmt: skip


# ------------------------------------------------------------------------------------------- types by type


@pytest.mark.parametrize(
    ("operation", "text", "score"),
    [
        ("eq", "Paris", 1), ("eq", "paris", 0), ("eq", "Paris.", 0), ("ne", "Paris", 0), ("ne", "Rome", 1),
        ("like", "In Paris.", 1), ("like", "In paris.", 0), ("ilike", "in PARIS", 1), ("ilike", "Pari", 0),
    ],
)  # fmt: skip
def test_string_check(operation, text, score):
    told = CHECK | {"operation": operation, "reference": "{{item.city}}"}
    assert outcomes(told, [({"city": "Paris"}, text)]) == [Outcome(score)]


@pytest.mark.parametrize("measure", MEASURES)
def test_similarity_is_what_other_libraries_say(measure):
    told = {
        "type": "text_similarity", "name": "t", "input": "{{sample.output_text}}",
        "reference": "{{item.reference}}", "evaluation_metric": measure,
    }  # fmt: skip
    found = outcomes(told, [(case, case["text"]) for case in GOLDEN["cases"]])
    assert [o.score for o in found] == pytest.approx([case[measure] for case in GOLDEN["cases"]], abs=1e-12)
    assert len({o.score for o in found}) > 1
    assert outcomes(told, [({"reference": ""}, "")])[0].score in (0.0, 1.0)


def test_stems_are_porters():
    assert {word: stem(word) for word in GOLDEN["stems"]} == GOLDEN["stems"]


def test_words_of_any_script_count():
    assert MEASURES["rouge_1"]("Zürich liegt am See", "zürich am see") == pytest.approx(6 / 7)
    assert MEASURES["rouge_l"]("東京 都", "東京 府") == 0.5


def test_longest_common_subsequences_are_those_of_the_table():
    generator = random.Random(0)
    for _ in range(200):
        one, other = ("".join(generator.choices("abc", k=generator.randrange(1, 12))) for _ in "ab")
        table = [[0] * (len(other) + 1) for _ in range(len(one) + 1)]
        for i, a in enumerate(one):
            for j, b in enumerate(other):
                table[i + 1][j + 1] = table[i][j] + 1 if a == b else max(table[i][j + 1], table[i + 1][j])
        assert MEASURES["fuzzy_match"](one, other) == 2 * table[-1][-1] / (len(one) + len(other))


def test_embeddings_are_refused_with_what_there_is_instead():
    told = CHECK | {"type": "text_similarity", "reference": "x", "evaluation_metric": "cosine"}
    del told["operation"]
    assert refused(told).code == "not_supported"
    assert "rouge_l" in refused(told).message


def multi(formula, **scores):
    """A formula over graders whose scores are 0 or 1."""
    return {
        "type": "multi",
        "name": "m",
        "graders": {name: CHECK | {"reference": "yes" if score else "no"} for name, score in scores.items()},
        "calculate_output": formula,
    }


@pytest.mark.parametrize(
    ("formula", "score"),
    [
        ("a", 1), ("a + b", 1), ("0.25 * a - b", 0.25), ("2 * a ^ 2 + b", 2), ("2 ^ 3 ^ a + b", 8),
        ("-a ^ 2 + b", -1), ("max(a, b, 0.5)", 1), ("min(a + b, 0.5)", 0.5), ("abs(b - a)", 1),
        ("floor(a / 2) + b", 0), ("ceil(a / 3) + b", 1), ("sqrt(4 * a) + b", 2), ("log(exp(a)) + b", 1),
        ("(a + 3) / 2 + b", 2), ("log(a + 7, 2) + b", 3), ("1e-3*a+b", 1e-3),
    ],
)  # fmt: skip
def test_a_formula_is_worked_out(formula, score):
    told = multi(formula, a=1, b=0) if "b" in formula.replace("abs", "") else multi(formula, a=1)
    (found,) = outcomes(told, [({}, "yes")])
    assert found.score == pytest.approx(score)
    assert found.parts["a"] == 1


@pytest.mark.parametrize(
    "formula", ["a / b", "log(b) + a", "sqrt(b - a)", "exp(1000 * a) + b", "9^9^9^9*a+b"]
)
def test_a_formula_without_a_value_is_a_fault(formula):
    (found,) = outcomes(multi(formula, a=1, b=0), [({}, "yes")])
    assert (found.score, found.fault) == (0.0, "formula_parse_error")


@pytest.mark.parametrize(
    ("formula", "code", "words"),
    [
        ("a + corect", "unknown_variable", 'did you mean "correct"?'),
        ("a", "unused_grader", "does not use it"),
        ("a + correct +", "invalid_formula", "not a formula"),
        ("a if correct else 0", "invalid_formula", "none of"),
        ("__import__('os')", "invalid_formula", "no function"),
        ("a.real + correct", "invalid_formula", "none of"),
        ("(lambda: a)()", "invalid_formula", "none of"),
        ("sqr(a) + correct", "invalid_formula", 'did you mean "sqrt"?'),
        ("max(a) + correct", "invalid_formula", "max takes 2 to 16"),
        ("'a' + correct", "invalid_formula", "no number"),
        ("True + a + correct", "invalid_formula", "no number"),
        ("(" * 60 + "-" * 60 + "a" + ")" * 60 + "+correct", "invalid_formula", "nested"),
        ("(" * 400 + "a" + ")" * 400, "invalid_formula", "not a formula"),
        ("a + correct + " + "9" * 400, "invalid_formula", "too large"),
    ],
)
def test_a_formula_that_is_none_is_refused(formula, code, words):
    error = refused(multi(formula, a=1, correct=1))
    assert error.code == code
    assert words in error.message


def test_several_graders_need_names_that_a_formula_can_use():
    assert refused(multi("max", max=1)).param == "grader.graders.max"
    assert "grader.graders.a-b" in refused(multi("a", **{"a-b": 1})).message
    one = multi("c * 2", c=1) | {"graders": CHECK | {"reference": "yes"}}
    assert outcomes(one, [({}, "yes")])[0].score == 2
    with pytest.raises(ValidationError):
        grader_of(multi("m", m=1) | {"graders": {"m": multi("a", a=1)}})
    inner = refused(multi("a", a=1) | {"graders": {"a": CHECK | {"reference": "{{item.x}}"}}}, {"y"})
    assert inner.param == "grader.graders.a.reference"


MODEL = {
    "type": "score_model", "name": "j", "model": "judge-1", "range": [0, 10],
    "input": [
        {"role": "system", "content": "Be strict."},
        {
            "role": "user",
            "content": [{"type": "input_text", "text": "Q: {{item.q}}"}, "A: {{sample.output_text}}"],
        },
    ],
    "sampling_params": {"temperature": 0.0, "max_completions_tokens": 50},
}  # fmt: skip


def test_a_model_is_asked_and_its_number_read():
    asked = []

    def ask(model, messages, sampling):
        asked.append((model, messages, sampling))
        answer = messages[1]["content"].splitlines()[1].removeprefix("A: ")
        if answer == "down":
            raise ConnectionError("no route")
        return answer

    texts = [
        '{"result": 7}', 'Well: {"x": {}} so {"result": 2.5}.', "7", '{"result": 11}', '{"result": "7"}',
    ]  # fmt: skip
    found = outcomes(MODEL, [({"q": "1+1"}, text) for text in [*texts, "down"]], Allowed(ask=ask))
    assert [o.score for o in found] == [7, 2.5, 0, 0, 0, 0]
    assert [o.fault for o in found[:2]] == ["", ""]
    assert {o.fault for o in found[2:5]} == {"model_grader_parse_error"}
    assert found[5].fault == "model_grader_server_error"
    assert "no route" in found[5].detail
    model, messages, sampling = next(a for a in asked if "7}" in a[1][1]["content"])
    assert (model, sampling) == ("judge-1", {"temperature": 0.0, "max_completions_tokens": 50})
    assert messages[0] == {"role": "system", "content": "Be strict."}
    assert messages[1]["content"].startswith("Q: 1+1\nA: ")
    assert "from 0 to 10" in messages[2]["content"]


def test_a_model_picks_a_label():
    told = {key: value for key, value in MODEL.items() if key != "range"}
    told |= {"type": "label_model", "labels": ["good", "bad"], "passing_labels": ["good"]}
    answers = iter(['{"result": "good"}', '{"result": "bad"}', '{"result": "ugly"}', '{"result": ["good"]}'])
    allowed = Allowed(ask=lambda model, messages, sampling: messages[1]["content"].splitlines()[1][3:])
    found = outcomes(told, [({"q": ""}, text) for text in answers], allowed)
    assert [(o.score, o.fault) for o in found] == [
        (1, ""), (0, ""), (0, "model_grader_parse_error"), (0, "model_grader_parse_error"),
    ]  # fmt: skip
    with pytest.raises(ValidationError):
        grader_of(told | {"passing_labels": ["great"]})


def test_without_somebody_to_ask_a_model_grader_is_refused():
    error = refused(MODEL)
    assert (error.code, error.param) == ("no_judge", "grader.model")
    assert "PEFT_SERVICE_JUDGE_URL" in error.message


def test_pictures_and_unknown_keys_are_refused():
    picture = [{"role": "user", "content": {"type": "input_image", "image_url": "http://x"}}]
    for wrong in (MODEL | {"input": picture}, CHECK, CHECK | {"reference": "", "refrence": ""}):
        with pytest.raises(ValidationError):
            grader_of(wrong)


# -------------------------------------------------------------------------------------------------- scripts

ISOLATED = Allowed(python="isolated")


def script(body, **more):
    return {"type": "python", "name": "p", "source": body, **more}


def test_scripts_are_off_unless_the_operator_allows_them():
    error = refused(script("def grade(sample, item): return 1"))
    assert error.code == "python_graders_off"
    assert "PEFT_SERVICE_PYTHON_GRADERS" in error.message


@needs_sandbox
def test_a_script_grades_many_texts():
    source = """
import json, re
seen = []
def grade(sample, item):
    seen.append(1)
    assert len(seen) == 1  # every call is the first
    words = re.findall("[a-z]+", sample["output_text"])
    return len(words) / item["most"] + (sample["output_json"] or {}).get("bonus", 0)
"""
    pairs = [({"most": 4}, "one two"), ({"most": 1}, '{"bonus": 2}')] * 500
    found = outcomes(script(source), pairs, ISOLATED)
    assert [o.score for o in found] == [0.5, 3.0] * 500


@needs_sandbox
@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("raise ValueError('no good')", "ValueError: no good, line 4"),
        ("return None", "TypeError"),
        ("return 'many'", "ValueError"),
        ("sys.exit(0)", "SystemExit"),
        ("os._exit(0)", "the process ended, exit status 0"),
        ("return len(b'x' * (3 << 30))", "MemoryError"),
        ("return grade(sample, item)", "RecursionError"),
        ("os.write(4, b'x' * 100_000); os.write(5, b'x' * 100_000)", ""),
    ],
)
def test_a_script_that_fails_gets_nothing_and_the_next_text_is_graded(line, words):
    source = f"import os, sys\ndef grade(sample, item):\n  if item['bad']:\n    {line}\n  return 0.5"
    found = outcomes(script(source), [({"bad": True}, ""), ({"bad": False}, "")], ISOLATED)
    assert (found[0].score, found[0].fault) == (0.0, "python_grader_runtime_error")
    assert words in found[0].detail
    assert found[1] == Outcome(0.5)


@needs_sandbox
def test_a_number_that_is_none_is_a_fault():
    (found,) = outcomes(script("def grade(sample, item): return float('inf')"), [({}, "")], ISOLATED)
    assert (found.score, found.fault) == (0.0, "other_error")


@needs_sandbox
def test_a_script_that_never_ends_is_ended():
    with Sandbox("def grade(sample, item):\n  while item: pass\n  return 1", seconds=1) as sandbox:
        assert "within 1 seconds" in sandbox.grade({}, True).problem
        assert sandbox.grade({}, False).score == 1


@needs_sandbox
@pytest.mark.parametrize(
    "attempt",
    [
        "open('/etc/passwd').read()",
        "open('{secret}').read()",
        "open('/proc/{parent}/environ').read()",
        "open('/proc/self/mem', 'r+b')",
        "os.listdir('{directory}')",
        "open('{directory}/new', 'w')",
        "open('new', 'w')",
        "os.unlink('{secret}')",
        "os.chmod('{secret}', 0o777)",
        "os.rename('{secret}', '{secret}2')",
        "os.symlink('/', '/tmp/root')",
        "os.kill({parent}, 0)",
        "os.fork()",
        "os.execv('/bin/true', ['true'])",
        "__import__('subprocess').run(['true'])",
        "__import__('threading').Thread(target=print).start()",
        "__import__('socket').socket()",
        "__import__('socket').socketpair()",
        "__import__('urllib.request').request.urlopen('http://127.0.0.1:{port}/')",
        "__import__('resource').setrlimit(7, (4096, 4096))",
        "exec('import ctypes; c = ctypes.CDLL(None, use_errno=True); r = c.ptrace(16, {parent}, 0, 0)') "
        "or (_ for _ in ()).throw(OSError('ptrace')) if __import__('ctypes').CDLL(None).ptrace(16, {parent}, "
        "0, 0) < 0 else 0",
    ],
)
def test_a_script_cannot_get_out(attempt, tmp_path):
    secret = tmp_path / "secret"
    secret.write_text("key")
    with socket.create_server(("127.0.0.1", 0)) as server:
        line = attempt.format(
            secret=secret, directory=tmp_path, parent=os.getpid(), port=server.getsockname()[1]
        )
        source = f"import os\ndef grade(sample, item):\n  {line}\n  return 1"
        (found,) = outcomes(script(source), [({}, "")], ISOLATED)
    assert (found.score, found.fault) == (0.0, "python_grader_runtime_error"), found
    assert [path.name for path in tmp_path.iterdir()] == ["secret"]
    assert secret.stat().st_mode & 0o777 != 0o777


@needs_sandbox
def test_a_script_has_no_environment_and_the_same_chances_every_time(monkeypatch):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hidden")
    source = (
        "import os, random\ndef grade(sample, item):\n"
        "  assert 'hidden' not in str(os.environ)\n  return random.random()"
    )
    found = outcomes(script(source), [({}, "")] * 3, ISOLATED)
    assert found[0].score > 0
    assert len({o.score for o in found}) == 1


@needs_sandbox
@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("def grade(sample, item) return 1", "SyntaxError"),
        ("def grad(sample, item): return 1", "no function grade"),
        ("import numpy\ndef grade(sample, item): return 1", "ModuleNotFoundError"),
        ("1/0", "ZeroDivisionError"),
    ],
)
def test_a_script_that_cannot_work_is_refused(source, words):
    error = refused(script(source), allowed=ISOLATED)
    assert (error.code, error.param) == ("script_fails", "grader.source")
    assert words in error.message
    assert refused(script("x = 1", image_tag="2025-05-08"), allowed=ISOLATED).code == "not_supported"


@needs_sandbox
def test_a_script_among_several_graders_keeps_its_process():
    told = multi("a + s", a=1)
    told["graders"]["s"] = script("def grade(sample, item): return 0.25")
    found = outcomes(told, [({}, "yes"), ({}, "no")], ISOLATED)
    assert [o.score for o in found] == [1.25, 0.25]
    assert found[0].parts == {"a": 1.0, "s": 0.25}


def test_every_type_of_openais_is_there():
    assert [variant.model_fields["type"].default for variant in graders.GRADERS] == [
        "label_model", "multi", "python", "score_model", "string_check", "text_similarity",
    ]  # fmt: skip
    assert all(math.isfinite(o.score) for o in outcomes(CHECK | {"reference": ""}, [({}, "")]))
