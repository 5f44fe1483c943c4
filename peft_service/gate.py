"""The gate: a clean process that loads an adapter as a user will, and checks it.

It uses plain `transformers` and `peft`, and our tuners where the artifact is of a type of ours: nothing that
the trainer patched is in this process. Shape suffixes: B rows, T tokens, V vocabulary.

The probe is a directory written by the trainer: `probe.safetensors` (`input.<name>`: what the forward pass
got; `output.<name>`: what the live model answered), `rows.jsonl` (rows of the training file) and
`rows.safetensors` (what they were tokenised to).
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peft_service import artifact
from peft_service.adapter import Check
from peft_service.errors import GateFailed
from peft_service.methods import Case
from peft_service.spec import FineTuneSpec

if TYPE_CHECKING:
    from torch import Tensor

PROBE_ROWS = 4
PROBE_TOKENS = 64
"""Of each row at most: logits are as wide as the vocabulary."""
TOLERANCE = {("fp32", False): 1e-4, ("fp32", True): 1e-3, ("bf16", False): 5e-2, ("bf16", True): 8e-2}
"""Largest difference of a logit, as a share of the largest, by precision and whether the base is quantised.

bf16 has 8 bits: two orders of the same sums differ by about 1 % here. The trainer's logits come from float32
masters rounded to bf16, the reloaded ones from the rounded file: the same numbers, in another order.
"""
SECONDS = 1800


def write_probe(
    directory: Path, probe: "dict[str, Tensor]", rows: "Sequence[dict[str, Any]]", tokenised: Any
) -> None:
    """Lay down what the gate compares with: logits of the live model, and some rows with their token ids.

    `tokenised` (`tokenised.Tokenised`) has what was made of `rows` of the training data, which are in the
    keys of their format.
    """
    from safetensors.torch import save_file

    directory.mkdir(parents=True, exist_ok=True)
    save_file(probe, directory / "probe.safetensors")
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (directory / "rows.jsonl").write_text(lines, encoding="utf-8")
    tokenised.save(directory / "rows.safetensors")


def ahead() -> "subprocess.Popen[str]":
    """Start the gate's process before there is something to check.

    It loads its libraries, some ten seconds of a core, while others train, and waits for `prove`. Whoever
    starts it ends it.
    """
    return subprocess.Popen(
        [sys.executable, "-m", "peft_service.gate"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def prove(
    adapter: Path,
    base: Path,
    probe: Path,
    spec: FineTuneSpec,
    case: Case,
    *,
    precision: str,
    stored: int | None,
    process: "subprocess.Popen[str] | None" = None,
) -> tuple[Check, ...]:
    """Run the gate on staged files in a process of its own; `process` is one that `ahead` started.

    Raises:
        GateFailed: that process could not do its work; what it said is in the message. A check that failed
            is in the result.
        RuntimeError: that process was killed: nothing is known of the adapter, so another attempt may follow.
    """
    arguments: dict[str, Any] = {
        "adapter": str(adapter),
        "base": str(base),
        "probe": str(probe),
        "precision": precision,
        "quantize": spec.base.quantize,
        "format": spec.data.training.format,
        "rows": spec.objective.rows,
        "data": spec.data.model_dump(mode="json", include={"train_on", "eos", "turns", "tools", "too_long"}),
        "max_seq_len": spec.training.max_seq_len,
        "stored": stored,
        "case": case.model_dump(mode="json"),
    }
    return _asked(arguments, process)


def prove_operation(adapter: Path, base: Path, probe: Path, case: Case) -> tuple[Check, ...]:
    """Run the gate on what an operation made; no rows were trained on, so no template is tried.

    Raises:
        GateFailed, RuntimeError: as `prove`.
    """
    arguments: dict[str, Any] = {
        "adapter": str(adapter),
        "base": str(base),
        "probe": str(probe),
        "precision": "fp32",
        "quantize": None,
        "format": None,
        "rows": "text",
        "data": {},
        "max_seq_len": 0,
        "stored": None,
        "case": case.model_dump(mode="json"),
    }
    return _asked(arguments, None)


def _asked(arguments: dict[str, Any], process: "subprocess.Popen[str] | None") -> tuple[Check, ...]:
    if process is None or process.poll() is not None:
        process = ahead()
    try:
        said, complained = process.communicate(json.dumps(arguments) + "\n", timeout=SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        raise RuntimeError(f"the gate has not ended within {SECONDS} s") from None
    if process.returncode < 0:
        raise RuntimeError(f"the gate's process was ended by signal {-process.returncode}")
    if process.returncode != 0 or not said.strip():
        raise GateFailed(
            "the adapter could not be loaded by plain peft: " + (complained.strip()[-2000:] or "no message")
        )
    return tuple(Check.model_validate(check) for check in json.loads(said.strip().splitlines()[-1]))


def main() -> int:
    """Check what one line of JSON on stdin asks for (`prove` writes it), and print the checks as another.

    Exit code 0 even where a check has failed; the end of stdin without a line is the end of the process.
    """
    # A step of the trainer is worth more than being ready early.
    os.nice(15)
    import peft  # noqa: F401
    import transformers

    import peft_service.tuners  # noqa: F401

    assert transformers.AutoModelForCausalLM, "transformers loads its parts when they are named"
    line = sys.stdin.readline()
    if line.strip():
        checks = [check.model_dump() for check in checks_of(**json.loads(line))]
        sys.stdout.write(json.dumps(checks) + "\n")
    return 0


def checks_of(
    *,
    adapter: str,
    base: str,
    probe: str,
    precision: str,
    quantize: str | None,
    format: str | None,
    rows: Any,
    data: dict[str, Any],
    max_seq_len: int,
    stored: int | None,
    case: dict[str, Any],
) -> list[Check]:
    """All checks, in order; one that cannot be made counts as failed and says why."""
    known = Case.model_validate(case)
    weights = weights_of(Path(adapter))
    checks = [_check("finite", lambda: finite(weights)), _check("nonzero", lambda: nonzero(weights))]
    if all(check.passed for check in checks):
        loaded: list[Any] = []

        def shapes() -> str:
            model = load_base(Path(base), known, precision, quantize)
            before = answers(model, Path(probe))
            if artifact.is_model(Path(adapter)):
                model = load_base(Path(adapter), known, precision, None)
            else:
                model = artifact.load(model, Path(adapter))
            loaded.extend([before, model])
            return shapes_and_count(model, weights, stored)

        checks.append(_check("shapes_and_count", shapes))
        tolerance = TOLERANCE[precision, quantize is not None]
        checks.append(_check("logits_equal", lambda: logits_equal(loaded, Path(probe), tolerance)))
    if format is not None:
        checks.append(
            _check(
                "template_round_trip",
                lambda: template_round_trip(
                    Path(adapter), Path(probe), format, rows, data, max_seq_len, known
                ),
            )
        )
    return checks


def weights_of(directory: Path) -> "dict[str, Tensor]":
    """Every tensor of an artifact, by file and name."""
    from safetensors.torch import load_file

    found: dict[str, Tensor] = {}
    for path in sorted(directory.rglob("*.safetensors")):
        prefix = path.relative_to(directory).as_posix()
        found |= {f"{prefix}:{name}": tensor for name, tensor in load_file(path).items()}
    return found


def shortened(inputs: "dict[str, Tensor]") -> "dict[str, Tensor]":
    """At most PROBE_TOKENS tokens of every row: the last ones where rows are padded on the left."""
    mask = inputs["attention_mask"]
    left = bool((mask[:, 0] == 0).any())
    width = mask.shape[1]

    def cut(name: str, tensor: Any) -> Any:
        whole = tensor.ndim != 2 or (tensor.shape[1] != width and name not in ("decoder_input_ids", "labels"))
        if whole or tensor.shape[1] <= PROBE_TOKENS:
            return tensor
        return tensor[:, -PROBE_TOKENS:] if left else tensor[:, :PROBE_TOKENS]

    return {name: cut(name, tensor) for name, tensor in inputs.items()}


def outputs_of(answer: Any) -> "dict[str, Tensor]":
    """The tensors of an answer that a user reads."""
    names = ("logits", "start_logits", "end_logits")
    return {name: answer[name] for name in names if answer.get(name) is not None}


class _Failed(Exception):
    """A check has not passed; the message says what was seen."""


def _check(name: str, run: Callable[[], str]) -> Check:
    try:
        return Check(name=name, passed=True, detail=run())
    except Exception as error:
        detail = str(error) if isinstance(error, _Failed) else f"{type(error).__name__}: {error}"
        return Check(name=name, passed=False, detail=detail)


def finite(weights: "dict[str, Tensor]") -> str:
    import torch

    bad = sorted(name for name, tensor in weights.items() if not torch.isfinite(tensor).all())
    if bad:
        raise _Failed(
            f"{len(bad)} of {len(weights)} tensors have values that are not finite, the first is {bad[0]}"
        )
    return f"all values of {len(weights)} tensors are finite"


def nonzero(weights: "dict[str, Tensor]") -> str:
    empty = sorted(name for name, tensor in weights.items() if tensor.numel() == 0)
    if empty:
        raise _Failed(f"{len(empty)} of {len(weights)} tensors are empty, the first is {empty[0]}")
    dead = [name for name, tensor in weights.items() if not tensor.any()]
    # One B at zero can be a module that no row reached; all of them is an adapter that learned nothing.
    outputs = [name for name in weights if "lora_B" in name] or list(weights)
    if set(outputs) <= set(dead):
        raise _Failed(f"all {len(outputs)} output matrices are zero: the adapter does nothing")
    return f"{len(weights) - len(dead)} of {len(weights)} tensors are not zero"


def load_base(base: Path, case: Case, precision: str, quantize: str | None) -> Any:
    """Base and head as the README of the adapter says."""
    import torch
    from transformers import AutoTokenizer

    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
    options: dict[str, Any] = {"device_map": {"": 0}} if torch.cuda.is_available() else {}
    model = artifact.load_base(base, case.task, case.labels, quantize=quantize, dtype=dtype, **options)
    if model.config.pad_token_id is None:
        tokenizer = AutoTokenizer.from_pretrained(base, local_files_only=True)
        pad = tokenizer.pad_token_id
        model.config.pad_token_id = tokenizer.eos_token_id if pad is None else pad
    return model.eval()


def answers(model: Any, probe: Path) -> "dict[str, Tensor]":
    """What a model says to the probe's inputs, as far as it takes them; float32 on the CPU."""
    import inspect

    import torch
    from safetensors.torch import load_file

    told = load_file(probe / "probe.safetensors")
    device = next(model.parameters()).device
    inputs = {
        name.removeprefix("input."): tensor.to(device)
        for name, tensor in told.items()
        if name.startswith("input.")
    }
    taken = inspect.signature(model.forward).parameters
    if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in taken.values()):
        inputs = {name: tensor for name, tensor in inputs.items() if name in taken}
    elif type(model).__module__.startswith("transformers."):
        # A base on its own: what only a method understands is left out.
        inputs = {name: tensor for name, tensor in inputs.items() if name in _PLAIN_INPUTS}
    with torch.no_grad():
        return {name: t.float().cpu() for name, t in outputs_of(model(**inputs)).items()}


