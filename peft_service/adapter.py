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
from peft_service.methods import SERVERS, Carrier, Method
from peft_service.spec import Base, FineTuneSpec, OperationSpec, spec_of
from peft_service.store import Store
from peft_service.tasks import AUTO_CLASSES, Task
from peft_service.variants import Frozen

if TYPE_CHECKING:
    from torch import Tensor

    from peft_service.attached import Attached

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
CARD = "README.md"
SUMS = "SHA256SUMS"
MANIFEST = "manifest.json"
SOFTWARE = ("torch", "transformers", "peft", "deepspeed", "ray", "bitsandbytes", "peft-service")
VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""What vLLM's --max-lora-rank can be."""


_PEFT_TYPES = frozenset(
    (
        *("PROMPT_TUNING", "MULTITASK_PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING", "LORA", "ADALORA", "BOFT"),
        *("ADAPTION_PROMPT", "IA3", "LOHA", "LOKR", "OFT", "POLY", "LN_TUNING", "VERA", "FOURIERFT", "XLORA"),
        *("HRA", "VBLORA", "CPT", "RANDLORA", "TRAINABLE_TOKENS", "SHIRA", "C3A", "ROAD", "WAVEFT", "OSF"),
        *("DELORA", "GRALORA", "MISS", "ADAMSS", "BEFT", "CARTRIDGE", "FROD", "GLORA", "HIRA", "LILY"),
        *("PEANUT", "PSOFT", "PVERA", "SHADOW", "SUPERTUNING", "TINYLORA", "UNILORA", "DEFT"),
    )
)
"""peft's own types: importing peft to ask it would import torch into the scheduler."""


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


def stage(
    attached: "Attached", trainable: Mapping[str, "Tensor"], tokenizer: Any, directory: Path, base: Base
) -> None:
    """Write the artifact of a trained method, and the tokenizer with its template.

    `trainable` has every trainable parameter full size on the CPU, by its name in the model: under ZeRO-3 the
    model's own parameters are empty outside `Engine.gathered`.

    Raises:
        GateFailed: a tensor is empty.
    """
    from peft_service.attached import check_gathered

    check_gathered(trainable)
    directory.mkdir(parents=True, exist_ok=True)
    attached.save(trainable, directory, (base.id, base.revision))
    tokenizer.save_pretrained(directory)


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
    spec = spec_of(record["spec"])
    staged = {file.path: file for file in proof.files}
    config: dict[str, Any] | None = None
    made: dict[str, str] = {}
    if CONFIG in staged:
        config = json.loads(_checked(store, staged_prefix, staged[CONFIG]))
        # Servers compare this with the name they serve; the trainer's path would mean nothing to them.
        config["base_model_name_or_path"] = spec.base.id
        config["revision"] = spec.base.revision
        made[CONFIG] = json.dumps(config, indent=2, sort_keys=True) + "\n"

    copied = [file for file in proof.files if file.path not in (CONFIG, CARD, SUMS, MANIFEST)]
    for file in copied:
        if digest_in(store, f"{staged_prefix}/{file.path}") != file.sha256:
            raise GateFailed(f"{staged_prefix}/{file.path} is not the file that the gate checked")
        store.copy(f"{staged_prefix}/{file.path}", f"{target_prefix}/{file.path}")
    task = _task_of(spec) if isinstance(spec, FineTuneSpec) else "causal_lm"
    compatibility = compatibility_of(config, spec.method, task)
    if store.url.startswith("file:") and compatibility["ray_serve_llm"]["ok"]:
        compatibility["ray_serve_llm"] |= {
            "ok": False,
            "reason": "it reads buckets, and this store is a folder",
        }
    location = f"{store.url.rstrip('/')}/{target_prefix}"
    if isinstance(spec, OperationSpec):
        made[CARD] = card_of_operation(spec, record, proof, compatibility, location)
    else:
        made[CARD] = card(spec, record, proof, compatibility, location)
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
        if path in made:
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


def download(store: Store, prefix: str, directory: Path) -> dict[str, Any]:
    """Fetch every file of a published adapter, each as its manifest says; returns the manifest.

    Raises:
        ObjectNotFound, GateFailed: as `verify`.
    """
    manifest = verify(store, prefix)
    for file in manifest["files"]:
        (directory / file["path"]).parent.mkdir(parents=True, exist_ok=True)
        store.download(f"{prefix}/{file['path']}", directory / file["path"])
    return manifest


def is_servable(store: Store, prefix: str) -> bool:
    """Whether what lies there is what servers mean by an adapter: a plain LoRA of a language model."""
    try:
        return not _unservable(json.loads(store.get(f"{prefix}/{CONFIG}")))
    except ObjectNotFound:
        return False


