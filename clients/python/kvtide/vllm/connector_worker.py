"""A worker's half of the connector: moves blocks between vLLM's pages and the daemon.

Two threads, one that saves and one that loads, each with a connection of its own, so that a load waits for no store. The engine's
thread only hands over jobs and takes what is done; it waits in one place, :meth:`ConnectorWorker.fence`, for a copy out of
memory that is about to be written, never for the daemon.

On GPUs both threads have a stream. A copy out of pages begins behind an event of the compute stream that the engine's thread
recorded after the step (what is saved was written); a copy into pages behind one that was recorded before (whoever read their old
content is done).
"""

from __future__ import annotations

import contextlib
import functools
import logging
import queue
import threading
import time
from dataclasses import dataclass, field
from typing import Any, Callable, Dict, Iterator, List, Optional, Sequence, Set, Tuple

import numpy as np
import torch

from .. import _core
from .._trace import trace
from ..block_watch import FIRST_TIER
from ..errors import FailedPrecondition, KvtideError, ResourceExhausted
from ..store_link import close_at_exit, in_pieces
from .connector_pages import Pages
from .connector_plan import Load, Rank, Save, Saved, Step

IDLE_SECONDS = 0.002
"""That a step which computes nothing waits for a load, or for a save that is asked for."""
_WAITING, _COPYING, _DONE = range(3)
_TYPES = {torch.float32: np.float32, torch.float16: np.float16, torch.bfloat16: np.uint16, torch.uint8: np.uint8}


@dataclass
class Job:
    """A save on its way out of the pages."""

    save: Save
    event: Any = None
    state: int = _WAITING
    cancelled: bool = False
    tiers: List[str] = field(default_factory=list)
    """Of its first chunks, as far as they are there."""


@dataclass
class Counts:
    """Since they were last taken."""

    saved_blocks: int = 0
    present_blocks: int = 0
    dropped_blocks: int = 0
    saved_bytes: int = 0
    loaded_blocks: int = 0
    loaded_bytes: int = 0
    in_place_blocks: int = 0
    failed_loads: int = 0
    save_seconds: float = 0.0
    load_seconds: float = 0.0


def codec_versions(pair: str) -> Tuple[int, int]:
    """Of this package, for keys and values."""
    key, value = pair.split("/")
    return _core.codec_version(key), _core.codec_version(value)


class Staging:
    """Two buffers in the memory that a link's daemon sees, taken in turn: while one is copied, the other is filled. On GPUs they are
    pinned, else a copy would go through a third one of the driver's; where that is not allowed, copies are slower.

    Args:
        copier: what copies from and to them, if it is not torch.
        say: called with an error, once.
    """

    def __init__(self, link: Any, size: int, gpu: Optional[torch.device], copier: Any = None,
                 say: Callable[[BaseException], None] = lambda error: None) -> None:
        self.link, self.size, self.gpu, self.copier, self.say = link, size, gpu, copier, say
        self.pool: Any = None
        self.buffers: List[np.ndarray] = []
        self.pinned: List[np.ndarray] = []
        self.events: List[Any] = [None, None]
        self.next = 0

    def both(self) -> List[np.ndarray]:
        """The buffers, of ``size`` bytes."""
        if self.pool is not self.link.pool or not self.buffers:
            self.close()
            self.buffers = [self._new(), self._new()]
            self.pool = self.link.pool
        return self.buffers

    def take(self) -> np.ndarray:
        """The next buffer, when nothing copies it any more."""
        buffers = self.both()
        self.next = 1 - self.next
        if self.events[self.next] is not None:
            self.events[self.next].synchronize()
        return buffers[self.next]

    def copying(self) -> None:
        """Copies of the buffer taken last are on the current stream."""
        if self.events[self.next] is None:
            self.events[self.next] = torch.cuda.Event()
        self.events[self.next].record()

    def _new(self) -> np.ndarray:
        buffer = self.link.empty((self.size,), np.uint8)
        if self.gpu is not None:
            try:
                self._pin(buffer)
                self.pinned.append(buffer)
            except (KvtideError, MemoryError) as error:
                self.say(MemoryError(f"{self.size} bytes of memory shared with kvtided cannot be pinned ({error}): copies are slower; "
                                     "raise the limit of locked memory (ulimit -l)"))
        return buffer

    def _pin(self, buffer: np.ndarray) -> None:
        if self.copier is not None:
            return self.copier.pin(buffer)
        status = int(torch.cuda.cudart().cudaHostRegister(buffer.ctypes.data, self.size, 0))
        if status != 0:
            raise MemoryError(f"CUDA error {status}")

    def close(self) -> None:
        pinned, self.pinned, self.buffers = self.pinned, [], []
        if self.gpu is not None and pinned:
            torch.cuda.synchronize(self.gpu)
            for buffer in pinned:
                self.copier.unpin(buffer) if self.copier is not None else torch.cuda.cudart().cudaHostUnregister(buffer.ctypes.data)