_PLAIN_INPUTS = ("input_ids", "attention_mask", "decoder_input_ids")


def shapes_and_count(model: Any, weights: "dict[str, Tensor]", stored: int | None) -> str:
    if hasattr(model, "peft_config"):
        from peft import get_peft_model_state_dict

        wanted = get_peft_model_state_dict(model, save_embedding_layers=False)
        # Of a composition, this is the outermost part; a file that it does not have is another part's.
        files = {name.partition(":")[0] for name in weights}
        if len(files) == 1:
            found = {name.partition(":")[2]: tensor for name, tensor in weights.items()}
            missing, surplus = sorted(wanted.keys() - found.keys()), sorted(found.keys() - wanted.keys())
            if missing or surplus:
                raise _Failed(
                    f"PEFT wants {missing[:3]} which the file lacks, the file has {surplus[:3]} which PEFT "
                    "ignores"
                )
            for name, tensor in found.items():
                if tensor.shape != wanted[name].shape:
                    raise _Failed(
                        f"{name} is {list(tensor.shape)} in the file, PEFT wants {list(wanted[name].shape)}"
                    )
    # Positions of a sparse delta say where its values go; they are no weights.
    count = sum(tensor.numel() for name, tensor in weights.items() if not name.endswith(".index"))
    if stored is not None and count != stored:
        raise _Failed(f"the file has {count} values, the method's formula says {stored}")
    said = "as the method's formula says" if stored is not None else "as many as the training kept"
    return f"{len(weights)} tensors with {count} values, {said}"


