"""vLLM's GPU worker with our adapter sync, whose weights stay on the device while its KV memory is given back.

vLLM's sleep mode unmaps everything in its memory pool. Only keys and values are put there, so that the trainer can go
on computing with vLLM's weight tensors while the engine sleeps. Addresses stay the same: CUDA graphs stay valid.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from vllm.device_allocator import get_mem_allocator_instance  # pyright: ignore[reportMissingImports]
from vllm.v1.worker.gpu_worker import Worker  # pyright: ignore[reportMissingImports]

from rlbench.engine.vllm_worker import AdapterWorker


class SharedBaseWorker(AdapterWorker, Worker):
    """For `LLM(worker_cls=...)` with `enable_cumem_allocator=True`."""

    def _maybe_get_memory_pool_context(self, tag: str) -> AbstractContextManager[object]:
        return super()._maybe_get_memory_pool_context(tag) if tag == "kv_cache" else nullcontext()

    def rlbench_release_kv_cache(self) -> None:
        torch.cuda.synchronize()
        get_mem_allocator_instance().sleep(offload_tags=())

    def rlbench_kv_cache_bytes(self) -> int:
        return sum(cache.nbytes for cache in self.model_runner.kv_caches)

    def rlbench_take_kv_cache(self) -> None:
        get_mem_allocator_instance().wake_up()
        for cache in self.model_runner.kv_caches:
            cache.zero_()
        self.model_runner.post_kv_cache_wake_up()
