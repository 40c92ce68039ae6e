"""The optimizer, and the learning rate as a pure function of the step."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import nn

from rlbench.config.schema import OptimConfig
from rlbench.models.moments import MomentBytes, count_moments
from rlbench.training.galore import GaloreAdamW
from rlbench.training.muon import MuonAdamW

MUON_MOMENTUM = 0.95  # torch's own default
_BITSANDBYTES = {  # its classes
    "adamw_8bit": "AdamW8bit",
    "galore_8bit": "AdamW8bit",
    "paged_adamw": "PagedAdamW",
    "paged_adamw_8bit": "PagedAdamW8bit",
}


def make_optimizer(
    parameters: list[nn.Parameter], config: OptimConfig, *, tables: Sequence[nn.Parameter] = ()
) -> torch.optim.Optimizer:
    """AdamW, Muon or GaLore over float32 parameters; the learning rate is set before each step by `set_lr`.

    Args:
        parameters: all that are trained.
        config: the `optim` part of the config, lr derived.
        tables: matrices that Muon and GaLore leave to AdamW: embeddings and the head.

    Source: Loshchilov and Hutter 2019, arXiv:1711.05101, algorithm 2; in 8 bits Dettmers et al. 2022, arXiv:2110.02861.

    Raises:
        ValueError: optim.name needs a package that is not installed, or GaLore's rank is above all matrices.
    """
    assert config.lr is not None
    options: dict[str, Any] = {
        "lr": config.lr,
        "betas": (config.beta1, config.beta2),
        "eps": config.eps,
        "weight_decay": config.weight_decay,
    }
    is_cuda = parameters[0].is_cuda
    if config.name == "adamw":
        return torch.optim.AdamW(parameters, **options, fused=is_cuda)
    if config.name == "muon":
        momentum = MUON_MOMENTUM if config.momentum is None else config.momentum
        return MuonAdamW(parameters, momentum=momentum, others=tables, **options)
    if config.name == "galore":

        def make_adamw(groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
            return torch.optim.AdamW(groups, **options, fused=is_cuda)

        return GaloreAdamW(parameters, make_adamw, others=tables, **asdict(config.galore), **options)
    make = _bitsandbytes_adamw(config.name)
    if config.name == "galore_8bit":
        return GaloreAdamW(
            parameters, lambda groups: make(groups, **options), others=tables, **asdict(config.galore), **options
        )
    return make(parameters, **options)


def _bitsandbytes_adamw(name: str) -> Callable[..., torch.optim.Optimizer]:
    if importlib.util.find_spec("bitsandbytes") is None:
        expected = name.removesuffix("_8bit").removeprefix("paged_")
        raise ValueError(
            f"optim.name is {name}, which needs the package bitsandbytes; expected it installed, or {expected}"
        )
    from bitsandbytes.optim import adamw

    return getattr(adamw, _BITSANDBYTES[name])


def moment_bytes(
    parameters: Sequence[nn.Parameter], config: OptimConfig, *, tables: Sequence[nn.Parameter] = ()
) -> MomentBytes:
    """`count_moments` of these parameters.

    Args:
        parameters, config, tables: as of `make_optimizer`.
    """
    left_out = {id(table) for table in tables}
    others = [parameter.shape for parameter in parameters if id(parameter) not in left_out]
    return count_moments(others, config, tables=[table.shape for table in tables])


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
