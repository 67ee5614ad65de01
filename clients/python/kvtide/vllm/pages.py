"""The memory of the backend and its steps: exact pages beside vLLM's coded ones.

Sizes: one exact page of 64 tokens is ``128 * kv_heads * head_dim * 2`` bytes a layer. Each layer has ``slots`` of them that stay
over steps, and all layers of a shape share scratch pages for the middle of prefill chunks. ``clients/python/exact_pages.h`` says how
many are enough and what happens when there are fewer than the windows of all sequences take.
"""

from __future__ import annotations

import functools
import weakref
from dataclasses import dataclass, replace
from typing import Any, Dict, List, Optional, Tuple

import numpy as np
import torch
from vllm.config import get_current_vllm_config_or_none
from vllm.logger import init_logger

from .. import _core
from ..errors import InvalidArgument
from . import choose
from .settings import BLOCK_TOKENS, Settings, cuda_library, host_memory, refusals

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
_settings: Dict[int, Tuple[Any, Settings]] = {}
_last: List[Settings] = []


def settings_of(config: Any) -> Settings:
    """The settings of a vLLM configuration with the pair chosen; refuses what cannot run. Says in the log what was chosen."""
    if id(config.cache_config) in _settings:
        return _settings[id(config.cache_config)][1]
    reasons = refusals(config)
    if reasons:
        raise InvalidArgument("kvtide cannot run with these options of vLLM:\n  " + "\n  ".join(reasons))
    settings = Settings.read(config=config.additional_config)
    model, device, context = config.model_config.model, planner_device(config), config.model_config.max_model_len
    if settings.pair == "auto":
        sequences = config.scheduler_config.max_num_seqs
        choice = choose.choose(model, device, context, sequences, config.model_config.hf_config,
                               config.parallel_config.tensor_parallel_size)
        settings = replace(settings, pair=choice.pair)
        why = choice.reason
    else:
        why = choose.harm_of(settings.pair, model, device, context) or "harm not known to the planner: kvtide eval measures it"
    logger.info("kvtide: KV cache in %s (%s); the first %d and the last %d blocks of 64 tokens of running sequences in f16",
                settings.pair, why, settings.first_blocks, settings.last_blocks)
    _settings[id(config.cache_config)] = (config.cache_config, settings)
    _last[:] = [settings]
    return settings


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


def count_slots(shape: Shape, sliding: int, config: Any) -> Tuple[int, int]:
    """Slots of each layer, and scratch pages."""
    settings, bounds = settings_of(config), Bounds.of(config)
    first, last = settings.window_for(sliding)
    sizes = _core.exact_pages_sizes(first, last, bounds.sequences, bounds.tokens, bounds.rewritten)
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


