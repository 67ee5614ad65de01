"""The scheduler's half of the connector: which blocks come from the daemon, which go there, and when they may be freed.

Knows vLLM's requests and outputs by their attributes only, so that it runs without vLLM. All methods are called on the
scheduler's thread.

A *chunk* is what rests in the daemon under one key: ``chunk_tokens`` tokens, a multiple of vLLM's block and of kvtide's 64. Its
key is vLLM's own hash of its last block, which is chained: it names all tokens before it too, with adapters and images.

Rules of the interface that are kept here (each has a test of its name in ``tests/python/test_vllm_connector_plan.py``):

* looking up may happen many times for a request and changes nothing: the first answer, with its leases, is given again
* only what every rank can read now counts; a rank that says less decides for all
* a request whose load failed once computes; it does not ask again
* a request's blocks are kept until what was announced to be saved has been read: until every save of it, not the first
* a preempted request's saves are over before its blocks are written anew
* leases go back when the load is done, when the request ends without one, and by themselves
* where events are wanted, a chunk counts as stored when all ranks have said so
"""

from __future__ import annotations

import functools
import time
from dataclasses import dataclass, field
from typing import Any, Callable, Dict, List, Mapping, Optional, Sequence, Set, Tuple

from .._trace import trace
from ..block_watch import FIRST_TIER, BlockWatch, further

Rank = Tuple[int, int]
"""(pipeline parallel rank, tensor parallel rank)."""


@dataclass(frozen=True)
class Load:
    """Blocks of a request that come from the daemon.

    Attributes:
        leases: for each rank, a lease over the chunks from the first one that is needed on.
        chunks: how many of them.
        blocks: vLLM's block ids to write, in the order of the tokens.
        skip: blocks at the beginning of the first chunk that the engine has already.
    """

    request: str
    leases: Mapping[Rank, int]
    chunks: int
    blocks: Tuple[int, ...]
    skip: int = 0


@dataclass(frozen=True)
class Save:
    """Full chunks of a request, with vLLM's block ids of each one after the other.

    Attributes:
        number: under which workers say what became of it; 0 = nobody asks.
    """

    request: str
    keys: Tuple[bytes, ...]
    blocks: Tuple[int, ...]
    number: int = 0


@dataclass(frozen=True)
class Saved:
    """What became of a save: the tiers of its first chunks, as many as are there in each of ``ranks`` ranks."""

    ranks: int
    tiers: Tuple[str, ...]

    def and_of(self, other: "Saved") -> "Saved":
        """The same of more ranks: a chunk is there if all have it, and as near as in the rank where it is furthest."""
        return Saved(self.ranks + other.ranks, tuple(further(a, b) for a, b in zip(self.tiers, other.tiers)))


@dataclass
class Announced:
    """A save that workers have not all answered yet."""

    keys: Tuple[bytes, ...]
    what: List[Any]
    so_far: Saved


@dataclass
class Step:
    """What the workers have to do in one step.

    Attributes:
        fenced: preempted requests: nothing reads their blocks any more when the step begins.
        held: ended requests whose blocks are kept until their saves have read them.
        idle: the engine computes nothing in it.
    """

    loads: List[Load] = field(default_factory=list)
    saves: List[Save] = field(default_factory=list)
    fenced: Set[str] = field(default_factory=set)
    held: Set[str] = field(default_factory=set)
    idle: bool = False


@dataclass
class Answer:
    """Of a lookup: chunks that are there from ``first`` on."""

    first: int
    chunks: int
    leases: Dict[Rank, int]
    tiers: Tuple[Tuple[str, int], ...]
    until: float
    computed: int = 0
    """Tokens that the engine had when it was told."""
    known: bool = False
    """The daemon said so; else it is away."""


@dataclass
class Tracked:
    """A request that has blocks."""

    request: Any
    blocks: List[int] = field(default_factory=list)
    saved: int = 0
    """Chunks that are in the daemon or on their way there."""
    saving: bool = False
    """Saves were announced since its blocks were given to it."""