def logits_equal(loaded: list[Any], probe: Path, tolerance: float) -> str:
    """`loaded`: what the base said, and the model with the artifact."""
    from safetensors.torch import load_file

    if not loaded:
        raise _Failed("it could not be loaded, see above")
    before, model = loaded
    told = load_file(probe / "probe.safetensors")
    after = answers(model, probe)
    real_BT = told["input.attention_mask"].bool()
    worst = moved = 0.0
    for name, found in after.items():
        expected, base = told[f"output.{name}"], before[name]
        if found.ndim >= 2 and found.shape[1] >= real_BT.shape[1] and "input.decoder_input_ids" not in told:
            # By token: what a model says at padding is nobody's affair. Virtual tokens stand in front.
            width = real_BT.shape[1]
            expected, found = expected[:, -width:][real_BT], found[:, -width:][real_BT]
            base = base[:, -width:][real_BT]
        scale = max(1.0, float(expected.abs().max()))
        worst = max(worst, float((found - expected).abs().max()) / scale)
        moved = max(moved, float((found - base).abs().max()) / scale)
    if not worst <= tolerance:
        raise _Failed(
            f"the reloaded adapter's logits differ from the trainer's by {worst:.2e} of the largest, "
            f"more than {tolerance:.0e}"
        )
    if moved == 0:
        raise _Failed("with and without the adapter the logits are the same: it does nothing")
    return f"at most {worst:.1e} of the largest from the trainer's, {moved:.1e} from the base's"


