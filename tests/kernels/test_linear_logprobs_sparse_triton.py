"""`grad="sparse"` behind the Triton kernels: on the GPU, and for small sizes under Triton's interpreter."""

import warnings
from typing import Any

import pytest
import torch

import rlbench_kernels.linear_logprobs_reference as reference
from rlbench_kernels import SparseGradient, linear_logprobs, linear_token_loss
from rlbench_kernels.launch import has_triton
from rlbench_kernels.linear_logprobs_head import Head
from tests.kernels.interpreter import DEVICE, IS_INTERPRETED, gpu, needs_device, needs_gpu, on_cpu, run_interpreted
from tests.kernels.test_linear_logprobs import OPTIONS, columns, error, expected, inputs, options
from tests.kernels.test_linear_logprobs_sparse import (
    block_errors,
    exact_gradient,
    gradient,
    llm_inputs,
    policy_loss,
    weighted_errors,
)
from tests.kernels.test_linear_logprobs_triton import fused, small_tiles, to_device  # noqa: F401

if has_triton():
    from rlbench_kernels import linear_logprobs_fused_triton
    from rlbench_kernels.linear_logprobs_sparse_triton import SparseFusedSoftmax

ROWS = 8  # of a chunk, and so of a block, in the fixtures


@gpu
@needs_device
@pytest.mark.parametrize("tiles", ["small_tiles", "fused"])
@pytest.mark.parametrize("name", OPTIONS)
def test_values_keep_their_bits_and_sums_are_unbiased(name, tiles, request):
    request.getfixturevalue(tiles)
    hidden, weight, targets = to_device(*inputs(n=11, d=24, v=300, dtype=torch.float32))
    chosen: dict[str, Any] = {
        k: x.to(DEVICE) if isinstance(x, torch.Tensor) else x for k, x in options(name, 11, 300, torch.float32).items()
    }
    if "softcap" in chosen:
        chosen["softcap"] = 12.0
    sparse = SparseGradient(eps=3e-3, block_rows=ROWS, max_kept_frac=1.0)
    dense = linear_logprobs(hidden, weight, targets, **chosen)
    values = linear_logprobs(hidden, weight, targets, **chosen, grad="sparse", sparse=sparse)
    assert all(map(torch.equal, values, dense))
    ones = torch.ones(11, device=DEVICE)
    found = gradient(hidden, weight, targets, ones, **chosen, grad="sparse", sparse=sparse)
    exact = exact_gradient(hidden, weight, targets, ones, **chosen)
    assert sparse.stats is not None and float(sparse.stats.fallback_frac) == 0 < float(sparse.stats.tail_mass)
    assert 1e-4 < error(found, exact) < 0.1
    assert max(block_errors(found, exact, ROWS)) < 1e-5


@gpu
@needs_device
@pytest.mark.parametrize("tiles", ["small_tiles", "fused"])
def test_token_loss_and_masked_nan_rows(tiles, request):
    request.getfixturevalue(tiles)
    hidden, weight, targets = to_device(*inputs(n=11, d=24, v=300, dtype=torch.float32))
    parts = {name: x.to(DEVICE) for name, x in columns(11, dtype=torch.float32).items()}
    parts["old"] = linear_logprobs(hidden, weight, targets)[0].detach() + 0.1 * parts["advantages"].roll(1)
    poisoned = torch.where(parts["mask"][:, None], hidden.detach(), torch.nan).requires_grad_()
    sparse = SparseGradient(eps=3e-3, block_rows=ROWS, max_kept_frac=1.0)
    loss, _, _ = linear_token_loss(poisoned, weight, targets, policy_loss, parts, grad="sparse", sparse=sparse)
    (found,) = torch.autograd.grad(loss, poisoned)
    wide = hidden.detach().double().requires_grad_()
    exact_loss, _ = policy_loss(*expected(wide, weight, targets), parts)
    (exact,) = torch.autograd.grad(exact_loss, wide)
    assert (found[~parts["mask"]] == 0).all() and 1e-4 < error(found, exact) < 0.1
    assert max(weighted_errors(found, exact, ROWS)) < 1e-5


def rising_bias(v, targets, width, first, others):
    """[V]: in many rows the best score is 50 to 60 above the target's in the first section, above 60 in the next."""
    bias = torch.full((v,), others, device=targets.device)
    bias[:width] = first
    bias[targets] = 0.0
    return bias


