"""The Triton dequantisation and the LoRA functions on it: on the GPU, and small sizes under Triton's interpreter."""

import importlib
import importlib.util
import re

import pytest
import torch

from rlbench_kernels import Fp8Weight, Lora, Nf4Weight, dequantize_nf4, join_rows, lora_mlp, lora_qkv, quantize_nf4
from rlbench_kernels.lora_gating import GATES, apply_gate, gate_gradients
from rlbench_kernels.lora_matmuls import FORMS
from rlbench_kernels.nf4 import NestedAbsmax, reference_dequantize
from tests.kernels.interpreter import (
    DEVICE,
    gpu,
    needs_device,
    needs_gpu,
    on_cpu,
    rounded,
    run_interpreted,
)
from tests.kernels.lora_cases import (
    DEPTH,
    KINDS,
    adapter,
    base,
    check,
    error,
    exact_mlp,
    exact_projection,
    leaves_of,
    mlp_bases,
    random,
    to,
)
from tests.kernels.test_nf4 import DTYPES, bits, matrix
from tests.kernels.test_nf4_join import three

HAS_BITSANDBYTES = importlib.util.find_spec("bitsandbytes") is not None
pytestmark = pytest.mark.usefixtures("triton_backend", "poisoned_memory")


def move(weight, device):
    """The same weight on a device."""
    if isinstance(weight, torch.Tensor):
        return weight.to(device)
    if isinstance(weight, Fp8Weight):
        return Fp8Weight(weight.codes.to(device), weight.scale.to(device), weight.dtype)
    nested = weight.nested
    if nested is not None:
        tensors = (t.to(device) for t in (nested.absmax, nested.code, nested.offset))
        nested = NestedAbsmax(*tensors, nested.blocksize, nested.first_block)
    return Nf4Weight(
        weight.packed.to(device), weight.absmax.to(device), weight.shape, weight.dtype, weight.blocksize, nested
    )


