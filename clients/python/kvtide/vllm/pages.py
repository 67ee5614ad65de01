"""The memory of the backend and its steps: exact pages beside vLLM's coded ones.

Sizes: one exact page of 64 tokens is ``128 * kv_heads * head_dim * 2`` bytes a layer. Each layer has ``slots`` of them that stay
over steps, and all layers of a shape share scratch pages for the middle of prefill chunks. ``clients/python/exact_pages.h`` says how
many are enough and what happens when there are fewer than the windows of all sequences take.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass, replace
from typing import Any, Dict, List, Optional, Sequence, Tuple

import numpy as np
import torch
from vllm.config import get_current_vllm_config_or_none
from vllm.logger import init_logger
from vllm.model_executor.models.utils import extract_layer_index

from .. import _core, profiles
from ..errors import InvalidArgument
from . import block_tables, choose
from .devices import paged_device
from .settings import BLOCK_TOKENS, Settings, calibrated, check_transforms, heads_of_rank, host_memory, key_means, refusals

logger = init_logger("vllm.kvtide")

ALIGNMENT = 128
_TYPES = {torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16"}


@dataclass(frozen=True)
class Shape:
    """Of one layer on one rank."""

    kv_heads: int
    head_dim_k: int
    head_dim_v: int

    def page_bytes(self, pair: str) -> int:
        return _core.paged_page_bytes(pair, self.kv_heads, self.head_dim_k, self.head_dim_v)


# By the cache configuration, which a draft model shares with its target: pages of both are of one kind. The configuration is kept,
# so that its id stays its own.
_settings: Dict[int, Tuple[Any, Settings, Optional[profiles.KeyProfile]]] = {}
_last: List[Settings] = []


def settings_of(config: Any) -> Settings:
    """The settings of a vLLM configuration with the pair chosen; refuses what cannot run. Says in the log what was chosen."""
    if id(config.cache_config) in _settings:
        return _settings[id(config.cache_config)][1]
    reasons = refusals(config)
    if reasons:
        raise InvalidArgument("kvtide cannot run with these options of vLLM:\n  " + "\n  ".join(reasons))
    settings = Settings.read(config=config.additional_config)
    profile = read_profile(settings, config)
    model, device, context = config.model_config.model, planner_device(config), config.model_config.max_model_len
    if settings.pair == "auto":
        sequences = config.scheduler_config.max_num_seqs
        choice = choose.choose(model, device, context, sequences, config.model_config.hf_config,
                               config.parallel_config.tensor_parallel_size, settings.profile)
        settings = replace(settings, pair=choice.pair)
        why = choice.reason
    else:
        why = choose.harm_of(settings.pair, model, device, context, settings.profile) or "harm not known to the planner: kvtide eval measures it"
    logger.info("kvtide: KV cache in %s (%s); the first %d and the last %d blocks of 64 tokens of running sequences in f16%s",
                settings.pair, why, settings.first_blocks, settings.last_blocks,
                said_of(profile, settings.pair, context) if profile else "")
    _settings[id(config.cache_config)] = (config.cache_config, settings, profile)
    _last[:] = [settings]
    return settings


def said_of(profile: profiles.KeyProfile, pair: str, context: int) -> str:
    """What the log says about the profile."""
    what = f"{profile.tokens} tokens of {profile.text}"
    if not calibrated(pair):
        return f"; keys around their means over {what}"
    beyond = f", of {profile.context} positions: statistics beyond them are not known (--context of the calibration)"
    return f"; keys by transforms over {what}" + (beyond if 0 < profile.context < context else "")


def profile_of(config: Any) -> Optional[profiles.KeyProfile]:
    """The profile that keys are coded by, read once."""
    settings_of(config)
    return _settings[id(config.cache_config)][2]


def read_profile(settings: Settings, config: Any) -> Optional[profiles.KeyProfile]:
    """The profile that the user named, of this model."""
    if not settings.profile:
        return None
    try:
        profile = profiles.load(settings.profile)
    except OSError as error:
        raise InvalidArgument(f"KVTIDE_PROFILE: {error}") from error
    model = config.model_config
    key_means(profile, model.get_total_num_hidden_layers(), model.get_total_num_kv_heads(), model.get_head_size())
    if calibrated(settings.pair):
        check_transforms(profile, settings.pair)
    return profile


def chosen_pair() -> str:
    config = get_current_vllm_config_or_none()
    if config is not None and config.model_config is not None:
        return settings_of(config).pair
    return _last[0].pair


def planner_device(config: Any) -> str:
    """The card as the planner takes it; on a CPU, the memory that the cache and the model may take."""
    if config.device_config.device_type == "cpu":
        return f"vram={config.cache_config.kv_cache_memory_bytes or host_memory()},bandwidth=50GB/s"
    return "auto"


def device_memory(config: Any) -> int:
    if config.device_config.device_type == "cpu":
        return host_memory()
    return torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory


@dataclass(frozen=True)
class Bounds:
    """Of every step; from vLLM's configuration alone, so that memory can be taken before anything runs."""

    sequences: int
    tokens: int
    rewritten: int

    @classmethod
    def of(cls, config: Any) -> "Bounds":
        speculative = getattr(config.speculative_config, "num_speculative_tokens", 0) or 0
        sequences = config.scheduler_config.max_num_seqs
        return cls(sequences, config.scheduler_config.max_num_batched_tokens + sequences * speculative, speculative)


