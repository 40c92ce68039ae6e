"""The Triton versions of norms, rope, gated activations and logprobs: on the GPU, and small under the interpreter."""

import pytest
import torch

from rlbench_kernels import add_rms_norm, apply_rope, geglu, logprobs, rms_norm, swiglu
from tests.kernels.interpreter import DEVICE, IS_INTERPRETED, gpu, needs_device, needs_gpu, on_cpu, run_interpreted
from tests.kernels.test_logprobs import expected as exact_logprobs
from tests.kernels.test_norms import error, exact_norm
from tests.kernels.test_rope import angles

# relative Frobenius error of one rounding to the dtype and of float32 sums; the interpreter truncates to bfloat16
TOLERANCE = {torch.float32: 2e-6, torch.float16: 6e-4, torch.bfloat16: 8e-3 if IS_INTERPRETED else 3e-3}
DTYPES = tuple(TOLERANCE)
OFFSETS = (0.0, 1.0)
OPS = {"swiglu": swiglu, "geglu": geglu}
pytestmark = pytest.mark.usefixtures("triton_backend", "poisoned_memory")


def random(*shape, dtype, seed=0, scale=1.0):
    generator = torch.Generator(DEVICE).manual_seed(seed)
    return (scale * torch.randn(*shape, generator=generator, device=DEVICE)).to(dtype)


def leaf(*shape, **kwargs):
    return random(*shape, **kwargs).requires_grad_()


def wide(*tensors):
    """The same values as float64 leaves."""
    return [tensor.detach().double().requires_grad_() for tensor in tensors]


def compare(results, exact, leaves, exact_leaves, tolerance):
    """Values and gradients; random upstream gradients in the results' dtypes."""
    grads = [random(*r.shape, dtype=r.dtype, seed=50 + i) for i, r in enumerate(results)]
    found = [*results, *torch.autograd.grad(results, leaves, grads)]
    best = [*exact, *torch.autograd.grad(exact, exact_leaves, [g.double() for g in grads])]
    for mine, other in zip(found, best, strict=True):
        assert mine.shape == other.shape and error(mine, other) < tolerance


def check_norms(shape, dtype, offset, is_frozen=False):
    x, residual, weight = leaf(*shape, dtype=dtype), leaf(*shape, dtype=dtype, seed=1), leaf(shape[-1], dtype=dtype)
    with torch.no_grad():
        x *= torch.logspace(-2, 2, x[..., :1].numel(), device=DEVICE, dtype=dtype).view(*shape[:-1], 1)
    # Llama's order rounds twice in the forward pass
    tolerance = TOLERANCE[dtype] * (1.0 if offset else 1.5)
    if is_frozen:
        weight = weight.detach()
    before = [t.detach().clone() for t in (x, residual)]
    exact_x, exact_weight = wide(x, weight)
    pick = slice(1 if is_frozen else 2)
    result, exact = rms_norm(x, weight, 1e-6, offset=offset), exact_norm(exact_x, exact_weight, 1e-6, offset)
    compare([result], [exact], [x, weight][pick], [exact_x, exact_weight][pick], tolerance)

    normed, new_residual = add_rms_norm(x, residual, weight, 1e-6, offset=offset)
    if not (IS_INTERPRETED and dtype == torch.bfloat16):
        assert torch.equal(new_residual, x + residual)
    hidden, exact_weight = wide(new_residual, weight)
    exact = [exact_norm(hidden, exact_weight, 1e-6, offset), hidden * 1.0]
    compare([normed, new_residual], exact, [x, weight][pick], [hidden, exact_weight][pick], tolerance)
    assert all(map(torch.equal, (x, residual), before))


@gpu
@needs_device
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("offset", OFFSETS)
def test_norms_match_float64(dtype, offset):
    for shape in ((1, 3), (3, 5), (7, 130), (2, 3, 2049), (9, 4, 64)):  # D = 1 would leave rounding errors alone
        check_norms(shape, dtype, offset)
    for shape in ((5, 33), (2, 2049), (35, 130)):  # one tile, one a row, tiles of several rows
        check_norms(shape, dtype, offset, is_frozen=True)


@gpu
@needs_device
def test_rows_past_the_end_leave_no_nan_where_eps_is_0():
    x, weight = leaf(3, 130, dtype=torch.float32), leaf(130, dtype=torch.float32)
    exact_x, exact_weight = wide(x, weight)
    exact = exact_norm(exact_x, exact_weight, 0.0)
    compare([rms_norm(x, weight, 0.0)], [exact], [x, weight], [exact_x, exact_weight], 2e-6)


