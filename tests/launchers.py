"""A launcher that runs attempts as plain processes of this machine, for tests of the scheduler.

The process is real and ends, dies or hangs like any other; what it computes is not: it writes the files of a
run as the contract has them, in milliseconds and without torch.
"""

import contextlib
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # an attempt is this very file, run without the packages: it starts in 20 ms
    from cluster.launch import Progress
    from cluster.plan import Plan


class ProcessLauncher:
    """Attempts by name, remembered in `folder`: so any number of launchers on one folder see the same."""

    def __init__(self, folder: Path, store: Path, behaviour: dict[str, Any] | None = None) -> None:
        """`behaviour`: what the attempt of that number does (see `run`); "*" is for all others."""
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.store = store
        self.behaviour = behaviour or {}
        self.children: list[subprocess.Popen[bytes]] = []

    def start(self, name: str, run_prefix: str, plan: "Plan") -> None:
        try:
            (self.folder / name).mkdir()
        except FileExistsError:
            return
        attempt = name.rpartition("-")[2]
        options = self.behaviour.get(attempt, self.behaviour.get("*", {}))
        with (self.folder / name / "log").open("wb") as log:
            child = subprocess.Popen(
                [sys.executable, "-I", "-S", __file__, str(self.store), run_prefix, json.dumps(options)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=self.folder / name,
                start_new_session=True,
            )
        self.children.append(child)
        (self.folder / name / "pid").write_text(str(child.pid))

    def poll(self, name: str) -> "Progress":
        for child in self.children:
            child.poll()
        folder = self.folder / name
        if not folder.exists():
            return "lost"
        if (folder / "exit").exists():
            return "succeeded"
        if not (folder / "pid").exists():
            return "pending"
        if _alive(int((folder / "pid").read_text())):
            return "running"
        if (folder / "exit").exists():  # it ended between the two looks
            return "succeeded"
        return "stopped" if (folder / "asked").exists() else "failed"

    def stop(self, name: str) -> None:
        folder = self.folder / name
        if self.poll(name) != "running":
            return
        (folder / "asked").touch()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(int((folder / "pid").read_text()), signal.SIGKILL)

    def logs(self, name: str) -> str:
        log = self.folder / name / "log"
        return log.read_text() if log.exists() else ""

    def started(self) -> list[str]:
        """Names of all attempts that ever ran."""
        return sorted(entry.name for entry in self.folder.iterdir())

    def close(self) -> None:
        """End what still runs of what this launcher started."""
        for child in self.children:
            if child.poll() is None:
                child.kill()
                child.wait()


def _alive(pid: int) -> bool:
    try:
        status = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return status.rpartition(")")[2].split()[0] != "Z"


def run(store: Path, prefix: str, options: dict[str, Any]) -> None:
    """What an attempt does. Options: `die_at` a step, or `hang_at` a step until the store has a file "go";
    `outcome` instead of success, with its `error`; `seconds` per step; a checkpoint `every` so many steps;
    `deaf` to the stop flag; lines of `nonsense` in the metrics; `tamper` with the adapter after its proof,
    or `forget` the proof.
    """
    job = json.loads((store / prefix / "input.json").read_text())
    runs = (store / prefix).parent
    total = options.get("steps", 4)
    every = options.get("every", 2)
    kept = sorted(int(path.name[5:]) for path in runs.glob("*/checkpoints/step-*"))
    step = kept[-1] if kept else 0
    part = 0

    def write(key: str, text: str) -> None:
        target = store / prefix / key
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.parent / f".{target.name}"
        temporary.write_text(text)
        temporary.rename(target)

    def tell(*lines: dict[str, Any]) -> None:
        nonlocal part
        part += 1
        write(f"metrics/{part:08d}.jsonl", "".join(json.dumps(line) + "\n" for line in lines))

    def end(state: str, **more: Any) -> None:
        outcome = {"state": state, "error": None, "step": step, "trained_tokens": 100 * step, "metrics": {}}
        write("outcome.json", json.dumps(outcome | more))

    say(f"hello from {prefix}")
    tell({"type": "phase", "phase": "training", "time": time.time()})
    if options.get("nonsense"):
        part += 1
        write(f"metrics/{part:08d}.jsonl", "\n".join(options["nonsense"]))
    while step < total:
        if not options.get("deaf") and (store / prefix / "stop").exists():
            checkpoint(write, tell, prefix, step)
            return end("stopped")
        if options.get("die_at") == step:
            say("this attempt dies now")
            os.kill(os.getpid(), signal.SIGKILL)
        if options.get("hang_at") == step and not (store / "go").exists():
            time.sleep(0.01)
            continue
        time.sleep(options.get("seconds", 0))
        step += 1
        tell(
            {
                "type": "step",
                "step": step,
                "total_steps": total,
                "train_loss": 1 / step,
                "train_mean_token_accuracy": 1 - 1 / step,
                "grad_norm": 1.0,
                "learning_rate": 1e-3,
                "tokens": 100,
                "target_tokens": 50,
                "seconds": 0.5,
                "tokens_per_second": 200.0,
                "time": time.time(),
            },
            *(
                [{"type": "eval", "step": step, "valid_loss": 2 / step, "valid_mean_token_accuracy": 0.5}]
                if step % every == 0
                else []
            ),
        )
        if step % every == 0:
            checkpoint(write, tell, prefix, step)
    if options.get("outcome"):
        return end(options["outcome"], error=options.get("error"), retryable=options.get("retryable", False))
    adapter = {
        "adapter_model.safetensors": f"weights of {job['job']}",
        "adapter_config.json": json.dumps({"peft_type": "LORA", "r": 8, "base_model_name_or_path": "/tmp/x"}),
    }
    listed = [
        {"path": path, "size": len(text), "sha256": hashlib.sha256(text.encode()).hexdigest()}
        for path, text in adapter.items()
    ]
    checks = [{"name": "finite", "passed": True, "detail": "every value is"}]
    proof = {"checks": checks, "files": listed, "software": {}, "trainable_parameters": 1}
    if options.get("tamper"):
        adapter["adapter_model.safetensors"] += "!"
    for path, text in adapter.items():
        write(f"adapter/{path}", text)
    if not options.get("forget"):
        write("adapter.json", json.dumps(proof))
    return end("succeeded", metrics={"train_loss": 1 / total})


def say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def checkpoint(write: Any, tell: Any, prefix: str, step: int) -> None:
    key = f"{prefix}/checkpoints/step-{step:08d}"
    write(f"checkpoints/step-{step:08d}/manifest.json", "{}")
    tell({"type": "checkpoint", "step": step, "key": key, "metrics": {"train_loss": 1 / max(step, 1)}})


if __name__ == "__main__":
    run(Path(sys.argv[1]), sys.argv[2], json.loads(sys.argv[3]))
    Path("exit").touch()