@functools.lru_cache(maxsize=None)
def paged_device(kind: str) -> Any:
    return _core.PagedDevice("cpu", torch.get_num_threads()) if kind == "cpu" else _core.PagedDevice(kind, library=cuda_library())


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
        self.copied: Optional[torch.cuda.Event] = None

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
                                      rewritten=bounds.rewritten)
        paged = _core.Paged()
        paged.shape(self.settings.pair, impl.num_kv_heads, impl.head_size, impl.head_size, impl.num_heads)
        kind = _TYPES[self.config.model_config.dtype]
        paged.attend_as(impl.scale, impl.softcap, impl.sliding_window, kind, kind)
        paged.bounds(bounds.sequences, bounds.tokens, width, self.exact.exact_row, self.exact.max_seals)
        paged.pages(cache.stride(0), side.page_bytes, side.slots, side.scratch.data_ptr())
        self.kept = []  # what the object has addresses of
        for layer in self.layers:
            sinks = None if layer.impl.sinks is None else layer.impl.sinks.float().contiguous()
            self.kept += [layer.kv_cache, layer.impl.side.exact, sinks]
            paged.add_layer(layer.kv_cache.data_ptr(), layer.impl.side.exact.data_ptr(), 0 if sinks is None else sinks.data_ptr())
        paged.make(paged_device(self.device.type))
        self.host = self.exact.tables()
        self.host["query_start"] = np.zeros(bounds.sequences + 1, np.int32)
        self.host["lengths"] = np.zeros(bounds.sequences, np.int32)
        if self.on_cpu:
            self.there = {name: array.ctypes.data for name, array in self.host.items()}
        else:
            self.staging = {name: torch.from_numpy(array).clone().pin_memory() for name, array in self.host.items()}
            self.arrays = {name: tensor.to(self.device) for name, tensor in self.staging.items()}
            self.there = {name: tensor.data_ptr() for name, tensor in self.arrays.items()}
        self.caches, self.width, self.paged, self.deferred = caches, width, paged, self.deferred[:0]
        f16 = impl.shape.page_bytes("f16/f16")
        logger.info("kvtide: %d layers with %d pages of %d bytes (%.2fx smaller than f16); %d exact pages of %d bytes a layer for %d "
                    "sequences: %.1f MiB%s", len(self.layers), cache.shape[0], page, f16 / page, side.slots, side.page_bytes,
                    bounds.sequences, len(self.layers) * side.slots * side.page_bytes / 2**20,
                    "" if side.slots >= self.exact.all_slots else
                    f" (the windows of all sequences would take {self.exact.all_slots} pages: raise KVTIDE_SIDE_MEMORY or lower "
                    "--max-num-seqs, else some blocks of the windows are attended coded)")

    # --- once a step ---

    def step(self, m: Any) -> None:
        rows = m.num_reqs
        self.bind(m.block_table_tensor.shape[1])
        self.seal_deferred(m)
        query_start = self.host["query_start"][:rows + 1]
        query_start[:] = m.query_start_loc_cpu[:rows + 1].numpy()
        np.maximum.accumulate(query_start, out=query_start)
        lengths = self.host["lengths"][:rows]
        first_tokens = np.minimum(query_start[:-1], max(0, m.slot_mapping.shape[0] - 1))
        if self.on_cpu:
            lengths[:] = m.seq_lens[:rows].numpy()
            slots = m.slot_mapping.numpy()[first_tokens]
            table = m.block_table_tensor[:rows]
        else:
            # The tables are made on the host: this waits for the work of the step before.
            lengths[:] = m.seq_lens[:rows].cpu().numpy()
            slots = m.slot_mapping[torch.from_numpy(first_tokens).to(self.device)].cpu().numpy()
            columns = max(1, min(m.block_table_tensor.shape[1], -(-int(lengths.max(initial=0)) // BLOCK_TOKENS)))
            table = m.block_table_tensor[:rows, :columns].cpu()
        # Rows that vLLM writes nowhere are dummies (warm-up, padding of data parallel ranks).
        lengths[(slots < 0) | (query_start[1:] == query_start[:-1])] = 0
        self.exact.step(query_start, lengths, table.numpy())
        self.tokens = int(query_start[-1])
        seals = int(self.host["seal_count"][0])
        prefill = self.exact.most_queries > 1 + self.bounds.rewritten
        if not prefill:
            # A graph may serve this step: it has no seals, and the numbers of the step that it was captured with.
            self.deferred = self.host["seal_pages"][:seals].copy()
            seals = 0
        self.seals = seals
        self.plan(m, rows, m.num_actual_tokens, max(m.max_query_len, self.exact.most_queries), seals, prefill)

    def seal_deferred(self, m: Any) -> None:
        """What decoding steps have filled is sealed before the next step: no scratch page is among it, whoever reads it coded does
        so in a later step, and what is written over its exact pages is written after this."""
        count = len(self.deferred)
        if not count:
            return
        self.host["seal_pages"][:count] = self.deferred
        self.host["seal_count"][0] = count
        self.deferred = self.deferred[:0]
        self.plan(m, 0, 0, 0, count, False)
        for index in range(len(self.layers)):
            self.paged.seal(index, self.stream())

    def capture(self, m: Any) -> None:
        """A step of nothing, with the bounds of what the graph will serve."""
        rows = m.num_reqs
        self.bind(m.block_table_tensor.shape[1])
        self.seal_deferred(m)
        self.host["lengths"][:] = 0
        self.host["query_start"][:rows + 1] = m.query_start_loc_cpu[:rows + 1].numpy()
        self.exact.step(np.zeros(1, np.int32), np.zeros(0, np.int32), np.zeros((0, 1), np.int32))
        self.tokens, self.seals = m.num_actual_tokens, 0
        self.plan(m, rows, m.num_actual_tokens, m.max_query_len, 0, False)

    def plan(self, m: Any, rows: int, tokens: int, most_queries: int, seals: int, prefill: bool) -> None:
        if not self.on_cpu:
            if self.copied is not None:
                self.copied.synchronize()  # the copies of the plan before have left the staging memory
            for name, array in self.host.items():
                used = rows + 1 if name == "query_start" else rows if name in ("lengths", "coded_first", "coded_count",
                                                                               "exact_table") else len(array)
                self.staging[name][:used] = torch.from_numpy(array[:used])
                self.arrays[name][:used].copy_(self.staging[name][:used], non_blocking=True)
            self.copied = torch.cuda.Event()
            self.copied.record()
        at = self.there
        self.paged.tables(at["query_start"], at["lengths"], at["coded_first"], at["coded_count"], m.block_table_tensor.data_ptr(),
                          m.block_table_tensor.stride(0), at["exact_table"], self.exact.exact_row, at["write_slots"],
                          at["seal_pages"], at["seal_count"])
        host = [self.host[name].ctypes.data if prefill and not self.on_cpu else 0
                for name in ("query_start", "lengths", "coded_first", "coded_count")]
        self.paged.host_tables(*host)
        self.step_tables = m.block_table_tensor  # the plan has its address
        self.paged.plan(rows, tokens, most_queries, seals, self.stream())

    def stream(self) -> int:
        return 0 if self.on_cpu else torch.cuda.current_stream(self.device).cuda_stream

    # --- once a layer ---

    def attend(self, index: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
        if self.tokens == 0:
            return output.zero_()
        query, key, value = rows_of(query), rows_of(key), rows_of(value)
        out = rows_of(output)
        stream = self.stream()
        self.paged.write(index, key.data_ptr(), key.stride(0), value.data_ptr(), value.stride(0), stream)
        self.paged.attend(index, query.data_ptr(), query.stride(0), out.data_ptr(), out.stride(0), 0, stream)
        if self.seals:
            self.paged.seal(index, stream)
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
