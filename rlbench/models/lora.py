"""LoRA adapters: made, saved and loaded by PEFT, computed by one autograd function per linear layer.

Shapes: N tokens, R LoRA rank.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from peft import LoraConfig as PeftLoraConfig
from peft import PeftModel, get_peft_model
from peft.tuners.lora.layer import Linear as PeftLinear
from torch import Tensor, nn
from transformers import PreTrainedModel

from rlbench.config.schema import LoraConfig
from rlbench.models.adapter import Adapter
from rlbench.models.lora_dropout import SeededDropout, current_dropout
from rlbench.models.quantised_linear import frozen_weight
from rlbench_kernels import lora_linear

_ADAPTER = "default"
_PREFIX = "base_model.model."


def add_lora(model: PreTrainedModel, config: LoraConfig, *, seed: int) -> PeftModel:
    """Wrap `model` with trainable float32 LoRA weights (A random, B zero) and fuse their computation.

    Args:
        model: frozen base; a module tree of its own (see `share_base`), since PEFT replaces its linear layers.
        config: the `lora` part of the run's config.
        seed: of the initial A matrices; independent of every other random number of the run.
    """
    targets: Any = config.targets if config.targets == "all-linear" else [t.strip() for t in config.targets.split(",")]
    peft_config = PeftLoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,  # pyright: ignore[reportArgumentType]  (PEFT takes floats)
        lora_dropout=config.dropout,
        target_modules=targets,
        use_rslora=config.rslora,
        bias="none",
        task_type="CAUSAL_LM",
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        try:
            peft_model = get_peft_model(model, peft_config, autocast_adapter_dtype=True)
        except ValueError as error:
            raise ValueError(f"lora.targets={config.targets}: {error}") from error
    if config.dropout:
        for name, layer in lora_layers(peft_model):
            layer.lora_dropout[_ADAPTER] = SeededDropout(config.dropout, name)
    fuse_lora(peft_model)
    return peft_model


def lora_layers(model: nn.Module) -> Iterator[tuple[str, PeftLinear]]:
    """(module path inside the base model, layer) of all adapted linear layers."""
    for name, module in model.named_modules():
        if isinstance(module, PeftLinear):
            yield name.removeprefix(_PREFIX), module


def export_adapter(model: PeftModel) -> Adapter:
    """The adapter's live tensors by module path, for `Engine.sync`."""
    layers = dict(lora_layers(model))
    scalings = {layer.scaling[_ADAPTER] for layer in layers.values()}
    assert len(scalings) == 1, scalings
    return Adapter(
        lora_a={name: layer.lora_A[_ADAPTER].weight.detach() for name, layer in layers.items()},  # type: ignore[union-attr]
        lora_b={name: layer.lora_B[_ADAPTER].weight.detach() for name, layer in layers.items()},  # type: ignore[union-attr]
        scaling=scalings.pop(),
    )


def fuse_lora(model: nn.Module) -> None:
    """Let every PEFT linear layer compute through `lora_linear`; same parameters, same state dict, reversible."""
    for _, layer in lora_layers(model):
        layer.__class__ = FusedLoraLinear


def unfuse_lora(model: nn.Module) -> None:
    """Give PEFT's own forward back."""
    for _, layer in lora_layers(model):
        layer.__class__ = PeftLinear


class FusedLoraLinear(PeftLinear):
    """PEFT's linear layer with `lora_linear` as its forward. One adapter, never merged."""

    def forward(self, x: Tensor, *args: object, **kwargs: object) -> Tensor:
        base = self.get_base_layer()
        assert isinstance(base, nn.Linear) and not self.merged
        if self.disable_adapters:
            return base(x)
        lora_a, lora_b = self.lora_A[_ADAPTER].weight, self.lora_B[_ADAPTER].weight  # type: ignore[union-attr]
        scaling, dropout = self.scaling[_ADAPTER], current_dropout(self, _ADAPTER)
        return lora_linear(x, frozen_weight(base), lora_a, lora_b, scaling, base.bias, dropout=dropout)  # type: ignore[arg-type]