def _unservable(config: Mapping[str, Any]) -> list[str]:
    """Why vLLM, and what runs it, cannot serve an adapter with this adapter_config.json."""
    rank = config.get("r")
    reasons = []
    if config.get("peft_type") != "LORA" or rank is None:
        reasons.append(f"it is no LoRA but {config.get('peft_type')}")
    if config.get("task_type") not in (None, "CAUSAL_LM"):
        reasons.append(f"it is for {config.get('task_type')}, not for generating text")
    if config.get("rank_pattern") or config.get("alpha_pattern"):
        reasons.append("its layers have different ranks")
    if config.get("use_dora"):
        reasons.append("it is a DoRA")
    if config.get("bias", "none") != "none":
        reasons.append("it has trained biases")
    if config.get("modules_to_save"):
        reasons.append(f"it has trained modules besides LoRA: {config['modules_to_save']}")
    if rank is not None and rank > VLLM_RANKS[-1]:
        reasons.append(f"its rank {rank} is above {VLLM_RANKS[-1]}")
    return reasons


def compatibility_of(
    config: Mapping[str, Any] | None, method: Method, task: Task = "causal_lm"
) -> dict[str, dict[str, Any]]:
    """Which servers can load an adapter with this adapter_config.json, and why not the others.

    vLLM 0.15: LoRA only, no DoRA, no bias, no extra trained modules, a rank up to its --max-lora-rank.
    Ray Serve LLM runs vLLM. LoRAX: LoRA (and others we do not write) from a bucket's prefix.
    """
    if config is None:
        what = {
            "delta": "it is a delta: changed weights of the base, put on by peft_service.artifact.load",
            "model": "it is a whole model, to be served as one, without a base",
        }.get(method.can.carrier, "it has several parts, put together by peft_service.artifact.load")
        said = {server: {"ok": False, "reason": what, "needs": {}} for server in SERVERS}
        if method.can.carrier == "model" and task == "causal_lm":
            own = "as a model of its own, not as an adapter of its base"
            said |= {server: {"ok": True, "reason": own, "needs": {}} for server in ("vllm", "ray_serve_llm")}
        return said
    reasons = _unservable(config)
    rank = config.get("r")
    fitting = [limit for limit in VLLM_RANKS if rank is not None and rank <= limit]
    plain = config.get("peft_type") in _PEFT_TYPES
    served: dict[str, Any] = {"ok": not reasons, "reason": "; ".join(reasons) or None}
    needs = {"max_lora_rank": fitting[0]} if fitting and not reasons else {}
    return {
        "peft": {
            "ok": True,
            "reason": _told_to_peft(config)
            if plain
            else "after `import peft_service.tuners`, which registers its type",
        },
        "vllm": {**served, "needs": needs},
        "ray_serve_llm": {**served, "needs": needs},
        "lorax": {**served, "needs": {}},
    }


def _told_to_peft(config: Mapping[str, Any]) -> str | None:
    """What plain peft wants to be told besides the directory."""
    if config.get("peft_type") == "XLORA":
        return "with adapters=, the folders 0, 1, … beside it; peft_service.artifact.load finds them itself"
    if config.get("peft_type") in ("POLY", "MULTITASK_PROMPT_TUNING"):
        return "with task_ids, the number of every row's task, at each call"
    return None


def card_of_operation(
    spec: OperationSpec,
    record: Mapping[str, Any],
    proof: Proof,
    compatibility: Mapping[str, Mapping[str, Any]],
    location: str,
) -> str:
    """README.md of what an operation made: from which adapters, how, and with which measured error."""
    carrier, operation = spec.method.can.carrier, spec.operation
    front = {
        "base_model": spec.base.id,
        "base_model_relation": "merge" if carrier == "model" else "adapter",
        "library_name": "transformers" if carrier == "model" else "peft",
        "pipeline_tag": _PIPELINES[spec.task],
        "tags": [operation.kind, f"base_model:adapter:{spec.base.id}", "transformers"],
    }
    settings = [f"| {name} | {value} |" for name, value in operation.model_dump().items()]
    checks = [f"- {check.name}: {check.detail}" for check in proof.checks]
    return "\n".join(
        [
            "---",
            *(f"{key}: {json.dumps(value)}" for key, value in front.items()),
            "---",
            "",
            f"# {record['name']}-v{record['version']:04d}",
            "",
            f"{operation.title}: {operation.summary}",
            f"Made by job `{record['job']}` of peft-service, without training.",
            "",
            "## Load it",
            "",
            "```python",
            *_loading(carrier, spec.task, spec.base.id, len(spec.labels)),
            'tokenizer = AutoTokenizer.from_pretrained("this/folder")',
            "```",
            "",
            f"It lies at `{location}`.",
            "",
            *_servers(compatibility),
            "",
            "## Made from",
            "",
            f"- base: `{spec.base.id}`, revision `{spec.base.revision}`, digest `{spec.base.digest}`",
            *(
                f"- {source.reference} ({source.method}), `{source.id}`, digest `{source.digest}`"
                for source in spec.sources
            ),
            "",
            "| setting | value |",
            "|---|---|",
            *settings,
            "",
            "## Measured",
            "",
            "| what | value |",
            "|---|---|",
            *(f"| {name} | {value:.3g} |" for name, value in sorted(record["metrics"].items())),
            "",
            "## Proven before it was published",
            "",
            *checks,
            "",
        ]
    )


