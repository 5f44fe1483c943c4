"""Measure what is often said of fine-tuning methods and is not so; docs/methods/claims.json has the numbers.

1. "65B on 24 GB": bytes a weight of a linear layer in NF4 with double quantisation, times 65 billion.
2. "Soft prompts suit black-box models": a trained prompt against the nearest real tokens, which are
   all that an API which takes text can be given.
3. "Subtract BA, add B'A' to switch": how far a bf16 weight has drifted after so many switches to and fro.
"""

import json
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CLAIMS = ROOT / "docs" / "methods" / "claims.json"


def main() -> int:
    import torch

    torch.set_num_threads(1)
    claims = {"nf4": nf4(), "black_box": black_box(), "switching": switching()}
    CLAIMS.parent.mkdir(parents=True, exist_ok=True)
    CLAIMS.write_text(json.dumps(claims, indent=1) + "\n")
    sys.stdout.write(json.dumps(claims, indent=1) + "\n")
    return 0


def nf4() -> dict[str, float]:
    """Of one layer of 4096 x 4096: a 65B model's are larger, and their scales' scales weigh even less."""
    import bitsandbytes
    import torch

    layer = bitsandbytes.nn.Linear4bit(
        4096, 4096, bias=False, compute_dtype=torch.bfloat16, compress_statistics=True, quant_type="nf4"
    )
    layer.weight = bitsandbytes.nn.Params4bit(
        torch.randn(4096, 4096, dtype=torch.bfloat16), requires_grad=False, quant_type="nf4"
    )
    layer = layer.to("cpu")
    layer.weight = layer.weight.to("cpu")
    stored = layer.weight.numel() * layer.weight.element_size()
    state = layer.weight.quant_state.as_dict(packed=True)
    stored += sum(t.numel() * t.element_size() for t in state.values() if torch.is_tensor(t))
    each = stored / 4096**2
    return {"bytes_per_weight": each, "gib_of_65e9": each * 65e9 / 2**30, "bits_per_weight": 8 * each}


def black_box(steps: int = 150) -> dict[str, float]:
    """Losses on held-out rows of the demo: base, trained prompt of 20, and its nearest tokens as text."""
    import torch

    from jobs import demo_data
    from peft_service import base_model, batches
    from peft_service.methods import Case, Material
    from peft_service.methods.prompt_tuning import PromptTuning
    from peft_service.objectives.sft import SFT
    from peft_service.run import collate_of
    from peft_service.shipped import path
    from peft_service.spec import Training
    from peft_service.tokenise import tokenise
    from peft_service.train import LocalEngine, evaluate, train_step

    tokenizer = base_model.load_tokenizer(path())
    work = Path(tempfile.mkdtemp())
    (work / "train").write_bytes(demo_data.write_jsonl(demo_data.training_rows()))
    (work / "held").write_bytes(demo_data.write_jsonl(demo_data.validation_rows()))
    rows, held = (tokenise(work / name, "chat", tokenizer, 256) for name in ("train", "held"))
    model = base_model.load(path(), precision="fp32")
    case, pad = Case(steps=steps), int(tokenizer.pad_token_id or 0)
    attached = PromptTuning().attach(model, case, Material(tokenizer=tokenizer))
    training = Training(learning_rate=3e-2, batch_size=8, n_epochs=1000, max_steps=steps)
    engine, collate = LocalEngine(attached, training), collate_of(case, model)

    def loss() -> float:
        return evaluate(
            engine, SFT(), held, microbatch=8, pad_id=pad, attached=attached, collate=collate
        ).loss

    with attached.model.disable_adapter():
        base = loss()
    for step in range(steps):
        taken = batches.rows_of_step(step, rows.rows, training, 0)
        parts = batches.microbatches(rows, taken, 0, 1, 8, pad, "cpu", **collate)
        train_step(engine, SFT(), parts, 3e-2, attached, step)
    trained = loss()
    (prompt,) = (p for p in attached.model.parameters() if p.requires_grad)
    table = model.get_input_embeddings().weight
    with torch.no_grad():
        prompt.copy_(table[torch.cdist(prompt, table).argmin(1)])
    return {"base_loss": base, "prompt_loss": trained, "nearest_tokens_loss": loss(), "steps": steps}


def switching() -> dict[str, float]:
    """Drift of W after n round trips A -> B -> A of subtracting one update and adding the other.

    As a share of W, ‖W_n − W_0‖ / ‖W_0‖, and of the update itself: what a user notices is that the adapter is
    another one. Updates of 1 % and 10 % of the weight's norm.
    """
    import torch

    torch.manual_seed(0)
    size, rank = 512, 16
    base = torch.randn(size, size) * 0.02
    pairs = [torch.randn(size, rank) @ torch.randn(rank, size) for _ in range(2)]
    found = {}
    for share in (0.01, 0.1):
        one, two = (pair * (share * base.norm() / pair.norm()) for pair in pairs)
        for name, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32)):
            first, second = one.to(dtype), two.to(dtype)
            weight = (base + one).to(dtype)
            start = weight.float()
            for number in range(1, 101):
                weight = weight - first + second
                weight = weight - second + first
                if number in (1, 10, 100):
                    drift = float((weight.float() - start).norm())
                    found[f"{name}_update_{share:g}_after_{number}_of_weight"] = drift / float(start.norm())
                    found[f"{name}_update_{share:g}_after_{number}_of_update"] = drift / float(one.norm())
    return found


if __name__ == "__main__":
    sys.exit(main())