def sparse_case(name):
    """hidden [N, D], weight, targets, options of the op and of the sparse gradient."""
    n, v = (1, 300) if name == "one row" else (21, 413)
    hidden, weight, targets = (t.detach() for t in llm_inputs(n, d=24, v=v))
    chosen = options("all", n, v, torch.float32) | {"softcap": 30.0} if name == "options" else {}
    sparse: dict[str, Any] = {"eps": 1e-3, "block_rows": 5}
    if name == "flat":
        hidden = 0.01 * hidden
    elif name == "some flat blocks":  # of the second chunk the first and the last, of the third all
        hidden[[8, 14, 15, 16, 17, 18, 19, 20]] *= 0.01
        sparse["block_rows"] = 3
    elif name.startswith("moved references"):
        chosen = {"bias": rising_bias(len(weight), targets, 128, 59.0, 64.0)}
        sparse["max_kept_frac"] = 0.0 if "dense" in name else 0.5
    elif name == "weights":
        weights = torch.linspace(-1.0, 2.0, n)
        weights[[0, 6, 7]] = torch.tensor([0.0, 0.0, -3e-6])
        sparse["row_weights"] = weights
    elif name == "nothing kept":
        sparse["eps"] = 0.999
    elif name == "everything kept":
        sparse |= {"eps": 0.0, "max_kept_frac": 1.0}
    elif name == "rows beyond a tile":
        sparse["block_rows"] = 40
    return hidden.requires_grad_(), weight, targets, chosen, sparse


CASES = (
    "llm", "one row", "options", "flat", "some flat blocks", "moved references", "moved references, dense", "weights",
    "nothing kept", "everything kept", "rows beyond a tile",
)  # fmt: skip


@pytest.mark.skipif(not IS_INTERPRETED, reason="float32 runs in the fused kernel under the interpreter alone")
@pytest.mark.parametrize("name", CASES)
def test_the_fused_form_is_the_reference(name, fused, monkeypatch):  # noqa: F811
    hidden, weight, targets, chosen, settings = sparse_case(name)
    rows = 40 if name == "rows beyond a tile" else ROWS
    monkeypatch.setattr(linear_logprobs_fused_triton, "_ROWS", rows)
    monkeypatch.setattr(reference, "_CHUNK_ELEMENTS", rows * len(weight))
    row_grads = settings.get("row_weights", torch.linspace(0.5, 1.5, len(hidden)))
    results = []
    for backend in ("triton", "reference"):
        monkeypatch.setenv("RLBENCH_KERNELS", backend)
        sparse = SparseGradient(**settings)
        found = gradient(hidden, weight, targets, row_grads, **chosen, grad="sparse", sparse=sparse)
        assert sparse.stats is not None
        results.append((found, torch.stack(sparse.stats)))
    (found, stats), (exact, exact_stats) = results
    torch.testing.assert_close(stats, exact_stats, rtol=1e-4, atol=1e-8)
    assert found.isfinite().all() and error(found, exact) < 2e-5
    dense = gradient(hidden, weight, targets, row_grads, **chosen)
    is_dense = name in ("one row", "flat", "moved references, dense", "everything kept")
    assert (error(found, dense) < 1e-5) == is_dense
    assert stats[3] == {"flat": 1.0, "moved references, dense": 1.0, "some flat blocks": stats[3]}.get(name, 0.0)
    assert (0 < stats[3] < 1) == (name == "some flat blocks")


@pytest.mark.skipif(not IS_INTERPRETED, reason="float32 runs in the fused kernel under the interpreter alone")
@pytest.mark.parametrize("name", ["llm", "moved references"])
def test_after_a_chunk_that_falls_back_the_later_ones_are_dense(name, fused):  # noqa: F811
    hidden, weight, targets, chosen, settings = sparse_case(name)
    row_grads = torch.linspace(0.5, 1.5, len(hidden))
    shares = {}
    for num_flat in (0, ROWS):
        rows = hidden.detach().clone()
        rows[:num_flat] *= 0.01
        sparse = SparseGradient(**settings)
        found = gradient(rows.requires_grad_(), weight, targets, row_grads, **chosen, grad="sparse", sparse=sparse)
        dense = gradient(rows, weight, targets, row_grads, **chosen)
        assert sparse.stats is not None
        shares[num_flat] = float(sparse.stats.fallback_frac), error(found, dense) < 1e-5
    assert shares == {0: (0.0, False), ROWS: (1.0, True)}


