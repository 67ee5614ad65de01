"""A connection to the block store of a kvtided that may be away.

What engines want below their own cache: it never raises, never waits longer than a call's deadline, and a daemon that is gone
costs one deadline, then nothing until it is back. A thread of its own connects, again with growing pauses; whoever finds a call
failing says so (:meth:`StoreLink.failed`) and goes on without. A daemon that cannot serve (another version, options that it
refuses) is named in one line and asked again rarely.
"""

from __future__ import annotations

import atexit
import collections
import logging
import threading
import weakref
from typing import Any, Callable, Deque, List, Optional, Sequence, Tuple

from .block_store import BlockStore, Namespace
from .errors import (Cancelled, DeadlineExceeded, FailedPrecondition, InvalidArgument, KvtideError, NotFound, PermissionDenied,
                     Unavailable, Unimplemented)

REFUSALS = (Unimplemented, FailedPrecondition, InvalidArgument, PermissionDenied)
"""Answers to an opening that the same daemon will give again."""
GONE = (Unavailable, DeadlineExceeded, Cancelled, ConnectionError, OSError)
"""Errors of calls after which the connection is not used any more."""
LOOK_SECONDS = 0.5
"""How often a link that maps memory of its daemon looks whether that is still there: nobody else notices before the next call."""


def connect(address: str, *, way: str = "auto", timeout: float = 5.0, arena_bytes: int = 64 << 20, host_tier: bool = False,
            log: logging.Logger = logging.getLogger("kvtide")) -> Any:
    """A pool at ``address`` and nowhere else.

    Args:
        address: ``unix:/path/to/socket`` or ``host:port``; empty = ``$KVTIDE_ADDRESS``, else the default socket.
        way: ``shm``, ``grpc``, or ``auto``: through shared memory where that works.
        timeout: seconds of every call.
        host_tier: maps the daemon's tier of host memory where it may (``kvtided --host-sharing``).
    """
    from . import _core
    from .pool import connect as open_pool

    address = address or _core.default_address()
    ways = {"shm": [f"shm:{address}"], "grpc": [address], "auto": [f"shm:{address}", address]}
    if way not in ways:
        raise InvalidArgument(f"way is {way!r}; use auto, shm or grpc")
    if not address.startswith("unix:"):
        ways["auto"] = [address]
    for last, one in enumerate(ways[way], 1):
        try:
            return open_pool(one, timeout=timeout, connect_timeout=min(timeout, 5.0), arena_bytes=arena_bytes, host_tier=host_tier)
        except (KvtideError, OSError) as error:
            if last == len(ways[way]):
                raise
            log.info("kvtide: shared memory with kvtided at %s does not work (%s); trying gRPC, which copies blocks through messages", address,
                     _words(error))
    raise AssertionError


def is_here(address: str) -> bool:
    """Whether a daemon at this address is on this host."""
    from . import _core

    return (address or _core.default_address()).startswith("unix:")


def close_at_exit(owner: Any) -> None:
    """Calls ``owner.close()`` before the interpreter ends, if the object is still there. A thread that comes out of compiled code
    after that is ended in the middle of it, and the process dies (\"terminate called without an active exception\")."""
    close = weakref.WeakMethod(owner.close)

    def at_exit() -> None:
        call = close()
        if call is not None:
            call()

    atexit.register(at_exit)