def keys_are_shared(config: Any) -> bool:
    """Some layers attend the pages of another one (Gemma 3n, Gemma 4)."""
    return bool(getattr(config.model_config.hf_text_config, "num_kv_shared_layers", 0))


def count_slots(shape: Shape, sliding: int, config: Any) -> Tuple[int, int]:
    """Slots of each layer, and scratch pages."""
    settings, bounds = settings_of(config), Bounds.of(config)
    first, last = settings.window_for(sliding)
    sizes = _core.exact_pages_sizes(first, last, bounds.sequences, bounds.tokens, bounds.rewritten, keys_are_shared(config))
    most = settings.side_memory if settings.side_memory is not None else device_memory(config) // 10
    layers = max(1, config.model_config.get_num_layers(config.parallel_config))
    affordable = most // (layers * shape.page_bytes("f16/f16"))
    slots = min(sizes["all_slots"], max(sizes["least_slots"], affordable))
    return slots, sizes["scratch"]


def aligned_pages(pages: int, page_bytes: int) -> torch.Tensor:
    """Zeroed and at a multiple of ALIGNMENT, on torch's current device. Touched, so that it counts."""
    memory = torch.empty(pages * page_bytes + ALIGNMENT, dtype=torch.uint8).zero_()
    start = -memory.data_ptr() % ALIGNMENT
    return memory[start:start + pages * page_bytes]


PREFILL_BYTES = 256 << 20
"""Of PagedOptions::prefill_bytes."""
WORK_BYTES = 160 << 20
"""States of decoding and tables."""

_reserved: Dict[tuple, torch.Tensor] = {}


def transform_bytes(shape: Shape, config: Any) -> int:
    """Of calibrated keys on the device: for each layer and head a transform, its inverse, what turns queries, and some rows beside."""
    if not calibrated(settings_of(config).pair):
        return 0
    heads = config.model_config.get_num_layers(config.parallel_config) * shape.kv_heads
    return heads * (3 * shape.head_dim_k + 8) * shape.head_dim_k * 4


def reserve(likeness: tuple, tokens: int, heads: int, head_dims: int, transforms: int) -> None:
    """Takes the memory that the kernels will work in, so that vLLM counts it among what the model takes: decoded pages of prompts'
    chunks, their rows in f32, states of decoding, transforms. ``release`` gives it back when the object is made that takes it for
    good."""
    if likeness not in _reserved and torch.get_default_device().type == "cuda":
        rows = tokens * heads * (head_dims + 1) * 4
        _reserved[likeness] = torch.empty(PREFILL_BYTES + rows + WORK_BYTES + transforms, dtype=torch.uint8)


