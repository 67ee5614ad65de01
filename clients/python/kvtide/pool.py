"""Pools and sequences: the verbs of kvtide on arrays.

A :class:`Pool` keeps the keys and values of many :class:`Sequence` objects, compressed, in its tiers of memory. It lies in
this process (``kvtide.connect("embedded")``) or in a ``kvtided`` (a Unix socket or a host and port); everything below is
the same for both. All methods may be called from any thread and release the GIL while they work.
"""

from __future__ import annotations

import json
import threading
import weakref
from typing import TYPE_CHECKING, Any, Callable, Dict, Iterable, Iterator, List, Mapping, Optional, Sequence as SequenceOf, Tuple, Union

import numpy as np

from . import _arrays, _core
from ._types import PRIORITIES, CachedPrefix, Layer, MoveResult, PersistResult, PoolInfo, PoolPlan, PoolStats, SequenceInfo
from .errors import FailedPrecondition, InvalidArgument, KvtideError, NotFound

if TYPE_CHECKING:
    from .profiles import KeyProfile
    from .aio import AsyncPool
    from .block_store import BlockStore, Namespace
    from .device_steps import DeviceSteps

_CENTRING = {"default": 0, "none": 1, "first_block": 2, "calibrated": 3}
_PERSISTENCE = {"default": 0, "none": 1, "on-park": 2, "all": 3}
_EQUALISING = {"default": 0, "none": 1, "root": 2, "full": 3}
_ROPE = {"default": 0, "none": 1, "halves": 2, "neighbours": 3}
# A message carries tensors and a little around them.
_MESSAGE_SHARE = 0.75
# What comes in and what goes out lie there together.
_ARENA_SHARE = 0.4


def _choice(table: Mapping[str, int], name: str, value: str) -> int:
    if value not in table:
        raise InvalidArgument(f"{name} is {value!r}; use one of {', '.join(map(repr, table))}")
    return table[value]


def connect(
    address: str = "auto",
    *,
    timeout: float = 60.0,
    connect_timeout: float = 5.0,
    session: bool = True,
    max_message_bytes: int = 64 << 20,
    device: str = "auto",
    device_memory: Union[str, int, None] = None,
    host_memory: Union[str, int, None] = None,
    default_pair: Optional[str] = None,
    threads: int = 0,
    max_sequences: int = 0,
    arena_bytes: int = 64 << 20,
    direct_device: Optional[str] = None,
    host_tier: bool = False,
    tls_ca: str = "",
    tls_cert: str = "",
    tls_key: str = "",
    token_file: str = "",
) -> "Pool":
    """Opens a pool.

    Args:
        address: ``"embedded"`` for a pool in this process; ``"direct:unix:/path/to/socket"`` for a kvtided of this host whose
            first tier is mapped (``direct_device``); ``"shm:unix:/path/to/socket"`` for one through shared memory; ``"unix:/path/to/socket"`` or ``"host:port"`` for a kvtided over gRPC; ``"auto"`` for the kvtided of
            ``$KVTIDE_ADDRESS``, else the one at the default socket, by the best way that works (``"auto:unix:/path"`` names
            it), else an embedded pool. ``Pool.way`` and ``Pool.why`` say what it became.
        timeout: seconds of every call (daemon).
        connect_timeout: seconds to wait for the daemon.
        session: sequences die with this pool or this process (daemon). Calls of several threads then go one after the other;
            with ``False`` they go side by side and sequences live until they are closed.
        max_message_bytes: largest message (daemon); larger tensors go in pieces.
        device: where an embedded pool computes: ``"auto"``, ``"cpu"``, ``"cuda:0"``, a list ``"cuda:0,cuda:1"``.
        device_memory: size of the device tier of an embedded pool, such as ``"4GiB"`` (default 1 GiB). Taken at once.
        host_memory: size of the host tier of an embedded pool (default 2 GiB; 0 = none).
        default_pair: K and V type of sequences that name none (embedded; default ``q8_0/turbo4``).
        threads: threads that attend on the CPU (embedded; 0 = one per core).
        max_sequences: most sequences of an embedded pool (0 = 16,384).
        arena_bytes: size of the arena for tensors (shared memory); pages that are never used cost nothing.
        direct_device: where the caller's own tensors lie and :meth:`Pool.device_steps` computes: ``"cuda:0"``, ``"cuda:GPU-..."``
            or ``"cpu"``. None = the GPU of an embedded pool that names one, else nowhere.
        host_tier: maps the daemon's tier of host memory for reading, where it allows that (``kvtided --host-sharing``; shared
            memory): blocks may be loaded from where they lie. The mapping keeps that memory taken when the daemon has ended, until
            :meth:`Pool.drop_host_tier` or the pool's end.
        tls_ca: PEM file with the CA of the daemon's certificate, or ``"system"``: TLS to a daemon at a host and port
            (default: ``$KVTIDE_TLS_CA``).
        tls_cert, tls_key: PEM files with the caller's own certificate and key, where the daemon wants one
            (``$KVTIDE_TLS_CERT``, ``$KVTIDE_TLS_KEY``).
        token_file: file with a bearer token, where the daemon wants one; may be renewed meanwhile (``$KVTIDE_TOKEN_FILE``).

    Raises:
        PermissionDenied, Unauthenticated: the daemon does not let this user, certificate or token in, with the first call.
        Unavailable: no daemon answers at the address.
        InvalidArgument, ResourceExhausted: what is no address; sizes or devices that this machine does not have.
    """
    _check_address(address)
    config: dict = {"device": device, "compute_threads": threads, "max_sequences": max_sequences}
    for name, size in (("device_memory", device_memory), ("host_memory", host_memory)):
        if size is not None:
            config[name] = str(size)
    if default_pair is not None:
        config["default_pair"] = default_pair
    if direct_device is None:
        direct_device = device if address == "embedded" and device.startswith("cuda:") and "," not in device else ""
    core = _core.connect(address, timeout, connect_timeout, max_message_bytes, session, json.dumps(config), arena_bytes,
                         (tls_ca, tls_cert, tls_key, token_file), direct_device, host_tier)
    return Pool(core, arena_bytes, direct_device)


