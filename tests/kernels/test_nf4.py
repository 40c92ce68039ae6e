"""`quantize_nf4` and `dequantize_nf4` against hand-computed values and bitsandbytes' CPU backend."""

import pytest
import torch

from rlbench_kernels import Nf4Weight, dequantize_nf4, quantize_nf4
from rlbench_kernels.nf4 import NF4_CODE, dense_absmax

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# blocks that end in the middle of a row, an odd number of elements, a last block that is not full
SHAPES = [(8, 128), (300, 192), (5, 100), (3, 70), (7, 33)]


def matrix(shape, dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(shape, generator=generator) * 0.02
    values[0, :5] = 0.0
    return values.to(dtype)


def bits(tensor):
    return tensor.contiguous().view(torch.int32 if tensor.dtype == torch.float32 else torch.int16)


def from_bitsandbytes(tensor, is_double):
    functional = pytest.importorskip("bitsandbytes.functional", reason="bitsandbytes is not installed")
    packed, state = functional.quantize_4bit(tensor, blocksize=64, quant_type="nf4", compress_statistics=is_double)
    return packed, state, functional.dequantize_4bit(packed, state)


def test_values_are_code_times_absmax_with_the_first_code_in_the_high_bits():
    weight = Nf4Weight(torch.tensor([0x0F, 0x78], dtype=torch.uint8), torch.tensor([2.0]), (2, 2), torch.float32, 4)
    expected = torch.tensor([[-2.0, 2.0], [0.0, 2 * 0.07958029955625534]])
    assert torch.equal(dequantize_nf4(weight), expected)


def test_double_quantisation_by_hand_also_in_a_row_slice():
    from rlbench_kernels.nf4 import NestedAbsmax

    nested = NestedAbsmax(torch.tensor([1.0, 10.0]), torch.arange(256.0), torch.tensor([0.5, 0.5]), blocksize=3)
    packed = torch.full((4,), 0xF7, dtype=torch.uint8)
    weight = Nf4Weight(packed, torch.tensor([1, 2, 3, 4], dtype=torch.uint8), (4, 2), torch.float32, 2, nested)
    assert dense_absmax(weight).tolist() == [1.5, 2.5, 3.5, 40.5]
    assert dequantize_nf4(weight.rows(2, 4)).tolist() == [[3.5, 0.0], [40.5, 0.0]]
    assert dequantize_nf4(weight.rows(1, 4).rows(2, 3)).tolist() == [[40.5, 0.0]]


def test_quantisation_takes_the_nearest_code_and_on_a_midpoint_the_lower():
    code = torch.tensor(NF4_CODE)
    midpoints = (code[:-1] + code[1:]) / 2
    above = torch.nextafter(midpoints, torch.tensor(2.0))
    nibbles = quantize_nf4(torch.cat([code, midpoints, torch.ones(1), above, torch.ones(1)])[None], 16).packed
    unpacked = torch.stack([nibbles >> 4, nibbles & 15], 1).view(3, 16).tolist()
    assert unpacked == [[*range(16)], [*range(15), 15], [*range(1, 16), 15]]


def test_a_block_of_zeros_stays_zero():
    weight = quantize_nf4(torch.zeros(2, 64))
    assert torch.equal(dequantize_nf4(weight), torch.zeros(2, 64)) and not weight.absmax.any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_same_bits_as_bitsandbytes_on_cpu(shape, dtype):
    tensor = matrix(shape, dtype)
    packed, state, _ = from_bitsandbytes(tensor, is_double=False)
    mine = quantize_nf4(tensor)
    assert torch.equal(mine.packed, packed.view(-1)) and torch.equal(mine.absmax, state.absmax)
    for is_double in (False, True):
        packed, state, dense = from_bitsandbytes(tensor, is_double)
        found = bits(dequantize_nf4(Nf4Weight.from_quant_state(packed, state)))
        # its vectorised float16 path, which some CPUs take, rounds once more
        last_bits = 1 if dtype == torch.float16 else 0
        assert (found.int() - bits(dense).int()).abs().max() <= last_bits


def test_packed_bytes_in_another_storage_dtype():
    functional = pytest.importorskip("bitsandbytes.functional", reason="bitsandbytes is not installed")
    tensor = matrix((8, 64), torch.bfloat16)
    packed, state = functional.quantize_4bit(tensor, quant_type="nf4", quant_storage=torch.bfloat16)
    assert torch.equal(Nf4Weight.from_quant_state(packed, state).packed, quantize_nf4(tensor).packed)


@pytest.mark.parametrize("is_double", [False, True])
def test_row_slices_share_the_bytes_and_give_the_rows(is_double):
    packed, state, dense = from_bitsandbytes(matrix((300, 192), torch.bfloat16), is_double)
    weight = Nf4Weight.from_quant_state(packed, state)
    for start, stop in ((0, 300), (7, 7), (100, 299), (299, 300)):
        part = weight.rows(start, stop)
        assert torch.equal(dequantize_nf4(part), dense[start:stop])
        assert start == stop or part.packed.data_ptr() == packed.data_ptr() + start * 96


def test_writes_into_the_first_columns_of_a_wider_buffer():
    weight = quantize_nf4(matrix((6, 128), torch.bfloat16))
    buffer = torch.full((6, 144), torch.nan, dtype=torch.bfloat16)
    assert dequantize_nf4(weight, buffer[:, :128]).data_ptr() == buffer.data_ptr()
    assert torch.equal(buffer[:, :128], dequantize_nf4(weight)) and buffer[:, 128:].isnan().all()


def test_out_decides_the_dtype_and_is_rounded_once():
    weight = quantize_nf4(matrix((4, 64), torch.float16))
    exact = dequantize_nf4(weight, torch.empty(4, 64))
    assert torch.equal(dequantize_nf4(weight, torch.empty(4, 64, dtype=torch.bfloat16)), exact.bfloat16())


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: quantize_nf4(torch.zeros(4, 96)).rows(0, 2), "96 columns cannot be cut from blocks of 64"),
        (lambda: quantize_nf4(torch.zeros(4, 64)).rows(2, 5), "rows 2:5 of a weight with 4 rows"),
        (lambda: quantize_nf4(torch.zeros(64)), "a matrix"),
        (lambda: quantize_nf4(torch.zeros(2, 2), 48), "power of two"),
        (lambda: dequantize_nf4(quantize_nf4(torch.zeros(4, 64)), torch.empty(4, 65)), "out: floating"),
        (lambda: dequantize_nf4(quantize_nf4(torch.zeros(4, 64)), torch.empty(64, 4).T), "unit stride"),
        (
            lambda: Nf4Weight(torch.zeros(3, dtype=torch.uint8), torch.ones(1), (4, 2), torch.float32),
            r"packed: uint8 \[4\] expected",
        ),
        (
            lambda: Nf4Weight(torch.zeros(4, dtype=torch.uint8), torch.ones(2), (4, 2), torch.float32),
            r"absmax: torch.float32 \[1\] expected",
        ),
    ],
)
def test_errors_name_what_was_expected(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_another_quantisation_is_refused():
    functional = pytest.importorskip("bitsandbytes.functional", reason="bitsandbytes is not installed")
    packed, state = functional.quantize_4bit(torch.zeros(2, 64), quant_type="fp4")
    with pytest.raises(ValueError, match="'nf4' expected, got 'fp4'"):
        Nf4Weight.from_quant_state(packed, state)
