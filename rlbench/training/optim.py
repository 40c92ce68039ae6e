"""The optimizer, and the learning rate as a pure function of the step."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from rlbench.config.schema import OptimConfig
from rlbench.training.muon import MuonAdamW

MUON_MOMENTUM = 0.95  # torch's own default


def make_optimizer(
    parameters: list[nn.Parameter], config: OptimConfig, *, not_muon: Sequence[nn.Parameter] = ()
) -> torch.optim.Optimizer:
    """AdamW or Muon over float32 parameters; the learning rate is set before each step by `set_lr`.

    Args:
        parameters: all that are trained.
        config: the `optim` part of the config, lr derived.
        not_muon: matrices that optim.name=muon leaves to AdamW: embeddings and the head.

    Source: Loshchilov and Hutter 2019, arXiv:1711.05101, algorithm 2; in 8 bits Dettmers et al. 2022, arXiv:2110.02861.

    Raises:
        ValueError: optim.name needs a package that is not installed.
    """
    assert config.lr is not None
    options: dict[str, Any] = {
        "lr": config.lr,
        "betas": (config.beta1, config.beta2),
        "eps": config.eps,
        "weight_decay": config.weight_decay,
    }
    if config.name == "adamw":
        return torch.optim.AdamW(parameters, **options, fused=parameters[0].is_cuda)
    if config.name == "muon":
        momentum = MUON_MOMENTUM if config.momentum is None else config.momentum
        return MuonAdamW(parameters, momentum=momentum, others=not_muon, **options)
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ValueError(
            f"optim.name is {config.name}, which needs the package bitsandbytes; expected it installed, or adamw"
        )
    from bitsandbytes.optim.adamw import AdamW8bit

    return AdamW8bit(parameters, **options)


def learning_rate(step: int, num_steps: int, config: OptimConfig) -> float:
    """Linear warm-up to `lr`, then constant, linear or half-cosine to `min_lr_frac * lr` at the last step.

    Args:
        step: the optimizer step that is about to be made, from 1.
        num_steps: of the whole run.
        config: the `optim` part of the config, lr derived.

    Source: cosine without restarts, Loshchilov and Hutter 2017, arXiv:1608.03983, eq. 5.
    """
    assert config.lr is not None
    if step <= config.warmup_steps:
        return config.lr * step / (config.warmup_steps + 1)
    if config.schedule == "constant":
        return config.lr
    progress = (step - config.warmup_steps - 1) / max(1, num_steps - config.warmup_steps - 1)
    share = 1 - progress if config.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * progress))
    return config.lr * (config.min_lr_frac + (1 - config.min_lr_frac) * share)


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr
