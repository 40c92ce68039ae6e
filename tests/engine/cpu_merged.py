"""An engine with merged copies on a CPU: vLLM drops its own matrices there, the base comes from the model's folder."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from safetensors.torch import load_file

from rlbench.engine import vllm_engine
from rlbench.engine.dense_copies import DenseCopies, LinearLayer
from rlbench.engine.merged_adapter import MergedAdapter, MergedAdapterCalls
from rlbench.engine.vllm_worker import AdapterWorker, is_linear
from rlbench.models.shared_base import EngineWeight


class MergedWorker(AdapterWorker, MergedAdapterCalls):
    """As `SharedBaseWorker` with merged copies; what sleep gives back is lost for good."""

    model_config: Any

    def __getattr__(self, name: str) -> Any:
        if name != "rlbench_merged":
            raise AttributeError(name)
        merged = MergedAdapter(DenseCopies(list(self._layers()), self.model_config.dtype))
        self.__dict__["rlbench_merged"] = merged
        return merged

    def rlbench_release_kv_cache(self) -> None:
        AdapterWorker.rlbench_release_kv_cache(self)  # type: ignore[arg-type]
        for layer in self._linears().values():
            layer.rlbench_dense.fill_(torch.nan)
        self.rlbench_merged.forget()

    def _linears(self) -> dict[str, Any]:
        model = self.model_runner.get_model()
        return {n: layer for n, layer in model.named_modules() if is_linear(layer)}

    def _layers(self) -> Iterator[LinearLayer]:
        weights = load_file(Path(self.model_config.model) / "model.safetensors")
        fused = self.model_runner.get_model().packed_modules_mapping
        for path, layer in self._linears().items():
            parent, _, leaf = path.rpartition(".")
            names = [f"{parent}.{name}" for name in fused.get(leaf, [leaf])]
            matrices = [weights[f"{name}.weight"].to(self.model_config.dtype) for name in names]
            parts = tuple((name, len(matrix)) for name, matrix in zip(names, matrices, strict=True))
            yield LinearLayer(layer, EngineWeight(torch.cat(matrices)), parts, matrices[0].shape[1])


@contextmanager
def merges_on_cpu() -> Iterator[None]:
    """Engines started inside may have `dense_copies="merged"`."""
    options = {"worker_extension_cls": f"{__name__}.MergedWorker"}
    with patch.dict(vllm_engine._PLATFORM_OPTIONS, cpu=options), patch.object(vllm_engine, "check_dense_copies"):
        yield
