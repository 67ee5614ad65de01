"""KvtideCache: transformers' cache interface over a store."""

from __future__ import annotations

import contextlib
import copy
import warnings
import weakref
from typing import Any, List, Optional, Tuple

import torch
from transformers.cache_utils import Cache, CacheLayerMixin

from ..errors import InvalidArgument, Unavailable
from ..pool import Pool, connect
from ..profiles import KeyProfile, load as load_profile
from .attention import NAME, Handle
from .geometry import LayerKind, layer_kinds, layer_shapes, text_config
from .prefix import ForwardIds, prompt_of, salt_of
from .rotary import ropes as ropes_of
from .store import Store, default_pool

_MODES = ("auto", "attend", "materialise")


class _PoolLayer(CacheLayerMixin):
    """One layer of the cache; all it has lies in the store."""

    is_compileable = False
    is_croppable = True
    supports_early_init = False

    def __init__(self, store: Store, index: int) -> None:
        super().__init__()
        self.store = store
        self.index = index
        kind = store.kinds[index]
        self.is_sliding = kind.kind == "sliding"
        self.window = kind.window if kind.kind == "sliding" else 0

    def lazy_initialization(self, *args: Any, **kwargs: Any) -> None:
        self.is_initialized = True

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any) -> Tuple[Any, Any]:
        self.is_initialized = True
        store, layer = self.store, self.index
        start = store.begin(layer)
        if store.attend:
            store.take(layer, key_states, value_states)
            handle = Handle(store, layer, start, key_states, value_states)
            return handle, handle
        first = max(0, start - self.window + 1) if self.window else 0
        if store.model is not None and store.settings["seal_at_once"]:
            store.take(layer, key_states, value_states)
            return store.read(layer, first, start + key_states.shape[2], key_states, value_states)
        # Earlier tokens as they are stored, new ones as they are; a sliding layer lets go of old ones when new ones come.
        before = store.read(layer, first, start, key_states, value_states) if start > 0 else None
        store.take(layer, key_states, value_states)
        if before is None:
            return key_states, value_states
        return torch.cat([before[0], key_states], dim=2), torch.cat([before[1], value_states], dim=2)

    def get_seq_length(self, *args: Any) -> int:
        return self.store.length(self.index)

    def get_mask_sizes(self, query_length: Any, *args: Any) -> Tuple[int, int]:
        # Older versions pass the positions instead of their number.
        queries = int(query_length.shape[0]) if isinstance(query_length, torch.Tensor) and query_length.ndim else int(query_length)
        seen = self.store.length(self.index)
        first = max(0, seen - self.window + 1) if self.window and not self.store.attend else 0
        return seen + queries - first, first

    def get_max_length(self) -> int:
        return self.window or -1

    get_max_cache_shape = get_max_length

    def offload(self) -> None:
        self.store.settle()
        for row in self.store.rows:
            row.evict()

    def prefetch(self) -> None:
        for row in self.store.rows:
            row.prefetch()

    def reset(self) -> None:
        self.is_initialized = False


