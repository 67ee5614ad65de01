"""Profiles of keys, as ``kvtide calibrate`` writes them: the mean of every layer's keys over a text.

>>> profile = kvtide.profiles.load("model.profile")
>>> pool.register("model", layers, key_means=profile.means)
>>> pool.create("model", pair="turbo4/turbo4", key_centring="calibrated")

Keys are then coded as their difference from the mean, which attention takes back exactly.
"""

from __future__ import annotations

import hashlib
import json
import os
import pathlib
import struct
from dataclasses import dataclass
from typing import List, Union

import numpy as np

from .errors import InvalidArgument

_FORMATS = ("kvtide-key-profile-1", "kvtide-key-profile-2")  # the second has transforms besides


@dataclass(frozen=True)
class KeyProfile:
    """``means[layer]`` is ``[kv_heads, head_dim]`` in float32, of keys after rotary embedding."""

    model: str
    text: str
    tokens: int
    means: List[np.ndarray]

    @property
    def digest(self) -> str:
        """Tells profiles apart."""
        return hashlib.sha256(b"".join(mean.tobytes() for mean in self.means)).hexdigest()[:16]


def load(path: Union[str, "os.PathLike[str]"]) -> KeyProfile:
    """Reads a profile (safetensors); ``InvalidArgument`` for files that are none."""
    data = pathlib.Path(path).read_bytes()
    try:
        (length,) = struct.unpack_from("<Q", data)
        header = json.loads(data[8 : 8 + length])
        notes = header.pop("__metadata__", {})
        if notes.get("format") not in _FORMATS:
            raise InvalidArgument(f"{path}: its format is {notes.get('format')!r}, not {_FORMATS[0]!r}; `kvtide calibrate` writes it")
        means = []
        for layer in range(sum(name.endswith(".key_mean") for name in header)):
            tensor = header[f"layers.{layer}.key_mean"]
            begin, end = tensor["data_offsets"]
            if tensor["dtype"] != "F32" or len(tensor["shape"]) != 2:
                raise InvalidArgument(f"{path}: the mean of layer {layer} is not f32 [kv_heads, head_dim]")
            means.append(np.frombuffer(data[8 + length + begin : 8 + length + end], "<f4").reshape(tensor["shape"]))
        return KeyProfile(notes.get("model", ""), notes.get("text", ""), int(notes["tokens"]), means)
    except InvalidArgument:
        raise
    except (struct.error, ValueError, KeyError, TypeError) as error:
        raise InvalidArgument(f"{path} is not a profile of `kvtide calibrate`: {error}") from error
