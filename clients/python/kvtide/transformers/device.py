"""Forwards on the pool's own device: one step of :mod:`kvtide.device_steps` for each forward of the model, so that tensors stay where
the model has them. What these steps do not do, the store does through host memory, and a warning says why."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any, Dict, List, Optional, Set, Tuple

import numpy as np
import torch

from ..device_steps import DeviceSteps, Step
from ..errors import FailedPrecondition, InvalidArgument, Unavailable, Unimplemented
from ..pool import Pool, Sequence

if TYPE_CHECKING:
    from .store import Store


def _power_of_two(least: int) -> int:
    return 1 << max(0, least - 1).bit_length()


class DeviceForward:
    """The forward that is under way, and what the steps were made for."""

    def __init__(self, pool: Pool, required: bool = False) -> None:
        self.pool = pool
        self.required = required
        self.steps: Optional[DeviceSteps] = None
        self.made_for: Tuple[Any, ...] = ()
        self.step: Optional[Step] = None
        self.start = self.tokens = 0  # logical columns of the step
        self.index: Any = None  # of the stored columns in [batch, tokens]; None = all
        self.written: Set[int] = set()
        self.options: Dict[str, Any] = {}
        self.why_not = ""  # steps on the device are not for this cache

    def again(self) -> "DeviceForward":
        """For a store of the same pool."""
        other = DeviceForward(self.pool, self.required)
        other.why_not = self.why_not
        return other

    # What a store asks.

    def takes(self, store: "Store", layer: int, start: int, k: torch.Tensor) -> bool:
        """Whether these columns belong to the step that is open."""
        return (self.step is not None and store.places[layer] not in self.written
                and (start, k.shape[2]) == (self.start, self.tokens))

    def append(self, store: "Store", layer: int, start: int, k: torch.Tensor, v: torch.Tensor) -> None:
        assert self.step is not None and self.steps is not None
        place = store.places[layer]
        self.step.append(place, self._flat(k), self._flat(v))
        self.written.add(place)

    def append_attend(self, store: "Store", layer: int, start: int, q: torch.Tensor, k: Optional[torch.Tensor],
                      v: Optional[torch.Tensor], options: Dict[str, Any]) -> Optional[torch.Tensor]:
        """As Store.append_attend; None: through host memory."""
        if k is not None and v is not None:
            if not self.takes(store, layer, start, k):
                self.finish()
                if self.why_not or not self._begin(store, layer, start, q, options):
                    return None
        elif self.step is None or start + q.shape[2] != self.start + self.tokens or start < self.start:
            self.finish()
            return None
        assert self.step is not None
        different = self._differs(store, layer, options)
        if different:
            raise InvalidArgument(f"layer {layer}: {different}, unlike the layers before; "
                                  "use KvtideCache(..., on_device=False)")
        batch, heads, queries, _ = q.shape
        if queries < self.tokens:  # those of earlier tokens are not asked for
            q = torch.cat([q.new_zeros(batch, heads, self.tokens - queries, q.shape[3]), q], dim=2)
        place = store.places[layer]
        if k is not None and v is not None:  # one call of the device for both
            found = self.step.append_attend(place, self._flat(q), self._flat(k), self._flat(v))
            self.written.add(place)
        else:
            found = self.step.attend(place, self._flat(q))
        if self.index is None:
            return found.view(batch, self.tokens, heads, -1)[:, self.tokens - queries :]
        output = q.new_zeros((batch, self.tokens, heads, found.shape[2]))
        output[self.index] = found
        return output[:, self.tokens - queries :]

    def finish(self) -> None:
        """Ends the step; its tokens count from now on."""
        if self.step is None:
            return
        step, self.step = self.step, None
        if self.steps is not None and len(self.written) < len(self.steps._layers):
            step.roll_back()
            raise FailedPrecondition(f"the last forward ended after {len(self.written)} of {len(self.steps._layers)} layers; its tokens "
                                     "were taken back: reset the cache, or crop it to the tokens before")
        step.end()

    def close(self) -> None:
        """Ends a step that is whole, so that its blocks are found by what the tokens are; takes another one back."""
        step, self.step = self.step, None
        if step is not None and self.steps is not None and len(self.written) == len(self.steps._layers):
            step.end()
        elif step is not None:
            step.roll_back()
        self.steps, self.made_for = None, ()

    # How it is done.

    def _flat(self, rows: torch.Tensor) -> torch.Tensor:
        """[batch, heads, tokens, dim] -> the stored columns as [tokens of all rows, heads, dim]."""
        assert self.steps is not None
        rows = rows.detach().to(getattr(torch, self.steps.dtype)).transpose(1, 2)
        if self.index is not None:
            return rows[self.index].contiguous()
        return rows.reshape(-1, rows.shape[2], rows.shape[3]).contiguous()

    def _differs(self, store: "Store", layer: int, options: Dict[str, Any]) -> str:
        window = store.pool._models[store.model][store.places[layer]].window
        if options.get("sinks") is not None:
            return "attention sinks"
        if (options.get("window") or 0) != window:
            return f"a window of {options.get('window') or 0}, registered with {window}"
        for name in ("scale", "softcap"):
            if options.get(name) != self.options.get(name):
                return f"{name} {options.get(name)}"
        return ""

    def _refuse(self, why: str) -> bool:
        if self.required:
            raise InvalidArgument(f"this cache was to attend on {self.pool.direct_device}: {why}")
        self.why_not = why
        warnings.warn(f"KvtideCache attends through host memory, not on {self.pool.direct_device}: {why}", RuntimeWarning, stacklevel=2)
        return False

    def _begin(self, store: "Store", layer: int, start: int, q: torch.Tensor, options: Dict[str, Any]) -> bool:
        device = "cuda" if self.pool.direct_device.startswith("cuda") else "cpu"
        if q.device.type != device:
            return self._refuse(f"the model lies on {q.device}")
        if store.settings["seal_at_once"]:
            return self._refuse("seal_at_once codes tokens before anything attends over them")
        if q.dtype not in (torch.float32, torch.float16, torch.bfloat16):
            return self._refuse(f"queries are {q.dtype}")
        # The pool keeps more of these layers than their window: the steps' windows would be other ones.
        if any(kind.lent for kind in store.kinds):
            return self._refuse("layers share the keys of a sliding one")
        if store.keep_all and store.windowed:
            return self._refuse("sliding layers keep all tokens, so that they can be taken back")
        self.options = dict(options)
        different = self._differs(store, layer, options)
        if different:
            return self._refuse(f"layer {layer} has {different}")
        tokens = q.shape[2]
        columns = [kept[start : start + tokens] for kept in store.kept]
        items: List[Tuple[Sequence, int]] = [(row, int(seen.sum())) for row, seen in zip(store.rows, columns) if seen.any()]
        if not items:
            return False
        named = [store.named(0, row, start, tokens) for row, seen in enumerate(columns) if seen.any()]
        new = sum(count for _, count in items)
        longest = max(len(row) + count for row, count in items)
        try:
            steps = self._steps(store, q, len(store.rows), new, longest)
            try:
                step = steps.step(items, token_ids=named)
            except FailedPrecondition:  # evicted meanwhile
                self.pool.prefetch([row for row, _ in items])
                step = steps.step(items, token_ids=named)
        except (InvalidArgument, FailedPrecondition, Unavailable, Unimplemented) as error:
            return self._refuse(str(error))
        self.step, self.start, self.tokens, self.written = step, start, tokens, set()
        whole = all(seen.all() for seen in columns)
        self.index = None if whole else torch.from_numpy(np.stack(columns)).to(q.device)
        return True

    def _steps(self, store: "Store", q: torch.Tensor, rows: int, new: int, longest: int) -> DeviceSteps:
        """Those that are there, if they serve; else larger ones."""
        kind = (store.model, store.settings.get("pair"), q.dtype, self.options.get("scale"), self.options.get("softcap"))
        old = self.steps
        if old is not None and self.made_for == kind and (
                rows <= old.max_sequences and new <= old.max_new_tokens and longest <= old.max_sequence_tokens):
            return old
        bounds = (old.max_new_tokens, old.max_sequence_tokens) if old is not None and self.made_for == kind else (0, 2048)
        self.steps = None  # its memory goes before the next one's comes
        self.steps = self.pool.device_steps(
            store.model, store.settings.get("pair") or self.pool.info().default_pair,
            dtype=str(q.dtype).replace("torch.", ""), max_sequences=rows,
            max_new_tokens=max(rows, bounds[0] if new <= bounds[0] else _power_of_two(new)),
            max_sequence_tokens=bounds[1] if longest <= bounds[1] else _power_of_two(longest),
            scale=self.options.get("scale"), softcap=self.options.get("softcap") or 0.0)
        self.made_for = kind
        return self.steps
