"""Base models: where they are, what shape they have, and how they are loaded.

`inspect` and `fetch` read config.json and safetensors headers only, so the API can call them without torch.
Nothing is ever unpickled and no code of a repository is ever run: safetensors, json and tokenizer files only.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import re
import shutil
import struct
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from peft_service import artifact
from peft_service.errors import StoreError, UnknownBase
from peft_service.spec import Base
from peft_service.tasks import IN_BLOCK, POOLED_HEADS, Architecture, Task
from peft_service.variants import Frozen

if TYPE_CHECKING:
    import torch
    from torch import nn

WANTED = re.compile(
    r"^(config\.json|generation_config\.json|[^/]*\.safetensors|model\.safetensors\.index\.json|tokenizer\.json"
    r"|tokenizer_config\.json|special_tokens_map\.json|added_tokens\.json|tokenizer\.model|vocab\.json|merges\.txt"
    r"|chat_template\.(jinja|json)|README\.md|LICENSE[^/]*)$"
)
"""The only files that are fetched. Anything else in a repository (.bin, .py, .gguf) is never read."""

WEIGHTS = re.compile(r"\.safetensors(\.index\.json)?$")

MAX_HEADER_BYTES = 100 << 20
"""The safetensors format's own limit."""

SAMPLED_ABOVE_BYTES = 1 << 30
_BLOCK = 1 << 20
_BLOCKS = 256

_DTYPE_BITS = {"F64": 64, "I64": 64, "F32": 32, "I32": 32, "F16": 16, "BF16": 16, "I16": 16}
_DTYPE_NAMES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_OUTPUT_HEAD = re.compile(r"(^|\.)(lm_head|embed_out|output_layer)$")
_NOT_LINEAR = re.compile(
    r"embed|(^|\.)(wte|wpe|wse)$|norm|\.experts\.|rotary|relative_attention_bias|\.gate$"
)
"""Layers of a transformer are numbered; pooler, heads and projections around them are not."""
_MODEL_HEAD = re.compile(r"^(lm_head|embed_out|output_layer|cls|generator_lm_head|generator_predictions)\.")
_POOLER = re.compile(r"(^|\.)pooler\.")
_EMBEDDINGS = re.compile(r"(^|\.)(embed_tokens|word_embeddings|wte|shared)\.weight$")
_ENCODERS = {
    "bert", "roberta", "xlm-roberta", "camembert", "distilbert", "electra", "albert", "mpnet", "deberta-v2",
    "modernbert",
}  # fmt: skip
_T5S = {"t5", "mt5", "umt5"}
_POSITIONS_BEHIND_PADDING = {"roberta", "xlm-roberta", "camembert", "mpnet"}
_ENCODERS_DECODERS = {*_T5S, "bart", "mbart", "longt5", "m2m_100", "marian", "pegasus"}


