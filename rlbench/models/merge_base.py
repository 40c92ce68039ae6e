"""The base of a run as a dense float32 model: what was trained on, or what it was quantised or rounded from."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, PreTrainedModel

from rlbench.config.schema import ModelConfig
from rlbench.models.base import load_base
from rlbench.models.fp8_linear import Fp8Linear
from rlbench.models.nf4_linear import Nf4Linear

TRAINED, ORIGINAL = "trained", "original"
_OF_QUANTISER = ("hf_quantizer", "quantization_method", "is_quantized", "is_loaded_in_4bit")


def dense_base(folder: str, config: ModelConfig, which: str, *, is_on_gpu: bool = False) -> PreTrainedModel:
    """A model on the CPU without a trace of quantisation.

    Args:
        folder: of the checkpoint that `config.path` names.
        config: the `model` part of a run's config, dtype derived.
        which: "trained": the numbers that the trainer computed with, quantised ones made dense; "original": those of
            the checkpoint.
        is_on_gpu: quantise there, where the run did; the scales of blocks may differ in their last bit otherwise.

    Raises:
        ValueError: it cannot be loaded, or the checkpoint holds no original weights.
    """
    if which == ORIGINAL:
        if getattr(AutoConfig.from_pretrained(folder, local_files_only=True), "quantization_config", None):
            raise ValueError(
                f"--base is original, but the checkpoint that model.path names ({config.path}) is in NF4 itself; "
                "expected --base trained, or model.path=DENSE_CHECKPOINT"
            )
        return load_base(folder, dtype=torch.float32, device="cpu")
    dtype = getattr(torch, config.dtype)
    device = "cuda" if is_on_gpu and config.quantization != "none" else "cpu"
    base = load_base(folder, dtype=dtype, device=device, quantization=config.quantization)
    _make_dense(base)
    return base.requires_grad_(False)


def _make_dense(base: Any) -> None:
    for name, module in list(base.named_modules()):
        if isinstance(module, Nf4Linear | Fp8Linear):
            base.set_submodule(name, _dense(module))
    for name in _OF_QUANTISER:
        base.__dict__.pop(name, None)
    base.config.__dict__.pop("quantization_config", None)
    base.to("cpu")
    base.float()


def _dense(module: Nf4Linear | Fp8Linear) -> nn.Linear:
    layer = nn.Linear(module.in_features, module.out_features, bias=False, device="meta")
    layer.weight = nn.Parameter(module.dense_weight().cpu(), requires_grad=False)
    layer.register_parameter("bias", module.bias)
    return layer