@pytest.mark.skipif(not IS_INTERPRETED, reason="float32 runs in the fused kernel under the interpreter alone")
def test_a_reference_moves_after_a_section_of_the_case_above(fused):  # noqa: F811
    hidden, weight, targets, chosen, _ = sparse_case("moved references")
    softmax = SparseFusedSoftmax(hidden.detach(), Head(weight, chosen["bias"], 1.0, None))
    num_moved = 0
    for rows in softmax.chunks:
        softmax.forward(hidden.detach()[rows], targets[rows], rows, with_gradient=False)
        num_moved += (softmax._references[:, : rows.stop - rows.start] != softmax._state[0]).any(0).sum()
    assert num_moved > 5, num_moved


@pytest.mark.skipif(not IS_INTERPRETED, reason="float32 runs in the fused kernel under the interpreter alone")
@pytest.mark.parametrize(("value", "max_kept_frac"), [(-torch.inf, 1.0), (torch.nan, 1.0), (torch.nan, 0.0)])
def test_masked_rows_may_hold_anything_and_others_do_not_feel_it(value, max_kept_frac, fused):  # noqa: F811
    hidden, weight, targets, _, _ = sparse_case("llm")
    row_grads = torch.where(torch.arange(21) % 3 != 1, torch.linspace(-1, 1, 21), 0.0)
    sparse = SparseGradient(eps=1e-3, block_rows=5, max_kept_frac=max_kept_frac, row_weights=row_grads)
    found = []
    for filler in (0.5, value):
        rows = torch.where(row_grads[:, None] != 0, hidden.detach(), filler).requires_grad_()
        found.append(gradient(rows, weight, targets, row_grads, grad="sparse", sparse=sparse))
    assert torch.equal(*found) and (found[0][row_grads == 0] == 0).all()
    exact = exact_gradient(hidden, weight, targets, row_grads)
    for start in range(0, 21, ROWS):
        assert max(weighted_errors(found[0][start:][:ROWS], exact[start:][:ROWS], 5)) < 1e-5


@pytest.mark.skipif(not IS_INTERPRETED, reason="float32 runs in the fused kernel under the interpreter alone")
def test_a_row_declared_without_weight_that_gets_a_gradient_is_nan(fused):  # noqa: F811
    hidden, weight, targets, _, _ = sparse_case("llm")
    sparse = SparseGradient(eps=1e-3, row_weights=(torch.arange(21) != 4).float())
    found = gradient(hidden, weight, targets, torch.ones(21), grad="sparse", sparse=sparse)
    assert found.isnan().all(1).nonzero().tolist() == [[4]] and found[torch.arange(21) != 4].isfinite().all()


@gpu
@needs_gpu
@pytest.mark.parametrize(("n", "d", "v"), [(513, 256, 49152), (1, 256, 49152), (300, 576, 50257)])
def test_bfloat16_on_the_gpu(n, d, v):
    hidden, weight, targets = to_device(*llm_inputs(n, d=d, v=v, dtype=torch.bfloat16))
    ones = torch.ones(n, device=DEVICE)
    sparse = SparseGradient()
    found = gradient(hidden, weight, targets, ones, grad="sparse", sparse=sparse)
    assert sparse.stats is not None and float(sparse.stats.fallback_frac) == 0
    assert error(found, exact_gradient(hidden, weight, targets, ones)) < 8e-3


