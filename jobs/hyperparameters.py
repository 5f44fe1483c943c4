"""The numbers of a request: those of `training`, and the flat ones that OpenAI and other hosts put together.

Both are made from `peft_service.spec.Training`, so that every limit is written once.
"""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, create_model
from pydantic.fields import FieldInfo

from peft_service.spec import Training
from peft_service.variants import Frozen

AUTO_FIELDS = ("n_epochs", "batch_size", "learning_rate", "max_seq_len")
"""Fields of `Training` that `auto` leaves to the service; `learning_rate_multiplier` is 1 then."""
FLAT_ADAPTER = {"lora_r": "rank", "lora_alpha": "alpha", "lora_dropout": "dropout"}


def constrained(info: FieldInfo) -> Any:
    """The type of a field with its limits."""
    limits = [*info.metadata, *([Field(discriminator=info.discriminator)] if info.discriminator else [])]
    return Annotated[(info.annotation, *limits)] if limits else info.annotation


def or_auto(kind: Any) -> Any:
    # Azure's clients write -1 for "auto".
    return Annotated[kind | Literal["auto"], BeforeValidator(lambda value: "auto" if value == -1 else value)]


def optional(kind: Any, description: str | None) -> Any:
    """A field, as `create_model` takes it, that may be left out."""
    return (kind | None, Field(None, description=description))


def _of_training(name: str) -> Any:
    info = Training.model_fields[name]
    kind = constrained(info)
    return optional(or_auto(kind) if name in AUTO_FIELDS else kind, info.description)


_MULTIPLIER = optional(
    or_auto(Annotated[float, Field(gt=0, le=10_000)]),
    "Scales the default learning rate of the method and the objective.",
)

TrainingRequest: type[Frozen] = create_model(
    "TrainingRequest",
    __base__=Frozen,
    __doc__="How the parameters move; what is left out, or `auto`, is resolved and reported.",
    learning_rate_multiplier=_MULTIPLIER,
    **{name: _of_training(name) for name in Training.model_fields},
)

_FLAT_TRAINING = ("n_epochs", "batch_size", "learning_rate", "warmup_ratio", "weight_decay", "max_grad_norm")

Hyperparameters: type[Frozen] = create_model(
    "Hyperparameters",
    __base__=Frozen,
    __doc__="OpenAI's three, and the flat names that other hosts of this API take.",
    learning_rate_multiplier=_MULTIPLIER,
    lora=optional(bool, "True: train a LoRA adapter (the default)."),
    lora_r=optional(int, "`adapter.rank`"),
    lora_alpha=optional(int, "`adapter.alpha`"),
    lora_dropout=optional(float, "`adapter.dropout`"),
    packing=optional(bool, "`training.packing`"),
    **{name: _of_training(name) for name in _FLAT_TRAINING},
)
