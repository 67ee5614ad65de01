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
    ``transforms[layer]`` ``[kv_heads, head_dim, head_dim]`` in float32, channel by coefficient, and ``widths[layer]``
    ``[kv_heads, 3, groups of 8]`` in uint8, the bits of each group in tide4, tide3 and tide2; else both lists are empty."""

    model: str
    text: str
    tokens: int
    means: List[np.ndarray]
    transforms: List[np.ndarray] = field(default_factory=list)
    widths: List[np.ndarray] = field(default_factory=list)

    @property
    def digest(self) -> str:
        """Tells profiles apart."""
        parts = [*self.means, *self.transforms, *self.widths]
        return hashlib.sha256(b"".join(part.tobytes() for part in parts)).hexdigest()[:16]

    def of_layers(self, layers: Iterable[int]) -> "KeyProfile":
        """The same for these layers of the model alone, in this order."""
        layers = list(layers)
        pick = lambda parts: [parts[layer] for layer in layers] if parts else []  # noqa: E731
        return replace(self, means=pick(self.means), transforms=pick(self.transforms), widths=pick(self.widths))


def load(path: Union[str, "os.PathLike[str]"]) -> KeyProfile:
    """Reads a profile (safetensors); ``InvalidArgument`` for files that are none."""
    path = os.fspath(path)
    os.stat(path)  # FileNotFoundError as of any other file
    model, text, tokens, heads, dim, means, transforms, widths = _core.read_key_profile(path)
    arrays = lambda parts, dtype, *shape: [np.frombuffer(part, dtype).reshape(heads, *shape) for part in parts]  # noqa: E731
    return KeyProfile(model, text, tokens, arrays(means, "<f4", dim), arrays(transforms, "<f4", dim, dim),
                      arrays(widths, "u1", 3, -1))
