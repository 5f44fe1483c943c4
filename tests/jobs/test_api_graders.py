"""Graders through the unmodified `openai` client: tried on a text, and checked before a job needs one."""

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import openai
import pytest
from openai import OpenAI

from cluster.judge import JudgeFailed, asking
from peft_service.graders.sandbox import missing
from tests.jobs.serving import Service, serving

CHECK: Any = {
    "type": "string_check",
    "name": "exact",
    "input": "{{sample.output_text}}",
    "reference": "{{item.answer}}",
    "operation": "eq",
}
PYTHON: Any = {
    "type": "python",
    "name": "length",
    "source": "def grade(sample, item):\n    return len(sample['output_text']) / item['most']",
}
MODEL: Any = {
    "type": "score_model",
    "name": "judge",
    "model": "judge-1",
    "input": [{"role": "user", "content": "{{sample.output_text}}"}],
    "sampling_params": {"temperature": 0, "max_completions_tokens": 9},
}
needs_sandbox = pytest.mark.skipif(bool(missing()), reason=f"this machine lacks {missing()}")


class Judge:
    """An OpenAI-compatible endpoint that answers with what it is asked, after some failures."""

    def __init__(self) -> None:
        self.asked: list[dict[str, Any]] = []
        self.failures: list[int] = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["content-length"])))
                outer.asked.append({"path": self.path, "key": self.headers["authorization"], **body})
                status = outer.failures.pop(0) if outer.failures else 200
                told = {"choices": [{"message": {"content": body["messages"][0]["content"]}}]}
                sent = json.dumps(told if status == 200 else {"error": "busy"}).encode()
                self.send_response(status)
                self.send_header("content-length", str(len(sent)))
                self.end_headers()
                self.wfile.write(sent)

            def log_message(self, format: str, *args: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"


@pytest.fixture(scope="module")
def judge() -> Iterator[Judge]:
    judge = Judge()
    thread = threading.Thread(target=judge.server.serve_forever)
    thread.start()
    yield judge
    judge.server.shutdown()
    thread.join()
    judge.server.server_close()


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory, judge: Judge) -> Iterator[OpenAI]:
    options = {"python_graders": "isolated", "judge_url": judge.url, "judge_key": "sk-judge"}
    with Service(tmp_path_factory.mktemp("service"), **options) as service:
        yield OpenAI(base_url=service.url, api_key=service.keys["a"], max_retries=0)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Iterator[OpenAI]:
    """A service as it is without settings."""
    with serving(tmp_path_factory.mktemp("plain")) as service:
        yield OpenAI(base_url=service.url, api_key=service.keys["a"], max_retries=0)


def test_a_text_is_graded(client: OpenAI) -> None:
    found = client.fine_tuning.alpha.graders.run(grader=CHECK, model_sample="4", item={"answer": "4"})
    assert (found.reward, found.sub_rewards, found.metadata.scores) == (1.0, {}, {"exact": 1.0})
    assert (found.metadata.name, found.metadata.type) == ("exact", "string_check")
    assert found.metadata.execution_time >= 0
    errors = found.metadata.errors.model_dump()
    assert not any(errors.values())
    # Every field that the client's type requires is really in the answer.
    for part in (found, found.metadata, found.metadata.errors):
        type(part).model_validate(part.to_dict())


def test_what_goes_wrong_with_a_text_is_told(client: OpenAI) -> None:
    found = client.fine_tuning.alpha.graders.run(grader=CHECK, model_sample="4")
    assert (found.reward, found.metadata.errors.invalid_variable_error) == (0.0, True)
    json_check = CHECK | {"input": "{{sample.output_json.a}}", "reference": "1"}
    found = client.fine_tuning.alpha.graders.run(grader=json_check, model_sample="no")
    assert (found.reward, found.metadata.errors.sample_parse_error) == (0.0, True)


