"""One adapter for several tasks, with any method: a head a task, mixed batches, and rows drawn by task."""

import numpy as np
import pytest
import torch

from peft_service import batches
from peft_service.methods.lora import LoRA
from peft_service.objectives.sft import IGNORE
from peft_service.spec import Training
from tests.methods import bases
from tests.methods.checks import TASKS, Live, Trial


class Shared(LoRA):
    """LoRA, with data of several tasks."""

    needs_tasks = True


def live(root, base, task):
    made = Live(Trial(Shared(rank=4, alpha=8), base, task), root, rate=0.02)
    for step in range(3):
        made.step(step)
    return made


@pytest.mark.parametrize(
    ("base", "task"),
    [("bert", "sequence_classification"), ("llama", "sequence_classification"), ("llama", "causal_lm")],
)
def test_a_batch_of_mixed_tasks_is_its_tasks_one_by_one(root, base, task):
    """Loss and every gradient, and of a classification each task's own head."""
    made = live(root, base, task)
    parameters = made.engine.parameters
    assert made.case.tasks == TASKS

    def gradients(*parts):
        made.engine.model.eval()
        made.engine.model.zero_grad()
        sums = [made.objective.loss_sum(made.engine.model, made.batch(rows)) for rows in parts]
        sum(nll for nll, _ in sums).backward()
        found = {name: p.grad.clone() for name, p in parameters.items()}
        return float(sum(nll for nll, _ in sums)), int(sum(right for _, right in sums)), found

    one, two = [0, 2, 4, 6], [1, 3, 5, 7]
    batch = made.batch([*one, *two])
    assert batch.task_B.tolist() == [row % 2 for row in batch.rows]
    mixed, alone = gradients(range(8)), gradients(one, two)
    assert mixed[0] == pytest.approx(alone[0], rel=1e-5)
    assert mixed[1] == alone[1]
    for name, gradient in mixed[2].items():
        torch.testing.assert_close(alone[2][name], gradient, rtol=1e-4, atol=2e-5, msg=name)
    if task == "sequence_classification":
        labels = made.case.labels
        assert [label.partition("/")[0] for label in labels] == ["one"] * 3 + ["two"] * 3
        head = next(
            name
            for name in parameters
            if name.endswith(
                ("classifier.modules_to_save.default.weight", "score.modules_to_save.default.weight")
            )
        )
        of_one = gradients(one)[2][head]
        mine = torch.tensor([label.startswith("one/") for label in labels])
        assert of_one[mine].any()
        assert not of_one[~mine].any()


def test_a_class_of_another_task_is_never_the_answer(root):
    made = live(root, "bert", "sequence_classification")
    batch = made.batch([1, 3])
    mine = torch.tensor([label.startswith("two/") for label in made.case.labels])
    assert batch.allowed_BC.tolist() == [mine.tolist()] * 2

    class Says(torch.nn.Module):
        def forward(self, **inputs):
            logits = torch.zeros(2, 6)
            logits[:, ~mine] = 50.0
            logits[range(2), batch.labels_BT[:, 0]] = 1.0
            return type("Answer", (), {"logits": logits})

    nll, right = made.objective.loss_sum(Says(), batch)
    assert int(right) == 2
    assert float(nll) == pytest.approx(2 * float(np.log(np.e + 2) - 1), rel=1e-5)
    assert (batch.labels_BT != IGNORE).all()


SIZES = {0: 700, 1: 250, 2: 50}
ROW_TASKS = np.repeat(np.array(list(SIZES), dtype=np.int32), list(SIZES.values()))
TRAINING = Training(learning_rate=1e-3, batch_size=16, n_epochs=20)


def drawn(temperature, seed=0):
    steps = batches.steps_of(1000, TRAINING)
    draw = batches.by_task(ROW_TASKS, temperature)
    return [batches.rows_of_step(s, 1000, TRAINING, seed, draw=draw) for s in range(steps)]


@pytest.mark.parametrize("temperature", [1.0, 2.0, 5.0, 100.0])
def test_tasks_are_drawn_with_the_share_of_their_size_to_the_power_of_one_over_t(temperature):
    rows = np.concatenate(drawn(temperature))
    counts = np.bincount(ROW_TASKS[rows], minlength=3)
    weights = np.array([size ** (1 / temperature) for size in SIZES.values()])
    shares = weights / weights.sum()
    assert len(rows) == 20_000
    for count, share in zip(counts, shares, strict=True):
        assert abs(count - len(rows) * share) < 4.5 * np.sqrt(len(rows) * share * (1 - share))


def test_within_a_task_every_row_is_taken_in_turn():
    steps = -(-1000 // 16)
    rows = np.concatenate(drawn(100.0)[:steps])
    times = np.bincount(rows, minlength=1000)
    for task in SIZES:
        mine = times[task == ROW_TASKS]
        assert mine.max() - mine.min() <= 1
    assert times[ROW_TASKS == 2].min() >= 5


def test_a_step_is_a_function_of_its_number_so_that_a_resume_is_exact():
    whole = drawn(2.0)
    for start in (1, 62, 63, 700):
        batches._drawn.cache_clear()
        batches.order.cache_clear()
        again = batches.rows_of_step(start, 1000, TRAINING, 0, draw=batches.by_task(ROW_TASKS, 2.0))
        assert again == whole[start]
    assert drawn(2.0, seed=1) != whole
    assert whole[:63] != whole[63:126]


def test_a_run_hands_rows_on_as_they_were_drawn(root):
    """`fit` with a temperature: every row that a step computes is of the tasks drawn for it, and a stop and a
    resume in the middle give the same parameters."""
    from peft_service.train import Progress, fit

    def ran(pauses):
        made = Live(Trial(Shared(rank=4, alpha=8), "llama", "causal_lm"), root, steps=6)
        progress, kept = Progress(), []
        for pause in (*pauses, None):
            stop = [pause]

            def save(now, engine=made.engine):
                kept.append((now, engine.state()))

            fitted = fit(
                made.engine, made.objective, made.training, 0, made.data, None, microbatch=4, pad_id=2,
                start=progress, log=lambda line: None, save=save,
                stop_requested=lambda stop=stop: stop[0] is not None, attached=made.attached,
                collate=made.collate, draw=batches.by_task(np.array(made.data.row_tasks), 3.0),
            )  # fmt: skip
            progress = fitted.progress
            if pause is not None:
                assert not fitted.finished
                state = {name: tensor.clone() for name, tensor in kept[-1][1].items()}
                made = Live(Trial(Shared(rank=4, alpha=8), "llama", "causal_lm"), root, steps=6)
                made.engine.load_state(state)
        assert progress.step == 6
        return made.engine.trainable()

    whole, resumed = ran(()), ran((1,))
    for name, tensor in whole.items():
        assert torch.equal(tensor, resumed[name]), name


def test_rows_of_every_format_keep_their_task(tmp_path):
    from peft_service.tokenise import Meaning, tokenise

    lines = {
        "prompt_completion": '{"prompt": "a", "completion": " b", "task": "%s"}',
        "instruction": '{"instruction": "a", "output": "b", "task": "%s"}',
        "chat": '{"task": "%s", "messages": [{"role": "user", "content": "a"}, '
        '{"role": "assistant", "content": "b"}]}',
    }
    for format, line in lines.items():
        path = tmp_path / f"{format}.jsonl"
        path.write_text("".join(f"{line % task}\n" for task in ("two", "one", "two")))
        made = tokenise(path, format, bases.tokenizer("llama"), 64, "error", Meaning("causal_lm", (), TASKS))
        assert made.row_tasks.tolist() == [1, 0, 1], format
