"""Settings: the only reader of the environment. Every variable is `PEFT_SERVICE_<FIELD>`.

`AWS_*` (credentials and endpoint of the object store) are read by boto3 itself and never appear here.
"""

import difflib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AliasChoices, Field, ValidationError, field_validator
from pydantic_settings import BaseSettings, NoDecode, PydanticBaseSettingsSource, SettingsConfigDict

from peft_service.errors import InvalidRequest

PREFIX = "PEFT_SERVICE_"


class Settings(BaseSettings):
    """One value for everything that an operator may choose; immutable."""

    model_config = SettingsConfigDict(
        env_prefix=PREFIX,
        env_ignore_empty=True,
        extra="forbid",
        frozen=True,
        populate_by_name=True,
        use_attribute_docstrings=True,
    )

    data_dir: Path = Path("~/.peft-service")
    """Everything that is local: the default database and store, keys, logs, the state of `up`."""
    database_url: str = Field(default_factory=lambda data: f"sqlite:///{data['data_dir']}/service.db")
    """`sqlite:///file` or `postgresql+psycopg://user:password@host/database`."""
    store_url: str = Field(default_factory=lambda data: f"file://{data['data_dir']}/store")
    """`file:///directory` or `s3://bucket/prefix`."""

    host: str = "127.0.0.1"
    port: int = Field(8000, ge=0, le=65535)
    """Port of the REST API; 0 takes a free one."""
    api_replicas: int = Field(1, ge=1, le=64)

    url: str | None = Field(None, min_length=1)
    """Of the service that the client and the CLI talk to. None: the one that `up` started from `data_dir`."""
    api_key: str | None = Field(None, repr=False, min_length=1)
    """What the client sends. None, without `url`: the key in `data_dir`."""

    ray_address: str | None = Field(
        None, validation_alias=AliasChoices(f"{PREFIX}RAY_ADDRESS", "RAY_ADDRESS"), min_length=1
    )
    """Join this cluster: its dashboard (`http://host:8265`) or GCS (`host:6379`). None: start a local one."""
    train_ray_address: str | None = None
    """Dashboard URL of a separate cluster that trains. None: the cluster that serves also trains."""
    ray_auth_token: str | None = Field(
        None, repr=False, validation_alias=AliasChoices(f"{PREFIX}RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN")
    )
    ray_auth_token_path: Path | None = Field(
        None, validation_alias=AliasChoices(f"{PREFIX}RAY_AUTH_TOKEN_PATH", "RAY_AUTH_TOKEN_PATH")
    )
    """File with the token of the Ray clusters, read when needed, so that it may be rotated."""
    train_ray_auth_token_path: Path | None = None
    """The same for the training cluster, where it has a token of its own."""
    local_cpus: int | None = Field(None, ge=1)
    """CPUs that the local Ray cluster offers. None: as many as the machine has."""
    cluster_max: str | None = None
    """For clusters that grow on demand: the largest they become, as JSON, for example
    `[{"count": 4, "cpus": 96, "gpus": 8, "memory_gib": 1000, "gpu_memory_gib": 80}]`."""
    worker_python: str | None = None
    """Python that runs an attempt on the cluster. None: this one on this machine, else `python`."""
    cluster_seconds: float = Field(10, gt=0)
    """How long one request to the cluster may take."""

    lease_seconds: float = Field(15, gt=0)
    """A scheduler that has not renewed for so long is taken for dead, and its jobs are adopted."""
    tick_seconds: float = Field(0.5, gt=0)
    """Pause between two passes of the scheduler."""
    max_failures: int = Field(5, ge=0)
    """Attempts of a job that may die without any progress in between before the job fails."""
    stop_grace_seconds: float = Field(60, ge=0)
    """How long a paused run may take to write its checkpoint before it is stopped hard."""
    store_patience_seconds: float = Field(900, ge=0)
    """How long a run waits for a store that does not answer."""

    max_upload_bytes: int = Field(512 * 1024 * 1024, ge=1)
    """Largest file that the API accepts."""
    base_models_allow: Annotated[tuple[str, ...], NoDecode] = ()
    """Prefixes of the base model URIs that users may name or register, comma separated; empty: any URI."""
    data_allow: Annotated[tuple[str, ...], NoDecode] = ()
    """Where data may be brought from beside uploads, comma separated: absolute directories of this machine
    (none listed: no `file://`), and prefixes `s3://…` and `hf://…` (none of a scheme listed: all of it)."""
    data_hosts: Annotated[tuple[str, ...], NoDecode] = ()
    """Hosts that data may be brought from by `https://`, comma separated: `host` or `host:port`. A host whose
    address is private counts only if that address, or its network, is listed too: `10.0.0.0/8`."""
    max_source_bytes: int = Field(16 << 30, ge=1)
    """Largest data set that is brought in from elsewhere, all its files together."""

    python_graders: Literal["off", "isolated", "trusted"] = "off"
    """Scripts of users that grade texts. isolated: they run where Linux can shut them in (Landlock and
    seccomp), and are refused elsewhere; trusted: they run anyway, with the rights of the service."""
    judge_url: str | None = Field(None, min_length=1)
    """OpenAI-compatible endpoint, up to its `/v1`, whose models judge texts for score_model graders."""
    judge_key: str | None = Field(None, repr=False, min_length=1)

    @field_validator("data_dir", "ray_auth_token_path", "train_ray_auth_token_path")
    @classmethod
    def _absolute(cls, path: Path | None) -> Path | None:
        return path and Path(os.path.abspath(path.expanduser()))

    @field_validator("data_dir", mode="after")
    @classmethod
    def _usable_in_urls(cls, path: Path) -> Path:
        if any(mark in str(path) for mark in "?#%"):
            raise ValueError("a path with ?, # or % cannot be written in a database URL")
        return path

    @field_validator("base_models_allow", "data_allow", "data_hosts", mode="before")
    @classmethod
    def _comma_separated(cls, value: Any) -> Any:
        return (
            tuple(part.strip() for part in value.split(",") if part.strip())
            if isinstance(value, str)
            else value
        )

    @field_validator("cluster_max")
    @classmethod
    def _is_a_list(cls, value: str | None) -> str | None:
        if value is not None and not isinstance(json.loads(value), list):
            raise ValueError("must be a JSON list of node shapes")
        return value

    @property
    def ray_token(self) -> str | None:
        """Token of the serving cluster, or None when it asks for none."""
        return self.ray_auth_token or _read_token(self.ray_auth_token_path)

    @property
    def train_ray_token(self) -> str | None:
        return _read_token(self.train_ray_auth_token_path) or self.ray_token

    def environment(self) -> dict[str, str]:
        """The variables that give a child process these settings. Holds secrets: never log it."""
        values: dict[str, str] = {}
        for name in type(self).model_fields:
            value = getattr(self, name)
            if value is not None and value != ():
                values[PREFIX + name.upper()] = ",".join(value) if isinstance(value, tuple) else str(value)
        return values