class SharedTier:
    """The tier of host memory of a link's daemon, where it lets this engine map it (``kvtided --host-sharing``): blocks are copied from
    where they lie there, and the daemon copies nothing. A GPU's driver registers it first, which takes a while where it is large: when no
    load waits. Loads hold the lock, so that nothing is copied from it when it goes.

    Args:
        copier: of loads; None: torch moves the pages, and the tier is not used.
        say: called with an error, once.
    """

    def __init__(self, link: Any, copier: Any, say: Callable[[BaseException], None], log: logging.Logger) -> None:
        self.link, self.copier, self.say, self.log = link, copier, say, log
        self.lock = threading.Lock()
        self.store: Any = None
        """That it was tried for."""
        self.pin: Any = None
        if copier is not None and hasattr(link, "lost"):
            link.lost.append(self.close)

    def prepare(self) -> None:
        """Registers the tier of the daemon that is there now."""
        stores = self.link.stores()
        if self.copier is None or not stores or stores[0] is self.store or not hasattr(stores[0], "pin_tier"):
            return
        self.close()
        with self.lock:
            self.store = stores[0]
            try:
                self.pin = self.store.pin_tier(self.copier)
            except (KvtideError, MemoryError) as error:
                self.say(MemoryError(f"the host memory that kvtided shares cannot be registered ({error}): blocks come through the arena"))
            if self.pin is not None:
                self.log.info("kvtide: loads copy blocks from where they lie in %d MiB of kvtided's host memory (registered in %.2f s)",
                              self.pin.bytes >> 20, self.pin.seconds)

    def of(self, store: Any) -> bool:
        """Whether blocks of this store may be copied from it. Under the lock."""
        return self.pin is not None and self.store is store

    def close(self) -> None:
        with self.lock:
            pin, self.pin, self.store = self.pin, None, None
            if pin is not None:
                pin.close()


class ConnectorWorker:
    """Args:
        pages: the rank's pages.
        save_link, load_link: :class:`~kvtide.store_link.StoreLink` of the rank's namespace.
        rank: of this worker.
        coded: payloads are coded: pages are kvtide's own and travel as they are, or copiers code them.
        piece_bytes: most of one call's payload.
        most_blocks: blocks that may wait to be saved; what is beyond is not saved.
    """

    def __init__(self, pages: Pages, save_link: Any, load_link: Any, rank: Rank, *, coded: bool = False, piece_bytes: int = 16 << 20,
                 most_blocks: int = 1 << 30, log: Optional[logging.Logger] = None) -> None:
        self.pages, self.save_link, self.load_link, self.rank, self.coded = pages, save_link, load_link, rank, coded
        self.piece_bytes, self.most_blocks = piece_bytes, most_blocks
        self.log = log or logging.getLogger("vllm.kvtide")
        self.gpu = pages.caches[0].device if pages.caches[0].device.type == "cuda" else None
        staging = max(piece_bytes, pages.bytes)
        copiers = (pages.copiers.saving, pages.copiers.loading) if pages.copiers is not None else (None, None)
        self.said: Set[str] = set()
        self.save_staging, self.load_staging = (
            Staging(link, staging, self.gpu, copier, functools.partial(self._say, "pinning of memory"))
            for link, copier in zip((save_link, load_link), copiers))
        self.tier = SharedTier(load_link, copiers[1], functools.partial(self._say, "registration of memory"), self.log)
        self.lock = threading.Condition()
        self.jobs: Dict[str, List[Job]] = {}
        self.waiting_blocks = self.loading = 0
        self.idle = False
        self.held: Set[str] = set()
        self.received: Set[str] = set()
        self.bad_blocks: Set[int] = set()
        self.results: Dict[int, Saved] = {}
        self.asked_for = 0
        self.counts = Counts()
        self.saves: "queue.SimpleQueue[Optional[Job]]" = queue.SimpleQueue()
        self.loads: "queue.SimpleQueue[Optional[Tuple[Load, Any]]]" = queue.SimpleQueue()
        self.threads = [threading.Thread(target=work, name=f"kvtide-{name}", daemon=True)
                        for name, work in (("save", self._save_all), ("load", self._load_all))]
        for thread in self.threads:
            thread.start()
        close_at_exit(self)

    # --- the engine's thread ---

    def fence(self, requests: Set[str]) -> None:
        """Nothing reads blocks of these requests when this returns: what has not begun is not saved."""
        with self.lock:
            for request in requests:
                for job in self.jobs.get(request, ()):
                    if job.state == _WAITING:
                        job.cancelled = True
            self.lock.wait_for(lambda: not any(job.state == _COPYING for request in requests for job in self.jobs.get(request, ())))

    def start_loads(self, step: Step) -> None:
        with self.lock:
            self.idle = step.idle
            self.loading += len(step.loads)
        for load in step.loads:
            self.pages.will_be_written(load.blocks)
            self.loads.put((load, self._event()))

    def start_saves(self, step: Step) -> None:
        """After the step's work was launched."""
        with self.lock:
            self.held |= step.held
        for save in step.saves:
            with self.lock:
                self.asked_for += bool(save.number)
                if self.waiting_blocks + len(save.blocks) > self.most_blocks:
                    self.counts.dropped_blocks += len(save.keys)
                    self._answer(Job(save))
                    continue
                self.waiting_blocks += len(save.blocks)
            self.pages.will_be_read(save.blocks)
            job = Job(save, self._event())
            with self.lock:
                self.jobs.setdefault(save.request, []).append(job)
            self.saves.put(job)

    def take_done(self) -> Tuple[Set[str], Set[str]]:
        """Ended requests whose blocks nothing reads any more, and requests whose loads are over."""
        with self.lock:
            if self.idle and (self.loading > 0 or self.asked_for > 0):
                # The engine asks again and again, and holds the interpreter that the load needs.
                self.lock.wait_for(lambda: self.received or self.results, timeout=IDLE_SECONDS)
            saved = {request for request in self.held if not self.jobs.get(request)}
            self.held -= saved
            received, self.received = self.received, set()
            return saved, received

    def take_bad_blocks(self) -> Set[int]:
        """Blocks that a load should have written and did not; with or before their request in :meth:`take_done`."""
        with self.lock:
            bad, self.bad_blocks = self.bad_blocks, set()
            return bad

    def take_saved(self) -> Dict[int, Saved]:
        """What became of saves that have a number."""
        with self.lock:
            results, self.results = self.results, {}
            return results

    def take_counts(self) -> Counts:
        with self.lock:
            counts, self.counts = self.counts, Counts()
            return counts

    def close(self) -> None:
        self.saves.put(None)
        self.loads.put(None)
        for thread in self.threads:
            thread.join(timeout=10)
            if not thread.is_alive():
                (self.save_staging if thread.name == "kvtide-save" else self.load_staging).close()
                if thread.name == "kvtide-load":
                    self.tier.close()
        self.save_link.close()
        self.load_link.close()

    def _event(self) -> Any:
        if self.gpu is None:
            return None
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(self.gpu))
        return event

    # --- saving ---

    def _save_all(self) -> None:
        with self._stream():
            self._prepare(self.save_link, self.save_staging)
            while (job := self.saves.get()) is not None:
                try:
                    with trace(job.save.request):
                        self._save(job)
                except Exception as error:  # a block that is not saved is a later miss
                    self._say("save", error)
                    self.save_link.failed(error)
                finally:
                    self._copied(job)
                    with self.lock:
                        self._answer(job)
                        self.lock.notify_all()

    def _answer(self, job: Job) -> None:
        if job.save.number:
            self.results[job.save.number] = Saved(1, tuple(job.tiers))
            self.asked_for -= 1

    def _save(self, job: Job) -> None:
        save, began = job.save, time.monotonic()
        stores = self.save_link.stores()
        if not stores:
            return self._drop(save, len(save.keys))
        store = self._checked(stores[0])
        found = store.lookup(save.keys, lease_seconds=-1, peek=True)
        present = found.hits
        job.tiers = [tier for tier, chunks in found.tiers for _ in range(chunks)]
        with self.lock:
            self.counts.present_blocks += present
        if job.event is not None:  # the step that writes the blocks is no part of the time that saving takes
            job.event.synchronize()
            began = time.monotonic()
        pieces = [(present + first, present + end)
                  for first, end in in_pieces(len(save.keys) - present, self.pages.bytes, self.piece_bytes)]
        for first, end in pieces:
            with self.lock:
                if job.cancelled:
                    return self._drop(save, len(save.keys) - first)
                job.state = _COPYING
            try:
                payload = self._out(job, first, end)
            finally:
                with self.lock:
                    job.state = _WAITING
                    self.lock.notify_all()
            if end == len(save.keys):
                self._copied(job)  # the blocks may go; what follows is the daemon's
            result = store.store(save.keys[first:end], payload, coded=self.coded)
            if not result.left_out:
                job.tiers += [FIRST_TIER] * (end - first)
            elif save.number:  # which ones are there nobody said
                found = store.lookup(save.keys[first:end], lease_seconds=-1, peek=True)
                job.tiers += [tier for tier, chunks in found.tiers for _ in range(chunks)]
            with self.lock:
                self.counts.saved_blocks += result.stored
                self.counts.present_blocks += result.present
                self.counts.dropped_blocks += result.left_out
                self.counts.saved_bytes += result.stored * self.pages.bytes
                self.counts.save_seconds, began = self.counts.save_seconds + time.monotonic() - began, time.monotonic()
            if result.left_out:
                self._say("room", ResourceExhausted(result.problem))
                return None  # what comes behind would not be found without these
        return None

    def _out(self, job: Job, first: int, end: int) -> Any:
        blocks = job.save.blocks[first * self.pages.chunk_blocks:end * self.pages.chunk_blocks]
        payload, tensor = self._payload(self.save_staging, end - first)
        if self.pages.copiers is not None:
            self._after(self.pages.copiers.saving, job.event)
        if self.gpu is None or self.pages.copiers is not None:
            self.pages.read(blocks, tensor)
            return payload
        stream = torch.cuda.current_stream(self.gpu)
        stream.wait_event(job.event)
        staged = torch.empty(tensor.shape, dtype=tensor.dtype, device=self.gpu)
        self.pages.read(blocks, staged)
        tensor.copy_(staged, non_blocking=True)
        stream.synchronize()
        return payload

    def _copied(self, job: Job) -> None:
        with self.lock:
            if job.state == _DONE:
                return
            job.state = _DONE
            mine = self.jobs[job.save.request]
            mine.remove(job)
            if not mine:
                del self.jobs[job.save.request]
            self.waiting_blocks -= len(job.save.blocks)
            self.lock.notify_all()

    def _drop(self, save: Save, chunks: int) -> None:
        with self.lock:
            self.counts.dropped_blocks += chunks

    # --- loading ---

    def _load_all(self) -> None:
        with self._stream():
            self._prepare(self.load_link, self.load_staging)
            while True:
                if self.loads.empty():
                    self.tier.prepare()
                if (one := self.loads.get()) is None:
                    return
                load, event = one
                done = 0  # vLLM's blocks that are written
                try:
                    with trace(load.request):
                        for done in self._load(load, event):
                            pass
                except Exception as error:
                    self._say("load", error)
                    self.load_link.failed(error)
                if self.gpu is not None:
                    torch.cuda.current_stream(self.gpu).synchronize()
                with self.lock:
                    bad = load.blocks[done:]
                    self.counts.failed_loads += bool(bad)
                    # A block that failed is named before its request is.
                    self.bad_blocks.update(bad)
                    self.received.add(load.request)
                    self.loading -= 1
                    self.lock.notify_all()

    def _load(self, load: Load, event: Any) -> Iterator[int]:
        """The blocks written so far, after each piece. Ends where a block cannot be read."""
        stores = self.load_link.stores()
        if not stores or self.rank not in load.leases:
            return
        store = self._checked(stores[0])
        if self.pages.copiers is not None and hasattr(store, "load_pages"):
            yield self._load_at_once(store, load, event)
            return
        per, began = self.pages.chunk_blocks, time.monotonic()
        for first, end in in_pieces(load.chunks, self.pages.bytes, self.piece_bytes):
            payload, tensor = self._payload(self.load_staging, end - first)
            lost = store.load(load.leases[self.rank], payload, first_block=first, coded=self.coded)
            good = min([end, *lost])
            # Of the load's first chunk the engine may have the first blocks itself.
            begin, stop = max(0, first * per - load.skip), min(len(load.blocks), good * per - load.skip)
            if stop > begin:
                self._in(tensor, load.blocks[begin:stop], load.skip if first == 0 else 0, event)
            with self.lock:
                self.counts.loaded_blocks += good - first
                self.counts.loaded_bytes += (good - first) * self.pages.bytes
                self.counts.load_seconds, began = self.counts.load_seconds + time.monotonic() - began, time.monotonic()
            yield max(0, stop)
            if good < end:
                return

    def _load_at_once(self, store: Any, load: Load, event: Any) -> int:
        """All pieces in one call, which needs the interpreter's lock once."""
        copier, began = self.pages.copiers.loading, time.monotonic()
        with self.tier.lock:
            self._after(copier, event)
            chunks, _, error, in_place = store.load_pages(
                copier, load.leases[self.rank], load.chunks, self.pages.ids(load.blocks), self.load_staging.both(),
                skip=load.skip * self.pages.split, in_place=self.tier.of(store))
        with self.lock:
            self.counts.loaded_blocks += chunks
            self.counts.in_place_blocks += in_place
            self.counts.loaded_bytes += chunks * self.pages.bytes
            self.counts.load_seconds += time.monotonic() - began
        if error is not None:
            self._say("load", error)
            self.load_link.failed(error)
        return max(0, min(len(load.blocks), chunks * self.pages.chunk_blocks - load.skip))

    def _after(self, copier: Any, event: Any) -> None:
        if event is not None:
            copier.after(event.cuda_event)

    def _in(self, tensor: torch.Tensor, blocks: Sequence[int], skip: int, event: Any) -> None:
        if self.pages.copiers is not None:
            self._after(self.pages.copiers.loading, event)
        if self.gpu is None or self.pages.copiers is not None:
            self.pages.write(tensor, blocks, skip)
            return
        stream = torch.cuda.current_stream(self.gpu)
        stream.wait_event(event)
        self.pages.write(tensor.to(self.gpu, non_blocking=True), blocks, skip)
        self.load_staging.copying()

    # --- both ---

    def _prepare(self, link: Any, staging: Staging) -> None:
        """Takes and pins memory before the first request waits for it."""
        if link.stores():
            try:
                staging.both()
            except Exception as error:
                self._say("preparation", error)
                link.failed(error)

    def _checked(self, store: Any) -> Any:
        """Coded pages mean the same here and there."""
        if self.coded and tuple(store.codec_versions) != (here := codec_versions(store.pair)):
            raise FailedPrecondition(f"kvtided codes {store.pair} in versions {store.codec_versions}, this package in {here}: install "
                                     "the same release of both")
        return store

    def _payload(self, staging: Staging, chunks: int) -> Tuple[Any, torch.Tensor]:
        """Memory for chunks: what the store takes, and the same as a tensor."""
        array = staging.take()[:chunks * self.pages.bytes].view(_TYPES[self.pages.dtype]).reshape(chunks, *self.pages.shape)
        tensor = torch.from_numpy(array)
        if self.pages.dtype == torch.bfloat16:
            tensor = tensor.view(torch.bfloat16)
        return (tensor if self.pages.dtype == torch.bfloat16 else array), tensor

    @contextlib.contextmanager
    def _stream(self) -> Iterator[None]:
        if self.gpu is None:
            yield
            return
        with torch.cuda.device(self.gpu), torch.cuda.stream(torch.cuda.Stream(self.gpu)):
            yield

    def _say(self, what: str, error: BaseException) -> None:
        """Once for each kind of trouble."""
        key = f"{what} {type(error).__name__}"
        if key not in self.said:
            self.said.add(key)
            self.log.warning("kvtide: a %s did not work, the engine computes instead (said once): %s", what, error)