def release(likeness: tuple) -> None:
    if _reserved.pop(likeness, None) is not None:
        torch.cuda.empty_cache()


_scratch: "weakref.WeakValueDictionary[tuple, torch.Tensor]" = weakref.WeakValueDictionary()


class SideMemory:
    """Exact pages of one layer."""

    def __init__(self, shape: Shape, sliding: int, config: Any) -> None:
        self.page_bytes = shape.page_bytes("f16/f16")
        self.slots, self.scratch_pages = count_slots(shape, sliding, config)
        self.exact = aligned_pages(self.slots, self.page_bytes)
        key = (str(self.exact.device), self.page_bytes, self.scratch_pages)
        scratch = _scratch.get(key)
        if scratch is None:
            scratch = _scratch[key] = aligned_pages(self.scratch_pages, self.page_bytes)
        self.scratch = scratch


class StepArrays:
    """A step's tables, on the host and where the kernels read them: one copy a step, at addresses that stay."""

    STAGES = 3  # the host runs ahead of the GPU by a step or two

    def __init__(self, host: Dict[str, np.ndarray], device: torch.device) -> None:
        self.host = host
        self.there = {name: array.ctypes.data for name, array in host.items()}
        self.memory: Optional[torch.Tensor] = None
        if device.type == "cpu":
            return
        self.places: Dict[str, slice] = {}
        end = 0
        for name in sorted(host, key="exact_table".__eq__):  # the largest last: only its rows that count are sent
            self.places[name] = slice(end, end + host[name].size)
            end += -(-host[name].size // 32) * 32
        self.memory = torch.zeros(end, dtype=torch.int32, device=device)
        self.there = {name: self.memory[place].data_ptr() for name, place in self.places.items()}
        self.stages = [torch.zeros(end, dtype=torch.int32).pin_memory() for _ in range(self.STAGES)]
        self.sent: List[Optional[torch.cuda.Event]] = [None] * self.STAGES
        self.next = 0

    def send(self, rows: int) -> Dict[str, int]:
        """Addresses of the tables, which work put on the current stream after this finds as they are now."""
        if self.memory is None:
            return self.there
        stage, sent = self.stages[self.next], self.sent[self.next]
        if sent is not None:
            sent.synchronize()
        to = stage.numpy()
        for name, place in self.places.items():
            used = self.host[name][:rows] if name == "exact_table" else self.host[name]
            to[place.start:place.start + used.size] = used.reshape(-1)
            end = place.start + used.size
        self.memory[:end].copy_(stage[:end], non_blocking=True)
        if sent is None:
            sent = self.sent[self.next] = torch.cuda.Event()
        sent.record()
        self.next = (self.next + 1) % self.STAGES
        return self.there


class Part:
    """Layers of one cache group that attend alike: their tables, planned once a step."""

    def __init__(self, layers: List[Any], config: Any, device: torch.device) -> None:
        self.layers, self.config, self.device = layers, config, device
        self.on_cpu = device.type == "cpu"
        self.bounds = Bounds.of(config)
        self.settings = settings_of(config)
        self.impl = layers[0].impl
        for index, layer in enumerate(layers):
            layer.impl.part, layer.impl.index = self, index
        self.caches: Tuple[int, ...] = ()
        self.paged: Any = None
        self.exact: Any = None
        self.width = self.tokens = self.seals = 0
        self.deferred = np.zeros((0, 2), np.int32)

    # --- once the cache is there, and again when vLLM has made another ---

    def bind(self, width: int) -> None:
        caches = tuple(layer.kv_cache.data_ptr() for layer in self.layers)
        if caches == self.caches and width <= self.width:
            return
        impl, side, bounds = self.impl, self.impl.side, self.bounds
        cache = self.layers[0].kv_cache
        page = impl.shape.page_bytes(self.settings.pair)
        if cache.dtype != torch.uint8 or cache[0].numel() != page or not cache[0].is_contiguous():
            raise InvalidArgument(f"vLLM made pages of {cache[0].numel()} {cache.dtype} with strides {cache.stride()}, kvtide's have "
                                  f"{page} bytes side by side; another option or plugin has changed the cache")
        first, last = self.settings.window_for(impl.sliding_window)
        self.exact = _core.ExactPages(pages=cache.shape[0], slots=side.slots, first_blocks=first, last_blocks=last,
                                      sliding=impl.sliding_window, max_sequences=bounds.sequences, max_tokens=bounds.tokens,
                                      rewritten=bounds.rewritten, blocks_stay=keys_are_shared(self.config))
        paged = _core.Paged()
        paged.shape(self.settings.pair, impl.num_kv_heads, impl.head_size, impl.head_size, impl.num_heads)
        kind = _TYPES[self.config.model_config.dtype]
        paged.attend_as(impl.scale, impl.softcap, impl.sliding_window, kind, kind)
        paged.bounds(bounds.sequences, bounds.tokens, width, self.exact.exact_row, self.exact.max_seals)
        paged.pages(cache.stride(0), side.page_bytes, side.slots, side.scratch.data_ptr())
        self.kept = []  # what the object has addresses of
        transforms = calibrated(self.settings.pair)
        for layer in self.layers:
            sinks = None if layer.impl.sinks is None else layer.impl.sinks.float().contiguous()
            mean = None if transforms else self.mean_of(layer)
            self.kept += [layer.kv_cache, layer.impl.side.exact, sinks, mean]
            paged.add_layer(layer.kv_cache.data_ptr(), layer.impl.side.exact.data_ptr(), 0 if sinks is None else sinks.data_ptr(),
                            mean=0 if mean is None else mean.ctypes.data)
            if transforms:
                paged.transform_keys(*self.transforms_of(layer))
        release(impl.likeness())
        paged.make(paged_device(self.device.type))
        tables = self.exact.tables()
        tables["query_start"] = np.zeros(bounds.sequences + 1, np.int32)
        tables["lengths"] = np.zeros(bounds.sequences, np.int32)
        self.arrays = StepArrays(tables, self.device)
        self.caches, self.width, self.paged, self.deferred = caches, width, paged, self.deferred[:0]
        f16 = impl.shape.page_bytes("f16/f16")
        logger.info("kvtide: %d layers with %d pages of %d bytes (%.2fx smaller than f16); %d exact pages of %d bytes a layer for %d "
                    "sequences: %.1f MiB, %.1f MiB to work in%s", len(self.layers), cache.shape[0], page, f16 / page, side.slots,
                    side.page_bytes, bounds.sequences, len(self.layers) * side.slots * side.page_bytes / 2**20, paged.bytes / 2**20,
                    "" if side.slots >= self.exact.all_slots else
                    f" (the windows of all sequences would take {self.exact.all_slots} pages: raise KVTIDE_SIDE_MEMORY or lower "
                    "--max-num-seqs, else some blocks of the windows are attended coded)")

    def place_of(self, layer: Any, profile: profiles.KeyProfile) -> Optional[Tuple[int, slice]]:
        """Layer and this rank's heads in the profile; None for a draft model's layers."""
        parallel, impl = self.config.parallel_config, layer.impl
        number = extract_layer_index(layer.layer_name)
        ranks, heads = parallel.tensor_parallel_size, profile.means[0].shape[0]
        own = heads_of_rank(parallel.rank % ranks, ranks, heads)
        if number >= len(profile.means) or layer.layer_name.startswith("draft"):
            return None
        return (number, own) if profile.means[number][own].shape == (impl.num_kv_heads, impl.head_size) else None

    def mean_of(self, layer: Any) -> Optional[np.ndarray]:
        """Of this rank's keys in a layer, [kv_heads, head_dim]; None without a profile, and for a draft model's layers."""
        profile = profile_of(self.config)
        place = None if profile is None else self.place_of(layer, profile)
        return None if profile is None or place is None else np.ascontiguousarray(profile.means[place[0]][place[1]], dtype=np.float32)

    def transforms_of(self, layer: Any) -> Tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Centres, transforms and widths of this rank's keys in a layer.

        Raises:
            InvalidArgument: for layers of another model, such as a draft.
        """
        profile = profile_of(self.config)
        place = None if profile is None else self.place_of(layer, profile)
        if profile is None or place is None:
            raise InvalidArgument(f"layer {layer.layer_name}: KVTIDE_PROFILE has no transforms of it, as of a draft model's layers, and "
                                  f"{self.settings.pair} needs them; use turbo4/turbo4, or drafts without a model")
        number, own = place
        return (np.ascontiguousarray(profile.centres[number][own], np.float32),
                np.ascontiguousarray(profile.transforms[number][own], np.float32), np.ascontiguousarray(profile.widths[number][own], np.uint8))

    # --- once a step ---

    def step(self, m: Any) -> None:
        rows = m.num_reqs
        self.bind(m.block_table_tensor.shape[1])
        host = self.arrays.host
        query_start = host["query_start"][:rows + 1]
        query_start[:] = m.query_start_loc_cpu[:rows + 1].numpy()
        np.maximum.accumulate(query_start, out=query_start)
        lengths = host["lengths"][:rows]
        lengths[:], table = self.rows(m, query_start)
        lengths[query_start[1:] == query_start[:-1]] = 0
        deferred = self.deferred
        self.exact.step(query_start, lengths, table)
        self.tokens = int(query_start[-1])
        seals = int(host["seal_count"][0])
        prefill = self.exact.most_queries > 1 + self.bounds.rewritten
        most_queries = max(m.max_query_len, self.exact.most_queries)
        if prefill:
            own = host["seal_pages"][:seals].copy()
            self.seal_now(m.block_table_tensor, deferred)
            self.put_seals(own)
            self.deferred, self.seals = deferred[:0], seals
            self.plan(m.block_table_tensor, rows, m.num_actual_tokens, most_queries, seals, True)
            return
        # A graph may serve this step: it has no seals, and the numbers of the step that it was captured with. What decoding steps
        # have filled is sealed before the next step: no scratch page is among it, whoever reads it coded does so in a later step,
        # and what is written over its exact pages is written after this.
        self.deferred, self.seals = host["seal_pages"][:seals].copy(), 0
        self.put_seals(deferred)
        self.plan(m.block_table_tensor, rows, m.num_actual_tokens, most_queries, len(deferred), False)
        if len(deferred):
            self.paged.seal_layers(self.stream())

    def rows(self, m: Any, query_start: np.ndarray) -> Tuple[np.ndarray, np.ndarray]:
        """Lengths and pages of the step's rows; length 0 where vLLM writes nowhere: warm-up, padding of data parallel ranks."""
        rows = m.num_reqs
        known = None if self.on_cpu else block_tables.of_step(m, ask=self.config.speculative_config is not None)
        if known is not None:
            return known
        first_tokens = torch.from_numpy(np.minimum(query_start[:-1], max(0, m.slot_mapping.shape[0] - 1))).long()
        if self.on_cpu:
            lengths, slots, table = m.seq_lens[:rows], m.slot_mapping[first_tokens], m.block_table_tensor[:rows]
        else:
            # This waits for the work of the step before.
            lengths = m.seq_lens[:rows].cpu()
            slots = m.slot_mapping[first_tokens.to(self.device)].cpu()
            columns = max(1, min(m.block_table_tensor.shape[1], -(-int(lengths.max()) // BLOCK_TOKENS))) if rows else 1
            table = m.block_table_tensor[:rows, :columns].cpu()
        return np.where(slots.numpy() < 0, 0, lengths.numpy()), table.numpy()

    def put_seals(self, pages: np.ndarray) -> None:
        self.arrays.host["seal_pages"][:len(pages)] = pages
        self.arrays.host["seal_count"][0] = len(pages)

    def seal_now(self, table: torch.Tensor, pages: np.ndarray) -> None:
        if len(pages):
            self.put_seals(pages)
            self.plan(table, 0, 0, 0, len(pages), False)
            self.paged.seal_layers(self.stream())

    # --- between the engine's pages and somebody else ---

    def will_be_read(self, pages: Sequence[int]) -> None:
        """Work put on the current stream after this finds full blocks in these pages: what decoding has filled is sealed."""
        if len(self.deferred) and not set(pages).isdisjoint(self.deferred[:, 1].tolist()):
            deferred, self.deferred = self.deferred, self.deferred[:0]
            self.seal_now(self.step_tables, deferred)

    def will_be_written(self, pages: Sequence[int]) -> None:
        """The coded bytes of these pages come from elsewhere, behind the work on the current stream."""
        if self.exact is None:
            return
        self.exact.forget(np.asarray(pages, np.int32))
        if len(self.deferred):
            self.deferred = self.deferred[~np.isin(self.deferred[:, 1], pages)]

    def capture(self, m: Any) -> None:
        """A step of nothing, with the bounds of what the graph will serve."""
        rows = m.num_reqs
        self.bind(m.block_table_tensor.shape[1])
        self.seal_now(m.block_table_tensor, self.deferred)
        self.deferred = self.deferred[:0]
        host = self.arrays.host
        host["lengths"][:] = 0
        host["query_start"][:rows + 1] = m.query_start_loc_cpu[:rows + 1].numpy()
        self.exact.step(np.zeros(1, np.int32), np.zeros(0, np.int32), np.zeros((0, 1), np.int32))
        self.tokens, self.seals = m.num_actual_tokens, 0
        self.plan(m.block_table_tensor, rows, m.num_actual_tokens, m.max_query_len, 0, False)

    def plan(self, table: torch.Tensor, rows: int, tokens: int, most_queries: int, seals: int, prefill: bool) -> None:
        there = self.arrays.send(rows)
        self.paged.tables(there["query_start"], there["lengths"], there["coded_first"], there["coded_count"],
                          table.data_ptr(), table.stride(0), there["exact_table"], self.exact.exact_row,
                          there["write_slots"], there["seal_pages"], there["seal_count"])
        host = self.arrays.host
        self.paged.host_tables(*(host[name].ctypes.data if prefill and not self.on_cpu else 0
                                 for name in ("query_start", "lengths", "coded_first", "coded_count")))
        self.step_tables = table  # the plan has its address
        self.paged.plan(rows, tokens, most_queries, seals, self.stream())

    def stream(self) -> int:
        return 0 if self.on_cpu else torch.cuda.current_stream(self.device).cuda_stream

    # --- once a layer ---

    def seal(self, index: int) -> None:
        if self.tokens and self.seals:
            self.paged.seal(index, self.stream())

    def attend(self, index: int, query: torch.Tensor, output: torch.Tensor, key: Optional[torch.Tensor] = None,
               value: Optional[torch.Tensor] = None) -> torch.Tensor:
        """``key`` and ``value``: rows to be written before, together sooner than one after the other."""
        if self.tokens == 0:
            return output.zero_()
        query, out = rows_of(query), rows_of(output)
        asked = (query.data_ptr(), query.stride(0), out.data_ptr(), out.stride(0), 0, self.stream())
        if key is None:
            self.paged.attend(index, *asked)
        else:
            key, value = rows_of(key), rows_of(value)
            self.paged.write_attend(index, key.data_ptr(), key.stride(0), value.data_ptr(), value.stride(0), *asked)
        if out is not output:
            output.view(out.shape).copy_(out)
        return output


def rows_of(tensor: torch.Tensor) -> torch.Tensor:
    """[tokens, heads, dim] with the heads of a token side by side, at a multiple of 16 bytes; a copy only if it is not so."""
    if tensor.dim() == 2:
        tensor = tensor.unsqueeze(1)
    size = tensor.element_size()
    good = (tensor.stride(2) == 1 and (tensor.shape[1] == 1 or tensor.stride(1) == tensor.shape[2])
            and tensor.stride(0) >= tensor.shape[1] * tensor.shape[2] and tensor.data_ptr() % 16 == 0
            and tensor.stride(0) * size % 16 == 0)
    return tensor if good else tensor.contiguous()