class ModelShape(Frozen):
    """What the arithmetic of plans and methods needs to know about a base."""

    layers: int
    hidden: int
    vocab: int
    linears: tuple[tuple[str, int, int], ...]
    """(module name, d_out, d_in) of every linear layer but the output head and routed experts."""
    parameters: int
    bytes: int
    """Bytes of the weights as stored."""
    dtype: str
    """torch's name of the dtype most weights are stored in."""
    tied: bool
    """The output head is the embedding."""
    architecture: Architecture = "decoder"
    model_type: str = ""
    """transformers' name of the kind of model, for example `llama`."""
    decoder_layers: int = 0
    """Of an encoder-decoder, of which `layers` counts the encoder's."""
    heads: int = 0
    kv_heads: int = 0
    head_dim: int = 0
    intermediate: int = 0
    """Width inside the feed-forward block."""
    biases: tuple[tuple[str, int], ...] = ()
    """(tensor, size) of every bias of the body: linear layers' and norms', heads and pooler not."""
    norms: tuple[tuple[str, int], ...] = ()
    """(module, size) of every normalisation layer of the body."""
    embedding_parameters: int = 0
    """Of the token embedding."""
    pooler_parameters: int = 0
    head_parameters: int = 0
    """Of the head that the checkpoint brings: a language model's, where it is not the embedding."""

    decoder_parameters: int = 0
    """Of an encoder-decoder's decoder."""

    def for_task(self, task: Task) -> "ModelShape":
        """The part of the checkpoint that a model for this task is made of; a new head comes on top.

        Tags are found by a T5's encoder alone; a pooler serves the classes of a row, and only some models'.
        """
        encoder_only = task == "token_classification" and self.model_type in _T5S
        pooled = task == "sequence_classification" and self.model_type in POOLED_HEADS
        writes = task in ("causal_lm", "seq2seq_lm")
        gone = 0 if writes else self.head_parameters
        gone += 0 if pooled else self.pooler_parameters
        update: dict[str, Any] = {"head_parameters": self.head_parameters if writes else 0}
        if not pooled:
            update["pooler_parameters"] = 0
        if encoder_only:
            for name in ("linears", "biases", "norms"):
                kept = (entry for entry in getattr(self, name) if not entry[0].startswith("decoder."))
                update[name] = tuple(kept)
            gone += self.decoder_parameters
            update |= {"decoder_parameters": 0, "decoder_layers": 0}
        return self.model_copy(update={**update, "parameters": self.parameters - gone})

    @property
    def packed_in_4_bits(self) -> int:
        """Weights that four bits hold: the blocks' linear layers'; transformers keeps T5's `wo` whole."""
        kept = ".wo" if self.model_type in _T5S else "\0"
        return sum(d_out * d_in for name, d_out, d_in in self.linears if not name.endswith(kept))

    @property
    def body_parameters(self) -> int:
        """Without head and pooler."""
        return self.parameters - self.head_parameters - self.pooler_parameters

    @property
    def kv_width(self) -> int:
        """k of the notes: with grouped queries, keys and values are narrower than the hidden state."""
        return self.kv_heads * self.head_dim


class BaseInfo(Frozen):
    """What `inspect` found."""

    uri: str
    revision: str | None
    digest: str
    shape: ModelShape
    architecture: str
    license: str | None
    has_chat_template: bool
    context_length: int | None


class _Source(Protocol):
    """Random access to the files of one base, wherever it is."""

    def sizes(self) -> dict[str, int]: ...
    def read(self, name: str, start: int = 0, size: int | None = None) -> bytes: ...


def inspect(uri: str) -> BaseInfo:
    """Read config.json and the safetensors headers of the base at `uri`. No torch, no download of weights.

    Raises:
        UnknownBase: there is nothing, it is not safetensors, needs remote code, or is no decoder.
    """
    source: _Source
    revision = None
    if uri.startswith("hf://"):
        hub = _HubSource(uri)
        source, revision = hub, hub.revision
        digest = _digest_of_lines(hub.identities)
    else:
        source = _source_of(uri)
        digest = digest_of(source)
    config, names = _checked(uri, source)
    shape = _shape_of(uri, config, source, names)
    text = config.get("text_config", config)
    tokenizer_config = {}
    if "tokenizer_config.json" in names:
        tokenizer_config = _json_of(uri, source, "tokenizer_config.json")
    return BaseInfo(
        uri=uri,
        revision=revision,
        digest=digest,
        shape=shape,
        architecture=config["architectures"][0],
        license=_license_of(source, names),
        has_chat_template="chat_template.jinja" in names or bool(tokenizer_config.get("chat_template")),
        context_length=_context_length(text),
    )


def _context_length(config: dict[str, Any]) -> int | None:
    """Tokens of the longest row; RoBERTa and its kin count positions from behind the padding's id."""
    places = config.get("max_position_embeddings") or config.get("n_positions")
    if places and config.get("model_type") in _POSITIONS_BEHIND_PADDING:
        places -= int(config.get("pad_token_id", 1)) + 1
    return places


