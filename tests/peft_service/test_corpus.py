"""Every file of the corpus of broken files gets exactly the report that was read and found right."""

import ast
import json
import re
from pathlib import Path

import pytest

import peft_service
from tests.peft_service.corpus import BINARY, FOLDER, expected_of, files, is_expected, report_on, told

SOURCE = Path(peft_service.__file__).parent
NOT_HERE = {
    "train_validation_overlap": "between two files: test_validate has it",
}
"""Codes that no single file can show, and why."""


@pytest.mark.parametrize("path", files(), ids=lambda path: path.name)
def test_a_broken_file_gets_exactly_the_report_it_should(path):
    known = json.loads(expected_of(path).read_text())
    report = report_on(path, known.get("asked", {}))
    assert json.loads(json.dumps(told(report))) == known["report"]
    assert report.problem_count or report.warnings, "nothing is wrong with it: what is it for?"


def test_the_corpus_is_whole_and_large_enough():
    assert len(files()) >= 60
    assert {expected_of(path) for path in files()} == set(filter(is_expected, FOLDER.iterdir()))
    assert set(BINARY) <= {path.name for path in files()}
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) < 1024**2


CODE = re.compile(r"[a-z][a-z0-9]*(_[a-z0-9]+)*")


def codes_in(path: Path) -> set[str]:
    """Codes that the source of a module gives to problems: the constants where a code is wanted."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call):
            name = getattr(node.func, "id", getattr(node.func, "attr", ""))
            wanted = {
                "Problem": [1],
                "BadJSON": [0],
                "Unreadable": [0],
                "_Nowhere": [0],
                "Bad": [1],
                "_End": [2],
            }
            wanted |= {"_problem": [3]} if path.name == "json_array.py" else {}
            for place in wanted.get(name, []):
                if len(node.args) > place and isinstance(node.args[place], ast.Constant):
                    found.add(node.args[place].value)
        elif isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant):
            names = {getattr(target, "id", "") for target in node.targets}
            found |= {node.value.value} if "code" in names else set()
    return {code for code in found if isinstance(code, str) and CODE.fullmatch(code)}


def test_every_code_of_a_problem_is_in_the_corpus():
    modules = [
        *(SOURCE / "formats").glob("*.py"),
        *(SOURCE / "containers").glob("*.py"),
        *(SOURCE / name for name in ("validate.py", "columns.py", "leaks.py")),
    ]
    known = set().union(*map(codes_in, modules)) | {"secret", "personal_data"}
    assert len(known) > 60
    said = {
        problem["code"]
        for path in files()
        for kind in ("problems", "warnings")
        for problem in json.loads(expected_of(path).read_text())["report"][kind]
    }
    assert known - said == set(NOT_HERE)
    assert said - known == set()
