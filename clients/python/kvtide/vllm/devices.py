"""Where pages lie, and the compiled code that works on them there."""

from __future__ import annotations

import functools
from typing import Any

import torch

from .. import _core
from .settings import cuda_library


@functools.lru_cache(maxsize=None)
def paged_device(kind: str) -> Any:
    """``cpu`` or ``cuda``: of torch's current device."""
    return _core.PagedDevice("cpu", torch.get_num_threads()) if kind == "cpu" else _core.PagedDevice(kind, library=cuda_library())
