"""What calls are called in the daemon's log."""

from __future__ import annotations

import contextlib
import contextvars
from typing import Iterator, Optional, Tuple

from . import _core

# (request id, traceparent); None: the daemon makes an id for each call. _core looks at it with every call.
_current: "contextvars.ContextVar[Optional[Tuple[str, str]]]" = contextvars.ContextVar("kvtide_trace", default=None)
_core.set_trace_variable(_current)


@contextlib.contextmanager
def trace(request_id: str = "", traceparent: str = "") -> Iterator[None]:
    """Names the calls that are made within, in this thread or task, by every way.

    ``request_id`` (1 to 128 letters, digits and ``-_.:/+=``) is the id of your own request, ``traceparent`` the W3C trace that
    it belongs to (``"00-TRACE-PARENT-FLAGS"``). The daemon's lines about calls that failed or were slow have both; a text that is
    empty or not well formed is not sent. ``KvtideError.request_id`` says what a call that failed is called there.

    >>> with kvtide.trace(request_id="chat-17"):
    ...     sequence = pool.create(name)
    """
    token = _current.set((request_id, traceparent))
    try:
        yield
    finally:
        _current.reset(token)