def nested_weight(shape, dtype, *, blocksize=64, nested_blocksize=4):
    """Random bytes under double quantisation, without bitsandbytes."""
    generator = torch.Generator().manual_seed(0)
    numel = shape[0] * shape[1]
    blocks = numel // blocksize
    packed = torch.randint(256, (numel // 2,), generator=generator, dtype=torch.uint8)
    absmax = torch.randint(256, (blocks,), generator=generator, dtype=torch.uint8)
    inner = torch.rand(-(-blocks // nested_blocksize), generator=generator) * 0.1
    code = torch.randn(256, generator=generator).sort().values
    nested = NestedAbsmax(inner, code, torch.full_like(inner, 0.0713), nested_blocksize)
    return Nf4Weight(packed, absmax, shape, dtype, blocksize, nested)


def expected_dense(weight):
    """The reference on CPU."""
    return rounded(reference_dequantize(weight, torch.empty(weight.shape)), weight.dtype)


@gpu
@needs_device
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 64), (5, 192), (70, 128), (33, 320)])
def test_same_bits_as_the_reference(shape, dtype):
    for weight in (quantize_nf4(matrix(shape, dtype)), nested_weight(shape, dtype)):
        expected = expected_dense(weight)
        placed = move(weight, DEVICE)
        assert torch.equal(bits(dequantize_nf4(placed).cpu()), bits(expected))
        buffer = torch.full((shape[0], shape[1] + 16), torch.nan, dtype=dtype, device=DEVICE)
        dequantize_nf4(placed, buffer[:, : shape[1]])
        assert torch.equal(bits(buffer[:, : shape[1]].cpu()), bits(expected)) and buffer[:, shape[1] :].isnan().all()


@gpu
@needs_device
def test_row_slices_of_a_double_quantised_weight():
    weight = nested_weight((37, 192), torch.bfloat16)
    expected = expected_dense(weight)
    placed = move(weight, DEVICE)
    for start, stop in ((0, 37), (1, 2), (5, 36), (36, 37), (9, 9)):
        assert torch.equal(bits(dequantize_nf4(placed.rows(start, stop)).cpu()), bits(expected[start:stop]))


@gpu
@needs_device
def test_joined_matrices_with_offsets_of_their_own_in_one_launch(monkeypatch):
    from rlbench_kernels import nf4

    weights = three()
    expected = torch.cat([expected_dense(weight) for weight in weights])
    monkeypatch.setattr(nf4, "reference_dequantize", None)
    joined = join_rows([move(weight, DEVICE) for weight in weights])
    buffer = torch.full((29, DEPTH + 16), torch.nan, device=DEVICE)
    dequantize_nf4(joined[0].whole, buffer[:, :DEPTH])
    assert torch.equal(bits(buffer[:, :DEPTH].cpu()), bits(expected)) and buffer[:, DEPTH:].isnan().all()
    assert torch.equal(bits(dequantize_nf4(joined[1]).cpu()), bits(expected[16:24]))


@gpu
@needs_device
def test_blocks_of_other_sizes_and_those_that_end_inside_a_row():
    for shape, blocksize in (((6, 32), 32), ((3, 256), 256), ((2, 8192), 4096), ((4, 96), 64), ((5, 100), 64)):
        weight = quantize_nf4(matrix(shape, torch.float32), blocksize)
        expected = reference_dequantize(weight, torch.empty(shape))
        assert torch.equal(dequantize_nf4(move(weight, DEVICE)).cpu(), expected)
        wide = torch.empty((shape[0], shape[1] + 8), device=DEVICE)[:, : shape[1]]
        assert torch.equal(dequantize_nf4(move(weight, DEVICE), wide).cpu(), expected)


@gpu
@needs_device
def test_blocks_that_are_no_power_of_two():
    weight = nested_weight((7, 48), torch.float32, blocksize=24)
    assert torch.equal(dequantize_nf4(move(weight, DEVICE)).cpu(), expected_dense(weight))


@gpu
@needs_device
def test_one_launch_for_double_quantisation_too(monkeypatch):
    from rlbench_kernels import nf4, nf4_triton

    calls = []
    real = nf4_triton.launch_dequantize
    monkeypatch.setattr(nf4_triton, "launch_dequantize", lambda *args: (calls.append(1), real(*args)))
    monkeypatch.setattr(nf4, "reference_dequantize", None)
    dequantize_nf4(move(nested_weight((4, 128), torch.bfloat16), DEVICE))
    assert calls == [1]


@gpu
@needs_device
@pytest.mark.parametrize("kind", ["nf4", "fp8"])
@pytest.mark.parametrize("form", FORMS)
def test_lora_over_quantised_bases_matches_float64(form, kind):
    qkv = [move(base(o, DEPTH, kind=kind, dtype=None, seed=o), DEVICE) for o in (96, 32, 32)]
    mlp = [move(weight, DEVICE) for weight in mlp_bases(kind, None)]
    compare(qkv, mlp, 7, torch.float32, form, tolerance=1e-5)


@gpu
@needs_device
@pytest.mark.parametrize("activation", GATES)
def test_gating_matches_float64_in_strided_rows(activation):
    both, grad = (random(5, 2 * 1100, dtype=torch.float32, scale=4.0, seed=i).to(DEVICE) for i in range(2))
    grad = grad[:, :1100].contiguous()
    exact_parts = [part.double().requires_grad_() for part in both.chunk(2, 1)]
    exact = GATES[activation][0](exact_parts[0]) * exact_parts[1]
    exact_grads = torch.cat(torch.autograd.grad(exact, exact_parts, grad.double()), 1)
    room = torch.full((5, 1100 + 16), torch.nan, device=DEVICE)
    assert error(apply_gate(both, activation, room[:, :1100]), exact) < 2e-6 and room[:, 1100:].isnan().all()
    room = torch.full((5, 2200 + 16), torch.nan, device=DEVICE)
    assert error(gate_gradients(both, grad, activation, room[:, :2200]), exact) < 2e-6
    assert error(room[:, :2200], exact_grads) < 2e-6 and room[:, 2200:].isnan().all()


@gpu
@needs_gpu
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("form", [*FORMS, "auto"])
def test_lora_in_bfloat16_matches_float64_on_the_gpu(form, kind):
    shapes = ((768, 512), (256, 512), (256, 512), (1408, 512), (1408, 512), (512, 1408))
    weights = [base(*shape, kind=kind, dtype=torch.bfloat16, seed=i) for i, shape in enumerate(shapes)]
    weights = [move(w, DEVICE) for w in weights]
    for n in (1, 1000):
        compare(weights[:3], weights[3:], n, torch.bfloat16, form, tolerance=1.5e-2, rank=16)


def compare(qkv, mlp, n, dtype, form, tolerance, rank=5):
    """Values and gradients of both functions against float64 on the same device."""
    depth = qkv[0].shape[1]
    for is_mlp, weights in ((False, qkv), (True, mlp)):
        exact_loras = [place(adapter(*weight.shape, rank, seed=i)) for i, weight in enumerate(weights)]
        loras = [to(lora, torch.float32) for lora in exact_loras]
        exact_x = random(n, depth).to(dtype).double().to(DEVICE).requires_grad_()
        x = exact_x.detach().to(dtype).requires_grad_()
        if is_mlp:
            results = [lora_mlp(x, *weights, loras, form=form)]
            exact = [exact_mlp(exact_x, [dense(w) for w in weights], exact_loras)]
        else:
            results = lora_qkv(x, weights, loras, form=form)
            exact = [exact_projection(exact_x, dense(w), lora) for w, lora in zip(weights, exact_loras, strict=True)]
        check(results, exact, leaves_of(x, loras), leaves_of(exact_x, exact_loras), tolerance)


def place(lora):
    return Lora(*(t.detach().to(DEVICE).requires_grad_() for t in lora[:2]), lora.scaling)


def dense(weight):
    if isinstance(weight, torch.Tensor):
        return weight
    if isinstance(weight, Fp8Weight):
        return weight.codes.float() * weight.scale
    return reference_dequantize(weight, torch.empty(weight.shape, device=weight.device))


@gpu
@needs_gpu
@pytest.mark.skipif(not HAS_BITSANDBYTES, reason="bitsandbytes is not installed")
@pytest.mark.parametrize("is_double", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1024, 4096), (4097, 2560)])
def test_same_bits_as_bitsandbytes_on_the_gpu(shape, dtype, is_double):
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    tensor = (torch.randn(shape, generator=torch.Generator().manual_seed(1)) * 0.02).to(dtype).cuda()
    packed, state = quantize_4bit(tensor, blocksize=64, quant_type="nf4", compress_statistics=is_double)
    expected = dequantize_4bit(packed, state)
    weight = Nf4Weight.from_quant_state(packed, state)
    assert torch.equal(bits(dequantize_nf4(weight)), bits(expected))
    assert torch.equal(bits(dequantize_nf4(weight.rows(100, 612))), bits(expected[100:612]))
    wide = torch.empty(shape[0], shape[1] + 16, dtype=dtype, device="cuda")[:, : shape[1]]
    assert torch.equal(bits(dequantize_nf4(weight, wide)), bits(expected))
    if is_double:
        return
    mine = quantize_nf4(tensor)
    assert torch.equal(mine.absmax, state.absmax)
    # bitsandbytes' CUDA reciprocal is approximate: quotients on a midpoint may take the neighbouring code
    nibbles = [torch.stack([p.view(-1) >> 4, p.view(-1) & 15]).short() for p in (mine.packed, packed)]
    steps = (nibbles[0] - nibbles[1]).abs()
    assert steps.max() <= 1 and (steps != 0).float().mean() < 1e-4


