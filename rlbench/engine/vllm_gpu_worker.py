"""vLLM's GPU worker with our adapter sync, whose weights stay on the device while its KV memory is given back.

vLLM's sleep mode unmaps everything in its memory pool. Only keys and values are put there, and dense copies of the
linear layers (`rlbench.engine.dense_copies`), so that the trainer can go on computing with vLLM's weight tensors while
the engine sleeps. Addresses stay the same: CUDA graphs stay valid.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from vllm.device_allocator import get_mem_allocator_instance  # pyright: ignore[reportMissingImports]
from vllm.v1.worker.gpu_worker import Worker  # pyright: ignore[reportMissingImports]

from rlbench.engine.dense_copies import DENSE_COPIES, DenseCopies
from rlbench.engine.merged_adapter import MergedAdapter
from rlbench.engine.vllm_worker import AdapterWorker, linear_layers
from rlbench.models.device_cap import exclude_released


class SharedBaseWorker(AdapterWorker, Worker):
    """For `LLM(worker_cls=...)` with `enable_cumem_allocator=True`."""

    rlbench_copies: DenseCopies | None = None

    def load_model(self, **named: Any) -> None:
        """Before anything is compiled or captured, the layers get what they will compute with."""
        super().load_model(**named)
        options = self.vllm_config.additional_config
        kind = options.get(DENSE_COPIES, "none") if isinstance(options, dict) else "none"
        if kind == "none":
            return
        layers = linear_layers(self.model_runner.get_model(), only_nf4=kind == "base")
        with get_mem_allocator_instance().use_memory_pool(tag=DENSE_COPIES):
            self.rlbench_copies = DenseCopies(layers, self.model_config.dtype)
        self.rlbench_copies.fill()
        if kind == "merged":
            self.rlbench_merged = MergedAdapter(self.rlbench_copies)

    def _maybe_get_memory_pool_context(self, tag: str) -> AbstractContextManager[object]:
        return super()._maybe_get_memory_pool_context(tag) if tag == "kv_cache" else nullcontext()

    def rlbench_release_kv_cache(self) -> None:
        torch.cuda.synchronize()
        get_mem_allocator_instance().sleep(offload_tags=())
        exclude_released(self.rlbench_released_bytes())

    def rlbench_released_bytes(self) -> int:
        """What `rlbench_release_kv_cache` unmaps."""
        copies = self.rlbench_copies.num_bytes if self.rlbench_copies else 0
        return copies + sum(cache.nbytes for cache in self.model_runner.kv_caches)

    def rlbench_take_kv_cache(self) -> None:
        torch.cuda.empty_cache()  # what training freed and torch kept must not lie beside keys and values
        exclude_released(0)
        get_mem_allocator_instance().wake_up()
        for cache in self.model_runner.kv_caches:
            cache.zero_()
        if hasattr(self, "rlbench_merged"):
            self.rlbench_merged.forget()  # the next batch says what is wanted
        elif self.rlbench_copies:
            self.rlbench_copies.fill()
        self.model_runner.post_kv_cache_wake_up()
