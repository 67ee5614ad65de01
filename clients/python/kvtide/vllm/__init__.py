"""vLLM with a coded KV cache: an attention backend whose pages are kvtide's.

``pip install kvtide[vllm]`` is all that vLLM needs to find it (entry point ``vllm.general_plugins``). On a GPU::

    KVTIDE_PAIR=turbo4/turbo4 vllm serve MODEL --attention-backend CUSTOM --block-size 64

``python -m kvtide.vllm MODEL`` prints the line for a model and this machine, ``--check`` says whether it will work.
"""

from __future__ import annotations

from .settings import Settings

__all__ = ["Settings", "register"]


def register() -> None:
    """Called by vLLM in each of its processes, more than once."""
    import os

    from vllm.platforms import current_platform
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    if not current_platform.is_cpu():
        from . import block_tables

        block_tables.follow()
        register_backend(AttentionBackendEnum.CUSTOM, "kvtide.vllm.backend.KvtideBackend")
    elif os.environ.get("KVTIDE_PAIR"):
        # vLLM's CPU platform knows one name; who sets the pair wants this backend under it.
        register_backend(AttentionBackendEnum.CPU_ATTN, "kvtide.vllm.backend.KvtideCpuBackend")
