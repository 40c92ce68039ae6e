"""Packed attention with shared prompts against one plain attention a sequence, values and gradients."""

import importlib
import re
from types import SimpleNamespace

import pytest
import torch
from torch.nn.attention.flex_attention import create_block_mask

from rlbench_kernels import flash_attention_2, flash_attention_4
from rlbench_kernels.flexible_attention import flexible_attention
from rlbench_kernels.gathered_attention import GatheredKeys, gather_rows, gathered_attention, sum_copies
from rlbench_kernels.packed_attention import (
    SharedPromptLayout,
    describe_backend,
    join_parts,
    packed_attention,
    packed_attention_backend,
)
from tests.kernels.interpreter import IS_INTERPRETED, on_cpu, run_interpreted

GROUPS = [(5, [2, 0, 7]), (1, [1]), (8, [3, 3, 1, 4]), (3, []), (2, [0])]
MODULE = importlib.import_module(SharedPromptLayout.__module__)
HAS_GPU = torch.cuda.is_available()
gpu = pytest.mark.gpu
needs_gpu = pytest.mark.skipif(not HAS_GPU, reason="needs a CUDA device")


def inputs(groups, heads, kv_heads, dim, dtype=torch.float64, device="cpu"):
    num_tokens = sum(p + sum(c) for p, c in groups)
    generator = torch.Generator().manual_seed(0)
    shapes = [(num_tokens, heads, dim), (num_tokens, kv_heads, dim), (num_tokens, kv_heads, dim)]
    return [torch.randn(s, generator=generator).to(device, dtype).requires_grad_() for s in shapes]


def plain_attention(q, k, v, groups, scale, window=None, softcap=None):
    """float64 [T, Hq, d]: each prompt, and each prompt with one completion, by an explicit softmax."""
    q, k, v = q.double(), k.double(), v.double()
    repeat = q.shape[1] // k.shape[1]
    parts, start = [], 0
    for prompt, completions in groups:
        prompt_rows = list(range(start, start + prompt))
        sequences = [(prompt_rows, 0)]
        first = start + prompt
        for length in completions:
            sequences.append((prompt_rows + list(range(first, first + length)), prompt))
            first += length
        for rows, num_hidden in sequences:
            mine, keys, values = q[rows], *(x[rows].repeat_interleave(repeat, 1) for x in (k, v))
            scores = torch.einsum("qhd,khd->hqk", mine, keys) * scale
            scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
            distance = torch.arange(len(rows))[:, None] - torch.arange(len(rows))
            is_hidden = (distance < 0) | (distance >= (window or len(rows)))
            scores = scores.masked_fill(is_hidden.to(q.device), -torch.inf)
            parts.append(torch.einsum("hqk,khd->qhd", scores.softmax(-1), values)[num_hidden:])
        start = first
    return torch.cat(parts)


def errors(groups, heads, kv_heads, dim, dtype, device="cpu", attention=packed_attention, **features):
    """Relative Frobenius errors of the result and the gradients of q, k and v; of a gradient that is exactly zero, as
    those of q and k where each row sees one key, relative to v's."""
    leaves = inputs(groups, heads, kv_heads, dim, dtype, device)
    exact_leaves = [x.detach().double().requires_grad_() for x in leaves]
    found = attention(*leaves, SharedPromptLayout.from_lengths(groups, device), scale=dim**-0.5, **features)
    exact = plain_attention(*exact_leaves, groups, dim**-0.5, **features)
    upstream = torch.randn(exact.shape, generator=torch.Generator().manual_seed(1)).to(device)
    grads = torch.autograd.grad(found, leaves, upstream.to(found.dtype))
    exact_grads = torch.autograd.grad(exact, exact_leaves, upstream.to(found.dtype).double())
    pairs = zip((found, *grads), (exact, *exact_grads), strict=True)
    return [float(((a.double() - b).norm() / (b.norm() or exact_grads[2].norm())).detach()) for a, b in pairs]


@pytest.mark.parametrize("kv_heads", [1, 2, 6])
def test_the_reference_is_plain_attention(kv_heads):
    assert max(errors(GROUPS, 6, kv_heads, 4, torch.float64)) < 1e-12


