"""The error tree: what crosses processes and what a client sees."""

import json
import pickle
import re
import traceback
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import pytest

from peft_service import errors
from peft_service.errors import PeftServiceError


def tree(parent: type[PeftServiceError]) -> list[type[PeftServiceError]]:
    """`parent` and everything below it that errors.py defines, as the picture in its docstring is drawn."""
    below = [child for child in parent.__subclasses__() if child.__module__ == errors.__name__]
    return [parent, *(each for child in below for each in tree(child))]


ALL = tree(PeftServiceError)
every_error = pytest.mark.parametrize("kind", ALL, ids=lambda kind: kind.__name__)


def made(kind: type[PeftServiceError]) -> PeftServiceError:
    return kind(
        "rank is 0; give at least 1", code="special", param="method.rank", details={"errors": [{"line": 3}]}
    )


@every_error
def test_an_error_survives_pickling(kind: type[PeftServiceError]) -> None:
    for before in (made(kind), kind("only a message")):
        after = pickle.loads(pickle.dumps(before))
        assert type(after) is kind
        assert str(after) == before.message
        assert vars(after) == vars(before)
        assert after.body() == before.body()


def _raise(kind: type[PeftServiceError]) -> None:
    raise made(kind)


def test_an_error_keeps_its_class_and_its_traceback_on_the_way_out_of_another_process() -> None:
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        for kind in (errors.StoreUnavailable, errors.InvalidTrainingFile):
            with pytest.raises(kind) as caught:
                pool.submit(_raise, kind).result(60)
            assert caught.value.details == {"errors": [{"line": 3}]}
            assert "in _raise" in "".join(traceback.format_exception(caught.value))


@every_error
def test_a_body_is_the_inner_object_of_openai_s_error(kind: type[PeftServiceError]) -> None:
    body = kind("what was seen").body()
    assert body == {"message": "what was seen", "type": kind.type, "param": None, "code": kind.default_code}
    assert made(kind).body() == {
        "message": "rank is 0; give at least 1",
        "type": kind.type,
        "param": "method.rank",
        "code": "special",
        "errors": [{"line": 3}],
    }
    assert json.loads(json.dumps(made(kind).body())) == made(kind).body()


@every_error
def test_details_never_hide_the_four_keys(kind: type[PeftServiceError]) -> None:
    body = kind("seen", details={"message": "x", "type": "x", "param": "x", "code": "x"}).body()
    assert body == kind("seen").body()


@every_error
def test_status_and_type_agree(kind: type[PeftServiceError]) -> None:
    """The openai client chooses its exception by status; the type must tell the same story."""
    assert kind.type == {429: "rate_limit_error", 500: "server_error"}.get(
        kind.status, "invalid_request_error"
    )
    assert 400 <= kind.status < 600


def test_each_class_has_its_own_code() -> None:
    codes = [kind.default_code for kind in ALL]
    assert len(set(codes)) == len(codes)
    assert all(re.fullmatch(r"[a-z]+(_[a-z]+)*", code) for code in codes)


def test_the_picture_in_the_docstring_is_the_tree() -> None:
    drawn = re.findall(r"^ *[│├└─ ]*([A-Z]\w+)", str(errors.__doc__), re.MULTILINE)
    drawn = [name for name in drawn if hasattr(errors, name)]
    assert drawn == [kind.__name__ for kind in ALL]
    for name, status in re.findall(r"([A-Z]\w+) \((\d{3})\)", str(errors.__doc__)):
        assert getattr(errors, name).status == int(status)
