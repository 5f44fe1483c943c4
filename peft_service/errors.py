"""Every error a user can see, in one tree; the class gives the HTTP status and a stable `code`.

    PeftServiceError
    ├── InvalidRequest (400)        the request itself is wrong: `param` names the key
    │   ├── InvalidTrainingFile     a data file has bad lines; `report` lists them
    │   ├── DoesNotFit              no shape of the cluster can ever run this
    │   └── UnknownBase             no such base model, or it cannot be read
    ├── NotAuthenticated (401)      no key, a wrong key, an expired key
    ├── NotPermitted (403)
    ├── NotFound (404)
    ├── Conflict (409)              the state does not allow it; never worth a retry
    ├── TooLarge (413)
    ├── RateLimited (429)
    ├── RunFailed                   ends a job: says which step, rows or check
    │   ├── Diverged                the loss was not finite; weights were not touched
    │   └── GateFailed              the adapter did not pass a check
    └── StoreError
        ├── ObjectNotFound
        ├── ObjectExists
        ├── StoreDenied             wrong credentials or bucket: retrying cannot help
        └── StoreUnavailable        worth retrying

Errors are picklable: they cross processes on Ray.
"""

from typing import Any, ClassVar


class PeftServiceError(Exception):
    """Base of the tree. The message says what was seen, where, and what to do next."""

    status: ClassVar[int] = 500
    type: ClassVar[str] = "server_error"
    default_code: ClassVar[str] = "internal_error"

    def __init__(
        self,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        details: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.code = code or self.default_code
        self.param = param
        self.details = details or {}

    def __reduce__(self) -> tuple[Any, ...]:
        return (_rebuild, (type(self), self.message, self.code, self.param, self.details))

    def body(self) -> dict[str, Any]:
        """The inner object of the OpenAI error envelope; `details` are extra keys beside the four."""
        own = {"message": self.message, "type": self.type, "param": self.param, "code": self.code}
        return {**self.details, **own}


def _rebuild(
    kind: type[PeftServiceError], message: str, code: str, param: str | None, details: dict[str, Any]
) -> PeftServiceError:
    return kind(message, code=code, param=param, details=details)


class InvalidRequest(PeftServiceError):
    status = 400
    type = "invalid_request_error"
    default_code = "invalid_request"


class InvalidTrainingFile(InvalidRequest):
    default_code = "invalid_training_file"


class DoesNotFit(InvalidRequest):
    default_code = "does_not_fit"


class UnknownBase(InvalidRequest):
    default_code = "model_not_available"


class NotAuthenticated(PeftServiceError):
    status = 401
    type = "invalid_request_error"
    default_code = "invalid_api_key"


class NotPermitted(PeftServiceError):
    status = 403
    type = "invalid_request_error"
    default_code = "insufficient_permissions"


class NotFound(PeftServiceError):
    status = 404
    type = "invalid_request_error"
    default_code = "not_found"


class Conflict(PeftServiceError):
    status = 409
    type = "invalid_request_error"
    default_code = "conflict"


class TooLarge(PeftServiceError):
    status = 413
    type = "invalid_request_error"
    default_code = "too_large"


class RateLimited(PeftServiceError):
    status = 429
    type = "rate_limit_error"
    default_code = "rate_limit_exceeded"


class RunFailed(PeftServiceError):
    default_code = "run_failed"


class Diverged(RunFailed):
    default_code = "loss_not_finite"


class GateFailed(RunFailed):
    default_code = "adapter_invalid"


class StoreError(PeftServiceError):
    default_code = "store_error"


class ObjectNotFound(StoreError):
    default_code = "object_not_found"


class ObjectExists(StoreError):
    default_code = "object_exists"


class StoreDenied(StoreError):
    default_code = "store_denied"


class StoreUnavailable(StoreError):
    default_code = "store_unavailable"
