"""Profiles of keys, as ``kvtide calibrate`` writes them: the mean of every layer's keys over a text, and the transforms of
``tide`` types.

>>> profile = kvtide.profiles.load("model.profile")
>>> pool.register("model", layers, profile=profile)
>>> pool.create("model", pair="turbo4/turbo4", key_centring="calibrated")
>>> pool.create("model", pair="tide3/turbo3")        # where the profile has transforms

Keys are then coded as their difference from the mean, which attention takes back exactly.
"""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass, field, replace
from typing import Iterable, List, Union

import numpy as np

from . import _core


@dataclass(frozen=True)
class KeyProfile:
    """``means[layer]`` is ``[kv_heads, head_dim]`` in float32, of keys after rotary embedding. With transforms:
    ``transforms[layer]`` ``[kv_heads, head_dim, head_dim]`` in float32, channel by coefficient, of keys before rotary
    embedding minus ``centres[layer]`` ``[kv_heads, head_dim]``; ``widths[layer]`` ``[kv_heads, 4, groups of 8]`` in uint8, the
    bits of each group in tide4, tide3, tide2 and tide1 (profiles that are older than tide1 have the first three); ``frequencies[layer]`` ``[pairs]``, the rotary embedding in radians a
    position, of channels 2i and 2i + 1 with ``neighbours``, else i and i + pairs. Without transforms these lists are empty.
    With ``after_rope`` the transforms are of keys as they are stored, after rotary embedding, and hold for positions up to
    ``context``, the tokens of the text's windows (0 = not known)."""

    model: str
    text: str
    tokens: int
    means: List[np.ndarray]
    transforms: List[np.ndarray] = field(default_factory=list)
    widths: List[np.ndarray] = field(default_factory=list)
    centres: List[np.ndarray] = field(default_factory=list)
    frequencies: List[np.ndarray] = field(default_factory=list)
    neighbours: bool = False
    after_rope: bool = False
    context: int = 0

    @property
    def digest(self) -> str:
        """Tells profiles apart."""
        parts = [*self.means, *self.transforms, *self.widths, *self.centres, *self.frequencies]
        return hashlib.sha256(b"".join(part.tobytes() for part in parts) + b"\1" * self.neighbours + b"\2" * self.after_rope).hexdigest()[:16]

    def of_layers(self, layers: Iterable[int]) -> "KeyProfile":
        """The same for these layers of the model alone, in this order."""
        layers = list(layers)
        pick = lambda parts: [parts[layer] for layer in layers] if parts else []  # noqa: E731
        return replace(self, **{name: pick(getattr(self, name)) for name in ("means", "transforms", "widths", "centres", "frequencies")})


def load(path: Union[str, "os.PathLike[str]"]) -> KeyProfile:
    """Reads a profile (safetensors); ``InvalidArgument`` for files that are none."""
    path = os.fspath(path)
    os.stat(path)  # FileNotFoundError as of any other file
    model, text, tokens, heads, dim, means, transforms, widths, centres, frequencies, neighbours, after_rope, context = \
        _core.read_key_profile(path)
    arrays = lambda parts, dtype, *shape: [np.frombuffer(part, dtype).reshape(heads, *shape) for part in parts]  # noqa: E731
    return KeyProfile(model, text, tokens, arrays(means, "<f4", dim), arrays(transforms, "<f4", dim, dim),
                      arrays(widths, "u1", -1, (dim + 31) // 32 * 4), arrays(centres, "<f4", dim),
                      [np.frombuffer(part, "<f4") for part in frequencies], neighbours, after_rope, context)