@gpu
@needs_device
def test_norm_of_heads_inside_a_fused_projection():
    fused, weight = leaf(37, 12 * 32, dtype=torch.float32), leaf(32, dtype=torch.float32)
    exact_fused, exact_weight = wide(fused, weight)
    keys, exact_keys = (t.view(37, 12, 32)[:, 4:8] for t in (fused, exact_fused))
    result, exact = rms_norm(keys, weight, 1e-6), exact_norm(exact_keys, exact_weight, 1e-6)
    compare([result], [exact], [fused, weight], [exact_fused, exact_weight], 2e-6)
    strided, expanded = random(4, 37, 32, dtype=torch.float32).transpose(0, 1), torch.ones((), device=DEVICE)
    for grad in (strided, expanded.expand_as(result)):
        copies = (grad, grad.clone(memory_format=torch.contiguous_format))
        pair = [torch.autograd.grad(rms_norm(keys, weight, 1e-6), (keys, weight), g) for g in copies]
        assert all(map(torch.equal, *pair))


@gpu
@needs_device
def test_an_unused_result_of_add_rms_norm():
    x, residual, weight = (leaf(*s, dtype=torch.float32, seed=i) for i, s in enumerate([(6, 40), (6, 40), (40,)]))
    normed, new_residual = add_rms_norm(x, residual, weight, 1e-6)
    assert torch.equal(torch.autograd.grad(new_residual.sum(), x, retain_graph=True)[0], torch.ones_like(x))
    (grad,) = torch.autograd.grad(normed.sum(), residual)
    (hidden,) = wide(new_residual)
    (exact,) = torch.autograd.grad(exact_norm(hidden, weight, 1e-6).sum(), hidden)
    assert error(grad, exact) < 2e-6


def exact_rope(x, cos, sin):
    first, second = x.chunk(2, -1)
    return x * cos[:, None] + torch.cat((-second, first), -1) * sin[:, None]


def check_rope(tokens, queries, keys, size, dtype, angle_dtype):
    fused = leaf(tokens, queries + keys, size, dtype=dtype)
    cos, sin = (t.to(DEVICE) for t in angles(torch.arange(tokens) % 1000, size, angle_dtype))
    (exact_fused,) = wide(fused)
    results = apply_rope(fused[:, :queries], fused[:, queries:], cos, sin)
    exact = exact_rope(exact_fused, cos.double(), sin.double()).split((queries, keys), 1)
    compare(results, exact, [fused], [exact_fused], TOLERANCE[dtype])


@gpu
@needs_device
@pytest.mark.parametrize("dtype", DTYPES)
def test_rope_matches_float64(dtype, monkeypatch):
    from rlbench_kernels import rope_triton

    check_rope(1, 1, 1, 2, dtype, torch.float32)
    check_rope(5, 5, 2, 12, dtype, dtype)
    monkeypatch.setattr(rope_triton, "_MAX_TILE", 16)  # heads in several steps
    check_rope(5, 7, 3, 16, dtype, torch.float32)


def check_gated(op, rows, size, dtype):
    fused = leaf(rows, 2 * size + 3, dtype=dtype, scale=3.0)
    (exact_fused,) = wide(fused)
    before = fused.detach().clone()
    result = OPS[op](fused[:, :size], fused[:, size : 2 * size])
    gate, up = exact_fused[:, :size], exact_fused[:, size : 2 * size]
    exact = torch.nn.functional.silu(gate) if op == "swiglu" else torch.nn.functional.gelu(gate, approximate="tanh")
    compare([result], [exact * up], [fused], [exact_fused], TOLERANCE[dtype])
    assert torch.equal(fused, before)


@gpu
@needs_device
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("op", OPS)
def test_gated_activations_match_float64(op, dtype):
    for rows, size in ((1, 1), (3, 130), (2, 1025)):
        check_gated(op, rows, size, dtype)


@gpu
@needs_device
@pytest.mark.parametrize("op", OPS.values())
def test_large_gates_give_no_nan(op):
    gate = torch.tensor([100.0, -100.0, 3e4, -3e4, 0.0], device=DEVICE).requires_grad_()
    result = op(gate, torch.full_like(gate, 2.0))
    assert result.tolist() == [200.0, 0.0, 6e4, 0.0, 0.0]
    assert torch.autograd.grad(result.sum(), gate)[0].tolist() == [2.0, 0.0, 2.0, 0.0, 1.0]


