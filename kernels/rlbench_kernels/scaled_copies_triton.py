"""`ScaledCopies` on CUDA: one launch whose programs look up what they copy in a table of addresses."""

# pyright does not know kernel launches
# pyright: reportIndexIssue=false, reportCallIssue=false, reportArgumentType=false
from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from rlbench_kernels.launch import cdiv

_BLOCK = 2048  # numbers of one program
_COLUMNS = 5  # of the table: addresses of source and target, numbers, columns, stride of the target's rows
_DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


class Table:
    """Where the numbers of one set of sources go, on the device."""

    def __init__(
        self, sources: Sequence[Tensor], where: Sequence[int], shapes: Sequence[tuple[int, int]],
        strides: Sequence[int], factors: Sequence[float],
    ) -> None:  # fmt: skip
        """
        Args:
            sources: contiguous, of one dtype, on one device; float32, bfloat16 or float16.
            where: addresses of the targets, or bytes from the beginning of a room.
            shapes: of sources and targets.
            strides: of the targets' rows, in numbers.
            factors: of each.
        """
        device = sources[0].device
        rows = [
            (source.data_ptr(), place, shape[0] * shape[1], shape[1], stride)
            for source, place, shape, stride in zip(sources, where, shapes, strides, strict=True)
        ]
        blocks = torch.tensor([cdiv(row[2], _BLOCK) for row in rows])
        index = torch.repeat_interleave(torch.arange(len(rows)), blocks)
        nth = torch.arange(len(index)) - (blocks.cumsum(0) - blocks)[index]
        self.num_blocks = len(index)
        self.blocks = torch.stack([index, nth], 1).int().to(device)  # [programs, 2]: row of the table, nth block in it
        self.places = torch.tensor(rows, dtype=torch.int64).to(device)  # [copies, 5]
        self.factors = torch.tensor(factors, dtype=torch.float32).to(device)
        self.dtype = sources[0].dtype
        self._addresses = [row[0] for row in rows]

    def is_of(self, sources: Sequence[Tensor]) -> bool:
        """Whether these sources lie where those of the table did; shapes are the same."""
        return self.dtype == sources[0].dtype and self._addresses == [source.data_ptr() for source in sources]


@triton.jit(do_not_specialize=["room"])
def _copy(places, blocks, factors, room, COLUMNS: tl.constexpr, BLOCK: tl.constexpr, SOURCE: tl.constexpr,
          TARGET: tl.constexpr):  # fmt: skip
    index = tl.load(blocks + 2 * tl.program_id(0))
    first = tl.load(blocks + 2 * tl.program_id(0) + 1) * BLOCK
    row_of_table = places + index * COLUMNS
    source = tl.load(row_of_table).to(tl.pointer_type(SOURCE))
    target = (tl.load(row_of_table + 1) + room).to(tl.pointer_type(TARGET))
    count = tl.load(row_of_table + 2).to(tl.int32)
    columns = tl.load(row_of_table + 3).to(tl.int32)
    stride = tl.load(row_of_table + 4)
    place = first + tl.arange(0, BLOCK)
    mask = place < count
    values = tl.load(source + place, mask=mask, other=0.0).to(tl.float32) * tl.load(factors + index)
    row = place // columns
    tl.store(target + row * stride + (place - row * columns), values.to(TARGET), mask=mask)


def launch_copies(table: Table, dtype: torch.dtype, room: Tensor | None) -> None:
    """
    Args:
        table: of the sources.
        dtype: of the targets.
        room: in which the targets lie, or None for targets at addresses.
    """
    if not table.num_blocks:
        return
    with torch.cuda.device_of(table.places):
        _copy[(table.num_blocks,)](
            table.places, table.blocks, table.factors, 0 if room is None else room.data_ptr(), COLUMNS=_COLUMNS,
            BLOCK=_BLOCK, SOURCE=_DTYPES[table.dtype], TARGET=_DTYPES[dtype], num_warps=4,
        )  # fmt: skip