def _check_address(address: str) -> None:
    """What can be no address is told at once, and not after a wait for a daemon that nobody meant."""
    place = address
    for way in ("shm:", "auto:", "direct:"):
        if place.startswith(way):
            place = place[len(way) :]
            break
    host, colon, port = place.rpartition(":")
    if address in ("auto", "embedded") or place.startswith("unix:") and len(place) > 5 or (host and colon and port.isdigit() and "//" not in host):
        return
    raise InvalidArgument(f"{address!r} is no address of a pool; write 'auto', 'embedded', 'unix:/path/to/socket', "
                          "'shm:unix:/path/to/socket', 'direct:unix:/path/to/socket' or 'host:port'")


def _token_ids(ids: Any) -> List[int]:
    if isinstance(ids, np.ndarray) or hasattr(ids, "tolist"):
        ids = ids.tolist()
    ids = [int(id) for id in ids]
    if ids and not 0 <= min(ids) <= max(ids) < 1 << 32:
        raise InvalidArgument("token ids are integers from 0 to 2^32 - 1")
    return ids


def _named(ids: Optional[Any], tokens: int, what: str) -> List[int]:
    named = [] if ids is None else _token_ids(ids)
    if ids is not None and len(named) != tokens:
        raise InvalidArgument(f"{what}: {len(named)} token ids for {tokens} tokens")
    return named


