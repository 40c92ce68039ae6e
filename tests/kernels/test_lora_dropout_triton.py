"""The Triton version of dropout against Philox in plain Python: on the GPU, and under the interpreter."""

import pytest
import torch

from rlbench_kernels import Lora, LoraDropout, lora_mlp, lora_qkv, seeded_dropout
from rlbench_kernels.lora_dropout import drop
from rlbench_kernels.lora_matmuls import FORMS
from tests.kernels.interpreter import DEVICE, IS_INTERPRETED, gpu, needs_device, on_cpu, run_interpreted

DTYPES = (torch.float32, torch.float16) if IS_INTERPRETED else (torch.float32, torch.float16, torch.bfloat16)
P, SEED = 0.3, 2**62 + 0xF0003039  # both words used to the top
WORD = 2**32
pytestmark = pytest.mark.usefixtures("triton_backend", "poisoned_memory")


def philox(counter, key):
    """Philox4x32-10, Salmon et al. 2011."""
    c, k = list(counter), list(key)
    for _ in range(10):
        high, low = divmod(0xD2511F53 * c[0], WORD), divmod(0xCD9E8D57 * c[2], WORD)
        c = [low[0] ^ c[1] ^ k[0], low[1], high[0] ^ c[3] ^ k[1], high[1]]
        k = [(k[0] + 0x9E3779B9) % WORD, (k[1] + 0xBB67AE85) % WORD]
    return c


def exact_mask(shape, seed):
    """bool [N, D]: column d of row n is number (d % 1024) // 256 of counter (d // 1024 * 256 + d % 256, n, 0, 0)."""
    rows = []
    for n in range(shape[0]):
        words = []
        for d in range(shape[1]):
            word = philox((d // 1024 * 256 + d % 256, n, 0, 0), (seed % WORD, seed // WORD))[d % 1024 // 256]
            signed = word - WORD if word >= WORD // 2 else word
            words.append((~signed if signed < 0 else signed) * 4.6566127342e-10)
        rows.append(words)
    return torch.tensor(rows, device=DEVICE).float() >= P


def random(*shape, dtype=torch.float32, seed=0):
    generator = torch.Generator(DEVICE).manual_seed(seed)
    return torch.randn(*shape, generator=generator, device=DEVICE).to(dtype)


def test_philox_gives_the_published_numbers():
    """Of Random123's kat_vectors: key and counter zero, and digits of pi."""
    assert philox((0, 0, 0, 0), (0, 0)) == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    pi = (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344)
    assert philox(pi, (0xA4093822, 0x299F31D0)) == [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1]


@gpu
@needs_device
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1), (3, 257), (5, 1024), (2, 2051)])
@pytest.mark.parametrize("seed", [0, 7, SEED])
def test_the_mask_is_philox_of_seed_column_and_row(shape, dtype, seed):
    wide = random(shape[0], shape[1] + 3, dtype=dtype)
    x, mask = wide[:, : shape[1]], exact_mask(shape, seed)
    expected = torch.where(mask, x.float() * (1 / (1 - P)), 0.0)
    assert torch.equal(drop(x, LoraDropout(P, seed)), expected.to(dtype))
    assert torch.equal(drop(x.T.contiguous().T, LoraDropout(P, seed)), expected.to(dtype))

    total = random(shape[0], 2 * shape[1], dtype=dtype, seed=1)
    before = total.clone()
    part = total[:, shape[1] :]
    assert drop(x, LoraDropout(P, seed), add_to=part) is part
    assert torch.equal(part, (before[:, shape[1] :].float() + expected).to(dtype))
    assert torch.equal(total[:, : shape[1]], before[:, : shape[1]])


@gpu
@needs_device
def test_how_much_is_kept_and_that_rows_columns_and_seeds_differ():
    kept = torch.stack([drop(torch.ones(64, 2048, device=DEVICE), LoraDropout(P, seed)) > 0 for seed in (1, 2)])
    assert kept.float().mean().item() == pytest.approx(1 - P, abs=0.005)
    both, expected = (kept[0] & kept[1]).float().mean().item(), (1 - P) ** 2
    assert both == pytest.approx(expected, abs=0.005)
    for a, b in ((kept[:, 1:], kept[:, :-1]), (kept[..., 256:], kept[..., :-256]), (kept[..., 1:], kept[..., :-1])):
        assert (a & b).float().mean().item() == pytest.approx(expected, abs=0.005)


@gpu
@needs_device
@pytest.mark.parametrize("form", FORMS)
def test_gradients_are_those_of_the_forwards_mask(form):
    """Against autograd of the written-out sum with the masks of `drop`."""
    size, inner = 48, 80
    weights = [random(o, d, seed=o) * d**-0.5 for o, d in ((inner, size), (inner, size), (size, inner))]
    loras = [
        Lora(random(4, w.shape[1], seed=i).requires_grad_(), random(len(w), 4, seed=i + 5).requires_grad_(), 0.5)
        for i, w in enumerate(weights)
    ]
    dropouts = [LoraDropout(P, seed) for seed in (3, 4, SEED)]
    x = random(6, size).requires_grad_()
    leaves = [x, *(t for lora in loras for t in lora[:2])]

    def plain(x, i):
        mask = drop(torch.ones_like(x), dropouts[i])
        return x @ weights[i].T + 0.5 * ((x * mask) @ loras[i].a.T) @ loras[i].b.T

    exact = [plain(x, 0), plain(x, 1)]
    exact.append(plain(torch.nn.functional.silu(exact[0]) * exact[1], 2))
    found = [
        *lora_qkv(x, weights[:2], loras[:2], dropouts=dropouts[:2], form=form),
        lora_mlp(x, *weights, loras, dropouts=dropouts, form=form),
    ]
    grads, expected = (torch.autograd.grad([y.square().sum() for y in ys], leaves) for ys in (found, exact))
    for a, b in zip([*found, *grads], [*exact, *expected], strict=True):
        assert (a - b).norm() < 2e-5 * b.norm() if DEVICE == "cpu" else (a - b).norm() < 2e-3 * b.norm()  # tf32
    (grad,) = torch.autograd.grad(seeded_dropout(x, dropouts[0]).sum(), x)
    assert torch.equal(grad, drop(torch.ones_like(x), dropouts[0]))


@on_cpu
def test_these_tests_pass_under_the_interpreter():
    run_interpreted(__file__)
