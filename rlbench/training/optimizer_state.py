"""An optimizer's state as tensors by name, and back into an optimizer, which may keep it in memory of its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

_MOMENTS = ("state1", "state2")  # of bitsandbytes: in buffers that it may have paged


def state_tensors(named: Sequence[tuple[str, nn.Parameter]], optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Copies on the host, under "parameter's name|key"."""
    return {
        f"{name}|{key}": torch.as_tensor(value).detach().cpu().clone()
        for name, parameter in named
        for key, value in optimizer.state.get(parameter, {}).items()
    }


def fill_state(
    named: Sequence[tuple[str, nn.Parameter]], optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]
) -> None:
    """Put back what `state_tensors` gave, bit for bit, each tensor where the optimizer itself would keep it.

    A parameter of which there is none keeps the state that it has.
    """
    is_fused = {id(p): bool(group.get("fused")) for group in optimizer.param_groups for p in group["params"]}
    has_buffers = hasattr(optimizer, "get_state_buffer")  # bitsandbytes' own; GaLore's inner one takes what it finds
    for name, parameter in named:
        prefix = f"{name}|"
        values = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
        if not values:
            continue
        state: dict[str, Any] = {}
        for key, value in values.items():
            if key in _MOMENTS and has_buffers:
                state[key] = _filled_buffer(key, value, parameter, optimizer)
            elif key == "step":
                state[key] = _step(value, parameter.device, is_fused=is_fused[id(parameter)])
            else:
                state[key] = value.to(parameter.device)
        optimizer.state[parameter] = state


def _filled_buffer(key: str, value: Tensor, parameter: nn.Parameter, optimizer: Any) -> Tensor:
    """The moment's buffer if there is one, else one that bitsandbytes makes: paged, if it would page it.

    Paged buffers are taken again because bitsandbytes never frees them: a replay fills the same optimizer many times.
    """
    buffer = optimizer.state.get(parameter, {}).get(key)
    if buffer is None or (buffer.shape, buffer.dtype) != (value.shape, value.dtype):
        buffer = optimizer.get_state_buffer(parameter, dtype=value.dtype)
    assert buffer.shape == value.shape
    return buffer.copy_(value)


def _step(value: Tensor, device: torch.device, *, is_fused: bool) -> Tensor | int:
    """torch keeps it as a tensor, on the host unless the optimizer is fused; bitsandbytes as a plain number."""
    if not value.is_floating_point():
        return int(value)
    return value.to(device) if is_fused else value
