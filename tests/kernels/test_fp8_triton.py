"""The Triton `dequantize_fp8`, bit for bit the PyTorch one: on the GPU, and small sizes under Triton's interpreter."""

import pytest
import torch

from rlbench_kernels import FP8, Fp8Weight, dequantize_fp8, quantize_fp8
from rlbench_kernels.fp8 import reference_dequantize
from tests.kernels.interpreter import DEVICE, gpu, needs_device, needs_gpu, on_cpu, rounded, run_interpreted
from tests.kernels.test_fp8 import DTYPES, matrix

SHAPES = [(1, 1), (4, 1), (5, 33), (9, 513), (17, 1040)]  # odd, and past a program's rows and columns
pytestmark = pytest.mark.usefixtures("triton_backend", "poisoned_memory")


def place(weight):
    return Fp8Weight(weight.codes.to(DEVICE), weight.scale.to(DEVICE), weight.dtype)


def assert_same(found, weight):
    """nan where the reference on CPU has one, its bits elsewhere."""
    values = reference_dequantize(weight, torch.zeros(weight.shape))
    expected = rounded(torch.where(values.isnan(), 0.0, values), found.dtype)
    assert torch.equal(found.isnan().cpu(), values.isnan())
    assert bits(found.nan_to_num(0.0, torch.inf, -torch.inf).cpu()) == bits(expected)


def bits(tensor):
    return tensor.contiguous().view({2: torch.int16, 4: torch.int32}[tensor.element_size()]).tolist()


@gpu
@needs_device
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_code_under_scales_of_all_sizes(dtype):
    codes = torch.arange(256, dtype=torch.uint8).view(FP8).expand(7, 256).contiguous()
    scale = torch.tensor([1.0, 0.0, -3.1e-3, 2.0**-110, 1.7e38, torch.inf, 0.0123]).view(7, 1)
    weight = Fp8Weight(codes, scale, dtype)
    assert weight.codes.float().isnan().sum() == 14

    assert_same(dequantize_fp8(place(weight)), weight)


@gpu
@needs_device
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_odd_shapes_and_every_layout_of_the_result(dtype, shape):
    weight = quantize_fp8(matrix(shape, dtype))
    placed, (num_rows, num_columns) = place(weight), shape
    assert_same(dequantize_fp8(placed), weight)

    wide = torch.empty(num_rows + 1, num_columns + 16, dtype=dtype, device=DEVICE)
    result = wide[:num_rows, :num_columns]
    assert dequantize_fp8(placed, result) is result
    assert_same(result, weight)
    assert wide[num_rows:].isnan().all() and wide[:, num_columns:].isnan().all()

    transposed = torch.empty(num_columns, num_rows + 3, dtype=dtype, device=DEVICE)
    assert_same(dequantize_fp8(placed, transposed[:, :num_rows].T), weight)
    assert transposed[:, num_rows:].isnan().all()


@gpu
@needs_device
def test_rows_of_vllms_transposed_padded_matrix_in_another_dtype():
    whole = quantize_fp8(matrix((40, 48), torch.bfloat16))
    stored = torch.full((48, 56), 127, dtype=torch.uint8, device=DEVICE)  # nan codes around
    stored[:40, :48] = whole.codes.view(torch.uint8).to(DEVICE)
    engines, rows = stored.view(FP8).T, slice(5, 38)  # [D, O] as vLLM shows it, q of a fused matrix
    weight = Fp8Weight(engines.T[rows, :48], whole.scale.to(DEVICE)[rows], torch.bfloat16)

    for dtype in DTYPES:
        found = dequantize_fp8(weight, torch.empty(33, 48, dtype=dtype, device=DEVICE))
        assert_same(found, Fp8Weight(whole.codes[rows], whole.scale[rows], dtype))


@gpu
@needs_device
@pytest.mark.parametrize("dtype", DTYPES)
def test_one_scale_of_the_whole_matrix(dtype):
    weight = Fp8Weight(quantize_fp8(matrix((11, 40), dtype)).codes, torch.tensor(0.0123).expand(11, 1), dtype)
    placed = Fp8Weight(weight.codes.to(DEVICE), weight.scale[0, 0].to(DEVICE).expand(11, 1), dtype)

    assert placed.scale.stride(0) == 0
    assert_same(dequantize_fp8(placed), weight)


@gpu
@needs_device
def test_one_launch_and_no_pytorch_operation(monkeypatch):
    from rlbench_kernels import fp8, fp8_triton

    calls = []
    real = fp8_triton.launch_dequantize
    monkeypatch.setattr(fp8_triton, "launch_dequantize", lambda *args: (calls.append(1), real(*args)))
    monkeypatch.setattr(fp8, "reference_dequantize", None)
    dequantize_fp8(place(quantize_fp8(matrix((4, 128), torch.bfloat16))))
    assert calls == [1]


@gpu
@needs_device
def test_float64_and_nothing():
    weight = quantize_fp8(matrix((3, 8), torch.float32))
    found = dequantize_fp8(place(weight), torch.empty(3, 8, dtype=torch.float64, device=DEVICE))
    assert torch.equal(found.cpu(), weight.codes.double() * weight.scale.double())
    for shape in ((0, 8), (3, 0)):
        empty = Fp8Weight(torch.zeros(shape).to(FP8), torch.ones(shape[0], 1), torch.bfloat16)
        assert dequantize_fp8(place(empty)).shape == shape


@gpu
@needs_gpu
def test_rows_more_than_2_to_the_31_numbers_apart():
    stride = 2**30  # fits in 32 bits, but twice it does not
    weight = quantize_fp8(matrix((3, 64), torch.bfloat16))
    codes = torch.zeros(2 * stride + 64, dtype=torch.uint8, device=DEVICE).view(FP8).as_strided((3, 64), (stride, 1))
    out = torch.zeros(2 * stride + 64, dtype=torch.bfloat16, device=DEVICE).as_strided((3, 64), (stride, 1))
    codes.copy_(weight.codes)

    assert_same(dequantize_fp8(Fp8Weight(codes, weight.scale.to(DEVICE), torch.bfloat16), out), weight)


@gpu
@needs_gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1024, 4096), (4097, 3584), (512, 18944)])
def test_same_bits_as_pytorch_on_the_gpu(shape, dtype):
    weight = place(quantize_fp8(matrix(shape, dtype)))

    expected = reference_dequantize(weight, torch.empty(shape, dtype=dtype, device=DEVICE))

    assert torch.equal(dequantize_fp8(weight), expected)


@on_cpu
def test_these_tests_pass_under_the_interpreter():
    run_interpreted(__file__)
