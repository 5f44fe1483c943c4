"""The adapter's files: staged by the trainer, published once they are proven, verified by who reads them.

    <attempt>/adapter/…      staged: weights, adapter_config.json, tokenizer, chat template
    <attempt>/adapter.json   Proof: the gate's checks and every staged file's sha256; written by the driver
    adapters/<base>/<id>/    published: the same bytes, card, SHA256SUMS, config, manifest.json last

Ray Serve LLM takes a folder with an adapter_config.json for an adapter, so that file comes after the weights;
our own readers look for the manifest.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peft_service.errors import GateFailed, ObjectNotFound
from peft_service.spec import FineTuneSpec
from peft_service.store import Store
from peft_service.variants import Frozen

if TYPE_CHECKING:
    from torch import Tensor

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
CARD = "README.md"
SUMS = "SHA256SUMS"
MANIFEST = "manifest.json"
SOFTWARE = ("torch", "transformers", "peft", "deepspeed", "ray", "bitsandbytes", "peft-service")
VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""What vLLM's --max-lora-rank can be."""


class Check(Frozen):
    """One check of the gate."""

    name: str
    passed: bool
    detail: str


class File(Frozen):
    path: str
    size: int
    sha256: str


class Proof(Frozen):
    """What the driver found out about the staged files; goes into the manifest."""

    checks: tuple[Check, ...]
    files: tuple[File, ...]
    software: dict[str, str]
    trainable_parameters: int


def stage(model: Any, trainable: Mapping[str, "Tensor"], tokenizer: Any, directory: Path) -> int:
    """Write the adapter of a PeftModel as PEFT does, and the tokenizer with its template; count its values.

    `trainable` has every trainable parameter full size on the CPU, by its name in `model`: under ZeRO-3 the
    model's own parameters are empty, and PEFT would write them so.

    Raises:
        GateFailed: a tensor is empty.
    """
    empty = sorted(name for name, tensor in trainable.items() if tensor.numel() == 0)
    if empty:
        raise GateFailed(
            f"{len(empty)} of {len(trainable)} gathered tensors are empty, the first is {empty[0]}"
        )
    directory.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(
        directory, state_dict=dict(trainable), safe_serialization=True, save_embedding_layers=False
    )
    tokenizer.save_pretrained(directory)
    # PEFT's card names the trainer's local path as the base; ours is written when the adapter has a name.
    (directory / CARD).unlink(missing_ok=True)
    return sum(tensor.numel() for tensor in trainable.values())


def files_of(directory: Path) -> tuple[File, ...]:
    """Every file below, by path."""
    found = []
    for path in sorted(path for path in directory.rglob("*") if path.is_file()):
        with path.open("rb") as content:
            digest = hashlib.file_digest(content, "sha256").hexdigest()
        found.append(
            File(path=path.relative_to(directory).as_posix(), size=path.stat().st_size, sha256=digest)
        )
    return tuple(found)


def software() -> dict[str, str]:
    return {name: version(name) for name in SOFTWARE}