def large_inputs(flat_blocks=(), n=4096, d=1024, v=128256):
    """As `llm_inputs` of 16 texts, made on the GPU; in bfloat16."""
    generator = torch.Generator(DEVICE).manual_seed(0)
    weight = (torch.randn(v, d, device=DEVICE, generator=generator) / d**0.5).bfloat16()
    zipf = 1.0 / torch.arange(1, v + 1, device=DEVICE)
    texts = torch.stack([torch.multinomial(zipf, 64, generator=generator) for _ in range(16)])
    order = torch.rand(n, 64, device=DEVICE, generator=generator).argsort(1)
    candidates = texts.repeat_interleave(n // 16, 0).gather(1, order)
    scores = 17.0 - 2.0 * torch.arange(1, 65, device=DEVICE).log()
    hidden = torch.cat([torch.einsum("k,nkd->nd", scores, weight[rows].float()) for rows in candidates.split(512)])
    hidden.mul_(17.0 / (hidden[:512].bfloat16() @ weight.T).amax(1).mean())
    for block in flat_blocks:  # most columns have a probability above eps in some row
        hidden[128 * block :][:128] = 1.3 * torch.randn(128, d, device=DEVICE, generator=generator)
    targets = candidates[:, 0].clone()
    targets[::7] = torch.randint(v, targets[::7].shape, device=DEVICE, generator=generator)
    return hidden.bfloat16().requires_grad_(), weight, targets


@gpu
@needs_gpu
@pytest.mark.parametrize("flat_blocks", [(), (0, 1, 5, 31), range(16, 32), range(32)])
def test_at_a_real_size_the_fused_form_is_the_reference(flat_blocks, monkeypatch):
    hidden, weight, targets = large_inputs(flat_blocks)
    weights = torch.randn(4096, device=DEVICE).masked_fill_(torch.arange(4096, device=DEVICE) % 5 == 0, 0.0)
    dense = gradient(hidden, weight, targets, weights)
    results = []
    for can_fuse in (linear_logprobs_fused_triton.can_fuse, linear_logprobs_fused_triton.can_fuse, lambda *_: False):
        monkeypatch.setattr(linear_logprobs_fused_triton, "can_fuse", can_fuse)
        sparse = SparseGradient(row_weights=weights)
        found = gradient(hidden, weight, targets, weights, grad="sparse", sparse=sparse)
        assert sparse.stats is not None
        results.append((found, torch.stack(sparse.stats)))
    (found, stats), (again, _), (exact, exact_stats) = results
    assert torch.equal(found, again)
    assert stats[3] == exact_stats[3] == len(flat_blocks) / 32 and (stats[2] > 1e-4) == (len(flat_blocks) < 32)
    torch.testing.assert_close(stats, exact_stats, rtol=0.02, atol=1e-6)
    assert error(found, exact) < 6e-3 and error(found, dense) < 1e-2
    assert max(block_errors(found, dense.double())) < 1e-2


@gpu
@needs_gpu
def test_far_targets_at_a_real_size():
    hidden, weight, _ = large_inputs()
    targets = torch.arange(4096, device=DEVICE) * 31
    chosen = {"bias": rising_bias(len(weight), targets, 2**15, 40.0, 50.0).bfloat16()}
    ones = torch.ones(4096, device=DEVICE)
    dense = gradient(hidden, weight, targets, ones, **chosen)
    for max_kept_frac in (0.0, 0.5):
        sparse = SparseGradient(max_kept_frac=max_kept_frac)
        found = gradient(hidden, weight, targets, ones, **chosen, grad="sparse", sparse=sparse)
        assert error(found, dense) < 1e-2
    values = [linear_logprobs(hidden, weight, targets, **chosen, grad=grad) for grad in ("dense", "sparse")]
    assert all(map(torch.equal, *values))


@gpu
@needs_gpu
def test_memory_and_waits_are_those_of_the_documentation():
    hidden, weight, targets = large_inputs()
    parts = {"a": torch.randn(4096, device=DEVICE)}

    def run():
        sparse = SparseGradient()
        loss, _, _ = linear_token_loss(
            hidden, weight, targets, lambda p, h, c: ((p * c["a"]).sum(), {}), parts, grad="sparse", sparse=sparse
        )
        loss.backward()
        return sparse

    run()
    hidden.grad = None
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as waits:
            warnings.simplefilter("always")
            sparse = run()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert 0 < sum("synchronizing" in str(w.message) for w in waits) <= 2  # chunks of 2048 rows
    assert sparse.stats is not None
    kept_frac = float(sparse.stats.kept_frac)
    e = 2 * 2048 * 128256
    # e of a chunk, what is kept of it, the gradient twice, float32 sums [2048, D], and less than 64 MiB
    extra = torch.cuda.max_memory_allocated() - before - 2 * hidden.nbytes - 4 * 2048 * 1024
    assert 0.95 * e < extra < e * (1 + 3 * kept_frac) + 2**26


@on_cpu
def test_kernels_under_the_interpreter():
    run_interpreted(__file__)
