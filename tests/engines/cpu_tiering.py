"""vLLM's tiered offloading on a machine without a GPU: vLLM refuses to make the worker that copies between the GPU and its CPU tier
there, so this one copies between its pages in host memory and that tier. Everything else, the tiers too, is vLLM's own."""

import torch
from vllm.v1.kv_offload.base import OffloadingWorker, TransferResult
from vllm.v1.kv_offload.cpu.shared_offload_region import SharedOffloadRegion
from vllm.v1.kv_offload.tiering.spec import TieringOffloadingSpec


class Worker(OffloadingWorker):
    def __init__(self, caches, region, per_chunk):
        self.pages = [one.tensor.view(torch.int8).reshape(one.tensor.shape[0], -1) for one in caches.tensors]
        self.chunks = [region.create_next_worker_view(pages.shape[1] * per_chunk) for pages in self.pages]
        self.per_chunk, self.done = per_chunk, []

    def _copy(self, job, blocks, chunks, store):
        first = blocks.block_indices[0] % self.per_chunk
        for i, block in enumerate(blocks.block_ids):
            chunk, part = divmod(first + i, self.per_chunk)
            for pages, memory in zip(self.pages, self.chunks):
                page, size = pages[int(block)], pages.shape[1]
                cell = memory[int(chunks.block_ids[chunk])][part * size:(part + 1) * size]
                cell.copy_(page) if store else page.copy_(cell)
        self.done.append(TransferResult(job, True, len(blocks.block_ids) * sum(pages.shape[1] for pages in self.pages), 1e-3))
        return True

    def submit_store(self, job_id, src_spec, dst_spec):
        return self._copy(job_id, src_spec, dst_spec, True)

    def submit_load(self, job_id, src_spec, dst_spec):
        return self._copy(job_id, dst_spec, src_spec, False)

    def wait(self, job_ids):
        pass

    def get_finished(self):
        done, self.done = self.done, []
        return done


class CpuTieringSpec(TieringOffloadingSpec):
    def get_worker(self, kv_caches):
        if not self._worker:
            region = SharedOffloadRegion(engine_id=self._engine_id, num_chunks=self.num_chunks, rank=self.config.parallel.rank,
                                         kv_bytes_per_chunk=self.kv_bytes_per_chunk, cpu_page_size=self.cpu_page_size_per_worker)
            self._worker = Worker(kv_caches, region, self.blocks_per_chunk)
        return self._worker