def test_several_graders(client: OpenAI) -> None:
    similar = {
        "type": "text_similarity", "name": "s", "input": "{{sample.output_text}}",
        "reference": "{{item.answer}}", "evaluation_metric": "fuzzy_match",
    }  # fmt: skip
    told: Any = {
        "type": "multi",
        "name": "both",
        "graders": {"exact": CHECK, "close": similar},
        "calculate_output": "0.5 * exact + 0.5 * close",
    }
    found = client.fine_tuning.alpha.graders.run(grader=told, model_sample="ab", item={"answer": "abcd"})
    assert found.sub_rewards == {"exact": 0.0, "close": pytest.approx(2 / 3)}
    assert found.reward == pytest.approx(1 / 3)
    checked = client.fine_tuning.alpha.graders.validate(grader=told)
    assert checked.grader is not None
    assert checked.grader.to_dict()["calculate_output"] == told["calculate_output"]


@needs_sandbox
def test_a_script(client: OpenAI) -> None:
    found = client.fine_tuning.alpha.graders.run(grader=PYTHON, model_sample="abcd", item={"most": 8})
    assert found.reward == 0.5
    found = client.fine_tuning.alpha.graders.run(grader=PYTHON, model_sample="abcd", item={"most": 0})
    assert (found.reward, found.metadata.errors.python_grader_runtime_error) == (0.0, True)
    assert "ZeroDivisionError" in str(found.metadata.errors.python_grader_runtime_error_details)
    broken = PYTHON | {"source": "def grade(sample, item) return 1"}
    with pytest.raises(openai.BadRequestError, match="SyntaxError") as refused:
        client.fine_tuning.alpha.graders.validate(grader=broken)
    assert (refused.value.code, refused.value.param) == ("script_fails", "grader.source")


def test_a_model_that_judges(client: OpenAI, judge: Judge) -> None:
    found = client.fine_tuning.alpha.graders.run(grader=MODEL, model_sample='{"result": 0.75}')
    assert found.reward == 0.75
    asked = judge.asked[-1]
    assert (asked["path"], asked["key"]) == ("/v1/chat/completions", "Bearer sk-judge")
    assert (asked["model"], asked["temperature"], asked["max_completion_tokens"]) == ("judge-1", 0, 9)
    judge.failures[:] = [400]
    found = client.fine_tuning.alpha.graders.run(grader=MODEL, model_sample='{"result": 0.75}')
    errors = found.metadata.errors
    assert (found.reward, errors.api_model_grader_server_error) == (0.0, True)
    assert "status 400" in str(errors.api_model_grader_server_error_details)


def test_a_busy_endpoint_is_asked_again(judge: Judge) -> None:
    waited: list[float] = []
    ask = asking(judge.url, None, sleep=waited.append)
    judge.failures[:] = [503, 429]
    assert ask("m", [{"role": "user", "content": "hello"}], {}) == "hello"
    assert waited == [1.0, 2.0]
    judge.failures[:] = [500] * 4
    with pytest.raises(JudgeFailed, match="status 500"):
        ask("m", [{"role": "user", "content": "hello"}], {})
    assert not judge.failures


@pytest.mark.parametrize(
    ("grader", "param", "words"),
    [
        (CHECK | {"operaton": "eq"}, "grader.operaton", "did you mean 'operation'?"),
        (CHECK | {"operation": "equals"}, "grader.operation", "'eq'"),
        (CHECK | {"type": "regex"}, "grader", "string_check"),
        (CHECK | {"input": "{{sample.output}}"}, "grader.input", 'did you mean "output_text"?'),
        ({"type": "text_similarity", "name": "s", "input": "", "reference": "",
          "evaluation_metric": "cosine"},
         "grader.evaluation_metric", "no embedding model"),
        ({"type": "multi", "name": "m", "graders": {"exact": CHECK}, "calculate_output": "exat"},
         "grader.calculate_output", 'did you mean "exact"?'),
    ],
)  # fmt: skip
def test_a_grader_that_cannot_work_is_refused(client: OpenAI, grader: Any, param: str, words: str) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        client.fine_tuning.alpha.graders.validate(grader=grader)
    assert refused.value.param == param
    assert words in refused.value.message


def test_what_the_operator_has_not_allowed_is_refused(plain: OpenAI) -> None:
    for grader, code in ((PYTHON, "python_graders_off"), (MODEL, "no_judge")):
        with pytest.raises(openai.BadRequestError) as refused:
            plain.fine_tuning.alpha.graders.run(grader=grader, model_sample="x")
        assert refused.value.code == code
        assert "PEFT_SERVICE_" in refused.value.message
    assert plain.fine_tuning.alpha.graders.validate(grader=CHECK).grader is not None
