"""Names under which users of other packages of quantised caches know such a cache.

``IsoQuantCache(bits=4)`` and its kin are ``KvtideCache`` with both sides in the type of that family. Measure before you choose:
the README of kvtide lists what each type costs, and ``KvtideCache(model)`` takes a pair that harms less at similar size."""

from __future__ import annotations

from typing import Any

from ..errors import InvalidArgument
from .cache import KvtideCache


def _pair(family: str, bits: int, widths: tuple) -> str:
    if bits not in widths:
        raise InvalidArgument(f"bits is {bits}; {family} has {', '.join(map(str, widths))}")
    return f"{family}{bits}/{family}{bits}"


def TurboQuantCache(model_or_config: Any = None, *, bits: int = 4, **options: Any) -> KvtideCache:
    """Walsh-Hadamard rotation and optimal scalar levels: turbo4, turbo3 or turbo2 on both sides."""
    return KvtideCache(model_or_config, _pair("turbo", bits, (4, 3, 2)), **options)


def IsoQuantCache(model_or_config: Any = None, *, bits: int = 4, **options: Any) -> KvtideCache:
    """Rotations of four channels (quaternions): iso4 or iso3 on both sides."""
    return KvtideCache(model_or_config, _pair("iso", bits, (4, 3)), **options)


def PlanarQuantCache(model_or_config: Any = None, *, bits: int = 4, **options: Any) -> KvtideCache:
    """Rotations of two channels: planar4 or planar3 on both sides."""
    return KvtideCache(model_or_config, _pair("planar", bits, (4, 3)), **options)


def RotorQuantCache(model_or_config: Any = None, *, bits: int = 4, **options: Any) -> KvtideCache:
    """Rotors of three channels: rotor4 or rotor3 on both sides."""
    return KvtideCache(model_or_config, _pair("rotor", bits, (4, 3)), **options)
