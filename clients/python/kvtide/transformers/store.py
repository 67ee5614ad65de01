"""The rows of a batch in a pool: one sequence for each row, the same for all layers.

A store knows nothing of transformers' classes. Positions are **logical** where they count the columns of the batch, padding
included, and **stored** where they count what a row's sequence holds: padding is not stored when the masks are known (attend
mode)."""

from __future__ import annotations

import copy
import hashlib
import threading
from typing import Any, Dict, List, Optional, Sequence as SequenceOf, Tuple

import numpy as np
import torch

from .._types import Layer, Rope
from ..errors import InvalidArgument, Unavailable
from ..pool import Pool, Sequence, connect
from ..profiles import KeyProfile
from .device import DeviceForward
from .geometry import LayerKind, LayerShape
from .prefix import ids_of

_default: Dict[str, Pool] = {}  # by GPU; "" = none
_default_lock = threading.Lock()


def default_pool(gpu: str = "") -> Pool:
    """The pool of caches that name none: ``kvtide.connect()``, opened once for the process, and once for each GPU ("cuda:0") with
    a model whose kernels the build has."""
    with _default_lock:
        if gpu and gpu not in _default:
            try:
                _default[gpu] = connect(device=gpu, direct_device=gpu)
            except (InvalidArgument, Unavailable):
                gpu = ""  # a build without CUDA: through host memory
        if gpu not in _default:
            _default[gpu] = connect()
        return _default[gpu]