@pytest.mark.parametrize("window", [None, 1, 2, 5, 9, 40])
@pytest.mark.parametrize("softcap", [None, 0.7])
def test_the_reference_has_windows_of_positions_and_capped_scores(window, softcap):
    assert max(errors(GROUPS, 6, 2, 4, torch.float64, window=window, softcap=softcap)) < 1e-12


@pytest.mark.parametrize("window", [None, 1, 2, 5, 9, 40])
@pytest.mark.parametrize("softcap", [None, 0.7])
def test_the_blocks_of_flex_attention_see_the_same_keys(window, softcap):
    groups = [*GROUPS, (70, [100, 9])]  # more than a block
    leaves = [x.detach() for x in inputs(groups, 6, 2, 16, torch.float32)]  # torch has no backward pass of it on a CPU
    mask = SharedPromptLayout.from_lengths(groups, "cpu").block_mask(window)

    found = flexible_attention(*leaves, mask, scale=0.25, softcap=softcap)

    exact = plain_attention(*leaves, groups, 0.25, window, softcap)
    torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("window", [None, 1, 200])
@pytest.mark.parametrize(
    "groups", [[(5, [2])], [(300, [600, 9, 128]), (1, [200, 0, 1]), (300, [])], [(128, [128, 128])]]
)
def test_blocks_are_those_that_torch_finds(groups, window):
    mask = SharedPromptLayout.from_lengths(groups, "cpu").block_mask(window)

    expected = create_block_mask(mask.mask_mod, None, None, *mask.seq_lengths, device="cpu")

    assert torch.equal(mask.to_dense(), expected.to_dense())
    for name in ("kv_num_blocks", "full_kv_num_blocks", "q_num_blocks", "full_q_num_blocks"):
        assert torch.equal(getattr(mask, name), getattr(expected, name)), name
    for kind in ("", "full_"):
        counts, indices = (getattr(mask, f"{kind}kv_{part}")[0, 0] for part in ("num_blocks", "indices"))
        others = getattr(expected, f"{kind}kv_indices")[0, 0]
        assert all(torch.equal(a[:n], b[:n]) for n, a, b in zip(counts, indices, others, strict=True))