class Sequence:
    """The tokens of one request or conversation in a pool: K and V of every layer, growing at the end.

    Made by :meth:`Pool.create`, :meth:`Pool.attach` and :meth:`fork`. Closes itself when it is no longer referenced, at the
    end of a ``with`` block, or by :meth:`close`. One thread writes at a time (a second writer gets ``Aborted``), readers run
    side by side.
    """

    def __init__(self, pool: "Pool", id: int, model: str, lengths: List[int], owned: bool) -> None:
        self.pool = pool
        self.id = id
        self.model = model
        self._lengths = lengths
        self._finalizer = weakref.finalize(self, _close_quietly, pool._core, id)
        # At exit the pool goes as a whole.
        self._finalizer.atexit = False
        if not owned:
            self._finalizer.detach()

    def __repr__(self) -> str:
        return f"<kvtide.Sequence {self.id} of {self.model!r}, {len(self)} tokens>"

    def __len__(self) -> int:
        """Tokens that all layers have, as far as this object has written them."""
        return min(self._lengths)

    def layer_length(self, layer: int) -> int:
        """Tokens of one layer: a new token of it goes there."""
        return self._lengths[layer]

    def __enter__(self) -> "Sequence":
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _check_layers(self, layers: Iterable[int]) -> None:
        for layer in layers:
            if not 0 <= layer < len(self._lengths):
                raise InvalidArgument(f"layer is {layer}; model {self.model!r} has layers 0 to {len(self._lengths) - 1}")

    def close(self) -> None:
        """Frees everything that no fork shares. A second call does nothing, nor one for a sequence that stays (attached,
        released): :meth:`Pool.close_sequence` frees those."""
        if self._finalizer.detach() is not None:
            self.pool._core.close_sequence(self.id)

    def release(self) -> int:
        """Gives the sequence away: it stays in the pool when this object goes (a daemon, ``session=False``). Returns its id,
        for :meth:`Pool.attach`."""
        self._finalizer.detach()
        return self.id

    def append(self, layer: int, k: Any, v: Any, *, start: Optional[int] = None, token_ids: Optional[Any] = None) -> int:
        """Appends tokens to one layer.

        Args:
            layer: model layer.
            k: ``[tokens, kv_heads, head_dim]``, after rotary embedding; float32, float16 or bfloat16, finite, within float16.
            v: ``[tokens, kv_heads, head_dim_v]``.
            start: position of the first token; None = the layer's length. An exact repeat of the last append succeeds
                without writing, so that a call whose answer was lost can be repeated.
            token_ids: what the tokens are, one integer for each: their blocks are found by them (:meth:`Pool.create` with
                ``begin_with``). Saying them with one layer is enough; they count from the sequence's first token on.

        Returns:
            The length of the sequence: tokens that all layers have.
        """
        return self.append_layers({layer: (k, v)}, start=start, token_ids=token_ids)

    def append_layers(
        self, layers: Mapping[int, Tuple[Any, Any]], *, start: Optional[int] = None, token_ids: Optional[Any] = None
    ) -> int:
        """Appends the same tokens to several layers, all or none: ``{layer: (k, v)}``. See :meth:`append`."""
        return self.pool._append(self, layers, start, token_ids)

    def attend(self, layer: int, q: Any, *, position: Optional[int] = None, **options: Any) -> Any:
        """Attends over the tokens of one layer where they lie.

        Args:
            layer: model layer.
            q: ``[queries, query_heads, head_dim]``, after rotary embedding; float32, float16 or bfloat16.
            position: position of the first query; None = the queries belong to the last tokens.
            options: as :meth:`Pool.attend`.

        Returns:
            The output ``[queries, query_heads, head_dim_v]`` in the dtype and framework of ``q``; with ``lse=True`` a pair of it
            and the natural log-sum-exp ``[queries, query_heads]`` in float32.
        """
        return self.pool.attend(layer, [(self, q)], positions=[position], **options)[0]

    def append_attend(
        self,
        layer: int,
        q: Any,
        k: Any,
        v: Any,
        *,
        start: Optional[int] = None,
        token_ids: Optional[Any] = None,
        **options: Any,
    ) -> Any:
        """Appends tokens to one layer and attends with their queries, causally, in one call.

        The new tokens are attended exactly (as float16); coding comes after. Shapes are those of :meth:`append` and
        :meth:`attend`, with as many queries as tokens; options and result those of :meth:`attend`.
        """
        ids = None if token_ids is None else [token_ids]
        return self.pool.append_attend(layer, [(self, q, k, v)], starts=[start], token_ids=ids, **options)[0]

    def read(self, layer: int, *, start: int = 0, tokens: Optional[int] = None, like: Any = None) -> Tuple[Any, Any]:
        """K and V of one layer as they are stored: decoded where they are coded.

        Args:
            layer: model layer.
            start: position of the first token.
            tokens: how many; None = all from ``start`` on.
            like: an array or tensor whose framework, dtype and device the result gets; None = NumPy float32.

        Returns:
            ``k[tokens, kv_heads, head_dim]`` and ``v[tokens, kv_heads, head_dim_v]``.

        Raises:
            OutOfRange: beyond the layer's length, or before its sliding window.
            DataLoss: tokens of the range were dropped.
        """
        self._check_layers([layer])
        shape = self.pool._models[self.model][layer]
        count = self._lengths[layer] - start if tokens is None else tokens
        k, v = (
            _arrays.new_rows(like, (max(0, count), shape.kv_heads, dim))
            for dim in (shape.head_dim, shape.head_dim_v or shape.head_dim)
        )
        if count > 0:
            self.read_into(layer, k, v, start=start)
        return _arrays.finish_rows(k, like), _arrays.finish_rows(v, like)

    def read_into(self, layer: int, k: Any, v: Any, *, start: int = 0) -> None:
        """:meth:`read` into memory of the caller: dense host arrays or tensors of the shapes that it returns, in float32,
        float16 or bfloat16."""
        self._check_layers([layer])
        k, v = _arrays.writable(k, "k"), _arrays.writable(v, "v")
        tokens = _arrays.check_rank(k, "k")[0]
        step = self.pool._tokens_per_call(_bytes_per_token(k) + _bytes_per_token(v))
        for done in range(0, tokens, step):
            end = min(done + step, tokens)
            self.pool._core.read(self.id, layer, start + done, k[done:end], v[done:end])

    def fork(self) -> "Sequence":
        """A second sequence with the same tokens. Blocks are shared until one of the two writes into them."""
        return self.pool.fork(self)

    def truncate(self, tokens: int) -> None:
        """Keeps the first ``tokens`` tokens in every layer. Also drops tokens that only some layers have."""
        self.pool._core.truncate_sequence(self.id, tokens)
        self._lengths = [min(length, tokens) for length in self._lengths]

    def evict(self, tier: str = "", *, drop: bool = False) -> MoveResult:
        """Moves the blocks down to ``tier`` (empty = the next lower one). See :meth:`Pool.evict`."""
        return self.pool.evict([self], tier, drop=drop)

    def prefetch(self) -> MoveResult:
        """Moves the blocks up to the first tier as far as there is room."""
        return self.pool.prefetch([self])

    def set_priority(self, priority: str) -> None:
        """``low``, ``normal`` or ``high``, from now on. See :meth:`Pool.set_priority`."""
        self.pool.set_priority([self], priority)

    def persist(self) -> PersistResult:
        """Makes it durable as it is now. See :meth:`Pool.persist`."""
        return self.pool.persist([self])

    def info(self) -> SequenceInfo:
        """What the pool knows about the sequence."""
        return self.pool._info_of(self.id)


def _options(scale: Optional[float], causal: Optional[bool], window: Optional[int], softcap: Optional[float], sinks: Any) -> Any:
    logits = [] if sinks is None else _arrays.vector(sinks).tolist()
    return _core.AttentionOptions(scale, causal, window, softcap, logits)


