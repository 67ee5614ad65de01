"""The attention backend: kvtide's pages in vLLM's block tables.

Life of a step: vLLM's runner asks each metadata builder for the step's metadata (``KvtideMetadataBuilder.build``); every part of
the builder (layers that attend alike) asks ``ExactPages`` which blocks of which row are exact and plans the step. Then, layer after
layer, ``KvtideImpl.forward`` writes the new rows into exact pages, attends, and seals what is full into vLLM's pages.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar, List, Optional

import torch
from vllm.config import get_current_vllm_config
from vllm.v1.attention.backend import (AttentionBackend, AttentionCGSupport, AttentionImpl, AttentionMetadata,
                                       AttentionMetadataBuilder, AttentionType)
from vllm.v1.kv_cache_interface import KVCacheLayout

from ..errors import InvalidArgument
from .pages import BLOCK_TOKENS, Bounds, Part, Shape, SideMemory, chosen_pair, keys_are_shared, reserve, transform_bytes

HEAD_SIZES = [64, 80, 96, 112, 128, 192, 256, 512]


class KvtideBackend(AttentionBackend):
    """What vLLM asks before it builds anything."""

    forward_includes_kv_cache_update = True
    supported_dtypes: ClassVar[List[torch.dtype]] = [torch.float16, torch.bfloat16, torch.float32]
    supported_kv_cache_dtypes: ClassVar[List[str]] = ["auto", "float16", "bfloat16"]

    @staticmethod
    def get_name() -> str:
        return "CUSTOM"

    @staticmethod
    def get_impl_cls() -> type:
        return KvtideImpl

    @staticmethod
    def get_builder_cls() -> type:
        return KvtideMetadataBuilder

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec: Any = None) -> List[int]:
        return [BLOCK_TOKENS]

    @classmethod
    def get_supported_head_sizes(cls) -> List[int]:
        return HEAD_SIZES

    @classmethod
    def supported_kv_cache_layouts(cls) -> tuple:
        return (KVCacheLayout.LBHNC, KVCacheLayout.BLHNC)  # the records of a page lie side by side

    @classmethod
    def supports_sink(cls) -> bool:
        return True

    @classmethod
    def supports_sliding_window(cls) -> bool:
        return True

    @classmethod
    def supports_kv_connector(cls) -> bool:
        return True  # KvtideConnector; ``settings.refusals`` refuses others, which do not know when a page is sealed

    @classmethod
    def supports_device_cpu_query_lens_mismatch(cls) -> bool:
        return False  # steps are planned with the lengths that the host knows

    @classmethod
    def supports_attn_type(cls, attn_type: str) -> bool:
        return attn_type == AttentionType.DECODER

    @classmethod
    def customize_spec(cls, spec: Any) -> Any:
        """A page of ``block_size`` tokens is a record of our layout for each KV head. vLLM counts a page in cells of one token
        and head; nothing but the sum of a page's cells is read."""
        if spec.state_content_bytes is not None:
            return spec
        record = Shape(1, spec.head_size, spec.head_size_v).page_bytes(chosen_pair())
        return replace(spec, dtype=torch.uint8, state_content_bytes=record // BLOCK_TOKENS)


class KvtideCpuBackend(KvtideBackend):
    """Under the one name that vLLM's CPU platform knows."""

    @staticmethod
    def get_name() -> str:
        return "CPU_ATTN"

    @classmethod
    def get_supported_head_sizes(cls) -> List[int]:
        return list(range(16, 513, 16))


@dataclass
class KvtideMetadata(AttentionMetadata):
    """The step is planned in the parts; layers find theirs by themselves."""

    num_actual_tokens: int


class KvtideMetadataBuilder(AttentionMetadataBuilder):
    # Decode batches, speculation included, replay whole graphs; batches with prefill chunks run piecewise.
    _cudagraph_support: ClassVar[AttentionCGSupport] = AttentionCGSupport.UNIFORM_BATCH
    reorder_batch_threshold: Optional[int] = None

    def __init__(self, kv_cache_spec: Any, layer_names: List[str], vllm_config: Any, device: torch.device) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        if kv_cache_spec.block_size != BLOCK_TOKENS:
            raise InvalidArgument(f"kvtide's pages have {BLOCK_TOKENS} tokens, this cache group's {kv_cache_spec.block_size}: use "
                                  "--block-size 64; models whose state caches ask for larger blocks are not supported")
        context = vllm_config.compilation_config.static_forward_context
        parts: dict = {}
        for name in layer_names:
            impl = context[name].impl
            if not isinstance(impl, KvtideImpl):
                raise InvalidArgument(f"layer {name} has another attention backend ({type(impl).__name__}) in one cache group")
            if impl.owner_name is None:
                parts.setdefault(impl.likeness(), []).append(context[name])
                continue
            impl.owner = context[impl.owner_name].impl
            if impl.owner.likeness() != impl.likeness():
                raise InvalidArgument(f"layer {name} attends the keys of {impl.owner_name} with other heads, scale, window or soft-cap: "
                                      "use vLLM's own backends for this model")
        self.parts = [Part(layers, vllm_config, device) for layers in parts.values()]

    def build(self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False) -> KvtideMetadata:
        m = common_attn_metadata
        if m.causal is not True:
            raise InvalidArgument("kvtide attends causally; this model asks for another mask in this step")
        for part in self.parts:
            part.step(m)
        return KvtideMetadata(m.num_actual_tokens)

    def build_for_cudagraph_capture(self, common_attn_metadata: Any) -> KvtideMetadata:
        for part in self.parts:
            part.capture(common_attn_metadata)
        return KvtideMetadata(common_attn_metadata.num_actual_tokens)


class KvtideImpl(AttentionImpl):
    """One layer."""

    def __init__(self, num_heads: int, head_size: int, scale: float, num_kv_heads: Optional[int] = None,
                 alibi_slopes: Optional[List[float]] = None, sliding_window: Optional[int] = None, kv_cache_dtype: str = "auto",
                 logits_soft_cap: Optional[float] = None, attn_type: str = AttentionType.DECODER,
                 kv_sharing_target_layer_name: Optional[str] = None, sinks: Optional[torch.Tensor] = None, **other: Any) -> None:
        config = get_current_vllm_config()
        if alibi_slopes is not None:
            raise InvalidArgument("kvtide does not know ALiBi; use vLLM's own backends for this model")
        if attn_type != AttentionType.DECODER:
            raise InvalidArgument(f"kvtide attends for decoders, not {attn_type}; use vLLM's own backends for this model")
        other = {key: value for key, value in other.items() if value is not None and value is not False and value != -1}
        if other:
            raise InvalidArgument(f"kvtide does not know the attention options {', '.join(other)} of this model; use vLLM's own "
                                  "backends for it")
        self.num_heads, self.head_size, self.num_kv_heads = num_heads, head_size, num_kv_heads or num_heads
        self.scale, self.softcap, self.sliding_window = float(scale), float(logits_soft_cap or 0), int(sliding_window or 0)
        self.kv_cache_dtype, self.sinks = kv_cache_dtype, sinks  # sinks are a parameter that is loaded later
        self.shape = Shape(self.num_kv_heads, head_size, head_size)
        self.part: Optional[Part] = None
        self.index = 0
        self.owner: "KvtideImpl" = self  # the layer whose pages this one attends
        self.owner_name = kv_sharing_target_layer_name
        if kv_sharing_target_layer_name is None:
            # Now, so that vLLM counts it among what the model takes and not among what is free for pages.
            self.side = SideMemory(self.shape, self.sliding_window, config)
            reserve(self.likeness(), Bounds.of(config).tokens, self.num_heads, 2 * head_size, transform_bytes(self.shape, config))
        elif not keys_are_shared(config):
            raise InvalidArgument("this model's layers share another layer's keys and its configuration has no num_kv_shared_layers: "
                                  "use vLLM's own backends for it")

    def likeness(self) -> tuple:
        """Layers with the same are attended by one object."""
        return (self.num_heads, self.shape, self.scale, self.softcap, self.sliding_window)

    def forward(self, layer: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, kv_cache: torch.Tensor,
                attn_metadata: Optional[KvtideMetadata], output: torch.Tensor, output_scale: Optional[torch.Tensor] = None,
                output_block_scale: Optional[torch.Tensor] = None) -> torch.Tensor:
        if output_scale is not None or output_block_scale is not None:
            raise InvalidArgument("kvtide's attention writes unquantised outputs; switch the fusion of attention and quantisation off")
        part, index = self.owner.part, self.owner.index
        if attn_metadata is None or part is None:  # memory profiling, before there is a cache
            return output.zero_()
        if self.owner is not self:
            return part.attend(index, query, output)
        part.attend(index, query, output, key, value)
        part.seal(index)
        return output
