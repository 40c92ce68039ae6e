"""What layers keep for their backward pass waits in pinned host memory, copied beside the computation.

At most two layers are on their way to the host while the next ones run: the host waits for the third, so that device
memory does not depend on how far the host is ahead. In the backward pass a layer's tensors are fetched while the layer
after it runs.
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn

_LEAST_BYTES = 2**20  # smaller tensors stay
_ON_THEIR_WAY = 2  # layers
_Key = tuple[int, int, torch.dtype, object]


class Copies(Protocol):
    """Copies in the order in which they are asked for, beside the computation."""

    def to_host(self, tensor: Tensor) -> Tensor: ...

    def to_device(self, host: Tensor, device: torch.device) -> Tensor: ...

    def mark(self) -> Any:
        """What has been asked for up to now."""

    def wait_on_host(self, mark: Any) -> None:
        """Until it is done."""

    def wait_on_device(self, mark: Any) -> None:
        """What the device is asked for from now on runs after it."""


class HostMemory:
    """Of the layers of one model; forward passes may follow each other before a backward pass."""

    def __init__(self, copies: Copies | None = None) -> None:
        self._copies = copies or CudaCopies()
        self._last: weakref.ref[_LayerTensors] | None = None
        self._leaving: deque[_LayerTensors] = deque()

    @contextmanager
    def keeping(self) -> Iterator[None]:
        """Around a layer's forward pass."""
        if not torch.is_grad_enabled():
            yield
            return
        layer = _LayerTensors(self._copies, self._last)
        with torch.autograd.graph.saved_tensors_hooks(layer.keep, lambda kept: kept()):
            yield
        layer.left = self._copies.mark()
        self._last = weakref.ref(layer)
        self._leaving.append(layer)
        if len(self._leaving) > _ON_THEIR_WAY:
            self._leaving.popleft().release()


class _LayerTensors:
    """A tensor that is kept twice, as attention's output is, travels once."""

    def __init__(self, copies: Copies, before: weakref.ref[_LayerTensors] | None) -> None:
        self.before = before  # the layer whose backward pass comes after this one's
        self.left: Any = None  # mark of the copies to the host
        self._copies = copies
        self._on_device: dict[_Key, Tensor] = {}  # until they are on the host
        self._hosts: dict[_Key, Tensor] = {}
        self._uses: dict[_Key, int] = {}
        self._back: dict[_Key, tuple[Tensor, Any]] = {}  # and the mark of its copy
        self._is_fetched = self._is_used = False

    def keep(self, tensor: Tensor) -> Callable[[], Tensor]:
        """What gives the tensor back."""
        if tensor.nbytes < _LEAST_BYTES or not tensor.is_floating_point() or isinstance(tensor, nn.Parameter):
            return lambda: tensor
        key = _key(tensor)
        if key not in self._hosts:
            self._on_device[key] = tensor.detach()  # held: no other tensor gets its address before the layer's end
            self._hosts[key] = self._copies.to_host(tensor.detach())
        self._uses[key] = self._uses.get(key, 0) + 1
        shape, device = tensor.shape, tensor.device
        return lambda: self._take(key, device).view(shape)

    def release(self) -> None:
        """Wait until all is on the host, and free it on the device."""
        self._copies.wait_on_host(self.left)
        self._on_device.clear()

    def fetch(self, device: torch.device) -> None:
        """Start the copies back in the order of need, what was kept last first."""
        if self._is_fetched:
            return
        self._is_fetched = True
        for key in reversed(self._hosts):
            self._fetch(key, device)
        self._on_device.clear()

    def _fetch(self, key: _Key, device: torch.device) -> None:
        if key in self._on_device:
            self._back[key] = self._on_device[key], None
        else:
            self._back[key] = self._copies.to_device(self._hosts[key], device), self._copies.mark()

    def _take(self, key: _Key, device: torch.device) -> Tensor:
        if not self._is_used:
            self._is_used = True
            self.fetch(device)
            before = None if self.before is None else self.before()
            if before is not None:
                before.fetch(device)
        if key not in self._back:
            self._fetch(key, device)  # for a second backward pass
        tensor, mark = self._back[key]
        self._copies.wait_on_device(mark)
        self._uses[key] -= 1
        if self._uses[key] <= 0:
            del self._back[key]
        return tensor


def _key(tensor: Tensor) -> _Key:
    """Tensors of one key have one content; contiguous ones may differ in shape."""
    layout = None if tensor.is_contiguous() else (tensor.shape, tensor.stride())
    return tensor.data_ptr(), tensor.nbytes, tensor.dtype, layout


class CudaCopies:
    """On a stream of its own."""

    def __init__(self) -> None:
        self._stream: torch.cuda.Stream | None = None

    def to_host(self, tensor: Tensor) -> Tensor:
        host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        with torch.cuda.stream(self._after_the_computation(tensor.device)):
            return host.copy_(tensor, non_blocking=True)

    def to_device(self, host: Tensor, device: torch.device) -> Tensor:
        back = torch.empty(host.shape, dtype=host.dtype, device=device)  # earlier kernels may still read its memory
        with torch.cuda.stream(self._after_the_computation(device)):
            return back.copy_(host, non_blocking=True)

    def mark(self) -> Any:
        return None if self._stream is None else self._stream.record_event()

    def wait_on_host(self, mark: Any) -> None:
        if mark is not None:
            mark.synchronize()

    def wait_on_device(self, mark: Any) -> None:
        if mark is not None:
            torch.cuda.current_stream().wait_event(mark)

    def _after_the_computation(self, device: torch.device) -> torch.cuda.Stream:
        if self._stream is None:
            self._stream = torch.cuda.Stream(device)
        self._stream.wait_stream(torch.cuda.current_stream(device))
        return self._stream