def publish(
    store: Store, staged_prefix: str, target_prefix: str, record: Mapping[str, Any]
) -> dict[str, Any]:
    """Copy a proven adapter to its immutable place and write its manifest last; returns the manifest.

    Safe to repeat after a crash at any line: every object's bytes depend on the arguments alone.

    Raises:
        GateFailed: a check did not pass, or a staged file is not what the gate saw.
        ObjectNotFound: there is no proof.
    """
    try:
        there: dict[str, Any] = json.loads(store.get(f"{target_prefix}/{MANIFEST}"))
        return there
    except ObjectNotFound:
        pass
    proof = Proof.model_validate_json(store.get(f"{staged_prefix}.json"))
    if failed := [check for check in proof.checks if not check.passed]:
        raise GateFailed("; ".join(f"{check.name}: {check.detail}" for check in failed))
    spec = FineTuneSpec.model_validate(record["spec"])
    staged = {file.path: file for file in proof.files}
    config = json.loads(_checked(store, staged_prefix, staged[CONFIG]))
    # Servers compare this with the name they serve; the trainer's path would mean nothing to them.
    config["base_model_name_or_path"] = spec.base.id
    config["revision"] = spec.base.revision
    made = {CONFIG: json.dumps(config, indent=2, sort_keys=True) + "\n"}

    copied = [file for file in proof.files if file.path not in (CONFIG, CARD, SUMS, MANIFEST)]
    for file in copied:
        if digest_in(store, f"{staged_prefix}/{file.path}") != file.sha256:
            raise GateFailed(f"{staged_prefix}/{file.path} is not the file that the gate checked")
        store.copy(f"{staged_prefix}/{file.path}", f"{target_prefix}/{file.path}")
    compatibility = compatibility_of(config)
    if store.url.startswith("file:") and compatibility["ray_serve_llm"]["ok"]:
        compatibility["ray_serve_llm"] |= {
            "ok": False,
            "reason": "it reads buckets, and this store is a folder",
        }
    made[CARD] = card(spec, record, proof, compatibility, f"{store.url.rstrip('/')}/{target_prefix}")
    listed = sorted(
        [*copied, *(_file(path, text) for path, text in made.items())], key=lambda file: file.path
    )
    made[SUMS] = "".join(f"{file.sha256}  {file.path}\n" for file in listed)
    manifest = {
        "format": "peft-service/adapter/1",
        "record": dict(record),
        "files": [
            file.model_dump() for file in sorted([*listed, _file(SUMS, made[SUMS])], key=lambda f: f.path)
        ],
        "gate": [check.model_dump() for check in proof.checks],
        "trainable_parameters": proof.trainable_parameters,
        "software": proof.software,
        "compatibility": compatibility,
    }
    for path in (CARD, SUMS, CONFIG):
        store.put(f"{target_prefix}/{path}", made[path].encode())
    text = json.dumps(manifest, indent=1, sort_keys=True) + "\n"
    store.put(f"{target_prefix}/{MANIFEST}", text.encode())
    return manifest


def verify(store: Store, prefix: str) -> dict[str, Any]:
    """Compare every file of a published adapter with its manifest; returns the manifest.

    Raises:
        ObjectNotFound: no manifest, or a file is missing.
        GateFailed: a file has other bytes.
    """
    manifest: dict[str, Any] = json.loads(store.get(f"{prefix}/{MANIFEST}"))
    for listed in manifest["files"]:
        found = digest_in(store, f"{prefix}/{listed['path']}")
        if found != listed["sha256"]:
            raise GateFailed(
                f"{prefix}/{listed['path']} has sha256 {found}, its manifest says {listed['sha256']}"
            )
    return manifest


