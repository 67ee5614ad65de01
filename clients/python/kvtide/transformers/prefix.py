"""What the tokens of a cache are: blocks of a pool are found by token ids, so a cache whose prompt begins as an earlier one did begins
with what that one has left. Ids come from the model itself: a hook sees what every forward with the cache is given."""

from __future__ import annotations

import hashlib
import weakref
from typing import Any, Optional, Tuple

import numpy as np
import torch

from ..errors import InvalidArgument

_SAMPLES = 64


def prompt_of(prompt_ids: Any) -> np.ndarray:
    """Token ids as [rows, tokens]."""
    if hasattr(prompt_ids, "detach"):
        prompt_ids = prompt_ids.detach().cpu().numpy()
    ids = np.asarray(prompt_ids)
    if ids.ndim == 1:
        ids = ids[None]
    if ids.ndim != 2 or ids.size == 0 or not np.issubdtype(ids.dtype, np.integer) or ids.min() < 0:
        raise InvalidArgument("prompt_ids are the token ids of generate(): [rows, tokens], without padding")
    return ids.astype(np.int64)


def salt_of(model: Any) -> str:
    """What tells apart the keys and values of two models for the same tokens: the configuration, and the name, type, shape and samples
    of every weight, those of adapters too."""
    digest = hashlib.sha256(repr(sorted(model.config.to_dict().items(), key=lambda item: item[0])).encode())
    for name, weight in [*model.named_parameters(), *model.named_buffers()]:
        if weight.is_meta:
            raise InvalidArgument(f"{name} is not in memory, so nobody can tell these weights from others: prefixes need all of them loaded")
        flat = weight.detach().reshape(-1)
        digest.update(f"{name} {weight.dtype} {tuple(weight.shape)}".encode())
        if flat.numel():
            at = torch.linspace(0, flat.numel() - 1, min(_SAMPLES, flat.numel()), dtype=torch.float64).round().long()
            values = flat[at.to(flat.device)].cpu().contiguous()
            digest.update(values.view(torch.uint8).numpy().tobytes())
    adapters = getattr(model, "active_adapters", None)
    try:
        digest.update(repr(adapters() if callable(adapters) else adapters).encode())
    except ValueError:  # none was ever loaded
        pass
    return digest.hexdigest()


class ForwardIds:
    """The ids that a forward of the model has, for as long as its cache lives."""

    def __init__(self, model: Any, cache: Any) -> None:
        mine = weakref.ref(cache)

        def look(module: Any, args: Tuple[Any, ...], kwargs: dict) -> None:
            cache = mine()
            if cache is None or not any(value is cache for value in (*args, *kwargs.values())):  # the argument's name has changed
                return
            ids = kwargs.get("input_ids", args[0] if args else None)
            cache._store.say(None if ids is None else ids.detach().cpu().numpy())

        self._hook = model.register_forward_pre_hook(look, with_kwargs=True)
        weakref.finalize(cache, self._hook.remove)

    def close(self) -> None:
        self._hook.remove()


def ids_of(said: Optional[Tuple[int, np.ndarray]], row: int, start: int, tokens: int) -> Optional[np.ndarray]:
    """Those of the columns from `start` on, out of what was said: the first column and ids [rows, columns]. None: not all are known."""
    if said is None or row >= len(said[1]) or start < said[0] or start + tokens > said[0] + said[1].shape[1]:
        return None
    return said[1][row, start - said[0] : start - said[0] + tokens]
