"""The buffers of the form "extended": values, and zeros behind them."""

import pytest
import torch

from rlbench_kernels.lora_matmuls import _write_side_by_side
from tests.kernels.interpreter import DEVICE, needs_device, on_cpu, run_interpreted


@needs_device
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("num_rows", "depth", "rank", "width"), [(5, 48, 16, 16), (3, 1300, 3, 32), (70, 2048, 8, 16)])
@pytest.mark.parametrize("is_strided", [False, True])
def test_columns_lie_side_by_side_with_zeros_behind(num_rows, depth, rank, width, dtype, is_strided):
    left, right = (torch.randn(num_rows, n, device=DEVICE).to(dtype) for n in (depth, rank))
    if is_strided:
        left = torch.randn(num_rows, 2 * depth, device=DEVICE).to(dtype)[:, :depth]
        right = torch.randn(rank, num_rows, device=DEVICE).to(dtype).T
    zeros = left.new_zeros((num_rows, width - rank))
    expected = torch.cat([left, right, zeros], 1)
    room = left.new_full((num_rows, depth + width + 5), torch.nan)

    _write_side_by_side(room[:, : depth + width], left, right, depth)

    assert torch.equal(room[:, : depth + width], expected)
    assert room[:, depth + width :].isnan().all()
    room[:, depth:] = torch.nan
    _write_side_by_side(room[:, : depth + width], None, right, depth)
    assert torch.equal(room[:, : depth + width], expected)


@on_cpu
def test_kernels_under_the_interpreter():
    run_interpreted(__file__)