def _servers(compatibility: Mapping[str, Mapping[str, Any]]) -> list[str]:
    return [
        f"- {server}: {'yes' if said['ok'] else 'no, ' + str(said['reason'])}"
        + (f" (`--max-lora-rank {said['needs']['max_lora_rank']}` at least)" if said.get("needs") else "")
        for server, said in compatibility.items()
    ]


def card(
    spec: FineTuneSpec,
    record: Mapping[str, Any],
    proof: Proof,
    compatibility: Mapping[str, Mapping[str, Any]],
    location: str,
) -> str:
    """README.md: a model card that the Hub accepts, with how to load just this adapter."""
    carrier, task = spec.method.can.carrier, _task_of(spec)
    front = {
        "base_model": spec.base.id,
        "base_model_relation": "finetune" if carrier in ("model", "delta") else "adapter",
        "library_name": "transformers" if carrier == "model" else "peft",
        "pipeline_tag": _PIPELINES[task],
        "tags": [spec.method.kind, f"base_model:adapter:{spec.base.id}", spec.objective.kind, "transformers"],
    }
    reference = f"{record['name']}-v{record['version']:04d}"
    rows = [f"| {name} | {value} |" for name, value in _hyperparameters(spec)]
    metrics = [f"| {name} | {value:.4f} |" for name, value in sorted(record["metrics"].items())]
    checks = [f"- {check.name}: {check.detail}" for check in proof.checks]
    data = [f"- training: {source.rows} rows, sha256 `{source.sha256}`" for source in spec.data.sources]
    data.append(f"- objective: {spec.objective.kind}: {spec.objective.summary}")
    if spec.data.template is not None:
        named = spec.data.template.name or "given inline"
        data.append(f"- chat template: {named}, sha256 `{spec.data.template.sha256}`")
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
            f"A {spec.method.title or spec.method.kind} fine-tune of {spec.base.id}, which trained "
            f"{proof.trainable_parameters:,} values.",
            f"Made by job `{record['job']}` of peft-service. It has the base's licence and limits; what it",
            "learned is what its training rows show.",
            "",
            "## Load it",
            "",
            "```python",
            *_loading(carrier, task, spec.base.id, len(spec.objective.labels(spec.data.labels))),
            'tokenizer = AutoTokenizer.from_pretrained("this/folder")',
            "```",
            "",
            f"It lies at `{location}`. Tokenizer and chat template of this folder are those of the training.",
            "",
            *_servers(compatibility),
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


_PIPELINES: dict[Task, str] = {
    "causal_lm": "text-generation",
    "seq2seq_lm": "text2text-generation",
    "sequence_classification": "text-classification",
    "token_classification": "token-classification",
    "question_answering": "question-answering",
}


def _task_of(spec: FineTuneSpec) -> Task:
    """Of a spec without its shape: what its objective asks of a decoder, or of an encoder-decoder."""
    task = spec.objective.task("decoder")
    return "seq2seq_lm" if task == "causal_lm" and spec.base.architecture == "encoder_decoder" else task


def _loading(carrier: Carrier, task: Task, base: str, labels: int) -> list[str]:
    """Lines of Python that load the artifact."""
    name = AUTO_CLASSES[task]
    head = ""
    if labels and task != "question_answering" and carrier != "model":
        head = f", num_labels={labels}"
    source = "this/folder" if carrier == "model" else base
    lines = [
        f"from transformers import {name}, AutoTokenizer",
        "",
        f'model = {name}.from_pretrained("{source}"{head})',
    ]
    if carrier in ("peft", "registered"):
        load = 'model = PeftModel.from_pretrained(model, "this/folder")'
        lines = ["from peft import PeftModel", *lines, load]
    if carrier == "registered":
        lines = ["import peft_service.tuners  # registers the type with peft", *lines]
    if carrier in ("delta", "composite"):
        lines = ["from pathlib import Path", *lines, 'model = artifact.load(model, Path("this/folder"))']
        lines.insert(2, "from peft_service import artifact")
    return lines


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
