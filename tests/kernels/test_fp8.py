"""`quantize_fp8` and `dequantize_fp8` against hand-computed values and float64."""

import pytest
import torch

from rlbench_kernels import FP8, Fp8Weight, dequantize_fp8, quantize_fp8

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
SHAPES = [(8, 128), (1, 1), (5, 33), (300, 48)]


def matrix(shape, dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator) * 0.02).to(dtype)


def test_values_are_code_times_the_scale_of_their_row():
    codes = torch.tensor([[1.0, -448.0], [0.001953125, 2.5]]).to(FP8)  # the largest and the smallest magnitude
    weight = Fp8Weight(codes, torch.tensor([[0.5], [2.0]]), torch.float32)

    assert dequantize_fp8(weight).tolist() == [[0.5, -224.0], [0.00390625, 5.0]]


def test_the_largest_magnitude_of_a_row_takes_the_largest_code_and_a_midpoint_the_even_one():
    weight = quantize_fp8(torch.tensor([[448.0, 17.0, 19.0, -17.0], [-896.0, 448.0, 0.0, 34.0]]))  # steps of 2 there

    assert weight.scale.tolist() == [[1.0], [2.0]]
    assert weight.codes.float().tolist() == [[448.0, 16.0, 20.0, -16.0], [-448.0, 224.0, 0.0, 16.0]]


def test_a_row_of_zeros_stays_zero():
    weight = quantize_fp8(torch.tensor([[0.0, 0.0], [1.0, 0.0]]))

    assert dequantize_fp8(weight).tolist() == [[0.0, 0.0], [1.0, 0.0]]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_no_value_is_further_from_its_code_than_half_a_step(dtype, shape):
    dense = matrix(shape, dtype)

    weight = quantize_fp8(dense)

    exact = weight.codes.double() * weight.scale.double()
    # three mantissa bits: half a step is a sixteenth; below 2^-6 the steps are 2^-9
    bound = torch.maximum(dense.double().abs() / 16, weight.scale.double() * 2**-10)
    assert ((exact - dense.double()).abs() <= bound * (1 + 1e-6)).all()
    assert weight.dtype == dtype and weight.shape == shape


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_dense_matrix_is_the_product_in_float64_rounded_once(dtype, shape):
    weight = quantize_fp8(matrix(shape, dtype))

    found = dequantize_fp8(weight)

    exact = weight.codes.double() * weight.scale.double()
    product = exact.float()  # of 24 and 4 bits, so rounded here as float32 does
    assert found.dtype == dtype and torch.equal(found, product.to(dtype))


def test_one_scale_of_the_whole_matrix_is_a_view_of_it_on_every_row():
    weight = Fp8Weight(
        torch.tensor([[1.0, -3.5], [2.0, 448.0]]).to(FP8), torch.tensor(0.25).expand(2, 1), torch.float32
    )

    assert dequantize_fp8(weight).tolist() == [[0.25, -0.875], [0.5, 112.0]]


def test_it_writes_into_the_first_columns_of_a_wider_buffer_in_any_dtype():
    weight = quantize_fp8(matrix((6, 32), torch.bfloat16))
    buffer = torch.full((6, 40), float("nan"), dtype=torch.float32)

    result = dequantize_fp8(weight, buffer[:, :32])

    assert torch.equal(result, weight.codes.float() * weight.scale) and result.data_ptr() == buffer.data_ptr()
    assert buffer[:, 32:].isnan().all()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: quantize_fp8(torch.zeros(3)), r"a matrix in float32, bfloat16 or float16 expected.*\[3\]"),
        (lambda: quantize_fp8(torch.zeros(2, 2, dtype=torch.int32)), "got torch.int32"),
        (lambda: Fp8Weight(torch.zeros(2, 3), torch.ones(2, 1), torch.float32), "codes: torch.float8_e4m3fn"),
        (lambda: Fp8Weight(torch.zeros(3, 2).to(FP8).T, torch.ones(2, 1), torch.float32), "unit stride along D"),
        (lambda: Fp8Weight(torch.zeros(2, 3).to(FP8), torch.ones(1), torch.float32), r"scale: torch.float32 \[2, 1\]"),
        (lambda: dequantize_fp8(quantize_fp8(torch.ones(2, 3)), torch.empty(3, 2)), r"out: floating \[2, 3\]"),
        (lambda: dequantize_fp8(quantize_fp8(torch.ones(2, 3)), torch.empty(2, 3, device="meta")), "out is on meta"),
    ],
)
def test_bad_inputs_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()
