"""An engine with merged copies on a CPU: vLLM drops its own matrices there, the base comes from the model's folder."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import MethodType
from typing import Any
from unittest.mock import patch

import torch
from safetensors.torch import load_file

from rlbench.engine import vllm_engine
from rlbench.engine.dense_copies import DenseCopies, LinearLayer
from rlbench.engine.merged_adapter import MergedAdapter, MergedAdapterCalls
from rlbench.engine.vllm_worker import AdapterWorker, is_linear
from rlbench.models.shared_base import EngineWeight


@contextmanager
def merges_on_cpu() -> Iterator[None]:
    """Engines started inside may have `dense_copies="merged"`; what sleep gives back of the copies is lost for good."""
    shapes = MergedAdapterCalls.rlbench_merged_shapes

    def first_call(worker: Any) -> dict[str, tuple[int, int]]:
        worker.rlbench_merged = MergedAdapter(DenseCopies(list(_layers(worker)), worker.model_config.dtype))
        worker.rlbench_release_kv_cache = MethodType(_release, worker)
        return shapes(worker)

    with (
        patch.object(MergedAdapterCalls, "rlbench_merged_shapes", first_call),
        patch.object(vllm_engine, "check_formats"),
    ):
        yield


def _release(worker: Any) -> None:
    AdapterWorker.rlbench_release_kv_cache(worker)
    for layer in _linears(worker).values():
        layer.rlbench_dense.fill_(torch.nan)
    worker.rlbench_merged.forget()


def _linears(worker: Any) -> dict[str, Any]:
    return {n: layer for n, layer in worker.model_runner.get_model().named_modules() if is_linear(layer)}


def _layers(worker: Any) -> Iterator[LinearLayer]:
    weights = load_file(Path(worker.model_config.model) / "model.safetensors")
    fused = worker.model_runner.get_model().packed_modules_mapping
    for path, layer in _linears(worker).items():
        parent, _, leaf = path.rpartition(".")
        names = [f"{parent}.{name}" for name in fused.get(leaf, [leaf])]
        matrices = [weights[f"{name}.weight"].to(worker.model_config.dtype) for name in names]
        parts = tuple((name, len(matrix)) for name, matrix in zip(names, matrices, strict=True))
        yield LinearLayer(layer, EngineWeight(torch.cat(matrices)), parts, matrices[0].shape[1])