@on_cpu
def test_codes_come_from_shared_memory_and_each_scale_once_a_block():
    from rlbench_kernels import nf4_triton

    ptx = compiled_dequantise(WORDS=nf4_triton._WORDS, SIZE=64, num_warps=nf4_triton._NUM_WARPS)
    words = nf4_triton._WORDS // (32 * nf4_triton._NUM_WARPS)  # of a thread, of eight elements
    loads = [found.start() for found in re.finditer(r"\bld\.global", ptx)]
    assert len(loads) == words + len(("code", "byte", "nested_absmax", "offset", "nested_code"))
    barrier = ptx.index("bar.sync")
    assert loads[-2] < barrier < loads[-1]  # none waits for another but the nested code's, which needs its byte
    assert len(re.findall(r"\bld\.shared", ptx)) == 9 * words  # values, and a scale a word
    assert ptx.count("cvt.rn.bf16x2.f32") == 4 * words and "fma" not in ptx
    assert ptx.count("st.global.v4.b32") == len(re.findall(r"\bst\.global", ptx)) == words


@on_cpu
def test_the_constants_of_a_launch_compile_for_padded_rows_and_other_blocks_and_dtypes():
    from rlbench_kernels import nf4_triton

    launch = {"WORDS": nf4_triton._WORDS, "num_warps": nf4_triton._NUM_WARPS}
    assert nf4_triton._WORDS * 8 >= nf4_triton._LARGEST_BLOCK
    for size, out in ((8, "*fp16"), (64, "*bf16"), (nf4_triton._LARGEST_BLOCK, "*fp32")):
        assert "st.global.v4.b32" in compiled_dequantise(SIZE=size, out=out, IS_PADDED=True, **launch)


def compiled_dequantise(*, num_warps, out="*bf16", IS_PADDED=False, **constants):
    """PTX for a Hopper GPU, double-quantised; sizes and pointers are divisible by 16 as far as the kernel may know."""
    compiler = importlib.import_module("triton.compiler")
    target = importlib.import_module("triton.backends.compiler").GPUTarget("cuda", 90, 32)
    kernel = importlib.import_module("rlbench_kernels.nf4_triton")._dequantize
    constants |= {"NESTED_SIZE": 256, "IS_PADDED": IS_PADDED}
    floats = dict.fromkeys(("codes", "nested_absmax", "nested_code", "offset"), "*fp32")
    types = {"words": "*i32", "absmax": "*u8", "out": out, **floats, **dict.fromkeys(constants, "constexpr")}
    names = kernel.arg_names
    odd = [p.name for p in kernel.params if p.do_not_specialize_on_alignment]
    source = compiler.ASTSource(
        kernel,
        {name: types.get(name, "i32") for name in names},
        {(names.index(name),): value for name, value in constants.items()},
        {(p.num,): [["tt.divisibility", 16]] for p in kernel.params if p.name not in constants and p.name not in odd},
    )
    options = {"num_warps": num_warps, "enable_fp_fusion": False}
    return importlib.import_module("triton").compile(source, target=target, options=options).asm["ptx"]


@on_cpu
def test_kernels_under_the_interpreter():
    run_interpreted(__file__)