class KvtideCache(Cache):
    """Keys and values of ``generate()`` in a kvtide pool.

    Args:
        model_or_config: the model (or its configuration). Without it, shapes are learned from the first forward, and all
            layers are taken to attend over everything.
        pair: K and V type, such as ``"q8_0/turbo4"``. ``"auto"``: what the pool's planner chooses for ``context`` tokens in
            ``batch`` rows; without ``context`` the pool's default pair.
        pool: an open pool; None = one for the whole process, opened by ``kvtide.connect()``.
        mode: ``"attend"``: the pool attends, ``update`` returns no tensors, and the model has to use the attention ``"kvtide"``
            (``model.set_attn_implementation("kvtide")``). ``"materialise"``: every layer gets tensors back.
            ``"auto"``: attend if the model uses that attention.
        context, batch: for ``pair="auto"``.
        exact_window: blocks of 64 tokens kept in float16 at the beginning and the end; None = the pool's default.
        seal_at_once: for evaluations: every token is coded before anything attends over it.
        key_centring, key_equalising, tenant, allow_drop: as :meth:`kvtide.Pool.create`.
        profile: a profile of ``kvtide calibrate`` for this model (:func:`kvtide.profiles.load`, or its path), by which keys are
            coded: around its means, in ``tide`` pairs by its transforms. With ``pair="auto"`` where that was measured.
        on_device: attend mode on the pool's own device, with the model's tensors where they are, in steps
            (:meth:`kvtide.Pool.device_steps`). None = where the pool can and the model lies there, with a warning if the model wants
            what steps do not do; True = that, or an error; False = through host memory.
        prompt_ids: the ``input_ids`` that ``generate()`` will be given, [rows, tokens] without padding: the cache begins with what is
            cached of them (:meth:`begin_with`), and remembers its own tokens for later ones, in this pool and, in a daemon, for other
            processes with the same weights.
        device_memory, host_memory, address, device, threads: as :func:`kvtide.connect`, for a pool of this cache alone, which lies
            on the model's device unless ``device`` says otherwise.

    The first forward attends over its own tokens exactly; so does every later one over those that it adds. Sequences are freed
    when the cache is dropped, by :meth:`close` or at the end of a ``with`` block; those in a daemon also when the process dies.

    Raises:
        ValueError: for models whose layers keep something else, such as DeepSeek's latent vectors.
    """

    def __init__(
        self,
        model_or_config: Any = None,
        pair: str = "auto",
        *,
        pool: Optional[Pool] = None,
        mode: str = "auto",
        context: int = 0,
        batch: int = 1,
        exact_window: Optional[Tuple[int, int]] = None,
        seal_at_once: bool = False,
        key_centring: str = "default",
        key_equalising: str = "default",
        tenant: str = "",
        allow_drop: bool = False,
        profile: Any = None,
        on_device: Optional[bool] = None,
        prompt_ids: Any = None,
        **connection: Any,
    ) -> None:
        if mode not in _MODES:
            raise InvalidArgument(f"mode is {mode!r}; use one of {', '.join(map(repr, _MODES))}")
        if pool is not None and connection:
            raise InvalidArgument(f"an open pool needs no {', '.join(sorted(connection))}")
        self._config = None if model_or_config is None else text_config(model_or_config)
        uses_kvtide = self._config is not None and getattr(self._config, "_attn_implementation", None) == NAME
        if mode == "attend" and self._config is not None and not uses_kvtide:
            raise InvalidArgument(f'attend mode needs the attention "{NAME}": call model.set_attn_implementation("{NAME}") first')
        attend = mode == "attend" or (mode == "auto" and uses_kvtide)
        kinds = [] if self._config is None else layer_kinds(self._config)
        if attend and any(kind.kind == "chunked" for kind in kinds):
            raise ValueError(f'{self._config.model_type} has layers of chunked attention; use mode="materialise"')
        self._owns_pool = bool(connection)
        if pool is None:
            pool = self._open(model_or_config, connection)
        settings: dict = {"exact_window": exact_window, "seal_at_once": seal_at_once, "key_centring": key_centring,
                          "key_equalising": key_equalising, "tenant": tenant, "allow_drop": allow_drop}
        if pair != "auto":
            settings["pair"] = pair
        if profile is not None:
            settings["key_centring"] = "calibrated"
            profile = profile if isinstance(profile, KeyProfile) else load_profile(profile)
        if pair.startswith("tide") and (profile is None or not profile.transforms):
            raise InvalidArgument(f"pair {pair!r} codes keys by the transforms of the model: give profile=, a file of `kvtide calibrate`"
                                  + ("" if profile is None else "; this one has means alone (--means-only)"))
        if on_device and not pool.direct_device:
            raise InvalidArgument(f"on_device: the pool ({pool.way}) is not mapped into this process; connect embedded or directly, with "
                                  "direct_device")
        ropes = {}
        if isinstance(model_or_config, torch.nn.Module) and attend and pool.way != "embedded":  # daemons calibrate keys from traffic
            layers = [index for index, kind in enumerate(kinds) if kind.stock is None]
            with contextlib.suppress(ValueError):
                ropes = dict(zip(layers, ropes_of(model_or_config, layers)))
        self._store = Store(pool, kinds, attend, settings, profile, on_device, ropes)
        self._lazy = self._config is None
        super().__init__(layers=[self._layer(i) for i in range(len(kinds))])
        shapes = None if self._config is None else layer_shapes(self._config, kinds)
        # Shapes by the configuration, until they are compared with the first tensors.
        self._shapes = {} if shapes is None else {i: shapes[i] for i, kind in enumerate(kinds) if kind.stock is None}
        self._expected = dict(self._shapes)
        self._auto = (context, batch) if pair == "auto" and context else None
        self._model = weakref.ref(model_or_config) if isinstance(model_or_config, torch.nn.Module) else lambda: None
        self._ids: Optional[ForwardIds] = None
        if prompt_ids is not None:
            self.begin_with(prompt_ids)

    @staticmethod
    def _open(model: Any, connection: dict) -> Pool:
        """A pool of its own, or the one of the process, where the model computes."""
        device = getattr(model, "device", None)
        gpu = f"cuda:{device.index or 0}" if getattr(device, "type", "") == "cuda" else ""
        if not connection:
            return default_pool(gpu)
        address = connection.pop("address", "embedded")
        if gpu and address == "embedded" and "device" not in connection:
            try:
                return connect(address, device=gpu, **connection)
            except (InvalidArgument, Unavailable) as error:  # a build without CUDA
                warnings.warn(f"the pool of KvtideCache lies in host memory, the model on {gpu}: {error}", RuntimeWarning, stacklevel=3)
        return connect(address, **connection)

    def _layer(self, index: int) -> Any:
        kind = self._store.kinds[index]
        return kind.stock if kind.stock is not None else _PoolLayer(self._store, index)

    # What the cache is.

    @property
    def pool(self) -> Pool:
        """Where the keys and values are."""
        return self._store.pool

    @property
    def mode(self) -> str:
        """``attend`` or ``materialise``."""
        return "attend" if self._store.attend else "materialise"

    @property
    def pair(self) -> str:
        """The K and V type of the sequences."""
        return self._store.settings.get("pair") or self.pool.info().default_pair

    @property
    def sequences(self) -> List[Any]:
        """The sequences of the rows, in order."""
        self._store.settle()
        return list(self._store.rows)

    @property
    def stored_bytes(self) -> int:
        """Bytes that the rows hold in all tiers; blocks that rows share count for each."""
        ids = {row.id for row in self.sequences}
        return sum(info.bytes for info in self.pool.sequences() if info.id in ids)

    @property
    def stored_values(self) -> int:
        """Numbers in the keys and values of all rows, as the model made them."""
        values = [shape.kv_heads * (shape.head_dim_k + shape.head_dim_v) for shape in self._store.shapes]
        return sum(row.layer_length(layer) * count for row in self.sequences for layer, count in enumerate(values))

    def __repr__(self) -> str:
        return f"<KvtideCache {self.mode}, {self._store.batch} rows, {self.get_seq_length()} tokens in {self.pool.address}>"

    # What transformers calls.

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Tuple[Any, Any]:
        while self._lazy and layer_idx >= len(self.layers):
            self._store.kinds.append(LayerKind("full"))
            self._store.lengths.append(0)
            self.layers.append(self._layer(len(self.layers)))
        if self._store.model is None and self._expected:
            self._register(layer_idx, key_states, value_states)
        return self.layers[layer_idx].update(key_states, value_states, *args, **kwargs)

    def _register(self, layer: int, k: torch.Tensor, v: torch.Tensor) -> None:
        """Registers by the configuration if the first tensors are as it says, else leaves it to the first forward."""
        expected, self._expected = self._expected, {}
        shape = expected.get(layer)
        if shape is None or (k.shape[1], k.shape[3], v.shape[3]) != (shape.kv_heads, shape.head_dim_k, shape.head_dim_v):
            return
        self._store.register(expected)
        self._choose_pair()

    def _choose_pair(self) -> None:
        if self._auto is None or self._store.model is None:
            return
        context, batch = self._auto
        self._auto = None
        settings = self._store.settings
        [plan] = self.pool.plan(self._store.model, [context], concurrency=batch, key_centring=settings["key_centring"]).contexts
        if plan.verdict == "does_not_fit":
            raise InvalidArgument(f"{batch} rows of {context} tokens do not fit into {self.pool.address}: {plan.reason}")
        settings["pair"] = plan.chosen_pair or plan.split_pair
        if self._store.profile is not None and not any(one.calibrated for one in plan.candidates if one.pair == settings["pair"]):
            settings["key_centring"] = "default"  # nobody measured the pair with a profile

    def get_seq_length(self, layer_idx: int = 0, *args: Any) -> int:
        if layer_idx >= len(self.layers):
            return 0
        if layer_idx == 0:  # the first layer that keeps keys
            return next((one.get_seq_length() for one in self.layers if isinstance(one, _PoolLayer)), 0)
        return self.layers[layer_idx].get_seq_length()

    def begin_with(self, prompt_ids: Any) -> int:
        """Begins an empty cache with what is cached of a prompt, in full blocks of 64 tokens; give ``generate()`` the same prompt. From
        now on the pool knows the tokens of this cache, prompt and answer, and later ones may begin with them. What is cached belongs to
        the model's weights and configuration, the pair, the exact window and the tenant.

        Args:
            prompt_ids: token ids [rows, tokens] or [tokens], without padding; with beams or several return sequences each row as often
                as ``generate()`` repeats it.

        Returns:
            How many tokens of each row are there: those that every row has. The last token is computed always.

        Raises:
            InvalidArgument: for a cache without its model, or that holds tokens; for layers that keep something else than keys and
                values, as linear attention does.
        """
        prompt = prompt_of(prompt_ids)
        model = self._model()
        if model is None:
            raise InvalidArgument("prefixes are found by token ids and weights: make the cache with the model, KvtideCache(model, ...)")
        if self._store.batch:
            raise InvalidArgument("the cache holds tokens; reset it before it begins with others")
        if any(not isinstance(layer, _PoolLayer) for layer in self.layers):
            raise InvalidArgument("layers that keep something else than keys and values do not begin with a prefix")
        if self._ids is None:
            self._store.settings["prefix_salt"] = salt_of(model)
            self._ids = ForwardIds(model, self)
        if self._store.model is None and self._expected:
            expected, self._expected = self._expected, {}
            self._store.register(expected)
            self._choose_pair()
        if self._store.model is None:  # its first forward shows what it keeps
            return 0
        found = self._store.begin_with(prompt)
        for layer in self.layers:
            layer.is_initialized = found > 0
        return found

    @property
    def reused_tokens(self) -> int:
        """Tokens of each row that the cache began with (:meth:`begin_with`)."""
        return self._store.reused

    def fork(self) -> "KvtideCache":
        """Another cache with the same tokens, whose blocks are shared until one of the two grows.

        For models all of whose layers keep keys and values."""
        if any(not isinstance(layer, _PoolLayer) for layer in self.layers):
            raise NotImplementedError("layers that keep something else than keys and values cannot be forked")
        other = copy.copy(self)
        other._store = self._store.fork()
        other._owns_pool = False
        model = self._model()
        other._ids = None if self._ids is None or model is None else ForwardIds(model, other)
        other.layers = [other._layer(i) for i in range(len(self.layers))]
        for mine, theirs in zip(self.layers, other.layers):
            theirs.is_initialized = mine.is_initialized
        return other

    def reset(self) -> None:
        """Forgets all tokens; the cache can be used again, with another batch too."""
        self._store.close()
        for layer in self.layers:
            layer.reset()

    def crop(self, max_length: int) -> None:
        """Removes tokens at the end: -n removes n, n > 0 keeps the first n, 0 does nothing (``reset`` empties).

        Raises:
            OutOfRange: when a sliding layer has let go of what it would need; see :meth:`activate_past_recording`.
        """
        tokens = int(max_length)
        length = self.get_seq_length()
        keep = length + tokens if tokens <= 0 else min(tokens, length)
        for layer in self.layers:
            if not isinstance(layer, _PoolLayer) and hasattr(layer, "crop"):
                layer.crop(max_length)
        if keep < length:
            self._store.truncate(max(0, keep))

    def activate_past_recording(self) -> None:
        """Sliding layers keep all tokens from now on, so that ``crop`` can go back. Assisted decoding calls it at its start."""
        for layer in self.layers:
            if not isinstance(layer, _PoolLayer) and hasattr(layer, "activate_past_recording"):
                layer.activate_past_recording()
        if self._store.windowed and not self._store.batch:
            self._store.keep_all = True
            self._store.model = None
            if not self._expected and self._shapes:
                self._expected = dict(self._shapes)

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Row i becomes a copy of row beam_idx[i]; blocks are shared."""
        for layer in self.layers:
            if not isinstance(layer, _PoolLayer):
                layer.reorder_cache(beam_idx)
        if self._store.batch:
            self._store.select(beam_idx.tolist())

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every row becomes ``repeats`` rows."""
        self._stock("batch_repeat_interleave", repeats)
        if self._store.batch:
            self._store.select([i for i in range(self._store.batch) for _ in range(repeats)])

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keeps these rows only."""
        self._stock("batch_select_indices", indices)
        if self._store.batch:
            if indices.dtype == torch.bool:
                indices = indices.nonzero().flatten()
            self._store.select(indices.tolist())

    def _stock(self, verb: str, argument: Any) -> None:
        for layer in self.layers:
            if not isinstance(layer, _PoolLayer):
                if not hasattr(layer, verb):
                    raise NotImplementedError(f"{type(layer).__name__} has no {verb}")
                getattr(layer, verb)(argument)

    def early_initialization(self, *args: Any, **kwargs: Any) -> None:
        """Nothing: memory belongs to the pool."""

    @property
    def batch_size(self) -> int:
        return self._store.batch or -1

    @property
    def is_initialized(self) -> bool:
        return self._store.batch > 0

    @property
    def is_compileable(self) -> bool:
        return False

    # Ending.

    def close(self) -> None:
        """Frees the sequences, and the pool if it was opened for this cache."""
        self._store.close()
        if self._ids is not None:
            self._ids.close()
            self._ids = None
        if self._owns_pool:
            self.pool.close()

    def __enter__(self) -> "KvtideCache":
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()