def load(environment: Mapping[str, str] | None = None, **overrides: Any) -> Settings:
    """Settings from the environment; `overrides` (command line options) win.

    Raises:
        InvalidRequest: an unknown variable (with the nearest known name) or a value that cannot be.
    """
    known = {PREFIX + name.upper() for name in Settings.model_fields}
    for name in sorted(os.environ if environment is None else environment):
        if name.upper().startswith(PREFIX) and name.upper() not in known:
            near = difflib.get_close_matches(name.upper(), known, n=1, cutoff=0.6)
            hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(sorted(known))}"
            raise InvalidRequest(f"unknown setting {name}: {hint}", code="invalid_settings", param=name)
    given = {name: value for name, value in overrides.items() if value is not None}
    try:
        if environment is None:
            return Settings(**given)
        return _from(environment, given)
    except ValidationError as error:
        first = error.errors()[0]
        field = str(first["loc"][0]) if first["loc"] else "settings"
        variable = field if field.upper() == field else PREFIX + field.upper()
        raise InvalidRequest(
            f"{variable} = {first['input']!r} cannot be used: {first['msg']}",
            code="invalid_settings",
            param=variable,
        ) from None


def _from(environment: Mapping[str, str], given: dict[str, Any]) -> Settings:
    """As pydantic-settings would read `environment`, without touching this process's own."""
    values: dict[str, Any] = {}
    for name in Settings.model_fields:
        plain = name.upper() if name in {"ray_address", "ray_auth_token", "ray_auth_token_path"} else ""
        value = environment.get(PREFIX + name.upper()) or environment.get(plain)
        if value:
            values[name] = value
    return _Only(**{**values, **given})


def child_environment(extra: Mapping[str, str], without: tuple[str, ...] = ()) -> dict[str, str]:
    """This process's environment (AWS_* and PATH in it) for a child, with `extra` and without the named."""
    return {name: value for name, value in os.environ.items() if name not in without} | dict(extra)


class _Only(Settings):
    """Settings that take no value from the environment."""

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        return (init_settings,)


def _read_token(path: Path | None) -> str | None:
    return path.read_text().strip() if path is not None and path.exists() else None