def template_round_trip(
    adapter: Path, probe: Path, format: str, kind: Any, data: dict[str, Any], max_seq_len: int, case: Case
) -> str:
    import numpy as np
    from transformers import AutoTokenizer

    from peft_service.rendering import Reading
    from peft_service.tokenise import Meaning, tokenise
    from peft_service.tokenised import Tokenised

    tokenizer = AutoTokenizer.from_pretrained(adapter, local_files_only=True)
    told = dict(data)
    too_long = told.pop("too_long")
    # Partners of unpaired rows are those of the whole data: here, every row is looked at by itself.
    meaning = Meaning(case.task, case.labels, case.tasks, "text" if kind == "unpaired" else kind)
    reading = Reading(**told | {"tools": tuple(told.get("tools", ()))})
    found = tokenise(probe / "rows.jsonl", format, tokenizer, max_seq_len, too_long, meaning, reading)
    expected = Tokenised.load(probe / "rows.safetensors")
    names = ("input_ids", "target_mask") if kind == "unpaired" else _COMPARED
    step = expected.sequences if kind == "unpaired" else 1
    for place in range(0, expected.rows * expected.sequences, step):
        # A row can become several: as many are compared as were laid down.
        ids, mask = expected.row(place)
        other_ids, other_mask = found.row(place // step)
        if not (np.array_equal(ids, other_ids) and np.array_equal(mask, other_mask)):
            raise _Failed(
                f"the saved tokenizer and template give other tokens for {expected.rows} training rows"
            )
    count = expected.rows
    for name in names[2:]:
        one, other = getattr(expected, name), getattr(found, name)
        if (one is None) != (other is None) or (
            one is not None and not np.array_equal(one[:count], other[: len(one[:count])])
        ):
            raise _Failed(f"the saved tokenizer gives other {name} for {expected.rows} training rows")
    return f"{expected.rows} training rows give the same {len(expected.input_ids)} tokens and targets"


_COMPARED = ("input_ids", "target_mask", "row_values", "row_numbers", "row_tasks")


if __name__ == "__main__":
    sys.exit(main())
