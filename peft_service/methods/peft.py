"""All further types of the installed peft, by one class: what it has beyond the methods that have files here.

A type is admitted when it passes the checks that every method passes; the others are refused by name, with
what was seen (`REFUSED`). `count` of a type is its number of trained values as a closed formula, so that a
plan needs no torch; a test compares both it and the names of the settings with the installed peft.
"""

import difflib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal, cast

from pydantic import Field, field_validator, model_validator

from peft_service.errors import InvalidRequest
from peft_service.methods import Capabilities, Case, Material, Method, adapted

if TYPE_CHECKING:
    from peft_service.attached import Attached
    from peft_service.base_model import ModelShape

Linears = list[tuple[str, int, int]]
Settings = Mapping[str, Any]
RESERVED = frozenset(
    [
        "target_modules",
        "exclude_modules",
        "modules_to_save",
        "layers_to_transform",
        "layers_pattern",
        "bias",
        "init_weights",
        "fan_in_fan_out",
        "rank_pattern",
        "alpha_pattern",
        "lambda_pattern",
        "block_size_pattern",
        "n_frequency_pattern",
        "use_effective_conv2d",
        "runtime_offload_base_weight",
        "progressbar",
        "target_svd_config",
    ]
)
"""Fields of peft's configurations that are not offered: `targets` says where, and values by layer would have
no formula."""


@dataclass(frozen=True)
class Admitted:
    """A type of peft that has passed."""

    paper: str
    rate: float
    settings: Mapping[str, Any]
    """Its settings and our defaults, which are peft's where nothing speaks against."""
    count: Callable[[Linears, Settings], int]
    """Trained values on these linear layers."""
    place: Literal["linear", "norm", "embedding"] = "linear"
    kept_more: bool = False
    """Its file holds more than what trained: positions, projections."""
    starts_as_base: bool = True
    mergeable: bool = True
    nf4: bool = True
    divides: Callable[[Settings], Mapping[str, int]] = field(default=lambda c: {})
    """"in" and "out" -> what must divide a layer's width."""
    most: Mapping[str, Callable[[int, int], int]] = field(default_factory=dict)
    """Setting -> the most that it can be on a layer of (d_out, d_in)."""


def _each(of: Callable[[int, int, Settings], int]) -> Callable[[Linears, Settings], int]:
    """The sum over layers of a count by (d_out, d_in, settings)."""
    return lambda linears, c: sum(of(d_out, d_in, c) for _, d_out, d_in in linears)


def _low_rank(times: int = 1, more: int = 0) -> Callable[[Linears, Settings], int]:
    """times · r (d_in + d_out) + more a layer."""
    return _each(lambda o, i, c: times * c["r"] * (o + i) + more)


