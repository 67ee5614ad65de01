"""What a user can choose, where from, and what of vLLM's own options goes together with it."""

from __future__ import annotations

import os
import pathlib
import re
from dataclasses import dataclass
from typing import Any, List, Mapping, Optional, Tuple

import numpy as np

from .. import formats
from ..errors import InvalidArgument

BLOCK_TOKENS = formats.BLOCK_TOKENS
_UNITS = {"": 1, "kib": 1 << 10, "mib": 1 << 20, "gib": 1 << 30, "kb": 10**3, "mb": 10**6, "gb": 10**9}


@dataclass(frozen=True)
class Settings:
    """Choices, each an environment variable and a key of ``--additional-config '{"kvtide": {...}}'``, which wins.

    Attributes:
        pair: ``KVTIDE_PAIR``, such as ``turbo4/turbo4``, ``f16``, or ``auto`` = the planner's choice.
        first_blocks, last_blocks: ``KVTIDE_EXACT_WINDOW`` (``1+2``): blocks of 64 tokens at either end of a running sequence
            that it attends in float16.
        side_memory: ``KVTIDE_SIDE_MEMORY`` (``2GiB``): most memory for float16 copies; None = a tenth of the device's. Less
            than the window of every sequence needs means that some attend blocks of it coded.
        profile: ``KVTIDE_PROFILE``, a profile of the model's keys (``python -m kvtide.calibrate``, ``kvtide calibrate``): keys are
            coded as their difference from its means, which attention takes back; ``tide`` types with its transforms, which must be
            of keys after RoPE (``--keys after-rope``).
    """

    pair: str = "auto"
    first_blocks: int = 1
    last_blocks: int = 2
    side_memory: Optional[int] = None
    profile: str = ""

    @classmethod
    def read(cls, environment: Optional[Mapping[str, str]] = None, config: Any = None) -> "Settings":
        """From the environment and vLLM's additional config."""
        environment = os.environ if environment is None else environment
        chosen = {
            "pair": environment.get("KVTIDE_PAIR") or "auto",
            "exact_window": environment.get("KVTIDE_EXACT_WINDOW") or "1+2",
            "side_memory": environment.get("KVTIDE_SIDE_MEMORY") or "",
            "profile": environment.get("KVTIDE_PROFILE") or "",
        }
        given = config.get("kvtide", {}) if isinstance(config, Mapping) else {}
        if not isinstance(given, Mapping) or set(given) - set(chosen):
            raise InvalidArgument(f"additional config kvtide: {given!r}; it has the keys {', '.join(chosen)}")
        chosen.update({key: str(value) for key, value in given.items()})
        first, last = parse_window(chosen["exact_window"])
        pair = parse_pair(chosen["pair"])
        check_profile_named(pair, chosen["profile"])
        return cls(pair, first, last, parse_size(chosen["side_memory"]), chosen["profile"])

    def window_for(self, sliding: int) -> Tuple[int, int]:
        """Exact blocks of a layer; a sliding window does not see its first block for long."""
        return (0 if sliding else self.first_blocks, self.last_blocks)


CALIBRATED = ("tide4", "tide3", "tide2", "tide1")
"""Types of keys that need transforms of a profile, in the order of their widths there."""


def calibrated(pair: str) -> bool:
    """Whether keys of the pair are of such a type."""
    return pair.split("/")[0] in CALIBRATED


def parse_pair(text: str) -> str:
    if text == "auto":
        return text
    key, *rest = text.split("/")
    value = rest[0] if rest else key
    if calibrated(value):
        raise InvalidArgument(f'pair "{text}": {value} codes keys only; write tide3/turbo3, for example')
    if key in CALIBRATED and len(rest) == 1:
        return f"{key}/{formats.parse_pair(value, 'auto').split('/')[1]}"
    return formats.parse_pair(text, "auto")


def parse_window(text: str) -> Tuple[int, int]:
    match = re.fullmatch(r"(\d+)\+(\d+)", text)
    if match is None or max(map(int, match.groups())) > 64:
        raise InvalidArgument(f'exact window "{text}": write blocks kept at the beginning and at the end such as 1+2, at most 64')
    return int(match.group(1)), int(match.group(2))


def parse_size(text: str) -> Optional[int]:
    if not text:
        return None
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([a-z]*)", text.strip().lower())
    if match is None or match.group(2) not in _UNITS:
        raise InvalidArgument(f'side memory "{text}": write a size such as 2GiB')
    return int(float(match.group(1)) * _UNITS[match.group(2)])


MAKE_ONE = "make one with python -m kvtide.calibrate --keys after-rope, or kvtide calibrate --keys after-rope"


def check_profile_named(pair: str, profile: str) -> None:
    if calibrated(pair) and not profile:
        raise InvalidArgument(f'pair "{pair}": calibrated keys are coded by a profile of the model; name it in KVTIDE_PROFILE '
                              f"({MAKE_ONE}), or take turbo4, turbo3 or turbo2")