def check_logprobs(rows, vocabulary, dtype, temperature, scale=3.0):
    logits = leaf(rows, vocabulary + 5, dtype=dtype, scale=scale)
    targets = torch.randint(vocabulary, (rows,), generator=torch.Generator().manual_seed(0)).to(DEVICE)
    before = logits.detach().clone()
    (exact_logits,) = wide(logits)
    results = logprobs(logits[:, :vocabulary], targets, temperature=temperature)
    exact = exact_logprobs(exact_logits[:, :vocabulary], targets, temperature)
    assert all(error(mine, best) < 2e-6 for mine, best in zip(results, exact, strict=True))
    for weights in ((1.0, 0.0), (0.0, 1.0), (0.5, -2.0)):
        g = torch.linspace(-1, 2, rows, device=DEVICE)
        terms = [[w * (r * g).sum() for w, r in zip(weights, rs, strict=True) if w] for rs in (results, exact)]
        (grad,) = torch.autograd.grad(sum(terms[0]), logits, retain_graph=True)
        (exact_grad,) = torch.autograd.grad(sum(terms[1]), exact_logits, retain_graph=True)
        assert error(grad, exact_grad) < max(5e-6, TOLERANCE[dtype])
    assert torch.equal(logits, before)


@gpu
@needs_device
@pytest.mark.parametrize("dtype", DTYPES)
def test_logprobs_match_float64(dtype, monkeypatch):
    from rlbench_kernels import logprobs_triton

    check_logprobs(1, 2, dtype, 1.0)
    monkeypatch.setattr(logprobs_triton, "_BLOCK", 64)
    for rows, vocabulary in ((33, 64), (35, 150)):
        for temperature in (0.7, torch.linspace(0.5, 1.5, rows, device=DEVICE)):
            check_logprobs(rows, vocabulary, dtype, temperature)


@gpu
@needs_device
def test_logprobs_at_the_edges(monkeypatch):
    from rlbench_kernels import logprobs_triton

    monkeypatch.setattr(logprobs_triton, "_BLOCK", 4)
    infinity = torch.inf
    rows = [
        [0.0, 30.0, *[-infinity] * 8],  # a nearly certain target
        [1.0, -infinity, 2.0, *[-infinity] * 6, 3.0],  # a block without any probability
        [*[-infinity] * 9, 3.0],  # certain
        [torch.nan] * 10,  # gets no gradient
        [*[-80.0] * 9, 80.0],  # an unlikely target
    ]
    logits = torch.tensor(rows, device=DEVICE).requires_grad_()
    value, entropy = logprobs(logits, torch.tensor([1, 9, 9, 0, 0], device=DEVICE))
    keep = torch.tensor([True, True, True, False, True], device=DEVICE)
    (grad,) = torch.autograd.grad(torch.where(keep, value + entropy, 0.0).sum(), logits)
    assert value[0].item() == pytest.approx(-9.357623e-14, rel=2e-5) and value[2] == 0 and entropy[2] == 0
    three = torch.log_softmax(torch.tensor([1.0, 2.0, 3.0]), 0)
    assert value[1].item() == pytest.approx(three[2].item(), rel=1e-6) and value[4].item() == pytest.approx(-160.0)
    assert entropy[1].item() == pytest.approx(-(three.exp() * three).sum().item(), rel=1e-6)
    assert grad.isfinite().all() and (grad[3] == 0).all() and (grad[1, 1] == 0)
    (grad,) = torch.autograd.grad(logprobs(logits[:1], torch.tensor([1], device=DEVICE))[0].sum(), logits)
    assert grad[0, 1].item() == pytest.approx(9.357623e-14, rel=2e-5)


@gpu
@needs_device
def test_a_row_has_the_same_bits_in_any_batch():
    x, weight, logits = (random(*s, dtype=torch.float32) for s in ((70, 96), (96,), (70, 300)))
    targets = torch.arange(70, device=DEVICE)
    assert torch.equal(rms_norm(x, weight, 1e-6)[41:45], rms_norm(x[41:45], weight, 1e-6))
    for whole, part in zip(logprobs(logits, targets), logprobs(logits[41:45], targets[41:45]), strict=True):
        assert torch.equal(whole[41:45], part)


@gpu
@needs_gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_real_sizes_on_the_gpu(dtype):
    for shape in ((1027, 4096), (515, 2560), (3, 16384), (1027, 32, 128)):
        check_norms(shape, dtype, 0.0)
        check_norms(shape, dtype, 1.0, is_frozen=True)
    check_rope(1027, 32, 8, 128, dtype, dtype)
    check_rope(301, 28, 4, 80, dtype, torch.float32)
    check_rope(301, 71, 1, 256, dtype, torch.float32)
    for op in OPS:
        check_gated(op, 515, 14336, dtype)
        check_gated(op, 515, 9728 + 5, dtype)
    for rows, vocabulary in ((67, 128256), (515, 49157)):
        for temperature in (0.7, torch.linspace(0.5, 1.5, rows, device=DEVICE)):
            check_logprobs(rows, vocabulary, dtype, temperature)