def _finish(output: Any, sums: Any, like: Any, lse: bool) -> Any:
    output = _arrays.finish_output(output, like)
    return (output, _arrays.finish_output(sums, like, keep_float32=True)) if lse else output


def _bytes_per_token(array: Any) -> int:
    return int(array.nbytes) // max(1, int(array.shape[0]))


def _pieces(
    tokens: SequenceOf[int], cost: Callable[[int], int], tokens_per_call: Callable[[int], int]
) -> Iterator[List[Tuple[int, int, int]]]:
    """Cuts items of so many tokens into calls that fit a message: lists of (item, begin, end)."""
    piece: List[Tuple[int, int, int]] = []
    used = 0.0  # share of a message
    for i, count in enumerate(tokens):
        most = tokens_per_call(cost(i))
        begin = 0
        while True:
            if used >= 1 or (piece and used + min(count - begin, most) / most > 1):
                yield piece
                piece, used = [], 0.0
            end = min(count, begin + most)
            piece.append((i, begin, end))
            used += (end - begin) / most
            begin = end
            if begin >= count:
                break
            yield piece
            piece, used = [], 0.0
    if piece:
        yield piece


def _close_quietly(core: Any, id: int) -> None:
    try:
        core.close_sequence(id)
    except KvtideError:
        pass  # the pool or the daemon has gone, and the sequence with it