def check_transforms(profile: Any, pair: str) -> None:
    """InvalidArgument for a profile without what a calibrated type needs over vLLM's pages: transforms of keys after RoPE."""
    key = pair.split("/")[0]
    if not profile.transforms:
        raise InvalidArgument(f"KVTIDE_PROFILE: {key} keys need transforms, and this profile has means alone; {MAKE_ONE}")
    if not profile.after_rope:
        raise InvalidArgument("KVTIDE_PROFILE: its transforms are of keys before RoPE, which kvtide's own pools attend; kernels over "
                              f"vLLM's pages take {key} keys coded after it: {MAKE_ONE}")
    if profile.widths[0].shape[1] <= CALIBRATED.index(key):
        raise InvalidArgument(f"KVTIDE_PROFILE: this profile is older than {key}; {MAKE_ONE}")


def key_means(profile: Any, layers: int, kv_heads: int, head_dim: int) -> List[np.ndarray]:
    """Those of a profile (``kvtide.profiles.KeyProfile``), for each layer ``[kv_heads, head_dim]``.

    Raises:
        InvalidArgument: the profile is of a model of another shape.
    """
    shape = profile.means[0].shape
    if (len(profile.means), *shape) != (layers, kv_heads, head_dim):
        raise InvalidArgument(f"KVTIDE_PROFILE is of {profile.model or 'a model'} with {len(profile.means)} layers of {shape[0]} KV heads of "
                              f"{shape[1]}; this model has {layers} of {kv_heads} of {head_dim}: make one with python -m kvtide.calibrate")
    return profile.means


def heads_of_rank(rank: int, ranks: int, kv_heads: int) -> slice:
    """Which of a layer's KV heads a tensor-parallel rank has; where there are more ranks than heads, some have the same one."""
    if kv_heads >= ranks:
        each = kv_heads // ranks
        return slice(rank * each, (rank + 1) * each)
    first = rank * kv_heads // ranks
    return slice(first, first + 1)


def host_memory(what: str = "MemTotal") -> int:
    """Bytes of this machine's memory; ``MemAvailable`` = what can be taken without swapping."""
    for line in pathlib.Path("/proc/meminfo").read_text().splitlines():
        name, value = line.split(":", 1)
        if name == what:
            return int(value.split()[0]) * 1024
    raise FileNotFoundError(f"/proc/meminfo has no line {what}")


def cuda_library() -> str:
    """The library with the CUDA kernels: that of the package, else the one that the system's linker finds ("")."""
    inside = pathlib.Path(__file__).resolve().parent.parent / "lib" / "libkvtide_cuda_paged.so"
    return os.environ.get("KVTIDE_CUDA_PAGED") or (str(inside) if inside.exists() else "")


def refusals(config: Any) -> List[str]:
    """Why this vLLM configuration cannot run on kvtide's pages, each with what to change."""
    out = []
    cache, parallel, model = config.cache_config, config.parallel_config, config.model_config
    if cache.cache_dtype not in ("auto", "float16", "bfloat16"):
        out.append(f"--kv-cache-dtype {cache.cache_dtype}: kvtide codes the cache itself; leave it at auto and choose KVTIDE_PAIR")
    if cache.block_size % BLOCK_TOKENS and getattr(cache, "user_specified_block_size", True):  # else vLLM asks the backend later
        out.append(f"--block-size {cache.block_size}: kvtide's blocks have 64 tokens; use --block-size 64")
    if getattr(cache, "kv_cache_dtype_skip_layers", None):
        out.append("--kv-cache-dtype-skip-layers: every layer has kvtide's pages; leave it out")
    if getattr(cache, "kv_sharing_fast_prefill", False):
        out.append("--kv-sharing-fast-prefill: not supported; leave it out")
    if getattr(model, "use_mla", False):
        out.append("models with multi-head latent attention (DeepSeek): use vLLM's own MLA backends")
    if getattr(model, "is_encoder_decoder", False):
        out.append("encoder-decoder models: use vLLM's own backends")
    if getattr(model, "is_mm_prefix_lm", False):
        out.append("models that attend images in both directions: use vLLM's own backends")
    for name, what in (("decode_context_parallel_size", "--decode-context-parallel-size"),
                       ("prefill_context_parallel_size", "--prefill-context-parallel-size")):
        if getattr(parallel, name, 1) > 1:
            out.append(f"{what} {getattr(parallel, name)}: sequences are not split over GPUs; use --tensor-parallel-size")
    if getattr(parallel, "enable_dbo", False) or getattr(parallel, "use_ubatching", False):
        out.append("--enable-dbo: batches are not split in two; leave it out")
    connector = getattr(config.kv_transfer_config, "kv_connector", None)
    if config.kv_transfer_config is not None and connector != "KvtideConnector":
        out.append(f"the KV connector {connector} (--kv-transfer-config, --kv-offloading-size): it would write pages behind the "
                   "backend's back; leave it out, or let blocks rest in kvtided: kvtide connect vllm --way both")
    return out
