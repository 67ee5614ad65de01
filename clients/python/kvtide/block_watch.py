"""Which blocks of a daemon an engine has spoken of, and whether they are still there.

A daemon drops blocks for room, moves them between its tiers, and may end; it tells nobody. Who publishes what rests there (KV events
of vLLM, for routers that send a prompt to the engine that has its beginning) learns it in three ways: from its own stores, lookups
and loads; from rounds that ask for every block, a piece at a time, on the link's thread, without counting as use; and from the link,
when the daemon goes. What a daemon that came back still has (its disk) is found by the round that begins then.

What cannot be known: that a block went between two rounds. And an engine that does nothing publishes nothing.
"""

from __future__ import annotations

import functools
import threading
import time
from dataclasses import dataclass
from typing import Any, Callable, Dict, Iterable, List, Optional, Sequence, Tuple

FIRST_TIER = "host"
"""Where new blocks are stored."""
_FAR = ("host", "disk", "remote")


def further(one: str, other: str) -> str:
    """The slower of two tiers; those of devices are the fastest."""
    place = {tier: at for at, tier in enumerate(_FAR)}
    return max(one, other, key=lambda tier: place.get(tier, -1))


@dataclass(frozen=True)
class Change:
    """A block is in ``tier`` now, or is not any more; ``what`` was said of it when it was first spoken of."""

    key: bytes
    tier: str
    removed: bool
    what: Any = None


@dataclass
class _Block:
    what: Any
    tier: str = ""
    """That was told; empty = the daemon is away, and nobody knows."""
    version: int = 0
    """Of the last time that somebody saw it."""


def tiers_of(stores: Sequence[Any], keys: Sequence[bytes]) -> Dict[bytes, str]:
    """Which keys are in all of these namespaces, and in which tier, the slowest of them. Lookups end at the first key that is not
    there, so there is one call more for each of those."""
    out: Dict[bytes, str] = {}
    for number, store in enumerate(stores):
        asked, mine, at = [key for key in keys if number == 0 or key in out], {}, 0
        while at < len(asked):
            found = store.lookup(asked[at:], lease_seconds=-1, peek=True)
            hits = iter(asked[at:at + found.hits])
            for tier, blocks in found.tiers:
                for _, key in zip(range(blocks), hits):
                    mine[key] = further(out.get(key, tier), tier)
            at += found.hits + 1
        out = mine
    return out


class BlockWatch:
    """All methods but the rounds are called on the engine's thread, or with what threads of its own found out.

    Args:
        link: :class:`~kvtide.store_link.StoreLink` of the namespaces; a block is there if all of them have it.
        seconds: from the end of a round to the next one.
        piece: blocks of one question.
    """

    def __init__(self, link: Any, *, seconds: float = 5.0, piece: int = 256, clock: Callable[[], float] = time.monotonic) -> None:
        self._link, self._seconds, self._piece, self._clock = link, seconds, piece, clock
        self._lock = threading.Lock()
        self._blocks: Dict[bytes, _Block] = {}
        self._changes: List[Change] = []
        self._version = 0
        self._pool: Any = None
        self._round: Optional[object] = None
        self._next = clock() + seconds

    def __len__(self) -> int:
        """Blocks that were told to be there."""
        with self._lock:
            return sum(bool(block.tier) for block in self._blocks.values())

    def knows(self, key: bytes) -> bool:
        """It was told to be there."""
        block = self._blocks.get(key)
        return block is not None and bool(block.tier)

    def there(self, key: bytes, tier: str, what: Any = None) -> None:
        """The block was stored or found."""
        with self._lock:
            self._there(key, tier, what)

    def gone(self, keys: Iterable[bytes]) -> None:
        """The blocks were looked up or loaded, and were not there."""
        with self._lock:
            for key in keys:
                self._gone(key)

    def clear(self) -> None:
        """All of them are gone."""
        with self._lock:
            for key in list(self._blocks):
                self._gone(key)

    def poll(self) -> None:
        """Begins a round when it is time for one. Called again and again."""
        stores, pool = self._link.stores(), self._link.pool
        with self._lock:
            if pool is not self._pool:
                # Another connection, or none: a round under way has ended with the old one, and what it holds has to be asked.
                self._pool, self._round, self._next = pool, None, self._clock() + (0 if self._blocks else self._seconds)
                if not stores:
                    for key, block in self._blocks.items():
                        self._tell(key, block, "")
            if not stores or self._round is not None or self._clock() < self._next or not self._blocks:
                return
            self._round, keys = object(), list(self._blocks)
            this = self._round
        self._link.later(functools.partial(self._ask, this, stores, keys))

    def hurry(self) -> None:
        """A block could not be read: the next round begins soon."""
        with self._lock:
            self._next = self._clock()

    def take(self) -> List[Change]:
        """What changed since it was last asked."""
        with self._lock:
            changes, self._changes = self._changes, []
            return changes

    # --- the link's thread ---

    def _ask(self, this: object, stores: Sequence[Any], keys: List[bytes]) -> None:
        piece, rest = keys[:self._piece], keys[self._piece:]
        with self._lock:
            if this is not self._round:
                return
            versions = {key: self._blocks[key].version for key in piece if key in self._blocks}
        try:
            tiers = tiers_of(stores, piece)
        except Exception:
            with self._lock:
                if this is self._round:
                    self._round, self._next = None, self._clock() + self._seconds
            raise
        with self._lock:
            if this is not self._round:
                return
            for key, version in versions.items():
                block = self._blocks.get(key)
                if block is None or block.version != version:
                    continue  # somebody has seen it since it was asked for
                if key in tiers:
                    self._tell(key, block, tiers[key])
                else:
                    self._gone(key)
            if not rest:
                self._round, self._next = None, self._clock() + self._seconds
                return
        self._link.later(functools.partial(self._ask, this, stores, rest))

    # --- with the lock ---

    def _there(self, key: bytes, tier: str, what: Any) -> None:
        block = self._blocks.setdefault(key, _Block(what))
        self._version += 1
        block.version = self._version
        self._tell(key, block, tier)

    def _gone(self, key: bytes) -> None:
        block = self._blocks.pop(key, None)
        if block is not None:
            self._tell(key, block, "")

    def _tell(self, key: bytes, block: _Block, tier: str) -> None:
        if block.tier == tier:
            return
        if block.tier:
            self._changes.append(Change(key, block.tier, True, block.what))
        if tier:
            self._changes.append(Change(key, tier, False, block.what))
        block.tier = tier


def runs(changes: Sequence[Change], follows: Callable[[Change, Change], bool]) -> List[List[Change]]:
    """Neighbouring changes of one tier and direction, as long as each ``follows`` the one before."""
    out: List[List[Change]] = []
    for change in changes:
        last = out[-1][-1] if out else None
        if last is not None and (last.tier, last.removed) == (change.tier, change.removed) and follows(last, change):
            out[-1].append(change)
        else:
            out.append([change])
    return out
