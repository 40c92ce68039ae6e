"""The limit that hardware.memory_gib sets to torch's allocator on a GPU.

torch counts the segments of vLLM's memory pool (keys and values, dense copies) like its own, and goes on counting them
while they are unmapped. The limit rises by as much for that time, so that training may use what generation gave back.
It cannot rise above the card: with a cap near the card's size, training has the card less what was given back. Memory
outside of torch's allocator, as the CUDA context, is not counted.
"""

from __future__ import annotations

import torch

_cap_bytes: int | None = None  # of this process; vLLM's worker is in it too


def set_device_cap(cap_gib: float | None) -> None:
    """Let torch's allocator take at most `cap_gib` GiB of the current CUDA device; None: all of it."""
    global _cap_bytes
    was_capped = _cap_bytes is not None
    _cap_bytes = None if cap_gib is None else int(cap_gib * 2**30)
    if _cap_bytes is not None:
        exclude_released(0)
    elif was_capped:
        torch.cuda.set_per_process_memory_fraction(1.0)


def exclude_released(num_bytes: int) -> None:
    """Leave `num_bytes`, which torch counts though no memory is behind them now, out of the cap, if there is one."""
    if _cap_bytes is not None:
        _, total = torch.cuda.mem_get_info()
        torch.cuda.set_per_process_memory_fraction(min(1.0, (_cap_bytes + num_bytes) / total))
