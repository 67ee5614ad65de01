"""What a state does not say: how wide a head is, and which channels RoPE turns together."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from typing import Any, Dict, List, Set, Tuple

from .. import _core
from .._types import Layer
from ..errors import InvalidArgument
from .state import Part

# Architectures whose RoPE turns neighbouring channels in GGUF files (LLAMA_ROPE_TYPE_NORM of llama_model_rope_type). All others
# turn halves. It matters to types that equalise keys by pairs of channels (planar, iso, rotor).
_NEIGHBOURS = frozenset(
    "arcee arctic baichuan bailingmoe chameleon chatglm cohere2 command-r deci deepseek deepseek2 ernie4_5 ernie4_5-moe granite "
    "granitemoe internlm2 llada llama llama4 minicpm mistral3 olmo plm smollm3 starcoder xverse".split())


@dataclass(frozen=True)
class ModelShape:
    """Widths of the heads of a model, by the width of a row of keys and of values."""

    architecture: str
    heads: Dict[Tuple[int, int], Tuple[int, int]]  # (row of K, row of V) -> (head_dim of K, of V)

    @classmethod
    def of(cls, model: Any) -> "ModelShape":
        """Of a ``llama_cpp.Llama``, or of the path of a GGUF file."""
        path = getattr(model, "model_path", model)
        if not isinstance(path, (str, os.PathLike)):
            raise InvalidArgument(f"{type(model).__name__} is neither a llama_cpp.Llama nor the path of a GGUF file")
        architecture, layers = _core.model_layers(os.fspath(path))
        heads: Dict[Tuple[int, int], Set[Tuple[int, int]]] = {}
        for kv_heads, head_dim_k, head_dim_v in layers:
            heads.setdefault((kv_heads * head_dim_k, kv_heads * head_dim_v), set()).add((head_dim_k, head_dim_v))
        for (row_k, row_v), widths in heads.items():
            if len(widths) > 1:
                raise InvalidArgument(f"layers with rows of {row_k} and {row_v} numbers have heads of different widths")
        return cls(architecture, {row: widths.pop() for row, widths in heads.items()})

    @property
    def rope_pairs(self) -> str:
        return "neighbours" if self.architecture in _NEIGHBOURS else "halves"

    def layers(self, part: Part) -> List[Layer]:
        """The layers of a part of a state as a pool registers them."""
        made = []
        for place, (keys, values) in enumerate(zip(part.keys, part.values)):
            widths = self.heads.get((keys.width, values.width))
            if widths is None:
                raise InvalidArgument(f"layer {place} of the state has rows of {keys.width} and {values.width} numbers, which no "
                                      f"layer of this {self.architecture} model has: is it the state of another model?")
            made.append(Layer(keys.width // widths[0], widths[0], head_dim_v=widths[1]))
        return made

    def name(self, layers: List[Layer]) -> str:
        return f"llama.cpp-{self.architecture}-" + hashlib.sha256(repr(layers).encode()).hexdigest()[:16]