def compatibility_of(config: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Which servers can load an adapter with this adapter_config.json, and why not the others.

    vLLM 0.15: LoRA only, no DoRA, no bias, no extra trained modules, a rank up to its --max-lora-rank.
    Ray Serve LLM runs vLLM. LoRAX: LoRA (and others we do not write) from a bucket's prefix.
    """
    rank = config.get("r")
    reasons = []
    if config.get("peft_type") != "LORA" or rank is None:
        reasons.append(f"it is no LoRA but {config.get('peft_type')}")
    if config.get("use_dora"):
        reasons.append("it is a DoRA")
    if config.get("bias", "none") != "none":
        reasons.append("it has trained biases")
    if config.get("modules_to_save"):
        reasons.append(f"it has trained modules besides LoRA: {config['modules_to_save']}")
    fitting = [limit for limit in VLLM_RANKS if rank is not None and rank <= limit]
    if rank is not None and not fitting:
        reasons.append(f"its rank {rank} is above {VLLM_RANKS[-1]}")
    served: dict[str, Any] = {"ok": not reasons, "reason": "; ".join(reasons) or None}
    needs = {"max_lora_rank": fitting[0]} if fitting and not reasons else {}
    return {
        "peft": {"ok": True, "reason": None},
        "vllm": {**served, "needs": needs},
        "ray_serve_llm": {**served, "needs": needs},
        "lorax": {**served, "needs": {}},
    }


def card(
    spec: FineTuneSpec,
    record: Mapping[str, Any],
    proof: Proof,
    compatibility: Mapping[str, Mapping[str, Any]],
    location: str,
) -> str:
    """README.md: a model card that the Hub accepts, with how to load just this adapter."""
    front = {
        "base_model": spec.base.id,
        "base_model_relation": "adapter",
        "library_name": "peft",
        "pipeline_tag": "text-generation",
        "tags": [spec.method.kind, f"base_model:adapter:{spec.base.id}", spec.objective.kind, "transformers"],
    }
    reference = f"{record['name']}-v{record['version']:04d}"
    rows = [f"| {name} | {value} |" for name, value in _hyperparameters(spec)]
    metrics = [f"| {name} | {value:.4f} |" for name, value in sorted(record["metrics"].items())]
    loads = [
        f"- {server}: {'yes' if said['ok'] else 'no, ' + str(said['reason'])}"
        + (f" (`--max-lora-rank {said['needs']['max_lora_rank']}` at least)" if said.get("needs") else "")
        for server, said in compatibility.items()
    ]
    checks = [f"- {check.name}: {check.detail}" for check in proof.checks]
    data = [f"- training: {spec.data.training.rows} rows, sha256 `{spec.data.training.sha256}`"]
    if spec.data.validation:
        data.append(f"- validation: {spec.data.validation.rows} rows, sha256 `{spec.data.validation.sha256}`")
    versions = ", ".join(f"{name} {number}" for name, number in sorted(proof.software.items()))
    # JSON is YAML: quoting cannot go wrong.
    return "\n".join(
        [
            "---",
            *(f"{key}: {json.dumps(value)}" for key, value in front.items()),
            "---",
            "",
            f"# {reference}",
            "",
            f"A {spec.method.kind} adapter of {spec.base.id} with {proof.trainable_parameters:,} values.",
            f"Made by job `{record['job']}` of peft-service. It has the base's licence and limits; what it",
            "learned is what its training rows show.",
            "",
            "## Load it",
            "",
            "```python",
            "from peft import PeftModel",
            "from transformers import AutoModelForCausalLM, AutoTokenizer",
            "",
            f'model = AutoModelForCausalLM.from_pretrained("{spec.base.id}")',
            'model = PeftModel.from_pretrained(model, "this/folder")',
            'tokenizer = AutoTokenizer.from_pretrained("this/folder")',
            "```",
            "",
            f"It lies at `{location}`. Tokenizer and chat template of this folder are those of the training.",
            "",
            *loads,
            "",
            "## Result",
            "",
            "| metric | value |",
            "|---|---|",
            *metrics,
            "",
            "## Made from",
            "",
            f"- base: `{spec.base.id}`, revision `{spec.base.revision}`, digest `{spec.base.digest}`"
            + (f", held in {spec.base.quantize} while training" if spec.base.quantize else ""),
            *data,
            f"- seed {spec.seed}; {record['step']} steps, {record['trained_tokens']:,} tokens",
            f"- software: {versions}",
            "",
            "| setting | value |",
            "|---|---|",
            *rows,
            "",
            "## Proven before it was published",
            "",
            *checks,
            "",
        ]
    )


def digest_in(store: Store, key: str) -> str:
    """sha256 of an object, read as a stream."""
    digest = hashlib.sha256()
    for chunk in store.read(key):
        digest.update(chunk)
    return digest.hexdigest()


def _checked(store: Store, prefix: str, file: File) -> bytes:
    data = store.get(f"{prefix}/{file.path}")
    if hashlib.sha256(data).hexdigest() != file.sha256:
        raise GateFailed(f"{prefix}/{file.path} is not the file that the gate checked")
    return data


def _file(path: str, text: str) -> File:
    data = text.encode()
    return File(path=path, size=len(data), sha256=hashlib.sha256(data).hexdigest())


def _hyperparameters(spec: FineTuneSpec) -> Iterator[tuple[str, Any]]:
    yield from spec.method.model_dump().items()
    yield from spec.training.model_dump().items()
