"""The optimizer, and the learning rate as a pure function of the step."""

from __future__ import annotations

import math

import torch
from torch import nn

from rlbench.config.schema import OptimConfig


def make_optimizer(parameters: list[nn.Parameter], config: OptimConfig) -> torch.optim.AdamW:
    """AdamW over float32 parameters; the learning rate is set before each step by `set_lr`."""
    return torch.optim.AdamW(
        parameters,
        lr=config.lr,
        betas=(config.beta1, config.beta2),
        eps=config.eps,
        weight_decay=config.weight_decay,
        fused=parameters[0].is_cuda,
    )


def learning_rate(step: int, num_steps: int, config: OptimConfig) -> float:
    """Linear warm-up to `lr`, then constant, linear or half-cosine to `min_lr_frac * lr` at the last step.

    Args:
        step: the optimizer step that is about to be made, from 1.
        num_steps: of the whole run.
        config: the `optim` part of the config.

    Source: cosine without restarts, Loshchilov and Hutter 2017, arXiv:1608.03983, eq. 5.
    """
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