class ConnectorPlan:
    """Args:
        link: the :class:`~kvtide.store_link.StoreLink` of all ranks' namespaces, in the order of ``ranks``.
        block_tokens: of vLLM's blocks.
        hash_tokens: tokens that one of vLLM's hashes stands for.
        load, save: what may be done.
        watch: is told which chunks are there, with what ``describe`` (request, first token, end) says of them.
    """

    def __init__(self, link: Any, block_tokens: int, chunk_tokens: int, *, hash_tokens: int = 0, lease_seconds: float = 60.0,
                 miss_seconds: float = 0.2, load: bool = True, save: bool = True, watch: Optional[BlockWatch] = None,
                 describe: Callable[[Any, int, int], Any] = lambda request, first, end: None,
                 clock: Callable[[], float] = time.monotonic) -> None:
        self.link = link
        self.ranks: Tuple[Rank, ...] = ()
        self.block_tokens, self.chunk_tokens = block_tokens, chunk_tokens
        self.hash_tokens = hash_tokens or block_tokens
        self.per_chunk = chunk_tokens // block_tokens
        self.lease_seconds, self.miss_seconds, self.clock = lease_seconds, miss_seconds, clock
        self.may_load, self.may_save = load, save
        self.answers: Dict[str, Answer] = {}
        self.loading: Dict[str, Answer] = {}
        self.loaded_from: Dict[str, Tuple[Tuple[str, int], ...]] = {}
        self.tracked: Dict[str, Tracked] = {}
        self.failed: Set[str] = set()
        self.step = Step()
        self.watch, self.describe = watch, describe
        self.announced: Dict[int, Announced] = {}
        self.next_save = 1
        self.counts: Dict[str, int] = {}

    # --- what is there ---

    def matched(self, request: Any, computed: int) -> Tuple[Optional[int], bool]:
        """Tokens beyond the ``computed`` first ones that can be loaded between steps."""
        if not self.may_load or request.request_id in self.failed or getattr(request, "skip_reading_prefix_cache", False):
            return 0, False
        # One token at least is computed: its logits are wanted.
        last = min(len(request.block_hashes) * self.hash_tokens, request.num_tokens - 1) // self.chunk_tokens
        first = computed // self.chunk_tokens
        if last <= first:
            self._drop_answer(request.request_id)
            return 0, False
        answer = self._answer(request, first, last)
        answer.computed = computed
        end = min(answer.first + answer.chunks, last) * self.chunk_tokens
        tokens = max(0, end - computed)
        return tokens, tokens > 0

    def key(self, request: Any, chunk: int) -> bytes:
        key = request.block_hashes[(chunk + 1) * self.chunk_tokens // self.hash_tokens - 1]
        return key if isinstance(key, bytes) else int(key).to_bytes(8, "little", signed=key < 0)

    def _answer(self, request: Any, first: int, last: int) -> Answer:
        now, old = self.clock(), self.answers.get(request.request_id)
        if old is not None and now < old.until and old.first == first:
            return old
        self._drop_answer(request.request_id)
        keys = [self.key(request, chunk) for chunk in range(first, last)]
        with trace(request.request_id):
            answer = self._look_up(keys, first)
        self.answers[request.request_id] = answer
        if self.watch is not None and answer.known:
            tiers = (tier for tier, chunks in answer.tiers for _ in range(chunks))
            for chunk, (key, tier) in enumerate(zip(keys[:answer.chunks], tiers), first):
                self.watch.there(key, tier, None if self.watch.knows(key) else self._describe(request, chunk))
            self.watch.gone(keys[answer.chunks:answer.chunks + 1])
        return answer

    def _describe(self, request: Any, chunk: int) -> Any:
        return self.describe(request, chunk * self.chunk_tokens, (chunk + 1) * self.chunk_tokens)

    def _count(self, name: str, more: int) -> None:
        self.counts[name] = self.counts.get(name, 0) + more

    def take_counts(self) -> Dict[str, int]:
        """What was counted since it was last asked; ``hit_tokens.TIER``: tokens of loads that were begun, by tier."""
        counts, self.counts = self.counts, {}
        return counts

    def _look_up(self, keys: Sequence[bytes], first: int) -> Answer:
        now = self.clock()
        answer = Answer(first, 0, {}, (), now + self.miss_seconds)
        stores = self.link.stores()
        if not stores or len(stores) != len(self.ranks):
            return answer
        self._count("lookups", 1)
        self._count("asked_blocks", len(keys))
        chunks, tiers = len(keys), ()
        try:
            for rank, store in zip(self.ranks, stores):
                found = store.lookup(keys[:chunks], lease_seconds=self.lease_seconds)
                if found.lease_id:
                    answer.leases[rank] = found.lease_id
                chunks = min(chunks, found.hits)
                if len(found.tiers) > len(tiers):
                    tiers = found.tiers
                if chunks == 0:
                    break
            answer.known = True
        except Exception as error:  # a lookup that fails is a miss
            self.link.failed(error)
            chunks = 0
        answer.chunks, answer.tiers = chunks, tuple(tiers)
        if chunks == 0:
            self._release(answer)
        else:
            answer.until = now + self.lease_seconds / 2
            self._count("found_blocks", chunks)
        return answer

    def _drop_answer(self, request_id: str) -> None:
        answer = self.answers.pop(request_id, None)
        if answer is not None:
            self._release(answer)

    def _release(self, answer: Answer) -> None:
        stores = self.link.stores()
        for rank, lease in answer.leases.items() if stores else ():  # else they ended with the session
            self.link.later(functools.partial(stores[self.ranks.index(rank)].release, lease))
        answer.leases = {}

    # --- blocks ---

    def allocated(self, request: Any, blocks: Sequence[int], external: int) -> None:
        """The request has these blocks; ``external`` tokens of them are to be loaded, as :meth:`matched` said or less."""
        one = self.tracked.setdefault(request.request_id, Tracked(request))
        one.request, one.blocks = request, list(blocks)
        answer = self.answers.get(request.request_id)
        if external <= 0 or answer is None or not answer.leases:
            self._drop_answer(request.request_id)
            return
        del self.answers[request.request_id]
        begin = answer.computed // self.block_tokens
        last = begin + external // self.block_tokens
        chunks = -(-last // self.per_chunk) - answer.first
        self.loading[request.request_id] = answer
        self.loaded_from[request.request_id] = answer.tiers
        self.step.loads.append(Load(request.request_id, dict(answer.leases), chunks, tuple(blocks[begin:last]),
                                    begin - answer.first * self.per_chunk))
        one.saved = max(one.saved, answer.first + answer.chunks)
        for tier, tokens in self.tokens_by_tier(request.request_id, external):
            self._count(f"hit_tokens.{tier}", tokens)

    def tokens_by_tier(self, request_id: str, tokens: int) -> List[Tuple[str, int]]:
        """Where so many tokens of the request's load come from."""
        out, tier = [], ""
        for tier, chunks in self.loaded_from.get(request_id, ()):
            here = min(tokens, chunks * self.chunk_tokens)
            tokens -= here
            if here:
                out.append((tier, here))
        return out + ([(tier or FIRST_TIER, tokens)] if tokens else [])

    def build(self, output: Any) -> Step:
        """The step's work, and a new one begins."""
        for new in output.scheduled_new_reqs:
            one = self.tracked.get(new.req_id)
            if one is not None:
                one.blocks = list(new.block_ids[0])
        cached = output.scheduled_cached_reqs
        for index, request_id in enumerate(cached.req_ids):
            one, more = self.tracked.get(request_id), cached.new_block_ids[index]
            if one is None or more is None:
                continue
            if request_id in cached.resumed_req_ids:
                one.blocks = list(more[0])
            else:
                one.blocks.extend(more[0])
        for request_id in output.preempted_req_ids or ():
            one = self.tracked.get(request_id)
            if one is not None:
                # Its blocks are gone, and what was to be read of them is read before this step writes.
                one.saving, one.saved = False, 0
            self._drop_answer(request_id)
            self.step.fenced.add(request_id)
        if self.may_save:
            computed = {new.req_id: new.num_computed_tokens for new in output.scheduled_new_reqs}
            computed.update(zip(cached.req_ids, cached.num_computed_tokens))
            for request_id, scheduled in output.num_scheduled_tokens.items():
                self._save(request_id, computed.get(request_id, 0) + scheduled)
        step, self.step = self.step, Step()
        step.idle = not output.num_scheduled_tokens
        return step

    def _save(self, request_id: str, written: int) -> None:
        """Chunks that are full of known tokens when this step is over. Drafts are no known tokens: their keys and values may be
        written again."""
        one = self.tracked.get(request_id)
        if one is None:
            return
        request = one.request
        known = min(written, request.num_tokens, len(request.block_hashes) * self.hash_tokens)
        last = min(known // self.chunk_tokens, len(one.blocks) // self.per_chunk)
        if last <= one.saved:
            return
        keys, number = tuple(self.key(request, chunk) for chunk in range(one.saved, last)), 0
        if self.watch is not None:
            number, self.next_save = self.next_save, self.next_save + 1
            self.announced[number] = Announced(keys, [self._describe(request, chunk) for chunk in range(one.saved, last)],
                                               Saved(0, (FIRST_TIER,) * len(keys)))
        self.step.saves.append(Save(request_id, keys, tuple(one.blocks[one.saved * self.per_chunk:last * self.per_chunk]), number))
        one.saved, one.saving = last, True

    def saved(self, results: Mapping[int, Saved]) -> None:
        """What workers say of saves. A chunk is there when all ranks have it."""
        for number, result in results.items():
            one = self.announced.get(number)
            if one is None or self.watch is None:
                continue
            # The first answer says where they are; what follows can only be as far or further.
            one.so_far = one.so_far.and_of(result) if one.so_far.ranks else result
            if one.so_far.ranks < len(self.ranks):
                continue
            del self.announced[number]
            for key, what, tier in zip(one.keys, one.what, one.so_far.tiers):
                self.watch.there(key, tier, what)

    # --- ends ---

    def finished(self, request_id: str) -> bool:
        """The request is over. True: its blocks are kept until the workers report it."""
        self._drop_answer(request_id)
        self.failed.discard(request_id)
        self.loaded_from.pop(request_id, None)
        one = self.tracked.pop(request_id, None)
        # Blocks of a load under way are kept by vLLM itself until the load is reported.
        if one is None or not one.saving or request_id in self.loading:
            return False
        self.step.held.add(request_id)
        return True

    def received(self, request_ids: Sequence[str], failed: bool = False) -> None:
        """Loads that are over."""
        for request_id in request_ids:
            answer = self.loading.pop(request_id, None)
            if answer is not None:
                self._release(answer)

    def load_failed(self, request_id: str) -> None:
        if self.watch is not None:
            self.watch.hurry()
        one = self.tracked.get(request_id)
        if one is not None:
            self.failed.add(request_id)
            one.saved = 0  # what could not be read is computed and may be stored again

    def reset(self) -> bool:
        """Empties the namespaces."""
        stores = self.link.stores()
        if not stores:
            return False
        for request_id in list(self.answers):
            self._drop_answer(request_id)
        try:
            for store in stores:
                store.delete()
        except Exception as error:
            self.link.failed(error)
            return False
        self.link.reopen()
        if self.watch is not None:
            self.announced.clear()
            self.watch.clear()
        return True
