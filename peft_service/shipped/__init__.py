"""The base model that comes with the package: small enough for a laptop, really pretrained, free to use.

Its model card (`tiny-llama-3m/README.md`) says from what, and what it cannot do.
"""

from importlib import resources
from pathlib import Path

SHIPPED_ID = "peft-service/tiny-llama-3m"
"""The name it is served under."""


def path() -> Path:
    """The model's directory, inside the installed package.

    Packages are installed as files here (never run from a zip), so the resource is a real directory.
    """
    return Path(str(resources.files(__name__))) / SHIPPED_ID.rpartition("/")[2]


def uri() -> str:
    """The directory as a base model's `uri`."""
    return path().as_uri()