def _factors(size: int, factor: int) -> tuple[int, int]:
    """LoKr's split of a width into m ≤ n with m·n = size: m = `factor` if it divides, else near the root."""
    if factor > 0 and size % factor == 0:
        return min(factor, size // factor), max(factor, size // factor)
    limit = size if factor == -1 else factor
    m, n = 1, size
    length = m + n
    while m < n:
        new_m = m + 1
        while size % new_m:
            new_m += 1
        new_n = size // new_m
        if new_m + new_n > length or new_m > limit:
            break
        m, n = new_m, new_n
    return min(m, n), max(m, n)


def _lokr(o: int, i: int, c: Settings) -> int:
    (out_l, out_k), (in_m, in_n) = _factors(o, c["decompose_factor"]), _factors(i, c["decompose_factor"])
    r = c["r"]
    split_1 = c["decompose_both"] and r < max(out_l, in_m) / 2
    split_2 = r < max(out_k, in_n) / 2
    first = r * (out_l + in_m) if split_1 else out_l * in_m
    return int(first + (r * (out_k + in_n) if split_2 else out_k * in_n))


def _oft(o: int, i: int, c: Settings) -> int:
    b = c["oft_block_size"]
    return int((1 if c["block_share"] else i // b) * (b * (b - 1) // 2))


def _psoft(o: int, i: int, c: Settings) -> int:
    r = c["r"]
    rotation = r * (r - 1) // 2 if c["psoft_orth"] else r * r
    return int(rotation + r * (c["psoft_mag_a"] + c["psoft_mag_b"]))


def _randlora(o: int, i: int, c: Settings) -> int:
    small = min(o, i)
    return int(math.ceil(small / c["r"]) * (c["r"] + small))


def _vblora(linears: Linears, c: Settings) -> int:
    vectors, length = c["num_vectors"], c["vector_length"]
    logits = sum(c["r"] * (o // length + i // length) * vectors for _, o, i in linears)
    return int(logits + vectors * length)


def _square(key: str) -> Callable[[Settings], Mapping[str, int]]:
    return lambda c: {"in": c[key], "out": c[key]}


_ROAD = {"road_1": 1, "road_2": 2, "road_4": 4}

ADMITTED: dict[str, Admitted] = {
    "LN_TUNING": Admitted("https://arxiv.org/abs/2312.11420", 1e-3, {}, lambda _, c: 0, place="norm"),
    "BEFT": Admitted("https://arxiv.org/abs/2509.15974", 1e-3, {}, _each(lambda o, i, c: o), mergeable=False),
    "TRAINABLE_TOKENS": Admitted(
        "https://huggingface.co/docs/peft/package_reference/trainable_tokens",
        1e-3, {"token_indices": []}, lambda _, c: 0, place="embedding", kept_more=True,
    ),
    "SHIRA": Admitted(
        "https://arxiv.org/abs/2406.13175", 3e-4, {"r": 32, "mask_type": "random", "random_seed": 0},
        _low_rank(), kept_more=True, most={"r": lambda o, i: o * i // (o + i)},
    ),
    "LOHA": Admitted(
        "https://arxiv.org/abs/2108.06098", 2e-4,
        {"r": 8, "alpha": 8, "rank_dropout": 0.0, "module_dropout": 0.0}, _low_rank(2), nf4=False,
    ),
    "LOKR": Admitted(
        "https://arxiv.org/abs/2309.14859", 5e-4,
        {"r": 8, "alpha": 8, "rank_dropout": 0.0, "module_dropout": 0.0, "decompose_both": False,
         "decompose_factor": -1, "rank_dropout_scale": False},
        _each(_lokr), nf4=False,
    ),
    "OFT": Admitted(
        "https://arxiv.org/abs/2306.07280", 5e-4,
        {"oft_block_size": 32, "module_dropout": 0.0, "coft": False, "eps": 6e-5, "block_share": False,
         "use_cayley_neumann": True, "num_cayley_neumann_terms": 5},
        _each(_oft), divides=lambda c: {"in": c["oft_block_size"]},
    ),
    "BOFT": Admitted(
        "https://arxiv.org/abs/2311.06243", 5e-4,
        {"boft_block_size": 4, "boft_dropout": 0.0},
        _each(lambda o, i, c: i * c["boft_block_size"] + o),
        divides=lambda c: {"in": c["boft_block_size"]},
    ),
    "HRA": Admitted(
        "https://arxiv.org/abs/2405.17484", 1e-3, {"r": 8, "apply_GS": False},
        _each(lambda o, i, c: i * c["r"]), nf4=False,
    ),
    "ROAD": Admitted(
        "https://arxiv.org/abs/2409.00119", 2e-3, {"variant": "road_1", "group_size": 64},
        _each(lambda o, i, c: o * _ROAD[c["variant"]]), divides=lambda c: {"out": c["group_size"]},
    ),
    "PSOFT": Admitted(
        "https://arxiv.org/abs/2505.11235", 1e-3,
        {"r": 32, "psoft_alpha": 32, "psoft_dropout": 0.0, "ab_svd_init": "psoft_init", "psoft_svd": "full",
         "psoft_svd_lowrank_niter": 10, "random_seed": 0, "psoft_orth": True, "psoft_mag_b": True,
         "psoft_mag_a": True, "use_cayley_neumann": False, "num_cayley_neumann_terms": 5,
         "cayley_neumann_eps": None},
        _each(_psoft), nf4=False, kept_more=True, most={"r": min},
    ),
    "FOURIERFT": Admitted(
        "https://arxiv.org/abs/2405.03003", 1e-2,
        {"n_frequency": 1000, "scaling": 150.0, "random_loc_seed": 777},
        _each(lambda o, i, c: c["n_frequency"]), starts_as_base=False, mergeable=False,
        most={"n_frequency": lambda o, i: o * i},
    ),
    "WAVEFT": Admitted(
        "https://arxiv.org/abs/2505.12532", 1e-2,
        {"n_frequency": 2592, "scaling": 25.0, "wavelet_family": "db1", "use_idwt": True,
         "random_loc_seed": 777},
        _each(lambda o, i, c: c["n_frequency"]), most={"n_frequency": lambda o, i: o * i},
    ),
    "C3A": Admitted(
        "https://arxiv.org/abs/2407.19342", 1e-2, {"block_size": 64},
        _each(lambda o, i, c: o * i // c["block_size"]), starts_as_base=False, nf4=False,
        divides=_square("block_size"),
    ),
    "RANDLORA": Admitted(
        "https://arxiv.org/abs/2502.00987", 1e-3,
        {"r": 32, "projection_prng_key": 0, "save_projection": True, "sparse": False, "very_sparse": False,
         "randlora_dropout": 0.0, "randlora_alpha": 640},
        _each(_randlora), kept_more=True,
    ),
    "VBLORA": Admitted(
        "https://arxiv.org/abs/2405.15179", 1e-3,
        {"r": 4, "num_vectors": 256, "vector_length": 64, "topk": 2, "save_only_topk_weights": False,
         "vblora_dropout": 0.0, "init_vector_bank_bound": 0.02, "init_logits_std": 0.1},
        _vblora, starts_as_base=False, divides=_square("vector_length"),
    ),
    "UNILORA": Admitted(
        "https://arxiv.org/abs/2506.00799", 1e-3,
        {"r": 4, "proj_seed": 42, "theta_d_length": 256, "unilora_dropout": 0.0, "init_theta_d_bound": 0.02,
         "save_indices": False},
        lambda _, c: c["theta_d_length"], starts_as_base=False, nf4=False,
    ),
    "PVERA": Admitted(
        "https://arxiv.org/abs/2512.07703", 1e-3,
        {"r": 256, "projection_prng_key": 0, "save_projection": True, "pvera_dropout": 0.0, "d_initial": 0.1,
         "sample_at_inference": False, "generator_seed": None},
        _each(lambda o, i, c: o + 2 * c["r"]), kept_more=True,
    ),
    "TINYLORA": Admitted(
        "https://arxiv.org/abs/2602.04118", 1e-3,
        {"r": 2, "u": 64, "projection_seed": 42, "save_projection": True, "init_v_bound": 0.02,
         "tinylora_dropout": 0.0},
        _each(lambda o, i, c: c["u"]), nf4=False, kept_more=True,
    ),
    "MISS": Admitted(
        "https://arxiv.org/abs/2409.15371", 2e-4, {"r": 64, "miss_dropout": 0.0},
        _each(lambda o, i, c: c["r"] * o), most={"r": lambda o, i: i},
    ),
    "HIRA": Admitted("", 1e-3, {"r": 32, "hira_dropout": 0.0}, _low_rank()),
    "GRALORA": Admitted(
        "https://arxiv.org/abs/2505.20355", 2e-4,
        {"r": 32, "alpha": 64, "gralora_dropout": 0.0, "gralora_k": 2},
        _low_rank(), nf4=False, divides=_square("gralora_k"),
    ),
    "DELORA": Admitted(
        "https://arxiv.org/abs/2503.18225", 1e-3, {"r": 8, "delora_lambda": 15, "module_dropout": 0.0},
        _low_rank(1, 1), nf4=False, kept_more=True,
    ),
    "OSF": Admitted(
        "https://arxiv.org/abs/2504.07097", 5e-5, {"effective_rank": None},
        _each(lambda o, i, c: (min(o, i) - (c["effective_rank"] or min(o, i) // 2)) * (o + i + 1)), nf4=False,
        most={"effective_rank": lambda o, i: min(o, i) - 1},
    ),
    "PEANUT": Admitted(
        "https://arxiv.org/abs/2410.01870", 5e-4, {"r": 32, "act_fn": "relu", "scaling": 1.0},
        _each(lambda o, i, c: 2 * c["r"] * o), nf4=False,
    ),
    "DEFT": Admitted(
        "", 2e-4,
        {"r": 8, "decomposition_method": "relu", "init_scale": 1.0, "alpha": None, "deft_dropout": 0.0},
        _each(lambda o, i, c: min(c["r"], o) * (o + i)), nf4=False,
    ),
    "SUPERTUNING": Admitted(
        "https://arxiv.org/abs/2607.09287", 3e-4, {"sparsity": 0.99, "select_top": True},
        _each(lambda o, i, c: int(o * i * (1 - c["sparsity"]))), nf4=False, kept_more=True,
    ),
}  # fmt: skip
"""Type of peft -> what it needs; in the order of methods.md."""

_WORDS: dict[str, tuple[str, ...]] = {
    "mask_type": ("random",),
    "variant": tuple(_ROAD),
    "ab_svd_init": ("psoft_init", "pissa_init"),
    "psoft_svd": ("full", "lowrank"),
    "decomposition_method": ("relu", "qr"),
    "act_fn": ("relu", "gelu", "silu", "tanh", "sigmoid"),
    "wavelet_family": tuple(f"db{number}" for number in range(1, 11)),
}
"""Setting -> what it can be."""
_WHOLE = ("effective_rank", "generator_seed")
"""Settings that are whole numbers though their default is none."""
_EVEN = ("group_size",)
"""Whole numbers that must be even."""
_LEAST = {"group_size": 2, "num_cayley_neumann_terms": 2, "psoft_svd_lowrank_niter": 0}
"""Whole number -> its least value, where that is not 1, or 0 for a seed."""
_BELOW = {"dropout": 1.0, "sparsity": 1.0, "cayley_neumann_eps": 1.0}
"""Part of a setting's name -> what its number must be below."""
_TOGETHER = (("gralora_k", "r", True), ("topk", "num_vectors", False))
"""(setting, another, whether it must divide that, or else not be more)."""


def _unlike(key: str, value: Any, usual: Any) -> str:
    """What the setting should be, where `value` is not that."""
    if isinstance(usual, bool):
        return "" if isinstance(value, bool) else "true or false"
    if isinstance(usual, str):
        return "" if value in _WORDS[key] else f"one of {', '.join(_WORDS[key])}"
    if isinstance(usual, list):
        right = isinstance(value, list) and all(type(entry) is int for entry in value)
        return "" if right and len(set(value)) == len(value) else "a list of different whole numbers"
    if value is None and usual is None:
        return ""
    number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if isinstance(usual, int) or key in _WHOLE:
        least = 0 if "seed" in key or key == "projection_prng_key" else _LEAST.get(key, 1)
        right = number and isinstance(value, int) and (value >= least or value == usual)
        if key in _EVEN:
            return "" if right and value % 2 == 0 else f"an even number, at least {least}"
        return "" if right else f"a whole number, at least {least}"
    most = next((most for part, most in _BELOW.items() if part in key), math.inf)
    right = number and value < most and (value > 0 or (value == 0 and "dropout" in key))
    below = f" and below {most:g}" if most < math.inf else ""
    return "" if right else f"a number {'from' if 'dropout' in key else 'above'} 0{below}"


NOT_OFFERED: dict[str, tuple[str, ...]] = {
    "OFT": ("r",),
    "BOFT": ("boft_block_num", "boft_n_butterfly_factor"),
    "WAVEFT": ("proportional_parameters",),
    "TINYLORA": ("weight_tying",),
    "MISS": ("mini_r",),
    "GRALORA": ("hybrid_r",),
    "PEANUT": ("depth",),
    "DEFT": ("para",),
    "SUPERTUNING": ("r", "lora_alpha", "lora_dropout", "save_precomputed_indices"),
}
"""Settings that say again what another says, or change the count in ways that have no formula here
(peft sets BOFT's factors to 1 where it finds no compiler for CUDA), or another method (DEFT's `para` has half
the values and does not start as the base)."""

REFUSED: dict[str, str] = {
    "LILY": "its router averages over all tokens of a batch, padding too, so that what a row says depends on "
    "the rows beside it (by 4e-4 on a tiny base); poly mixes LoRAs by task, xlora by token",
    "GLORA": "what trains depends on the biases of the layers and its file holds values that nothing "
    "trains, so that "
    "no count can be promised; LOHA and LoRA change the same layers",
    "FROD": "it was not put through the checks: it trains random positions of a square matrix of the input's "
    "width; SHIRA trains sparse positions and has passed",
    "SHADOW": "it needs a second loss for its shadow network, which peft leaves to the trainer; use LoRA",
    "ADAPTION_PROMPT": "only LLaMA, Mistral and GPT-2, and its gates sit in a copy of an old attention "
    "class; use "
    "prefix_tuning",
    "CPT": "it needs the kinds of a template's tokens beside every row, which no data format has; use "
    "prompt_tuning with init text",
    "CARTRIDGE": "peft has its prefix, but not the distillation from a corpus that makes a cartridge of "
    "it; use "
    "prefix_tuning",
    "ADAMSS": "it needs scikit-learn, which is not installed here; use LoRA or PSOFT",
    "LORA": "it has a kind of its own, lora",
    "ADALORA": "it has a kind of its own, adalora",
    "IA3": "it has a kind of its own, ia3",
    "VERA": "it has a kind of its own, vera",
    "PROMPT_TUNING": "it has a kind of its own, prompt_tuning",
    "PREFIX_TUNING": "it has a kind of its own, prefix_tuning",
    "P_TUNING": "it has a kind of its own, p_tuning",
    "MULTITASK_PROMPT_TUNING": "it learns several tasks and needs a kind of its own, with tasks in the data",
    "POLY": "it learns several tasks and needs a kind of its own, with tasks in the data",
    "XLORA": "it starts from trained LoRA adapters and needs a kind of its own, with sources",
}
"""Type of peft -> what was seen, and what works instead."""

if TYPE_CHECKING:
    TypeName = str
else:
    TypeName = Literal[tuple(ADMITTED)]


class _OfType:
    """`can` of an instance is that of its type; of the class, what holds for any."""

    def __get__(self, method: Any, owner: Any) -> Capabilities:
        if method is None:
            return _ANY
        told, name = ADMITTED[method.type], method.type
        why = {
            "starts_as_base": f"{name} starts from small random values",
            "mergeable": f"peft cannot write {name} into the base's weights",
            "nf4": f"peft's {name} reads the base's weights, or writes into what its layers say, and four "
            "bits allow neither. Use LoRA there",
        }
        return Capabilities(
            nf4=told.nf4,
            starts_as_base=told.starts_as_base,
            mergeable=told.mergeable,
            servers=("peft",),
            why={key: reason for key, reason in why.items() if not getattr(told, key)},
        )


_ANY = Capabilities(servers=("peft",))


class PeftNative(Method):
    kind: Literal["peft"] = "peft"
    type: TypeName = "LOHA"
    """peft's name of the method."""
    config: dict[str, Any] = Field(default_factory=dict)
    """Settings of that type by peft's names; the others have the defaults that are documented."""
    targets: tuple[str, ...] | None = Field(None, min_length=1)
    """Last parts of the names of the linear layers; None: all of the transformer's blocks."""

    learning_rate: ClassVar[float] = 2e-4
    title: ClassVar[str] = "Other methods of peft"
    family: ClassVar[str] = "peft"
    paper: ClassVar[str] = "https://github.com/huggingface/peft"
    summary: ClassVar[str] = "Any further type of the installed peft that has passed this service's checks."
    formula: ClassVar[str] = "The type's own; the count of trained values is a closed formula for each."
    use_when: ClassVar[str] = "A paper's method is to be compared, or has what a base needs."
    limits: ClassVar[str] = "Served by peft itself; settings by layer are not offered."
    aliases: ClassVar[dict[str, dict[str, Any]]] = {name.lower(): {"type": name} for name in ADMITTED} | {
        "layer_norm_tuning": {"type": "LN_TUNING"},
        "norm_tuning": {"type": "LN_TUNING"},
        "bone": {"type": "MISS"},
    }
    small: ClassVar[dict[str, Any]] = {"type": "LOHA", "config": {"r": 4}}
    can: ClassVar[Capabilities] = cast(Capabilities, _OfType())

    @field_validator("type", mode="before")
    @classmethod
    def _is_admitted(cls, value: Any) -> Any:
        name = str(value).upper()
        if name in REFUSED:
            raise ValueError(f"{name} is not offered: {REFUSED[name]}.")
        if name not in ADMITTED:
            near = difflib.get_close_matches(name, ADMITTED, 1)
            meant = f" Did you mean {near[0]}?" if near else ""
            raise ValueError(f"peft's {name} is not one of {', '.join(ADMITTED)}.{meant}")
        return name

    @model_validator(mode="after")
    def _settings_exist(self) -> "PeftNative":
        there = ADMITTED[self.type].settings
        for key, value in self.config.items():
            if key in there:
                if wanted := _unlike(key, value, there[key]):
                    raise ValueError(
                        f"config.{key} of {self.type} is {wanted}, by default {there[key]!r}; not {value!r}."
                    )
                continue
            near = difflib.get_close_matches(key, there, 1)
            meant = f" Did you mean {near[0]!r}?" if near else ""
            raise ValueError(
                f"config: {self.type} has no setting {key!r}.{meant} It has: "
                f"{', '.join(sorted(there)) or 'none'}."
            )
        settings = self.settings
        for part, whole, divided in _TOGETHER:
            if part in settings and whole in settings and (
                settings[whole] % settings[part] if divided else settings[part] > settings[whole]
            ):  # fmt: skip
                relation = "divide" if divided else "be at most"
                raise ValueError(
                    f"config.{part} of {self.type} is {settings[part]} and must {relation} config.{whole}, "
                    f"which is {settings[whole]}."
                )
        return self

    @property
    def settings(self) -> dict[str, Any]:
        """All settings, given and default."""
        return {**ADMITTED[self.type].settings, **self.config}

    def rate(self) -> float:
        return ADMITTED[self.type].rate

    def attach(self, model: Any, case: Case, material: Material) -> "Attached":
        import torch
        from peft import TaskType, get_peft_model
        from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
        from peft.utils import PeftType

        from peft_service.attached import head_modules
        from peft_service.targets import linear_layers, shortest
        from peft_service.tasks import PEFT_TASKS
        from peft_service.tuners.in_place import body
        from peft_service.tuners.native import Native

        kind = PEFT_TYPE_TO_CONFIG_MAPPING[PeftType(self.type)]
        place = ADMITTED[self.type].place
        fields: dict[str, Any] = {"task_type": TaskType(PEFT_TASKS[case.task]), **self.settings}
        if place == "linear":
            fields["target_modules"] = shortest(model, linear_layers(model, self.targets))
        elif place == "norm":
            vectors = [n for n in body(model) if n.endswith(".weight") and len(_shape(model, n)) == 1]
            fields["target_modules"] = [name.removesuffix(".weight") for name in vectors]
        if "modules_to_save" in kind.__dataclass_fields__:
            fields["modules_to_save"] = head_modules(model) or None
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(case.seed)
            made = get_peft_model(model, kind(**fields))
        for parameter in made.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
        return Native(made, ADMITTED[self.type].kept_more)

    def trainable(self, shape: "ModelShape", case: Case) -> int:
        told, part = ADMITTED[self.type], shape.for_task(case.task)
        if told.place == "norm":
            norms = dict(part.norms)
            return sum(norms.values()) + sum(
                n for name, n in part.biases if name.removesuffix(".bias") in norms
            )
        if told.place == "embedding":
            return len(self.settings["token_indices"]) * part.hidden
        return told.count(adapted(part, self.targets), self.settings)

    def stored(self, shape: "ModelShape", case: Case) -> int | None:
        return None if ADMITTED[self.type].kept_more else self.trainable(shape, case)

    def check(self, shape: "ModelShape", case: Case) -> None:
        told, settings = ADMITTED[self.type], self.settings
        if told.place != "linear" and self.targets is not None:
            raise InvalidRequest(
                f"{self.type} has no targets: it trains {told.place}s, all of them.", param="adapter.targets"
            )
        if told.place == "embedding":
            if case.task not in ("causal_lm", "seq2seq_lm"):
                raise InvalidRequest(
                    f"TRAINABLE_TOKENS does not work for {case.task.replace('_', ' ')}: peft trains no "
                    "head beside "
                    "it. Use LN_TUNING or LoRA.",
                    code="method_not_applicable",
                    param="adapter.type",
                )
            bad = [i for i in settings["token_indices"] if not 0 <= i < shape.vocab]
            if bad or not settings["token_indices"]:
                raise InvalidRequest(
                    f"TRAINABLE_TOKENS: config.token_indices has the numbers of the tokens to train, 0 to "
                    f"{shape.vocab - 1}; it is {settings['token_indices']}.",
                    param="adapter.config",
                )
        for key, limit in told.most.items():
            layers = adapted(shape.for_task(case.task), self.targets)
            name, d_out, d_in = min(layers, key=lambda layer: limit(*layer[1:]))
            if settings[key] is not None and settings[key] > limit(d_out, d_in):
                raise InvalidRequest(
                    f"{self.type}: {name} is {d_out} x {d_in}, which allows config.{key} up to "
                    f"{limit(d_out, d_in)}, and it is {settings[key]}: set it to that or less, or choose "
                    "other targets.",
                    param="adapter.config",
                )
        divisors = told.divides(settings)
        for name, d_out, d_in in adapted(shape.for_task(case.task), self.targets) if divisors else ():
            for side, width in (("in", d_in), ("out", d_out)):
                if side in divisors and width % divisors[side]:
                    raise InvalidRequest(
                        f"{self.type}: {name} is {width} wide, which {divisors[side]} does not divide; "
                        "choose "
                        f"another block in config, such as {math.gcd(width, divisors[side])}.",
                        param="adapter.config",
                    )


def _shape(model: Any, name: str) -> tuple[int, ...]:
    parameter = model.get_parameter(name)
    return tuple(getattr(parameter, "ds_shape", parameter.shape))
