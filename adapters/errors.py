"""Errors of the adapter service.

    AdapterServiceError(EdaError)
    ├── InvalidInputError           a field of a request has a value that cannot be used (HTTP 400)
    ├── NotFoundError               a name, version or job that does not exist (404)
    │   ├── UnknownModelError
    │   ├── UnknownVersionError
    │   └── UnknownJobError
    ├── ConflictError               right in itself, wrong in this state: name in use, job finished (409)
    ├── TooLargeError               a body or upload over its limit (413)
    ├── QueueFullError              too many jobs wait (429)
    ├── StorageFullError            the disk cannot hold what was asked for (507)
    ├── CorruptVersionError         a version in the store that must not be used
    ├── ClaimLostError              a worker's claim on a job was taken over, or the job was ended
    └── JobInterruptedError         a stage stopped because it was told to

``param`` names the field of the request that is at fault, where there is one.
"""

from eda.errors import EdaError


class AdapterServiceError(EdaError):
    """Root of the errors that this package raises on purpose."""

    def __init__(self, message: str, *, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class InvalidInputError(AdapterServiceError):
    """A value from outside that is malformed, out of range or not allowed."""


class NotFoundError(AdapterServiceError):
    """A name, version or job that does not exist."""


class UnknownModelError(NotFoundError):
    """No fine-tune is served under this name."""


class UnknownVersionError(NotFoundError):
    """The adapter has no such version, or it was refused at start-up."""


class UnknownJobError(NotFoundError):
    """No job has this id."""


class ConflictError(AdapterServiceError):
    """The request contradicts the present state: a name in use, a job that has ended, a reused key."""


class TooLargeError(AdapterServiceError):
    """A body, upload or data file over its limit."""


class QueueFullError(AdapterServiceError):
    """Too many jobs wait; ``retry_after`` is an estimate in seconds."""

    def __init__(self, message: str, *, retry_after: int = 60) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class StorageFullError(AdapterServiceError):
    """The disk has less room than the request needs."""


class CorruptVersionError(AdapterServiceError):
    """A stored version whose files are incomplete, altered, misshapen or made for something else."""


class ClaimLostError(AdapterServiceError):
    """The worker no longer owns the job: its lease ran out and another took over, or the job was deleted."""


class JobInterruptedError(AdapterServiceError):
    """A stage ended early because ``should_stop`` said so; what it finished is kept."""