def flash_by_the_book(q, k, v, q_starts, k_starts, *_, is_causal, scale, window=None):
    """What flash attention promises: the last query of a sequence sees its last key and the window - 1 before it."""
    assert is_causal
    parts = []
    for i in range(len(q_starts) - 1):
        rows, keys = (slice(int(starts[i]), int(starts[i + 1])) for starts in (q_starts, k_starts))
        mine, theirs, values = q[rows], *(x[keys].repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
        scores = torch.einsum("qhd,khd->hqk", mine, theirs) * scale
        place = torch.arange(len(mine))[:, None] + len(theirs) - len(mine) - torch.arange(len(theirs))
        scores = scores.masked_fill((place < 0) | (place >= (window or len(theirs))), -torch.inf)
        parts.append(torch.einsum("hqk,khd->qhd", scores.softmax(-1), values))
    return torch.cat(parts)


def gradients_by_the_book(grad, q, k, v, out, lse, *args, **options):
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    with torch.enable_grad():
        return torch.autograd.grad(flash_by_the_book(*leaves, *args, **options), leaves, grad)


@pytest.mark.parametrize("window", [None, 1, 2, 5, 9])
def test_gathered_keys_are_those_that_each_row_sees(window, monkeypatch):
    monkeypatch.setattr(flash_attention_2, "forward", lambda *a, **o: (flash_by_the_book(*a, **o), torch.zeros(1)))
    monkeypatch.setattr(flash_attention_2, "gradients", gradients_by_the_book)

    def gathered(q, k, v, layout, *, scale, window=None):
        bounds = layout.sequence_starts, layout.max_sequence, layout.gathered_keys(window)
        return gathered_attention(q, k, v, *bounds, flash_attention_2, scale=scale, window=window)

    assert max(errors(GROUPS, 6, 2, 4, torch.float64, attention=gathered, window=window)) < 1e-6


@pytest.mark.parametrize("window", [None, 1, 2, 5, 40])
def test_copies_are_where_the_gathered_rows_say(window):
    keys = GatheredKeys.from_groups(GROUPS, window, torch.device("cpu"))

    assert torch.equal(keys.copies, keys.rows.long().argsort(stable=True).int())
    counts = torch.bincount(keys.rows)
    assert torch.equal(keys.copy_starts.diff(), counts.int())
    assert keys.longest == int(keys.starts.diff().max())
    layout = SharedPromptLayout.from_lengths(GROUPS, "cpu")
    assert window is not None or layout.num_gathered == len(layout.gathered_keys(None).rows)


@pytest.mark.parametrize("heads", [(2, 24), (5, 256), (8, 128)])
@pytest.mark.parametrize("is_strided", [False, True])
def test_keys_are_gathered_and_their_gradients_summed(heads, is_strided):
    device = "cuda" if HAS_GPU and not IS_INTERPRETED else "cpu"
    keys = GatheredKeys.from_groups(GROUPS, None, torch.device(device))
    generator = torch.Generator().manual_seed(0)
    num_rows = sum(p + sum(c) for p, c in GROUPS)
    k, v = (laid_out(torch.randn(num_rows, *heads, generator=generator).to(device), is_strided) for _ in range(2))

    found = gather_rows(k, v, keys.rows)

    assert torch.equal(found[0], k[keys.rows]) and torch.equal(found[1], v[keys.rows])
    parts = [laid_out(torch.randn(x.shape, generator=generator).to(device).half(), is_strided) for x in found]
    sums = sum_copies(*parts, keys)
    for part, total in zip(parts, sums, strict=True):
        exact = torch.zeros(k.shape, dtype=torch.float64, device=device).index_add_(0, keys.rows, part.double())
        assert total.dtype == torch.float16
        torch.testing.assert_close(total.double(), exact, rtol=2**-11, atol=1e-7)  # rounded once


def test_a_window_over_everything_is_none(monkeypatch):
    layout = SharedPromptLayout.from_lengths(GROUPS, "cpu")
    assert layout.max_context == 12
    monkeypatch.setattr(SharedPromptLayout, "gathered_keys", None)
    leaves = inputs(GROUPS, 2, 2, 4)

    found = packed_attention(*leaves, layout, scale=1.0, window=12)

    assert torch.equal(found, packed_attention(*leaves, layout, scale=1.0))


@pytest.mark.parametrize(
    ("asked", "features", "expected"),
    [
        ("auto", {"window": 512}, "flash"),
        ("auto", {"softcap": 50.0}, "flex"),
        ("auto", {"softcap": 50.0, "window": 512}, "flex"),
        ("flex", {}, "flex"),
        ("reference", {"softcap": 50.0}, "reference"),
        ("flash", {"softcap": 50.0}, "caps attention scores at 50.0, which flash does not compute"),
        ("flash4", {"softcap": 50.0}, "caps attention scores at 50.0, which flash4 does not compute"),
        ("flash4", {"window": 512}, "sliding window of 512 tokens, which flash4 is not used for"),
    ],
)
def test_only_backends_that_compute_a_feature_are_chosen(asked, features, expected, monkeypatch):
    monkeypatch.setattr(flash_attention_4, "problem", lambda device: "")
    monkeypatch.setenv("RLBENCH_ATTENTION", asked)
    q = SimpleNamespace(is_cuda=True, dtype=torch.bfloat16, shape=(16384, 32, 256), device=torch.device("cuda"))

    if " " not in expected:
        assert packed_attention_backend(q, **features) == expected
        return
    with pytest.raises(ValueError, match=f"RLBENCH_ATTENTION={asked} cannot run: .*{expected}"):
        packed_attention_backend(q, **features)


@pytest.mark.parametrize(
    ("features", "expected"),
    [
        ({}, "FlashAttention 4 for large batches, else torch's flash attention"),
        ({"window": 512}, ".* torch's flash attention; with windows of 512 tokens torch's flash attention"),
        (
            {"window": 4096, "softcap": 50.0},
            r"torch's FlexAttention \(scores are capped at 50.0\); its first calls compile",
        ),
    ],
)
def test_a_run_is_told_what_its_attention_is(features, expected, monkeypatch):
    monkeypatch.setattr(flash_attention_4, "problem", lambda device: "")

    assert re.fullmatch(expected, describe_backend(torch.device("cuda"), **features))


@gpu
@needs_gpu
@pytest.mark.parametrize("window", [None, 1, 30, 200])
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("dim", [64, 256])
def test_windows_and_capped_scores_match_float64(window, softcap, dim):
    for groups in ([*GROUPS, (200, [300, 17, 1, 129]), (33, [64] * 5)], [(130, []), (1, [0])], [(700, [650, 20])]):
        found = errors(groups, 8, 4, dim, torch.bfloat16, "cuda", window=window, softcap=softcap)
        assert max(found) < 1e-2, groups


@pytest.mark.parametrize(
    ("groups", "queries_per_key", "is_gathered"),
    [
        ([(512, [100, 800])], 4, True),
        ([(4096, [20] * 64)], 1, False),  # 263,000 keys for 5,376 tokens
        ([(150, [250] * 8)], 1, True),  # 1.6 keys a token
        ([(512, [450] * 16)], 1, False),  # 2.1 keys a token
        ([(512, [450] * 16)], 4, True),
        ([(700, [120] * 8)], 4, False),  # 4.4 keys a token
        ([(700, [120] * 8)], 7, True),
        ([(512, []), (300, [0, 0])], 4, False),  # nothing is shared: one call without copies
    ],
)
def test_keys_are_gathered_where_copies_are_few(groups, queries_per_key, is_gathered):
    assert MODULE._is_gathered(SharedPromptLayout.from_lengths(groups, "cpu"), queries_per_key) == is_gathered


def test_the_reference_runs_on_a_cpu():
    assert packed_attention_backend(torch.zeros(2, 1, 8, dtype=torch.bfloat16)) == "reference"


@pytest.mark.parametrize("name", ["flash4", "flash", "fast"])
def test_a_backend_that_cannot_run_is_refused(name, monkeypatch):
    monkeypatch.setenv("RLBENCH_ATTENTION", name)

    with pytest.raises(ValueError, match=f"RLBENCH_ATTENTION='?{name}'?"):
        packed_attention_backend(torch.zeros(2, 1, 8, dtype=torch.bfloat16))


@pytest.mark.parametrize(
    ("problem", "num_tokens", "expected"),
    [("", 16384, "flash4"), ("", 4096, "flash4"), ("", 4095, "flash"), ("not installed", 16384, "flash")],
)
def test_large_batches_take_flash_attention_4_where_it_is_installed(problem, num_tokens, expected, monkeypatch):
    monkeypatch.setattr(flash_attention_4, "problem", lambda device: problem)
    q = SimpleNamespace(is_cuda=True, dtype=torch.bfloat16, shape=(num_tokens, 32, 128), device=torch.device("cuda"))

    assert packed_attention_backend(q) == expected


@gpu
@needs_gpu
@pytest.mark.parametrize("dim", [64, 128, 256])
@pytest.mark.parametrize("kv_heads", [2, 8])
@pytest.mark.parametrize("backend", ["flash4", "flash"])
@pytest.mark.parametrize("form", ["two calls", "gathered"])
def test_flash_attention_matches_float64(form, dim, kv_heads, backend, monkeypatch):
    monkeypatch.setattr(MODULE, "_is_gathered", lambda *_: form == "gathered")
    groups = [*GROUPS, (200, [300, 17, 1, 129]), (33, [64] * 5)]
    if backend == "flash4" and (problem := flash_attention_4.problem(torch.device("cuda"))):
        pytest.skip(problem)
    monkeypatch.setenv("RLBENCH_ATTENTION", backend)

    assert max(errors(groups, 8, kv_heads, dim, torch.bfloat16, "cuda")) < 8e-3
    assert max(errors([(130, []), (1, [0])], 8, kv_heads, dim, torch.bfloat16, "cuda")) < 8e-3  # no second call


@gpu
@needs_gpu
@pytest.mark.parametrize("backend", ["flash4", "flash"])
@pytest.mark.parametrize("form", ["two calls", "gathered"])
def test_deterministic_algorithms_give_the_same_gradients_again(form, backend, monkeypatch):
    monkeypatch.setattr(MODULE, "_is_gathered", lambda *_: form == "gathered")
    if backend == "flash4" and (problem := flash_attention_4.problem(torch.device("cuda"))):
        pytest.skip(problem)
    monkeypatch.setenv("RLBENCH_ATTENTION", backend)
    groups = [(200, [300, 17, 1, 129]), (33, [64] * 5), (900, [])]
    leaves = inputs(groups, 8, 2, 128, torch.bfloat16, "cuda")
    layout = SharedPromptLayout.from_lengths(groups, "cuda")
    torch.use_deterministic_algorithms(True)
    try:
        first, second = (
            torch.autograd.grad(packed_attention(*leaves, layout, scale=0.1).square().sum(), leaves) for _ in range(2)
        )
    finally:
        torch.use_deterministic_algorithms(False)

    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("heads", [3, 64])
@pytest.mark.parametrize("is_strided", [False, True])
def test_two_parts_of_a_softmax_join_to_the_whole(heads, is_strided):
    device = "cuda" if HAS_GPU and not IS_INTERPRETED else "cpu"
    num_rows = 5 if device == "cpu" else 3000
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(heads, num_rows, 11, generator=generator).to(device) * 5  # [H, T, keys]
    values = torch.randn(heads, 11, 80, generator=generator).to(device)
    whole = torch.einsum("htk,hkd->thd", scores.softmax(-1), values)
    parts = [
        (laid_out(torch.einsum("htk,hkd->thd", s.softmax(-1), v), is_strided), s.logsumexp(-1))
        for s, v in ((scores[..., :4], values[:, :4]), (scores[..., 4:], values[:, 4:]))
    ]
    rows = torch.tensor([0, 2, *range(4, num_rows)], device=device)
    first = parts[0][0].clone()

    join_parts(*parts[0], *parts[1], rows)

    torch.testing.assert_close(parts[0][0][rows], whole[rows])
    torch.testing.assert_close(parts[0][1][:, rows], scores.logsumexp(-1)[:, rows])
    assert torch.equal(parts[0][0][[1, 3]], first[[1, 3]])


def laid_out(x, is_strided):
    """[T, H, d] in memory order, or with the heads outermost."""
    return x.transpose(0, 1).contiguous().transpose(0, 1) if is_strided else x.contiguous()


@on_cpu
def test_the_join_under_the_interpreter():
    run_interpreted(__file__)


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ([(4, 2, 8), (4, 2, 8), (3, 2, 8)], "expected, got"),
        ([(4, 3, 8), (4, 2, 8), (4, 2, 8)], "no multiple"),
        ([(5, 2, 8), (5, 2, 8), (5, 2, 8)], "layout has 4 tokens"),
    ],
)
def test_what_does_not_fit_is_named(shapes, message):
    layout = SharedPromptLayout.from_lengths([(3, [1])], "cpu")

    with pytest.raises(ValueError, match=message):
        packed_attention(*(torch.zeros(s) for s in shapes), layout, scale=1.0)


@pytest.mark.parametrize("features", [{"window": 0}, {"softcap": 0.0}])
def test_a_window_or_softcap_of_nothing_is_refused(features):
    layout = SharedPromptLayout.from_lengths([(3, [1])], "cpu")

    with pytest.raises(ValueError, match="window and softcap: above 0 expected"):
        packed_attention(*[torch.zeros(4, 2, 8)] * 3, layout, scale=1.0, **features)


def test_an_empty_prompt_is_refused():
    with pytest.raises(ValueError, match="prompts of at least one token"):
        SharedPromptLayout.from_lengths([(0, [2])], "cpu")
