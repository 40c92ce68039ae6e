"""Layer inputs that wait in pinned host memory between forward and backward pass, copied beside the computation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(slots=True)
class _Stored:
    host: Tensor  # pinned
    device: torch.device
    before: _Stored | None  # stored just before: the next that a backward pass asks for
    copied: Any = None  # torch.cuda.Event of `back`
    back: Tensor | None = None


class HostMemory:
    """Last in, first out. While a tensor is used, the one before it is on its way back: two are on the device."""

    def __init__(self) -> None:
        self._stream: torch.cuda.Stream | None = None
        self._last: _Stored | None = None

    def put(self, tensor: Tensor) -> _Stored:
        """Start the copy to the host; the device's memory is free again when it has ended."""
        if self._stream is None:
            self._stream = torch.cuda.Stream(tensor.device)
        host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            host.copy_(tensor.detach(), non_blocking=True)
        tensor.record_stream(self._stream)
        self._last = _Stored(host, tensor.device, self._last)
        return self._last

    def get(self, stored: _Stored) -> Tensor:
        """The tensor on the device again, and the one before it on its way."""
        self._fetch(stored)
        if stored.before is not None:
            self._fetch(stored.before)
        assert stored.copied is not None and stored.back is not None
        torch.cuda.current_stream().wait_event(stored.copied)
        back = stored.back
        self._last, stored.back, stored.before = stored.before, None, None
        return back

    def _fetch(self, stored: _Stored) -> None:
        if stored.back is not None:
            return
        assert self._stream is not None
        stored.back = torch.empty(stored.host.shape, dtype=stored.host.dtype, device=stored.device)
        self._stream.wait_stream(torch.cuda.current_stream())  # its memory may still be read by earlier kernels
        with torch.cuda.stream(self._stream):
            stored.back.copy_(stored.host, non_blocking=True)
            stored.copied = self._stream.record_event()
