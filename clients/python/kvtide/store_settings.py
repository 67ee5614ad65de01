"""What a user chooses for an engine's blocks in a daemon, whichever engine it is."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, Mapping, Tuple

from . import formats
from .errors import InvalidArgument

if TYPE_CHECKING:
    from typing_extensions import Self

WAYS = ("auto", "shm", "grpc")


@dataclass(frozen=True)
class StoreSettings:
    """Attributes:
        address: of kvtided; empty = ``$KVTIDE_ADDRESS``, else the default socket.
        pair: types of keys and values at rest, such as ``turbo4/turbo4``; ``exact`` = the pages' bytes as they are.
        degrade: pairs of fewer and fewer bits that blocks may be recoded as when the daemon needs room, before they are dropped,
            such as ``turbo4,turbo3``; empty = never. Engines share blocks if theirs is the same.
        way: ``auto``, ``shm`` (shared memory) or ``grpc``.
        timeout: seconds of a load or a store.
        connect_wait: seconds that the start of the engine waits for the daemon.
        piece_mib: most that one call carries.
        salt: keeps engines apart that would share.
        persist: blocks survive a restart of the daemon, if it has a disk tier.
    """

    address: str = ""
    pair: str = "q8_0/turbo4"
    way: str = "auto"
    timeout: float = 10.0
    connect_wait: float = 3.0
    piece_mib: int = 16
    salt: str = ""
    persist: bool = False
    degrade: str = ""

    @property
    def rungs(self) -> Tuple[str, ...]:
        """The pairs of ``degrade``."""
        return tuple(self.degrade.split(",")) if self.degrade else ()

    @classmethod
    def make(cls, values: Mapping[str, Any], where: str) -> "Self":
        """Settings of these values. InvalidArgument, which begins with ``where``, for what cannot be."""
        known = [one.name for one in fields(cls)]
        for key in values:
            if key not in known:
                raise InvalidArgument(f"{where} has no key {key!r}; kvtide knows {', '.join(known)}")
        for one in fields(cls):
            value, kind = values.get(one.name, one.default), type(one.default)
            if not isinstance(value, (int, float) if kind is float else kind):
                raise InvalidArgument(f"{where}: {one.name} is {value!r}, not of type {kind.__name__}")
        out = cls(**values)
        if out.way not in WAYS:
            raise InvalidArgument(f"{where}: way is {out.way!r}; use {', '.join(WAYS[:-1])} or {WAYS[-1]}")
        if out.pair == "auto":
            raise InvalidArgument(f"{where}: name a pair; kvtide connect chooses one")
        if out.pair == "exact":
            if out.degrade:
                raise InvalidArgument(f"{where}: degrade: bytes as they are cannot be recoded to fewer bits; name a pair, or leave it out")
            return out
        try:
            rungs = ",".join(formats.parse_pair(rung.strip(), "exact") for rung in out.rungs)
            return replace(out, pair=formats.parse_pair(out.pair, "exact"), degrade=rungs)
        except InvalidArgument as error:
            raise InvalidArgument(f"{where}: {error}") from None