class Store:
    """Rows, lengths and what is still waiting for its geometry."""

    def __init__(self, pool: Pool, kinds: List[LayerKind], attend: bool, settings: Dict[str, Any],
                 profile: Optional[KeyProfile] = None, on_device: Optional[bool] = None,
                 ropes: Optional[Dict[int, Rope]] = None) -> None:
        self.pool = pool
        self.kinds = kinds
        self.attend = attend
        self.windowed = any(kind.kind == "sliding" for kind in kinds)
        self.settings = settings
        self.profile = profile
        self.ropes = ropes or {}  # by layer; empty = not known
        self.model: Optional[str] = None
        self.shapes: List[LayerShape] = []
        self.rows: List[Sequence] = []
        self.batch = 0
        self.keep_all = False  # sliding layers too, so that tokens can be taken back
        self.lengths = [0] * len(kinds)  # logical, by layer
        self.kept: List[np.ndarray] = []  # by row: which logical positions are stored
        # Tensors of the first forward until the geometry of all layers is known: {layer: (k, v)}.
        self.waiting: Dict[int, Tuple[torch.Tensor, torch.Tensor]] = {}
        self.query_heads: Dict[int, int] = {}
        self.places: Dict[int, int] = {}  # layer of the model -> layer of the pool's model
        # What the columns of the forward under way are: the first of them, and token ids [batch, columns]; None = not known.
        self.said: Optional[Tuple[int, np.ndarray]] = None
        self.reused = 0  # columns that the rows began with
        self.forward: Optional[DeviceForward] = None
        if attend and on_device is not False and pool.direct_device:
            self.forward = DeviceForward(pool, required=bool(on_device))

    # Geometry.

    def register(self, shapes: Dict[int, LayerShape]) -> None:
        """Makes the model known to the pool. Layers that keep nothing have no shape."""
        self.places = {layer: place for place, layer in enumerate(sorted(shapes))}
        layers = []
        for layer in sorted(shapes):
            shape, kind = shapes[layer], self.kinds[layer]
            # The pool lets go of what the next query does not see; layers that borrow keys ask once more, and so do reads of
            # tokens that are coded at once.
            keep = self.keep_all or (kind.lent and self.attend) or self.settings["seal_at_once"]
            window = kind.window if kind.kind == "sliding" and not keep else 0
            layers.append(Layer(shape.kv_heads, shape.head_dim_k, shape.query_heads, shape.head_dim_v, window,
                                rope=self.ropes.get(layer)))
        name = "transformers-" + hashlib.sha256(repr(layers).encode()).hexdigest()[:16]
        profile = None
        if self.profile is not None:
            if max(shapes) >= len(self.profile.means):
                raise InvalidArgument(f"the profile is of {self.profile.model} with {len(self.profile.means)} layers; this model "
                                      f"keeps keys in layer {max(shapes)}")
            profile = self.profile.of_layers(sorted(shapes))
            name += "-" + self.profile.digest
        self.model = self.pool.register(name, layers, profile=profile)
        self.shapes = [shapes[layer] for layer in sorted(shapes)]

    def settle(self) -> None:
        """Registers what the first forward has shown, and stores its tensors; ends a forward on the pool's device."""
        if self.forward is not None:
            self.forward.finish()
        if not self.waiting:
            return
        if self.model is None:
            self.register({
                layer: LayerShape(k.shape[1], k.shape[3], v.shape[3], self.query_heads.get(layer, k.shape[1]))
                for layer, (k, v) in self.waiting.items()
            })
        waiting, self.waiting = self.waiting, {}
        for layer, (k, v) in waiting.items():
            self._append(layer, k, v, 0)

    # Rows.

    def open(self, batch: int) -> None:
        if self.batch == 0:
            self.batch = batch
            self.kept = [np.zeros(0, dtype=bool) for _ in range(batch)]
        if batch != self.batch:
            raise InvalidArgument(f"the batch has {batch} rows, the cache holds {self.batch}; use one cache for each batch")
        if self.model is not None and not self.rows:
            self.rows = [self.pool.create(self.model, **self.settings) for _ in range(batch)]

    def begin_with(self, prompt: np.ndarray) -> int:
        """Rows that begin with what is cached of the prompt [rows, tokens], the same number of tokens in all of them."""
        assert self.model is not None and self.batch == 0
        asked = {name: value for name, value in self.settings.items() if name not in ("seal_at_once", "allow_drop")}
        common = 0
        if not self.settings["seal_at_once"]:
            common = min(self.pool.cached(self.model, ids[:-1], **asked).tokens for ids in prompt)
        self.open(len(prompt))
        if common == 0:
            return 0
        for row in self.rows:
            row.close()
        self.rows = [self.pool.create(self.model, **self.settings, begin_with=ids[:common]) for ids in prompt]
        self.reused = min(len(row) for row in self.rows)  # some may have been lost meanwhile
        for row in self.rows:
            row.truncate(self.reused)
        self.kept = [np.ones(self.reused, dtype=bool) for _ in self.rows]
        self.lengths = [self.reused] * len(self.kinds)
        return self.reused

    def say(self, ids: Optional[np.ndarray]) -> None:
        """The forward that begins has these ids [batch, columns]; None: nobody knows them."""
        first = next((self.lengths[layer] for layer, kind in enumerate(self.kinds) if kind.stock is None), 0)
        self.said = None if ids is None or ids.ndim != 2 else (first, ids)

    def close(self) -> None:
        self.said, self.reused = None, 0
        if self.forward is not None:
            self.forward.close()
        for row in self.rows:
            row.close()
        self.rows, self.batch, self.kept = [], 0, []
        self.lengths = [0] * len(self.kinds)
        self.waiting = {}

    def fork(self) -> "Store":
        """Another store with the same tokens; blocks are shared."""
        self.settle()
        other = copy.copy(self)
        other.forward = None if self.forward is None else self.forward.again()
        other.rows = [row.fork() for row in self.rows]
        other.lengths, other.kept, other.waiting = list(self.lengths), [kept.copy() for kept in self.kept], {}
        return other

    def select(self, indices: SequenceOf[int]) -> None:
        """Row i becomes a copy of the old row indices[i]."""
        self.settle()
        indices = [int(i) for i in indices]
        self.kept = [self.kept[i] for i in indices] if self.kept else []
        if self.rows:
            taken: set = set()
            rows = []
            for i in indices:
                rows.append(self.rows[i].fork() if i in taken else self.rows[i])
                taken.add(i)
            for i, row in enumerate(self.rows):
                if i not in taken:
                    row.close()
            self.rows = rows
        self.batch = len(indices)

    def truncate(self, length: int) -> None:
        """Keeps the first `length` columns of all layers."""
        self.settle()
        for i, row in enumerate(self.rows):
            stored = int(self.kept[i][:length].sum()) if self.attend else length
            row.truncate(stored)
        self.kept = [kept[:length] for kept in self.kept]
        self.lengths = [min(one, length) for one in self.lengths]

    # Tokens.

    def length(self, layer: int) -> int:
        return self.lengths[layer]

    def begin(self, layer: int) -> int:
        """The logical position of the next column of a layer."""
        if layer in self.waiting:  # a second forward begins, so the first has shown all layers
            self.settle()
        return self.lengths[layer]

    def take(self, layer: int, k: torch.Tensor, v: torch.Tensor) -> None:
        """New columns k, v [batch, kv_heads, n, head_dim] of a layer come: in materialise mode they are stored at once, in attend
        mode by `append_attend`."""
        start = self.begin(layer)
        self.open(k.shape[0])
        if self.model is None:
            self.waiting[layer] = (k, v)
        elif not self.attend:
            self.append(layer, k, v, start)
        self.lengths[layer] = start + k.shape[2]

    def append(self, layer: int, k: torch.Tensor, v: torch.Tensor, start: int) -> None:
        """Stores the columns k, v of a layer, which begin at logical position `start`."""
        self.open(k.shape[0])
        if self.forward is not None and self.forward.takes(self, layer, start, k):
            self.forward.append(self, layer, start, k, v)
        else:
            self._append(layer, k, v, start)

    def _append(self, layer: int, k: torch.Tensor, v: torch.Tensor, start: int) -> None:
        self.open(k.shape[0])
        k, v = k.detach().transpose(1, 2), v.detach().transpose(1, 2)
        place = self.places[layer]
        for i, row in enumerate(self.rows):
            if self.attend:
                seen = torch.from_numpy(self.kept[i][start : start + k.shape[1]])
                if not seen.any():
                    continue
                row.append(place, k[i][seen.to(k.device)], v[i][seen.to(v.device)], token_ids=self.named(place, i, start, k.shape[1]))
            else:
                row.append(place, k[i], v[i], start=start, token_ids=self.named(place, i, start, k.shape[1]))

    def named(self, place: int, row: int, start: int, tokens: int) -> Optional[np.ndarray]:
        """The ids of the columns that a row stores; the first layer says them for all."""
        ids = ids_of(self.said, row, start, tokens) if place == 0 else None
        return ids[self.kept[row][start : start + tokens]] if ids is not None and self.attend else ids

    def read(self, layer: int, start: int, end: int, like_k: torch.Tensor, like_v: torch.Tensor) -> Tuple[torch.Tensor, torch.Tensor]:
        """Columns `start` to `end` - 1: k, v [batch, kv_heads, n, head_dim], in materialise mode."""
        place, shape = self.places[layer], self.shapes[self.places[layer]]
        tokens = end - start
        results = []
        for width, like in ((shape.head_dim_k, like_k), (shape.head_dim_v, like_v)):
            results.append(torch.empty((self.batch, tokens, shape.kv_heads, width), dtype=like.dtype, device="cpu"))
        for i, row in enumerate(self.rows):
            row.read_into(place, results[0][i], results[1][i], start=start)
        k, v = (x.to(like.device).transpose(1, 2) for x, like in zip(results, (like_k, like_v)))
        return k, v

    def note_mask(self, start: int, tokens: int, mask: Optional[torch.Tensor]) -> None:
        """What the mask [batch, columns] says about the columns from `start` on is kept, and compared with what it said."""
        now = np.ones((self.batch, tokens), dtype=bool)
        if mask is not None:
            seen = mask.detach().cpu().numpy().astype(bool)
            if seen.shape[0] != self.batch or seen.shape[1] < tokens:
                raise InvalidArgument(f"the mask has the shape {list(seen.shape)}, the batch {self.batch} rows and {tokens} new tokens")
            now = seen[:, -tokens:]
            before = min(start, seen.shape[1] - tokens)
            for i, kept in enumerate(self.kept):
                if not np.array_equal(seen[i, seen.shape[1] - tokens - before : seen.shape[1] - tokens], kept[start - before : start]):
                    raise InvalidArgument(f"row {i}: the attention mask of tokens that are stored has changed")
        for i in range(self.batch):
            known = self.kept[i]
            if len(known) < start + tokens:
                self.kept[i] = np.concatenate([known[:start], now[i]])
                # Distances in a window are those of positions, so only the left may be padded.
                if self.windowed and not np.all(np.diff(self.kept[i].astype(np.int8)) >= 0):
                    raise InvalidArgument(f"row {i}: layers with a sliding window allow padding on the left only")

    def append_attend(self, layer: int, start: int, q: torch.Tensor, k: Optional[torch.Tensor], v: Optional[torch.Tensor],
                      options: Dict[str, Any]) -> torch.Tensor:
        """q [batch, query_heads, n, head_dim] at logical position `start`; appends k and v where they are given.

        Returns [batch, n, query_heads, head_dim_v]; padding gets zeros."""
        if self.forward is not None:
            result = self.forward.append_attend(self, layer, start, q, k, v, options)
            if result is not None:
                return result
        place = self.places[layer]
        shape = self.shapes[place]
        q = q.detach().transpose(1, 2)
        tokens = q.shape[1]
        items: List[Any] = []
        places: List[Any] = []
        named: List[Optional[np.ndarray]] = []
        positions: List[int] = []
        if k is not None and v is not None:
            k, v = k.detach().transpose(1, 2), v.detach().transpose(1, 2)
        for i, row in enumerate(self.rows):
            seen = self.kept[i][start : start + tokens]
            if not seen.any():
                continue
            index: Any = slice(None) if seen.all() else torch.from_numpy(seen).to(q.device)
            places.append((i, index))
            named.append(self.named(place, i, start, tokens) if k is not None else None)
            positions.append(int(self.kept[i][:start].sum()))
            items.append((row, q[i][index]) if k is None else (row, q[i][index], k[i][index], v[i][index]))
        output = torch.zeros((self.batch, tokens, shape.query_heads, shape.head_dim_v), dtype=q.dtype, device=q.device)
        if k is None:
            results = self.pool.attend(place, items, positions=positions, **options)
        else:
            results = self.pool.append_attend(place, items, starts=positions, token_ids=named, **options)
        for (i, index), result in zip(places, results):
            output[i, index] = result
        return output
