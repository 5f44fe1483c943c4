"""`python -m tests.methods.fresh DIR`: load artifacts as a user does and compare with what the trainer said.

Each artifact's directory has a `probe.safetensors` beside it: inputs, and the answers of the live model.
"""

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file


def main(directory: Path) -> None:
    from peft_service import artifact
    from peft_service.gate import outputs_of

    asked = json.loads((directory / "asked.json").read_text())
    told = {}
    for name, (base, place) in asked["artifacts"].items():
        path = Path(place)
        task, labels = artifact.task_of(path)
        if artifact.is_model(path):
            model = artifact.load_base(path, task, labels, dtype=torch.float32).eval()
        else:
            loaded = artifact.load_base(Path(asked["root"]) / base, task, labels, dtype=torch.float32)
            loaded.config.pad_token_id = 2
            model = artifact.load(loaded, path)
        model.config.pad_token_id = 2
        probe = load_file(path.parent / f"{path.name}.probe.safetensors")
        inputs = {key.removeprefix("input."): t for key, t in probe.items() if key.startswith("input.")}
        with torch.no_grad():
            answers = outputs_of(model(**inputs))
        mask = inputs["attention_mask"].bool()
        worst = 0.0
        for key, answer in answers.items():
            wanted = probe[f"output.{key}"]
            if answer.shape[1] != wanted.shape[1]:
                answer = answer[:, -wanted.shape[1] :]
            gap = (answer.float() - wanted).abs()
            by_token = "decoder_input_ids" not in inputs and gap.ndim >= 2 and gap.shape[1] == mask.shape[1]
            worst = max(worst, float(gap[mask].max() if by_token else gap.max()))
        told[name] = worst
    (directory / "told.json").write_text(json.dumps(told))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