@gpu
@needs_gpu
def test_logits_beyond_int32_on_the_gpu():
    """2^31 + 2^17 bfloat16 logits, 4 GiB, and as much for the gradient."""
    vocabulary, rows = 2**17, 2**14 + 1
    if torch.cuda.mem_get_info()[0] < 12 * 2**30:
        pytest.skip("needs 12 GiB of free GPU memory")
    logits = torch.zeros(rows, vocabulary, dtype=torch.bfloat16, device="cuda")
    last = random(1, vocabulary, dtype=torch.bfloat16, scale=3.0)
    logits[-1:] = last
    targets = torch.full((rows,), vocabulary - 1, device="cuda")
    value, entropy = logprobs(logits.requires_grad_(), targets)
    alone, exact = last.clone().requires_grad_(), last.double().requires_grad_()
    mine, best = logprobs(alone, targets[-1:]), exact_logprobs(exact, targets[-1:])
    assert torch.equal(value[-1:], mine[0]) and torch.equal(entropy[-1:], mine[1])
    assert error(mine[0], best[0]) < 2e-6 and error(mine[1], best[1]) < 2e-6
    (grad,) = torch.autograd.grad((value + entropy).sum(), logits)
    assert torch.equal(grad[-1:], torch.autograd.grad((mine[0] + mine[1]).sum(), alone)[0])
    assert error(grad[-1:], torch.autograd.grad((best[0] + best[1]).sum(), exact)[0]) < TOLERANCE[torch.bfloat16]


@gpu
@needs_gpu
def test_bfloat16_norms_are_within_one_rounding_step_of_transformers_on_the_gpu():
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    for size in (128, 2560, 4096):
        x, weight = random(2048, size, dtype=torch.bfloat16), random(size, dtype=torch.bfloat16, seed=1)
        module = LlamaRMSNorm(size, eps=1e-5).cuda()
        module.weight = torch.nn.Parameter(weight)
        ones = torch.ones_like(weight)
        mine, theirs = (t.view(torch.int16).int() for t in (rms_norm(x, ones, 1e-5), _normed(module, x, ones)))
        assert (mine - theirs).abs().max() <= 1 and (mine != theirs).float().mean() < 1e-3
        share = (rms_norm(x, weight, 1e-5) != _normed(module, x, weight)).float().mean()
        assert share < 1e-3


def _normed(module, x, weight):
    module.weight.data = weight
    return module(x).detach()


@gpu
@needs_gpu
def test_no_compilation_per_number_of_tokens_on_the_gpu():
    from rlbench_kernels import gated_activation_triton, logprobs_triton, norms_triton, rope_triton

    kernels = [
        norms_triton._norm, norms_triton._norm_gradients, rope_triton._rotate, gated_activation_triton._activation,
        gated_activation_triton._activation_gradients, logprobs_triton._sum_blocks, logprobs_triton._join_blocks,
        logprobs_triton._logit_gradients,
    ]  # fmt: skip
    weight = leaf(128, dtype=torch.bfloat16)

    def run(tokens):
        x = leaf(tokens, 8, 128, dtype=torch.bfloat16)
        cos, sin = (t.to(DEVICE) for t in angles(torch.arange(tokens), 128, torch.bfloat16))
        normed, added = add_rms_norm(x, x, weight, 1e-6)
        q, k = apply_rope(rms_norm(normed, weight, 1e-6), added, cos, sin)
        flat = swiglu(q, k).view(tokens, 1024)
        value, entropy = logprobs(flat, torch.zeros(tokens, dtype=torch.int64, device=DEVICE))
        torch.autograd.grad((value + entropy).sum(), (x, weight))

    def num_compiled():
        caches = [getattr(kernel, "device_caches", None) for kernel in kernels]
        if not all(caches):
            pytest.skip("this Triton keeps its compiled kernels elsewhere")
        return [len(cache[torch.cuda.current_device()][0]) for cache in caches]

    run(48)
    before = num_compiled()
    for tokens in (1, 2, 16, 17, 1000, 4096):
        run(tokens)
    assert num_compiled() == before


@on_cpu
def test_kernels_under_the_interpreter():
    run_interpreted(__file__)
