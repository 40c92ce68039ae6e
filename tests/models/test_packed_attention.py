"""Shared-prompt packing computes what plain, one-sequence-at-a-time forwards compute: hidden states and gradients."""

import pytest
import torch

from rlbench.config.schema import LoraConfig
from rlbench.data.packing import pack
from rlbench.models.attention import PackedAttention, Scoring, use_rlbench_attention
from rlbench.models.base import share_base
from rlbench.models.policy import Policy
from tests.data.test_packing import make_sample
from tests.models.random_base import random_base
from tests.models.test_lora import gradients, randomise

SAMPLES = [
    make_sample("a", [5, 6, 7, 8, 9], [10, 11, 12]),
    make_sample("a", [5, 6, 7, 8, 9], [13]),  # a completion of one token has no input of its own
    make_sample("a", [5, 6, 7, 8, 9], [14, 15, 16, 17, 18, 19, 20]),
    make_sample("b", [21], [22, 23]),
    make_sample("c", [24, 25, 26, 27, 28, 29, 30, 31], [32, 33, 34, 35]),
    make_sample("c", [24, 25, 26, 27, 28, 29, 30, 31], [36, 37]),
]


def make_policy(base) -> Policy:
    policy = Policy(base, LoraConfig(rank=4, alpha=8), seed=0)
    randomise(policy.model)
    return policy


def loss_weights(num_rows: int, dim: int) -> torch.Tensor:
    return torch.randn(num_rows, dim, generator=torch.Generator().manual_seed(2))


FEATURES = {
    "gemma2, a window in the first layer, capped scores": (
        "gemma2",
        {"layer_types": ["sliding_attention", "full_attention"], "attn_logit_softcapping": 2.0},
    ),
    "gemma3, windows in two of three layers": (
        "gemma3_text",
        {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"], "num_hidden_layers": 3},
    ),
    "mistral, a window in every layer": ("mistral", {}),
}


@pytest.fixture(params=FEATURES)
def windowed_base(request):
    """Windows of 4 positions: shorter than most of `SAMPLES`, longer than some."""
    family, options = FEATURES[request.param]
    return random_base(family, sliding_window=4, **options)


def plain_hidden(base, policy: Policy) -> torch.Tensor:
    """[N, D] by transformers' own attention, each sample alone, with the policy's adapter."""
    policy._tree.set_attn_implementation("eager")
    rows = []
    for sample in SAMPLES:
        token_ids = torch.tensor([[*sample.prompt_token_ids, *sample.token_ids[:-1]]])
        hidden = policy._tree.base_model(input_ids=token_ids).last_hidden_state[0]
        rows.append(hidden[len(sample.prompt_token_ids) - 1 :])
    return torch.cat(rows)


@pytest.mark.parametrize("budget", [1000, 17])
def test_packed_hidden_states_and_gradients_equal_the_plain_layout(tiny_base, budget):
    check_packing(tiny_base, budget)


def test_windows_are_of_positions_and_scores_are_capped(windowed_base):
    check_packing(windowed_base, 1000)


def check_packing(base, budget):
    packed, plain = make_policy(base), make_policy(base)
    batches = pack(SAMPLES, tokens_per_microbatch=budget, device="cpu")
    expected = plain_hidden(base, plain)
    weights = loss_weights(*expected.shape)
    (expected * weights).sum().backward()
    order = {int(t): i for i, t in enumerate(t for s in SAMPLES for t in s.token_ids)}

    for batch in batches:
        rows = torch.tensor([order[int(t)] for t in batch.targets])
        hidden = packed.hidden(batch)
        torch.testing.assert_close(hidden, expected[rows].detach(), rtol=1e-4, atol=1e-5)
        (hidden * weights[rows]).sum().backward()

    assert (len(batches) > 1) == (budget == 17)
    for (name, ours), theirs in zip(gradients(packed.model).items(), gradients(plain.model).values(), strict=True):
        rounding = 1e-5 * max(1.0, theirs.abs().max().item())  # of float32 sums, which memory's alignment moves
        torch.testing.assert_close(
            ours, theirs, rtol=1e-3, atol=rounding, msg=lambda text, name=name: f"{name}: {text}"
        )


def test_the_reference_policy_is_the_base_without_the_adapter(tiny_base):
    policy = make_policy(tiny_base)
    (batch,) = pack(SAMPLES[:1], tokens_per_microbatch=100, device="cpu")
    base_hidden = tiny_base.base_model(input_ids=batch.token_ids[None]).last_hidden_state[0][batch.predict_rows]

    with policy.reference():
        reference = policy.hidden(batch)

    torch.testing.assert_close(reference, base_hidden, rtol=1e-4, atol=1e-5)
    assert not reference.requires_grad
    assert (policy.hidden(batch) - base_hidden).abs().max() > 0.01


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sliding_window": 8}, "llama has sliding_window=8"),
        ({"attn_logit_softcapping": 50.0}, "llama has attn_logit_softcapping=50.0"),
        ({"use_bidirectional_attention": True}, "llama has use_bidirectional_attention"),
        ({"layer_types": ["full_attention", "linear_attention"]}, "llama has layers of type linear_attention"),
    ],
)
def test_an_attention_feature_that_is_not_computed_is_refused(change, message, tiny_base):
    tree = share_base(tiny_base)
    for name, value in change.items():
        setattr(tree.config, name, value)

    with pytest.raises(ValueError, match=f"model.path: {message}, which rlbench's attention does not compute"):
        use_rlbench_attention(tree)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(
    "scoring", [Scoring(0.125), Scoring(0.125, 4), Scoring(0.125, None, 2.0), Scoring(0.125, 4, 2.0)]
)
def test_flash_attention_on_the_gpu_is_the_padded_attention(scoring):
    (batch,) = pack(SAMPLES, tokens_per_microbatch=1000, device="cuda")
    generator = torch.Generator("cuda").manual_seed(0)
    shapes = [(1, 4, len(batch.token_ids), 64), *[(1, 2, len(batch.token_ids), 64)] * 2]
    heads = [torch.randn(shape, generator=generator, device="cuda").bfloat16() for shape in shapes]

    exact = PackedAttention(batch.layout, torch.float32).attend(0, *(x.float() for x in heads), scoring)
    found = PackedAttention(batch.layout, torch.bfloat16).attend(0, *heads, scoring)

    torch.testing.assert_close(found.float(), exact, rtol=2e-2, atol=2e-2)
