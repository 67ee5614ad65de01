"""SGLang's hierarchical cache on a machine without a GPU. SGLang's copies between device and host pages are functions of a package
that is compiled for GPUs, and its host pages are registered with CUDA, so these copy instead and nothing is registered; the engine, its
tree of prefixes, its host pool and its storage threads are SGLang's. Imported in SGLang's scheduler before it makes its pools."""

from sglang.srt.mem_cache.pool_host import common, mha
from torch.cpu import Stream


def pages(indices, page_size):
    """Numbers of the pages that token places [page after page] lie in."""
    return (indices[::page_size] // page_size).tolist()


def to_device(src_ptrs, dst_ptrs, src_indices, dst_indices, layer_id, page_size):
    """From host pools [pages, layers, tokens, heads, dim] into one layer's [tokens, heads, dim]."""
    for pool, layer in zip(src_ptrs, dst_ptrs):
        for i, page in enumerate(pages(src_indices, page_size)):
            layer[dst_indices[i * page_size:(i + 1) * page_size]] = pool[page, layer_id]


def to_host(src_ptrs, dst_ptrs, src_indices, dst_indices, page_size):
    """All layers' keys, then values, into the host pools."""
    layers = len(src_ptrs) // 2
    for side, pool in enumerate(dst_ptrs):
        for layer in range(layers):
            for i, page in enumerate(pages(dst_indices, page_size)):
                pool[page, layer] = src_ptrs[side * layers + layer][src_indices[i * page_size:(i + 1) * page_size]]


mha.transfer_kv_per_layer_direct_pf_lf, mha.transfer_kv_all_layer_direct_lf_pf = to_device, to_host
common._cuda_host_register = common._cuda_host_unregister = lambda *_: None
if not hasattr(Stream, "synchronize"):
    Stream.synchronize = lambda self: None
