"""Many matrices copied at once, each times a factor of its own: what moves an adapter, in one launch.

target = round(factor source), the product in float32 and rounded once. One by one, or by torch's `_foreach_` functions,
the adapter of a decoder with 32 layers is hundreds of launches, which a GPU waits for.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from rlbench_kernels.launch import use_triton

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class ScaledCopies:
    """Copies into targets that are always the same places, of memory of their own or of one room.

    Example:
        copies = ScaledCopies([a_of_engine, b_of_engine], [1.0, 2.0])
        copies([a, b])
        copies = ScaledCopies(room.split([3, 5]), [1.0, 1.0], room)  # views of `room`, here of its rows
        copies([a, b], another_room)
    """

    def __init__(self, targets: Sequence[Tensor], factors: Sequence[float], room: Tensor | None = None) -> None:
        """
        Args:
            targets: [rows, columns] each, any floating dtypes, unit stride along columns; kept, unless they lie in a
                room.
            factors: one for each target.
            room: contiguous, of the targets' dtype; they are views of it, and every call names the room to be filled.

        Raises:
            ValueError: other shapes or strides; numbers of targets and factors that differ.
        """
        for index, target in enumerate(targets):
            if target.ndim != 2 or (target.stride(1) != 1 and target.shape[1] > 1):
                raise ValueError(
                    f"target {index}: a matrix with unit stride along its columns expected, got "
                    f"{[*target.shape]} with strides {[*target.stride()]}"
                )
        if len(targets) != len(factors):
            raise ValueError(f"factors: one for each of {len(targets)} targets expected, got {len(factors)}")
        self._shapes = [(target.shape[0], target.shape[1]) for target in targets]
        self._strides = [target.stride(0) for target in targets]
        self._factors = [float(factor) for factor in factors]
        self._targets = [*targets] if room is None else []
        self._room = None if room is None else (room.numel(), room.dtype, room.device)
        self._starts = [] if room is None else [int(t.storage_offset() - room.storage_offset()) for t in targets]
        self._table: Any = None  # of the last call's sources

    @torch.no_grad()
    def __call__(self, sources: Sequence[Tensor], room: Tensor | None = None) -> None:
        """Copy.

        Args:
            sources: matrices in the targets' shapes, any floating dtypes and devices.
            room: where the targets lie, if they lie in one.

        Raises:
            ValueError: sources that do not fit; a room that is missing, not expected or not like the first.
        """
        self._check(sources, room)
        if not self._shapes:
            return
        if not self._can_launch(sources, room):
            for target, source, factor in zip(self.targets(room), sources, self._factors, strict=True):
                torch.mul(source.to(target.device, torch.float32), factor, out=target)
            return
        from rlbench_kernels.scaled_copies_triton import Table, launch_copies

        if self._table is None or not self._table.is_of(sources):
            where = [start * _itemsize(room) for start in self._starts] or [t.data_ptr() for t in self._targets]
            self._table = Table(sources, where, self._shapes, self._strides, self._factors)
        launch_copies(self._table, self._targets[0].dtype if room is None else room.dtype, room)

    def targets(self, room: Tensor | None = None) -> list[Tensor]:
        """The targets, as views of `room` if they lie in one."""
        if room is None:
            return self._targets
        begin = room.storage_offset()
        return [
            room.as_strided(shape, (stride, 1), begin + start)
            for shape, stride, start in zip(self._shapes, self._strides, self._starts, strict=True)
        ]

    def _check(self, sources: Sequence[Tensor], room: Tensor | None) -> None:
        found = None if room is None else (room.numel(), room.dtype, room.device)
        if found != self._room or (room is not None and not room.is_contiguous()):
            raise ValueError(f"room: {self._room} (numbers, dtype, device), contiguous, expected; got {found}")
        shapes = [tuple(source.shape) for source in sources]
        if shapes != self._shapes:
            wrong = next((pair for pair in zip(shapes, self._shapes, strict=False) if pair[0] != pair[1]), None)
            what = f"{len(self._shapes)} matrices expected, got {len(shapes)}"
            raise ValueError(f"sources: {f'shape {wrong[1]} expected, got {wrong[0]}' if wrong else what}")

    def _can_launch(self, sources: Sequence[Tensor], room: Tensor | None) -> bool:
        """One device, one dtype of all sources and one of all targets, sources without gaps."""
        places = [room] if room is not None else self._targets
        kinds = {(place.device, place.dtype) for place in places}
        of_sources = {(source.device, source.dtype) for source in sources}
        if len(kinds) != 1 or len(of_sources) != 1:
            return False
        (device, dtype), (source_device, source_dtype) = *kinds, *of_sources
        if device != source_device or dtype not in _DTYPES or source_dtype not in _DTYPES:
            return False
        return use_triton(device) and all(source.is_contiguous() for source in sources)


def _itemsize(room: Tensor | None) -> int:
    return 1 if room is None else room.element_size()