def shape_of_directory(directory: Path, uri: str | None = None) -> ModelShape:
    """The shape of a base that is already on this machine; `uri` is what errors call it.

    Raises:
        UnknownBase: see `inspect`.
    """
    uri = uri or str(directory)
    source = _DirectorySource(directory)
    config, names = _checked(uri, source)
    return _shape_of(uri, config, source, names)


def digest_of_directory(directory: Path) -> str:
    """`digest_of` of a base that is on this machine."""
    return digest_of(_DirectorySource(directory))


def license_of(directory: Path) -> str | None:
    """What the model card of a base on this machine says; an adapter inherits it."""
    source = _DirectorySource(directory)
    return _license_of(source, set(source.sizes()))


def digest_of(source: _Source) -> str:
    """sha256 over the sorted names, sizes and contents of the weights, the config and the tokenizer files.

    Of a file above 1 GiB, 256 evenly spaced blocks of 1 MiB (the header among them) stand for the contents:
    a 100 GB base is told from another in seconds, and two trainings of one shape differ in every block.
    """
    lines = []
    for name, size in sorted(source.sizes().items()):
        if name == "README.md" or name.startswith("LICENSE"):
            continue
        sha = hashlib.sha256()
        if size <= SAMPLED_ABOVE_BYTES:
            for start in range(0, size, 16 * _BLOCK):
                sha.update(source.read(name, start, min(16 * _BLOCK, size - start)))
        else:
            for block in range(_BLOCKS):
                sha.update(source.read(name, (size - _BLOCK) * block // (_BLOCKS - 1), _BLOCK))
        lines.append(f"{name} {size} {sha.hexdigest()}")
    return _digest_of_lines(lines)


def fetch(base: Base, cache: Path) -> Path:
    """The directory that holds `base` on this machine.

    `file://` is used in place; `s3://` and `hf://` are downloaded once into `cache`, whatever number of
    processes ask at the same time.

    Raises:
        UnknownBase: see `inspect`.
        StoreUnavailable: the object store does not answer; worth a retry.
    """
    if base.uri.startswith("file://"):
        directory = _file_directory(base.uri)
        shape_of_directory(directory, base.uri)
        return directory
    return _fetched(base, cache, weights=True)


def fetch_tokenizer(base: Base, cache: Path) -> Path:
    """A directory with what is small of `base`: config, tokenizer and chat template, but no weights.

    For whoever only tokenises. Where it is `file://`, the directory itself.

    Raises:
        UnknownBase: it is not there.
        StoreUnavailable: the object store does not answer; worth a retry.
    """
    if base.uri.startswith("file://"):
        return _file_directory(base.uri)
    return _fetched(base, cache, weights=False)


def _fetched(base: Base, cache: Path, *, weights: bool) -> Path:
    """The directory in `cache` that a base of a bucket or the Hub was downloaded into, once."""
    name = hashlib.sha256(f"{base.uri}@{base.revision}#{base.digest}".encode()).hexdigest()[:24]
    name += "" if weights else "-tokenizer"
    target = cache / name
    cache.mkdir(parents=True, exist_ok=True)
    with _locked(cache / f"{name}.lock"):
        if not target.exists():
            partial = Path(tempfile.mkdtemp(prefix=f"{name}-", dir=cache))
            try:
                if base.uri.startswith("hf://"):
                    _download_from_hub(base, partial, weights)
                else:
                    _download_from_store(base.uri, partial, weights)
                if weights:
                    shape_of_directory(partial, base.uri)
                partial.rename(target)
            finally:
                shutil.rmtree(partial, ignore_errors=True)
    return target


def load(
    directory: Path,
    *,
    precision: str,
    quantize: str | None = None,
    device: "torch.device | str" = "cpu",
    task: Task = "causal_lm",
    labels: tuple[str, ...] = (),
    seed: int = 0,
) -> "nn.Module":
    """The frozen base as a transformers model in eval mode, in float32 or bfloat16, optionally held in
    NF4.

    A task that needs a head gets one of as many outputs as there are `labels`, whose first values are drawn
    from `seed`; `model.new_head` has the names of its modules.
    """
    import torch

    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
    options: dict[str, Any] = {}
    if str(device) != "cpu" and (quantize or not _zero_init_is_on()):
        options["device_map"] = {"": str(device)}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)  # the head's first values
        # Storage in the compute dtype lets ZeRO-3 shard the packed weights together with the others.
        model = artifact.load_base(
            directory, task, labels, quantize=quantize, storage=dtype, dtype=dtype, **options
        )
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    model.config.use_cache = False
    model.eval()
    return model  # type: ignore[no-any-return]


def load_tokenizer(directory: Path) -> Any:
    """The base's own tokenizer.

    Raises:
        UnknownBase: there is none that works without remote code.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(directory, trust_remote_code=False, local_files_only=True)
    except (OSError, ValueError) as error:
        raise UnknownBase(f"no tokenizer that loads without remote code: {error}", param="model") from error


def linear_bytes(model: "nn.Module") -> tuple[int, int]:
    """(bytes stored, weights held) of the frozen linear layers, scales and codebooks of NF4 included.

    Four bits with double quantisation are 0.516 bytes a weight, bf16 two, fp32 four.
    """
    import torch

    stored = weights = 0
    for name, module in model.named_modules():
        if _OUTPUT_HEAD.search(name) or not isinstance(module, torch.nn.Linear):
            continue
        weight = module.weight
        if weight.requires_grad or "lora_" in name:
            continue
        stored += weight.numel() * weight.element_size()
        quantised = getattr(weight, "quant_state", None)
        weights += weight.numel() if quantised is None else int(torch.Size(quantised.shape).numel())
        if quantised is not None:
            state = quantised.as_dict(packed=True)
            stored += sum(t.numel() * t.element_size() for t in state.values() if torch.is_tensor(t))
    return stored, weights


def _zero_init_is_on() -> bool:
    """True while ZeRO-3 shards weights as they are loaded; it places them itself."""
    from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

    return bool(is_deepspeed_zero3_enabled())


def _checked(uri: str, source: _Source) -> tuple[dict[str, Any], set[str]]:
    names = set(source.sizes())
    if "config.json" not in names:
        raise UnknownBase(
            f"{uri}: no config.json there; give a transformers model's directory.", param="model"
        )
    config = _json_of(uri, source, "config.json")
    if not any(name.endswith(".safetensors") for name in names):
        raise UnknownBase(
            f"{uri}: no .safetensors file. Pickled weights (.bin, .pt) are never loaded; convert the model "
            f"with "
            "`save_pretrained` of a current transformers.",
            param="model",
        )
    known = _known_model_types()
    if config.get("auto_map") and config.get("model_type") not in known:
        raise UnknownBase(
            f"{uri}: model type {config.get('model_type')!r} needs code from its repository (auto_map), "
            f"and remote "
            "code is never run. Use a model that transformers itself knows.",
            param="model",
        )
    if config.get("quantization_config"):
        raise UnknownBase(
            f"{uri}: the weights are already quantised "
            f"({config['quantization_config'].get('quant_method', 'unknown method')}). Give the original "
            f"weights, "
            'and base.quantize = "nf4" for 4 bits.',
            param="model",
        )
    _architecture_of(uri, config)
    return config, names


def _architecture_of(uri: str, config: dict[str, Any]) -> Architecture:
    """
    Raises:
        UnknownBase: it is no text model of the three kinds.
    """
    named = (config.get("architectures") or [""])[0]
    model_type = config.get("model_type", "")
    if model_type in _ENCODERS_DECODERS:
        return "encoder_decoder"
    if re.search(r"(ForCausalLM|LMHeadModel)$", named):
        return "decoder"
    if model_type in _ENCODERS:
        return "encoder"
    raise UnknownBase(
        f"{uri}: architecture {named or 'unnamed'} is no decoder language model (…ForCausalLM), no encoder "
        f"({', '.join(sorted(_ENCODERS))}) and no encoder-decoder ({', '.join(sorted(_ENCODERS_DECODERS))}); "
        "only those can be fine-tuned.",
        param="model",
    )


def _known_model_types() -> set[str]:
    """Model types transformers has code for, read from its tree: importing transformers would import
    torch."""
    import importlib.util

    spec = importlib.util.find_spec("transformers")
    if spec is None or not spec.submodule_search_locations:
        return set()
    models = Path(next(iter(spec.submodule_search_locations))) / "models"
    return {entry.name.replace("-", "_") for entry in models.iterdir() if entry.is_dir()}


def _shape_of(uri: str, config: dict[str, Any], source: _Source, names: set[str]) -> ModelShape:
    text = config.get("text_config", config)
    architecture, model_type = _architecture_of(uri, config), str(config.get("model_type", ""))
    tied = bool(text.get("tie_word_embeddings", config.get("tie_word_embeddings", True)))
    transposed = model_type in {"gpt2", "gpt_bigcode", "imagegpt"}
    linears: list[tuple[str, int, int]] = []
    biases: list[tuple[str, int]] = []
    norms: list[tuple[str, int]] = []
    bytes_by_dtype: dict[str, int] = {}
    parameters = embedding = pooler = head = decoder = 0
    seen: set[str] = set()
    for file in sorted(names):
        if not file.endswith(".safetensors"):
            continue
        for tensor, entry in _header(uri, source, file).items():
            size = entry["data_offsets"][1] - entry["data_offsets"][0]
            if entry["dtype"] not in _DTYPE_NAMES and entry["dtype"][0] != "F":
                continue  # position ids and other buffers
            if tensor.endswith("final_logits_bias"):
                continue  # BART's, a buffer of zeros
            if tied and (_OUTPUT_HEAD.search(tensor.removesuffix(".weight")) or _tied_again(tensor, seen)):
                continue  # some repositories store the tied head, or T5's embedding, a second time
            shape = entry["shape"]
            numel = size * 8 // _DTYPE_BITS.get(entry["dtype"], 8)
            seen.add(tensor)
            parameters += numel
            bytes_by_dtype[entry["dtype"]] = bytes_by_dtype.get(entry["dtype"], 0) + size
            module, _, kind = tensor.rpartition(".")
            if _EMBEDDINGS.search(tensor):
                embedding = numel
            if architecture == "encoder_decoder" and tensor.startswith("decoder."):
                decoder += numel
            if _MODEL_HEAD.search(tensor):
                head += numel
            elif _POOLER.search(tensor):
                pooler += numel
            elif kind == "bias" and len(shape) == 1:
                biases.append((tensor, numel))
            elif kind == "weight" and len(shape) == 1:
                norms.append((module, numel))
            elif (
                kind == "weight"
                and len(shape) == 2
                and IN_BLOCK.search(tensor)
                and not _NOT_LINEAR.search(module.lower())
            ):
                d_out, d_in = reversed(shape) if transposed else shape
                linears.append((module, d_out, d_in))
    dtype = max(bytes_by_dtype, key=lambda key: bytes_by_dtype[key])

    def first(*keys: str) -> int:
        return int(next((text[key] for key in keys if text.get(key)), 0))

    hidden = first("hidden_size", "n_embd", "d_model", "dim")
    heads = first("num_attention_heads", "n_head", "num_heads", "encoder_attention_heads", "n_heads")
    layers = first("num_hidden_layers", "n_layer", "encoder_layers", "num_layers", "n_layers")
    return ModelShape(
        layers=layers,
        hidden=hidden,
        vocab=first("vocab_size"),
        linears=tuple(linears),
        parameters=parameters,
        bytes=sum(bytes_by_dtype.values()),
        dtype=_DTYPE_NAMES.get(dtype, dtype.lower()),
        tied=tied,
        architecture=architecture,
        model_type=model_type,
        decoder_layers=(first("decoder_layers", "num_decoder_layers") or layers)
        if architecture == "encoder_decoder"
        else 0,
        heads=heads,
        kv_heads=first("num_key_value_heads") or heads,
        head_dim=first("head_dim", "d_kv") or hidden // max(1, heads),
        intermediate=first("intermediate_size", "n_inner", "encoder_ffn_dim", "d_ff", "ffn_dim", "hidden_dim")
        or 4 * hidden,
        biases=tuple(biases),
        norms=tuple(norms),
        embedding_parameters=embedding,
        pooler_parameters=pooler,
        head_parameters=head,
        decoder_parameters=decoder,
    )


def _tied_again(tensor: str, seen: set[str]) -> bool:
    """T5 and BART hold one embedding under three names."""
    found = re.search(r"(^|\.)(encoder|decoder)\.embed_tokens\.weight$", tensor)
    return bool(found) and any(name.endswith("shared.weight") for name in seen)


def _header(uri: str, source: _Source, name: str) -> dict[str, Any]:
    """The tensors of a safetensors file: 8 bytes little-endian length, then JSON."""
    try:
        (length,) = struct.unpack("<Q", source.read(name, 0, 8))
        if length > MAX_HEADER_BYTES:
            raise ValueError(f"header of {length} bytes")
        header = json.loads(source.read(name, 8, length))
        header.pop("__metadata__", None)
        for entry in header.values():
            _ = entry["dtype"], entry["shape"], entry["data_offsets"][1]
    except (struct.error, ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
        raise UnknownBase(f"{uri}: {name} is no safetensors file ({error}).", param="model") from error
    return dict(header)


def _json_of(uri: str, source: _Source, name: str) -> dict[str, Any]:
    try:
        value = json.loads(source.read(name))
    except ValueError as error:
        raise UnknownBase(f"{uri}: {name} is no JSON ({error}).", param="model") from error
    if not isinstance(value, dict):
        raise UnknownBase(f"{uri}: {name} is no JSON object.", param="model")
    return value


def _license_of(source: _Source, names: set[str]) -> str | None:
    """The `license:` line of the model card's front matter."""
    if "README.md" not in names:
        return None
    text = source.read("README.md", 0, 1 << 16).decode("utf-8", "replace")
    front = re.match(r"---\n(.*?)\n---", text, re.DOTALL)
    found = re.search(r"^license:\s*(\S+)\s*$", front.group(1), re.MULTILINE) if front else None
    return found.group(1).strip("'\"") if found else None


def _digest_of_lines(lines: list[str]) -> str:
    return hashlib.sha256("\n".join(sorted(lines)).encode()).hexdigest()


def _file_directory(uri: str) -> Path:
    directory = Path(uri.removeprefix("file://"))
    if not directory.is_absolute() or not directory.is_dir():
        raise UnknownBase(
            f"{uri}: no such directory on {os.uname().nodename}. A file:// base must be an absolute path "
            f"that "
            "every node sees.",
            param="model",
        )
    return directory


def _source_of(uri: str) -> _Source:
    if uri.startswith("file://"):
        return _DirectorySource(_file_directory(uri))
    if uri.startswith("s3://"):
        return _StoreSource(uri)
    raise UnknownBase(
        f"{uri!r} is no base model address; use file:///dir, s3://bucket/prefix or hf://org/name@revision.",
        param="model",
    )


class _DirectorySource:
    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def sizes(self) -> dict[str, int]:
        return {
            path.name: path.stat().st_size
            for path in self.directory.iterdir()
            if path.is_file() and WANTED.match(path.name)
        }

    def read(self, name: str, start: int = 0, size: int | None = None) -> bytes:
        with (self.directory / name).open("rb") as file:
            file.seek(start)
            return file.read(-1 if size is None else size)


class _StoreSource:
    def __init__(self, uri: str) -> None:
        from peft_service.store import open_store

        self.uri, self.store = uri, open_store(uri)

    def sizes(self) -> dict[str, int]:
        try:
            return {info.key: info.size for info in self.store.list("") if WANTED.match(info.key)}
        except StoreError as error:
            raise UnknownBase(f"{self.uri}: {error.message}", param="model") from error

    def read(self, name: str, start: int = 0, size: int | None = None) -> bytes:
        return b"".join(self.store.read(name, start, size))


class _HubSource:
    """A repository on the Hugging Face Hub, read by ranges; needs the network."""

    def __init__(self, uri: str) -> None:
        from huggingface_hub import HfApi, HfFileSystem

        self.uri = uri
        repository, revision = _hub_parts(uri)
        info = _hub_call(uri, lambda: HfApi().model_info(repository, revision=revision, files_metadata=True))
        self.revision: str = str(info.sha)
        self.root = f"{repository}@{self.revision}"
        self.files = HfFileSystem()
        wanted = [file for file in info.siblings or [] if WANTED.match(file.rfilename)]
        self.by_name = {file.rfilename: int(file.size or 0) for file in wanted}
        self.identities = [
            f"{file.rfilename} {file.size} {file.lfs.sha256 if file.lfs else file.blob_id}"
            for file in wanted
            if file.rfilename != "README.md" and not file.rfilename.startswith("LICENSE")
        ]

    def sizes(self) -> dict[str, int]:
        return self.by_name

    def read(self, name: str, start: int = 0, size: int | None = None) -> bytes:
        end = None if size is None else start + size
        path = f"{self.root}/{name}"
        return bytes(_hub_call(self.uri, lambda: self.files.cat_file(path, start=start or None, end=end)))


def _hub_parts(uri: str) -> tuple[str, str | None]:
    found = re.fullmatch(r"hf://([\w.-]+/[\w.-]+)(?:@([\w./-]+))?", uri)
    if not found:
        raise UnknownBase(f"{uri!r}: write hf://org/name or hf://org/name@revision.", param="model")
    return found.group(1), found.group(2)


def _hub_call(uri: str, call: Callable[[], Any]) -> Any:
    try:
        return call()
    # hub errors are OSErrors; httpx's are RuntimeErrors or not
    except (OSError, ValueError, RuntimeError) as error:
        raise UnknownBase(
            f"{uri}: the Hugging Face Hub did not give it ({type(error).__name__}: "
            f"{str(error).splitlines()[0]}). "
            "Is the name right, is HF_TOKEN set for a gated model, can this machine reach the Hub?",
            param="model",
        ) from error
    except Exception as error:
        if type(error).__module__.split(".")[0] not in {"httpx", "httpcore", "huggingface_hub"}:
            raise
        raise UnknownBase(
            f"{uri}: the Hugging Face Hub cannot be reached ({type(error).__name__}).", param="model"
        ) from error


def _download_from_hub(base: Base, target: Path, weights: bool) -> None:
    from huggingface_hub import snapshot_download

    repository, revision = _hub_parts(base.uri)
    patterns = [
        "config.json", "generation_config.json", "*.safetensors", "model.safetensors.index.json",
        "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt",
        "chat_template.*", "README.md",
    ]  # fmt: skip
    _hub_call(
        base.uri,
        lambda: snapshot_download(
            repository,
            revision=base.revision or revision,
            local_dir=target,
            allow_patterns=patterns,
            ignore_patterns=["*/*", "*.py", "*.bin", *(() if weights else ("*.safetensors*",))],
        ),
    )


def _download_from_store(uri: str, target: Path, weights: bool) -> None:
    source = _StoreSource(uri)
    for name in source.sizes():
        if weights or not WEIGHTS.search(name):
            source.store.download(name, target / name)


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """One process at a time on this machine; released by the kernel if the holder dies."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
