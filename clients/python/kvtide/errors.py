"""One exception class for each status code of kvtide. Messages are the daemon's own and say what to do.

Every class derives from :class:`KvtideError` and, where Python has a word for the same mistake, from that built-in too, so
``except ValueError`` or ``except TimeoutError`` work as expected.
"""

from __future__ import annotations

from typing import Dict, Type


class KvtideError(Exception):
    """Base of all errors. ``code`` is the name of the status code, such as ``"NOT_FOUND"``; ``request_id`` is what the call is
    called in the daemon's log (:func:`kvtide.trace`), empty where the daemon has not answered."""

    code = "UNKNOWN"
    request_id = ""


class InvalidArgument(KvtideError, ValueError):
    """A shape, dtype, name or number that cannot be; NaN or infinity in a tensor (its place is named)."""

    code = "INVALID_ARGUMENT"


class NotFound(KvtideError, LookupError):
    """An unknown model or sequence (the message says so if it was closed)."""

    code = "NOT_FOUND"


class AlreadyExists(KvtideError):
    """Something of that name is there already."""

    code = "ALREADY_EXISTS"


class FailedPrecondition(KvtideError, RuntimeError):
    """The call makes no sense in this state: another model under the same name, a drop that was not allowed."""

    code = "FAILED_PRECONDITION"


class OutOfRange(KvtideError, IndexError):
    """A position that is not the length of the layer, or tokens that have left the sliding window."""

    code = "OUT_OF_RANGE"


class Aborted(KvtideError, RuntimeError):
    """Another writer holds the sequence, or it was closed while the call ran. Try again."""

    code = "ABORTED"


class ResourceExhausted(KvtideError, MemoryError):
    """No room in any tier, or a limit. Nothing has changed."""

    code = "RESOURCE_EXHAUSTED"


class DataLoss(KvtideError, RuntimeError):
    """Tokens that the call needs were dropped or are damaged; the range is named."""

    code = "DATA_LOSS"


class Cancelled(KvtideError, RuntimeError):
    """The call was cancelled; nothing has changed."""

    code = "CANCELLED"


class DeadlineExceeded(KvtideError, TimeoutError):
    """No answer in time. An append may or may not have happened: repeat it with the same start."""

    code = "DEADLINE_EXCEEDED"


class Unavailable(KvtideError, ConnectionError):
    """No daemon at the address, or it is shutting down."""

    code = "UNAVAILABLE"


class Unimplemented(KvtideError, NotImplementedError):
    """This build or this daemon does not have it."""

    code = "UNIMPLEMENTED"


class PermissionDenied(KvtideError, PermissionError):
    """The caller may not do that."""

    code = "PERMISSION_DENIED"


class Unauthenticated(KvtideError, PermissionError):
    """The daemon does not know the caller."""

    code = "UNAUTHENTICATED"


class Internal(KvtideError, RuntimeError):
    """A fault inside kvtide."""

    code = "INTERNAL"


_BY_CODE: Dict[str, Type[KvtideError]] = {
    cls.code: cls
    for cls in list(globals().values())
    if isinstance(cls, type) and issubclass(cls, KvtideError)
}


def from_status(code: str, message: str, request_id: str = "") -> KvtideError:
    """The exception of a status code."""
    error = _BY_CODE.get(code, KvtideError)(message)
    if request_id:
        error.request_id = request_id
    return error