class Pool:
    """Keys and values of many sequences. Made by :func:`connect`; a context manager."""

    def __init__(self, core: Any, arena_bytes: int, direct_device: str = "") -> None:
        self._core = core
        self._arena_bytes = arena_bytes
        self.address: str = core.address
        #: How the pool is reached: ``"embedded"``, ``"direct"``, ``"shared memory"`` or ``"gRPC"``, and why.
        self.way: str = core.way
        self.why: str = core.why
        #: Where :meth:`device_steps` computes; empty = nowhere, the pool is not mapped into this process.
        self.direct_device: str = direct_device if self.way in ("embedded", "direct") else ""
        self._models: Dict[str, List[Layer]] = {}
        self._wires: Dict[str, List[dict]] = {}  # the same as _core takes them
        self._info: Optional[PoolInfo] = None
        self._lock = threading.Lock()

    def __repr__(self) -> str:
        return f"<kvtide.Pool {self.address}>"

    def __enter__(self) -> "Pool":
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the pool (embedded) or the connection. Sequences made through it are gone unless ``session=False``."""
        self._core.close()

    @property
    def host_tier_bytes(self) -> int:
        """Of the tier of host memory that this process reads itself; 0 = none."""
        return self._core.host_tier_bytes

    def drop_host_tier(self) -> None:
        """Gives the mapping up for good."""
        self._core.drop_host_tier()

    @property
    def connected(self) -> bool:
        """False once the daemon is known to have gone (shared memory: at once; gRPC: a call says so)."""
        return self._core.connected

    def empty(self, shape: Union[int, SequenceOf[int]], dtype: Any = np.float32) -> np.ndarray:
        """An array, not initialised, in memory that the pool reads from and writes to without a copy (shared memory: its arena).

        It keeps the connection alive until it is gone.
        """
        shape = (shape,) if isinstance(shape, int) else tuple(shape)
        dtype = np.dtype(dtype)
        count = int(np.prod(shape, dtype=np.int64))
        return self._core.allocate(max(1, count * dtype.itemsize))[: count * dtype.itemsize].view(dtype).reshape(shape)

    @property
    def aio(self) -> "AsyncPool":
        """The same verbs as coroutines, run in threads."""
        from .aio import AsyncPool

        return AsyncPool(self)

    def device_steps(self, model: str, pair: Union[str, Iterable[str], None] = None, **options: Any) -> "DeviceSteps":
        """Attention over the pool by kernels on the caller's own tensors and stream: nothing crosses the bus, nothing waits for
        the host within a step. For embedded pools on one device and the direct way (``direct_device``).

        See :class:`kvtide.device_steps.DeviceSteps` for the options."""
        from .device_steps import DeviceSteps

        return DeviceSteps(self, model, pair, **options)

    def block_store(self, namespace: "Namespace", *, persist_all: bool = False, priority: str = "normal") -> "BlockStore":
        """Opens a namespace of the block store, for engines that keep pages of their own (:mod:`kvtide.block_store`).

        Idempotent: an equal namespace is the same one, after a restart too.

        Args:
            namespace: what its blocks are, and what keys are unique in.
            persist_all: blocks become durable soon after they were stored (a pool with a disk tier).
            priority: which of the tenant's own blocks make way first, as :meth:`set_priority` has it: of blocks that are
                stored without one. The last call decides; blocks that had the former one get it, too.
        """
        from .block_store import _open

        return _open(self, namespace, persist_all, _choice(PRIORITIES, "priority", priority))

    # What is there.

    def info(self) -> PoolInfo:
        """Version, tiers, cache types, limits and registered models."""
        return PoolInfo._of(self._core.info())

    def stats(self) -> PoolStats:
        """Gauges and counters of the pool."""
        return PoolStats._of(self._core.stats())

    def models(self) -> List[str]:
        """Names of the registered models."""
        return self.info().models

    def sequences(self, model: str = "") -> List[SequenceInfo]:
        """All sequences of the pool, of other clients too, or those of one model."""
        return [SequenceInfo._of(raw) for raw in self._core.sequences(model)]

    def plan(
        self,
        model: str,
        contexts: SequenceOf[int],
        *,
        concurrency: int = 1,
        device_bytes: int = 0,
        weights_bytes: int = 0,
        host_bytes: int = 0,
        pairs: SequenceOf[str] = (),
        exact_window: Optional[Tuple[int, int]] = None,
        max_perplexity_increase_percent: Optional[float] = None,
        margin_bytes: Optional[int] = None,
        key_centring: str = "default",
    ) -> PoolPlan:
        """Which pair lets sequences of a registered model fit into this pool, for every context length.

        Args:
            model: name of a registered model.
            contexts: tokens per sequence.
            concurrency: sequences at once.
            device_bytes, host_bytes: memory to plan for; 0 = the pool's own.
            pairs: pairs to consider; empty = all.
            key_centring: ``calibrated``: keys may be coded by the profile of the model (:meth:`register`); candidates with
                ``calibrated`` are measured so, and their sequences are to be created with ``key_centring="calibrated"``.
        """
        question = {
            "model": model,
            "contexts": [int(n) for n in contexts],
            "concurrency": concurrency,
            "device_bytes": device_bytes,
            "weights_bytes": weights_bytes,
            "host_bytes": host_bytes,
            "pairs": list(pairs),
            "exact_window": exact_window,
            "max_perplexity_increase_percent": max_perplexity_increase_percent,
            "margin_bytes": margin_bytes,
            "key_centring": _choice(_CENTRING, "key_centring", key_centring),
        }
        return PoolPlan._of(self._core.plan(question))

    # Models and sequences.

    def register(
        self,
        model: str,
        layers: SequenceOf[Layer],
        *,
        profile: Optional["KeyProfile"] = None,
        key_means: Optional[SequenceOf[Any]] = None,
    ) -> str:
        """Makes a model known under a name; an equal one under the same name is fine. Returns the name.

        Args:
            profile: of :func:`kvtide.profiles.load`, for sequences with ``key_centring="calibrated"``, and with transforms for
                ``tide`` pairs. Part of the model: one with another profile needs another name.
            key_means: means alone, of each layer ``[kv_heads, head_dim]``.
        """
        layers = list(layers)
        wire = [layer._wire() for layer in layers]
        if profile is not None:
            if key_means is not None:
                raise InvalidArgument("profile and key_means: give one of them; a profile has means")
            key_means = profile.means
        if key_means is not None:
            means = [_arrays.floats(mean, "key_means") for mean in key_means]
            shapes = [(layer.kv_heads, layer.head_dim) for layer in layers]
            if [mean.shape for mean in means] != shapes:
                what = "key_means has" if profile is None else f"the profile of {profile.model!r} has means of"
                raise InvalidArgument(f"{what} the shapes {[list(m.shape) for m in means][:3]}..., the layers have "
                                      f"{[list(shape) for shape in shapes][:3]}...: is it the profile of another model?")
            for layer, mean in zip(wire, means):
                layer["key_mean"] = mean.reshape(-1).tolist()
        if profile is not None and profile.transforms:
            parts = {"key_transform": profile.transforms, "key_widths": profile.widths, "key_centre": profile.centres,
                     "key_frequencies": [np.empty(0, np.float32)] * len(layers) if profile.after_rope else profile.frequencies}
            for index, layer in enumerate(wire):
                layer.update({name: part[index].reshape(-1).tolist() for name, part in parts.items()})
                layer["key_rope_neighbours"] = profile.neighbours
        self._core.register_model(model, wire)
        self._models[model], self._wires[model] = layers, wire
        return model

    def unregister(self, model: str) -> None:
        """Forgets a model, so that its name and its place are free. Its sequences have to be closed.

        Raises:
            FailedPrecondition: the model has open sequences.
            NotFound: no model of this name is registered.
        """
        self._core.unregister_model(model)
        self._models.pop(model, None)
        self._wires.pop(model, None)

    def create(
        self,
        model: str,
        *,
        pair: Optional[str] = None,
        group_pairs: SequenceOf[str] = (),
        exact_window: Optional[Tuple[int, int]] = None,
        seal_at_once: bool = False,
        key_centring: str = "default",
        key_equalising: str = "default",
        rope_pairs: str = "default",
        tenant: str = "",
        allow_drop: bool = False,
        device: str = "",
        persistence: str = "default",
        priority: str = "normal",
        prefix_salt: str = "",
        degrade: SequenceOf[str] = (),
        begin_with: Optional[Any] = None,
    ) -> Sequence:
        """A new sequence: an empty one, or one that begins with what is cached of some tokens.

        Args:
            model: name of a model that this pool has registered.
            pair: K and V type, such as ``"q8_0/turbo4"``; None = the pool's default.
            group_pairs: pairs by layer group; empty = ``pair`` for all.
            exact_window: blocks of 64 tokens kept in float16 at the beginning and the end; None = the pool's default.
            seal_at_once: evaluation mode: every token is coded before anything attends over it.
            key_centring: ``default``, ``none``, ``first_block`` or ``calibrated`` (see :meth:`register`).
            key_equalising: ``default``, ``none``, ``root`` or ``full``.
            rope_pairs: channels that RoPE turns together: ``default``, ``none``, ``halves`` or ``neighbours``.
            tenant: shown in lists.
            allow_drop: blocks may be dropped when the last tier is full.
            device: device of the first tier where it is to live; empty = where most room is.
            persistence: when it becomes durable by itself, beside :meth:`persist`: ``none``, ``on-park`` (with an eviction
                that names it), ``all`` (whenever it has changed), or ``default`` (as the daemon is configured).
            priority: which of the tenant's own blocks make way first: those of ``low`` before ``normal`` before ``high``.
                See :meth:`set_priority`.
            prefix_salt: what else keys and values depend on beside model and token ids (adapters, images): sequences of
                different salts have no prefix in common.
            degrade: pairs of fewer and fewer bits, such as ``["turbo3", "turbo2"]``, that blocks which were not used for a while
                may be recoded as when their tier needs room, before anything is demoted or dropped. Bits that went so do
                not come back. Sequences that allow other pairs have no prefix in common. Empty = never.
            begin_with: token ids. The sequence begins with the longest prefix of them that is cached, in full blocks of 64, and
                ``len(sequence)`` says how many tokens that is; the caller computes the rest. Leave the last token out: one has
                to be computed.
        """
        settings = self._settings(
            pair, group_pairs, exact_window, seal_at_once, key_centring, key_equalising, rope_pairs, tenant, allow_drop, device,
            persistence, prefix_salt, degrade, priority,
        )
        lease = 0
        if begin_with is not None:
            lease = self._core.lookup_prefix(model, settings, _token_ids(begin_with), 30.0, False)["lease"]
        try:
            id, tokens = self._core.create_sequence(model, settings, lease)
        except KvtideError:
            if lease != 0:
                self._core.release_lease(lease)
            raise
        return Sequence(self, id, model, [tokens] * self._layer_count(model), owned=True)

    def cached(
        self,
        model: str,
        token_ids: Any,
        *,
        pair: Optional[str] = None,
        group_pairs: SequenceOf[str] = (),
        exact_window: Optional[Tuple[int, int]] = None,
        key_centring: str = "default",
        key_equalising: str = "default",
        rope_pairs: str = "default",
        tenant: str = "",
        device: str = "",
        prefix_salt: str = "",
        degrade: SequenceOf[str] = (),
    ) -> CachedPrefix:
        """What is cached of some tokens for sequences that are created with the same arguments, and where it lies. Does not
        count as a use."""
        settings = self._settings(
            pair, group_pairs, exact_window, False, key_centring, key_equalising, rope_pairs, tenant, False, device, "default",
            prefix_salt, degrade,
        )
        found = self._core.lookup_prefix(model, settings, _token_ids(token_ids), -1.0, True)
        return CachedPrefix(found["tokens"], [tuple(run) for run in found["tiers"]])

    @staticmethod
    def _settings(
        pair: Optional[str],
        group_pairs: SequenceOf[str],
        exact_window: Optional[Tuple[int, int]],
        seal_at_once: bool,
        key_centring: str,
        key_equalising: str,
        rope_pairs: str,
        tenant: str,
        allow_drop: bool,
        device: str,
        persistence: str,
        prefix_salt: str,
        degrade: SequenceOf[str],
        priority: str = "normal",
    ) -> dict:
        settings: dict = {
            "key_centring": _choice(_CENTRING, "key_centring", key_centring),
            "key_equalising": _choice(_EQUALISING, "key_equalising", key_equalising),
            "rope_pairs": _choice(_ROPE, "rope_pairs", rope_pairs),
            "seal_at_once": seal_at_once,
            "tenant": tenant,
            "allow_drop": allow_drop,
            "device": device,
            "prefix_salt": prefix_salt,
            "persistence": _choice(_PERSISTENCE, "persistence", persistence),
            "priority": _choice(PRIORITIES, "priority", priority),
            "group_pairs": list(group_pairs),
            "degrade": list(degrade),
        }
        if pair is not None:
            settings["pair"] = pair
        if exact_window is not None:
            settings["exact_window"] = tuple(exact_window)
        return settings

    def attach(self, id: int) -> Sequence:
        """A sequence that is there already, by its id. It stays when this object goes."""
        info = self._info_of(id)
        if info.max_layer_tokens != info.tokens:
            raise FailedPrecondition(f"sequence {id} is being written: its layers have {info.tokens} to "
                                     f"{info.max_layer_tokens} tokens")
        return Sequence(self, id, info.model, [info.tokens] * self._layer_count(info.model), owned=False)

    def _info_of(self, id: int) -> SequenceInfo:
        try:
            return SequenceInfo._of(self._core.sequence(id))
        except NotFound:
            raise FailedPrecondition(f"the pool holds no sequence {id}") from None

    def close_sequence(self, id: int) -> None:
        """Frees a sequence by its id, whoever made it."""
        self._core.close_sequence(id)

    def fork(self, sequence: Sequence) -> Sequence:
        """A second sequence with the same tokens, sharing all blocks."""
        id = self._core.fork_sequence(sequence.id)
        return Sequence(self, id, sequence.model, list(sequence._lengths), owned=True)

    def _layer_count(self, model: str) -> int:
        if model not in self._models:
            raise FailedPrecondition(f"register model {model!r} through this pool first (registering it again is fine)")
        return len(self._models[model])

    # Tokens.

    def _limits(self) -> PoolInfo:
        with self._lock:
            if self._info is None:
                self._info = self.info()
            return self._info

    def _tokens_per_call(self, bytes_per_token: int) -> int:
        most = self._limits().max_append_tokens or 1 << 62
        return max(1, min(most, self._items_per_call(bytes_per_token)))

    def _items_per_call(self, bytes_per_token: int) -> int:
        limits = self._limits()
        most = 1 << 62
        if self.way == "gRPC" and limits.max_message_bytes:
            most = min(most, int(limits.max_message_bytes * _MESSAGE_SHARE) // max(1, bytes_per_token))
        elif self.way in ("shared memory", "direct"):
            most = min(most, int(self._arena_bytes * _ARENA_SHARE) // max(1, bytes_per_token))
        return max(1, most)

    def _append(
        self, sequence: Sequence, layers: Mapping[int, Tuple[Any, Any]], start: Optional[int], token_ids: Optional[Any] = None
    ) -> int:
        if not layers:
            raise InvalidArgument("the append has no layers")
        ids, ks, vs = [], [], []
        for layer, (k, v) in layers.items():
            ids.append(int(layer))
            ks.append(_arrays.borrow(k, f"layer {layer}: k"))
            vs.append(_arrays.borrow(v, f"layer {layer}: v"))
        sequence._check_layers(ids)
        tokens = _arrays.check_rank(ks[0], "k")[0]
        named = _named(token_ids, tokens, "the append")
        position = sequence._lengths[ids[0]] if start is None else start
        per_token = sum(_bytes_per_token(array) for array in ks + vs)
        step = self._tokens_per_call(per_token)
        length = len(sequence)
        for done in range(0, max(tokens, 1), step):
            pieces = [a if step >= tokens else a[done : done + step] for a in ks + vs]
            said = named[done : done + step]
            length = self._core.append(sequence.id, position + done, ids, pieces[: len(ks)], pieces[len(ks) :], said)
            for layer in ids:
                sequence._lengths[layer] = position + min(done + step, tokens)
        return length

    def attend(
        self,
        layer: int,
        items: Iterable[Tuple[Sequence, Any]],
        *,
        positions: Optional[SequenceOf[Optional[int]]] = None,
        lse: bool = False,
        scale: Optional[float] = None,
        causal: Optional[bool] = None,
        window: Optional[int] = None,
        softcap: Optional[float] = None,
        sinks: Optional[Any] = None,
    ) -> List[Any]:
        """Attends over many sequences of one model in one layer.

        Args:
            layer: model layer.
            items: ``(sequence, q)`` with ``q[queries, query_heads, head_dim]``.
            positions: of the first query of each item; None = the queries belong to the last tokens.
            lse: return pairs of output and natural log-sum-exp, with which other attention can be merged.
            scale, softcap: instead of those that the layer was registered with.
            causal: a query sees no later positions (default True).
            window: narrower than the registered one.
            sinks: ``[query_heads]`` extra logits that take part in softmax with value 0.

        Returns:
            For each item the output ``[queries, query_heads, head_dim_v]``, or ``(output, lse)``.
        """
        items = list(items)
        options = _options(scale, causal, window, softcap, sinks)
        results: List[Any] = [None] * len(items)
        q = [_arrays.borrow(item[1], f"items[{i}]: q") for i, item in enumerate(items)]
        outputs, lses = [], []
        for i, (sequence, _) in enumerate(items):
            output, sums = self._result_memory(sequence, layer, q[i], f"items[{i}]: q")
            outputs.append(output), lses.append(sums)
        starts = list(positions) if positions is not None else [None] * len(items)
        for i, (sequence, _) in enumerate(items):
            if starts[i] is None:
                starts[i] = sequence._lengths[layer] - int(q[i].shape[0])
        cost = lambda i: max(_bytes_per_token(q[i]), _bytes_per_token(outputs[i]))  # noqa: E731
        for piece in _pieces([int(a.shape[0]) for a in q], cost, self._tokens_per_call):
            self._core.attend(
                layer,
                [items[i][0].id for i, _, _ in piece],
                [starts[i] + begin for i, begin, _ in piece],
                [q[i][begin:end] for i, begin, end in piece],
                [outputs[i][begin:end] for i, begin, end in piece],
                [lses[i][begin:end] for i, begin, end in piece],
                options,
            )
        for i, (_, like) in enumerate(items):
            results[i] = _finish(outputs[i], lses[i], like, lse)
        return results

    def append_attend(
        self,
        layer: int,
        items: Iterable[Tuple[Sequence, Any, Any, Any]],
        *,
        starts: Optional[SequenceOf[Optional[int]]] = None,
        token_ids: Optional[SequenceOf[Optional[Any]]] = None,
        lse: bool = False,
        scale: Optional[float] = None,
        causal: Optional[bool] = None,
        window: Optional[int] = None,
        softcap: Optional[float] = None,
        sinks: Optional[Any] = None,
    ) -> List[Any]:
        """Appends and attends for many sequences of one model in one layer.

        Args:
            layer: model layer.
            items: ``(sequence, q, k, v)``: ``q[tokens, query_heads, head_dim]``, ``k[tokens, kv_heads, head_dim]``,
                ``v[tokens, kv_heads, head_dim_v]``.
            starts: position of the first token of each item; None = the layer's length.
            token_ids: what the tokens of each item are, as in :meth:`Sequence.append`; None = not said.

        The other arguments and the result are those of :meth:`attend`. A call is all or none, unless its tensors are beyond
        the daemon's message limit: then it goes in pieces, and an error leaves the pieces before it appended
        (``layer_length`` says how far).
        """
        items = list(items)
        options = _options(scale, causal, window, softcap, sinks)
        q, k, v = (
            [_arrays.borrow(item[part], f"items[{i}]: {name}") for i, item in enumerate(items)]
            for part, name in ((1, "q"), (2, "k"), (3, "v"))
        )
        outputs, lses = [], []
        for i, item in enumerate(items):
            output, sums = self._result_memory(item[0], layer, q[i], f"items[{i}]: q")
            outputs.append(output), lses.append(sums)
            if not int(q[i].shape[0]) == int(k[i].shape[0]) == int(v[i].shape[0]):
                raise InvalidArgument(f"items[{i}]: q has {q[i].shape[0]} tokens, k {k[i].shape[0]}, v {v[i].shape[0]}")
        given = list(starts) if starts is not None else [None] * len(items)
        first = [item[0]._lengths[layer] if given[i] is None else int(given[i]) for i, item in enumerate(items)]

        named = [
            _named(token_ids[i] if token_ids is not None else None, int(q[i].shape[0]), f"items[{i}]") for i in range(len(items))
        ]

        def cost(i: int) -> int:
            return max(sum(map(_bytes_per_token, (q[i], k[i], v[i]))), _bytes_per_token(outputs[i]))

        for piece in _pieces([int(a.shape[0]) for a in q], cost, self._tokens_per_call):
            self._core.append_attend(
                layer,
                [items[i][0].id for i, _, _ in piece],
                [first[i] + begin for i, begin, _ in piece],
                [q[i][begin:end] for i, begin, end in piece],
                [k[i][begin:end] for i, begin, end in piece],
                [v[i][begin:end] for i, begin, end in piece],
                [outputs[i][begin:end] for i, begin, end in piece],
                [lses[i][begin:end] for i, begin, end in piece],
                options,
                [named[i][begin:end] for i, begin, end in piece],
            )
            for i, _, end in piece:
                items[i][0]._lengths[layer] = first[i] + end
        return [_finish(outputs[i], lses[i], item[1], lse) for i, item in enumerate(items)]

    def _result_memory(self, sequence: Sequence, layer: int, q: Any, name: str) -> Tuple[Any, Any]:
        sequence._check_layers([layer])
        queries, heads, _ = _arrays.check_rank(q, name)
        shape = self._models[sequence.model][layer]
        width = shape.head_dim_v or shape.head_dim
        return _arrays.new_output(q, (queries, heads, width)), _arrays.new_output(q, (queries, heads))

    # Moves.

    def evict(self, sequences: Optional[Iterable[Sequence]] = None, tier: str = "", *, drop: bool = False) -> MoveResult:
        """Moves blocks out of the first tier, for sequences that will rest; they stay usable.

        Args:
            sequences: None = all sequences of the pool.
            tier: where to; empty = the next lower one.
            drop: forget the blocks instead (sequences made with ``allow_drop``).
        """
        ids = [] if sequences is None else [sequence.id for sequence in sequences]
        if sequences is not None and not ids:
            return MoveResult(0, 0, 0, 0, 0)
        return MoveResult(**self._core.evict(ids, tier, drop))

    def prefetch(self, sequences: Iterable[Sequence]) -> MoveResult:
        """Moves blocks back to the first tier as far as there is room."""
        ids = [sequence.id for sequence in sequences]
        return MoveResult(**self._core.prefetch(ids)) if ids else MoveResult(0, 0, 0, 0, 0)

    def set_priority(self, sequences: Iterable[Sequence], priority: str) -> None:
        """Which of the tenant's own blocks make way first, in every tier: those of ``low`` before ``normal`` before ``high``, and
        what attention wants comes up in the other order. Between tenants priorities say nothing. Blocks that several sequences
        have go by the highest of theirs; what a closed one leaves in the cache keeps what it had."""
        ids = [sequence.id for sequence in sequences]
        value = _choice(PRIORITIES, "priority", priority)
        if ids:
            self._core.set_priority(ids, value)

    def persist(self, sequences: Iterable[Sequence]) -> PersistResult:
        """Makes sequences durable as they are now: after a stop, a crash or a kill of the daemon they are there again, under
        their ids (:meth:`attach`), and read back bit for bit. Needs a daemon with a disk tier (``kvtided --disk``)."""
        ids = [sequence.id for sequence in sequences]
        return PersistResult(**self._core.persist(ids)) if ids else PersistResult(0, 0, 0, 0)