class StoreLink:
    """Open namespaces of one daemon, or none.

    Args:
        open_pool: makes a pool (something with ``block_store`` and ``empty``), or raises.
        where: the address, for words.
        persist: blocks become durable soon after they were stored.
        pauses: seconds before the first and before the later tries.
    """

    def __init__(self, open_pool: Callable[[], Any], where: str, *, persist: bool = False,
                 pauses: Tuple[float, float] = (0.5, 30.0), refused_pause: float = 300.0, log: Optional[logging.Logger] = None) -> None:
        self._open_pool, self._where, self._persist = open_pool, where, persist
        self._pauses, self._refused_pause = pauses, refused_pause
        self._log = log or logging.getLogger("kvtide")
        self._lock = threading.Condition()
        self._namespaces: Tuple[Namespace, ...] = ()
        self._stores: Optional[Tuple[BlockStore, ...]] = None
        self._pool: Any = None
        self._closed = False
        self._thread: Optional[threading.Thread] = None
        self._later: Deque[Callable[[], Any]] = collections.deque()
        self.problem = "not connected yet"
        self.tries = 0
        #: Called when the daemon, or its namespaces, are gone: nothing is copied from its memory any more when they return.
        self.lost: List[Callable[[], None]] = []
        close_at_exit(self)

    def start(self, namespaces: Sequence[Namespace], wait: float = 0.0) -> bool:
        """Begins to connect and to open these; waits for up to ``wait`` seconds. True if it is there."""
        with self._lock:
            self._namespaces = tuple(namespaces)
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="kvtide-link", daemon=True)
                self._thread.start()
            first = self.tries
            self._lock.wait_for(lambda: self._stores is not None or self.tries > first, timeout=wait)
            return self._stores is not None

    def stores(self) -> Optional[Tuple[BlockStore, ...]]:
        """The open namespaces in the order of :meth:`start`; None while the daemon is away."""
        return self._stores

    @property
    def pool(self) -> Any:
        """The pool at the other end now; None while the daemon is away."""
        return self._pool

    def empty(self, shape: Sequence[int], dtype: Any) -> Any:
        """Memory for a payload that goes to the daemon without a copy, if there is such."""
        pool = self._pool
        if pool is None:
            raise Unavailable(f"no kvtided at {self._where}: {self.problem}")
        return pool.empty(tuple(shape), dtype)

    def failed(self, error: BaseException) -> None:
        """A call ended so. What means that the daemon is gone, or has forgotten the namespaces, makes the link connect anew."""
        if not isinstance(error, GONE + (NotFound,)):
            return
        with self._lock:
            if self._stores is None:
                return
            pool = self._pool
            self._stores = self._pool = None
            self.problem = _words(error)
            self._log.warning("kvtide: lost kvtided at %s (%s); the engine goes on without what rests there", self._where, self.problem)
            self._lock.notify_all()
        self._let_go(pool)

    def reopen(self) -> None:
        """Opens the namespaces anew: they were deleted."""
        with self._lock:
            pool = self._pool
            self._stores = self._pool = None
            self._lock.notify_all()
        self._let_go(pool)

    def _let_go(self, pool: Any) -> None:
        """What is mapped of a daemon that has ended is memory that its successor wants."""
        for call in self.lost:
            call()
        if getattr(pool, "host_tier_bytes", 0):
            pool.drop_host_tier()

    def later(self, call: Callable[[], Any]) -> None:
        """Runs a call that nobody waits for, such as giving a lease back, on the link's thread; drops it if the daemon goes."""
        with self._lock:
            if self._stores is not None:
                self._later.append(call)
                self._lock.notify_all()

    def close(self) -> None:
        with self._lock:
            self._closed = True
            self._stores = None
            pool, self._pool = self._pool, None
            self._lock.notify_all()
        if self._thread is not None:
            self._thread.join(timeout=10)
        if pool is not None and hasattr(pool, "close"):
            pool.close()

    def _run(self) -> None:
        pause = self._pauses[0]
        said = ""
        while True:
            with self._lock:
                watched = self._pool if getattr(self._pool, "host_tier_bytes", 0) else None
                awake = self._lock.wait_for(lambda: self._closed or self._stores is None or bool(self._later),
                                            timeout=None if watched is None else LOOK_SECONDS)
                if self._closed:
                    return
                call = self._later.popleft() if self._later and self._stores is not None else None
                if awake and call is None:
                    self._later.clear()
            if not awake:
                if _gone(watched):
                    self.failed(Unavailable("it has ended"))
                continue
            if call is not None:
                try:
                    call()
                except Exception as error:
                    self.failed(error)
                continue
            try:
                pool = self._open_pool()
                stores = tuple(pool.block_store(one, persist_all=self._persist) for one in self._namespaces)
            except Exception as error:  # whatever it is: an engine must not end by its cache
                refused = isinstance(error, REFUSALS)
                with self._lock:
                    self.problem = _words(error)
                    self.tries += 1
                    self._lock.notify_all()
                if self.problem != said:
                    said = self.problem
                    self._log.warning("kvtide: %s kvtided at %s: %s; the engine goes on without it",
                                      "refused by" if refused else "no", self._where, said)
                with self._lock:
                    if self._lock.wait_for(lambda: self._closed, timeout=self._refused_pause if refused else pause):
                        return
                pause = min(self._pauses[1], 2 * pause)
                continue
            pause, said = self._pauses[0], ""
            with self._lock:
                if self._closed:
                    return
                self._pool, self._stores = pool, stores
                self.tries += 1
                self.problem = ""
                self._lock.notify_all()
            self._log.info("kvtide: kvtided at %s is there%s", self._where, f", by {pool.way}" if hasattr(pool, "way") else "")


def _gone(pool: Any) -> bool:
    try:
        return not pool.connected
    except KvtideError:  # it was closed meanwhile
        return True


def _words(error: BaseException) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]


def in_pieces(blocks: int, block_bytes: int, piece_bytes: int) -> List[Tuple[int, int]]:
    """Ranges (first, end) of blocks, each at most ``piece_bytes`` and at least one block."""
    step = max(1, piece_bytes // max(1, block_bytes))
    return [(at, min(blocks, at + step)) for at in range(0, blocks, step)]
