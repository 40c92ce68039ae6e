"""Every logprob of the trainer and of the HF engine is that of Gemma 2's capped logits, and of others' plain ones.

Expected values come from transformers' own forward, one sequence at a time, with PEFT's own layers.
"""

import math

import pytest
import torch

from rlbench.checks.trainer_logprobs import pack_sequences, trainer_logprobs, truncated_logprobs
from rlbench.config.preference import PreferenceConfig
from rlbench.config.schema import AlgorithmConfig, LoraConfig
from rlbench.data.packing import pack
from rlbench.data.preferences import PreferenceRow
from rlbench.data.supervised import given_sample
from rlbench.engine.hf_engine import HfEngine
from rlbench.models.base import share_base
from rlbench.models.lora import add_lora, unfuse_lora
from rlbench.records import SamplingParams
from rlbench.training.preference_step import make_batch, sequence_logps
from rlbench.training.sft_step import held_out_loss
from rlbench.training.step import fixed_columns, reference_logprobs, train_step
from tests.models.random_base import random_base
from tests.models.test_lora import randomise
from tests.training.test_step import make_policy, make_samples

FEATURES = {
    "gemma2": {"final_logit_softcapping": 3.0, "attn_logit_softcapping": 2.0},
    "gemma3_text": {"layer_types": ["sliding_attention", "full_attention"]},
    "mistral": {},
}
PROMPTS = [(5, 6, 7, 8, 9, 10, 11), (5, 6, 7, 8, 9, 10, 11), (12, 13)]
COMPLETIONS = [(20, 21, 22, 23, 24, 25, 26, 27), (30,), (40, 41, 42)]
T = 0.8


@pytest.fixture(params=FEATURES)
def base(request):
    return random_base(request.param, sliding_window=4, **FEATURES[request.param])


def logits(base, prompt, completion, *, use_adapter=True):
    """[len(completion), V], with the adapter of `make_policy`."""
    model = add_lora(share_base(base), LoraConfig(rank=4, alpha=8), seed=0)
    unfuse_lora(model)
    randomise(model)
    if not use_adapter:
        model.disable_adapter_layers()
    with torch.no_grad():
        return model(input_ids=torch.tensor([[*prompt, *completion]])).logits[0, len(prompt) - 1 : -1]


def logprobs(base, pairs, temperature=1.0, top_k=0, **options):
    """[N] of all completions."""
    found = []
    for prompt, completion in pairs:
        scores = logits(base, prompt, completion, **options) / temperature
        if top_k:
            scores = scores.masked_fill(scores < scores.topk(top_k).values[:, -1:], -math.inf)
        found.append(scores.log_softmax(-1)[range(len(completion)), list(completion)])
    return torch.cat(found)


def pairs_of(samples):
    return [(sample.prompt_token_ids, sample.token_ids) for sample in samples]


def assert_close(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=2e-5)


def test_the_cap_matters():
    base = random_base("gemma2", sliding_window=4, **FEATURES["gemma2"])
    capped = logprobs(base, list(zip(PROMPTS, COMPLETIONS, strict=True)))
    base.config.final_logit_softcapping = None

    assert (logprobs(base, list(zip(PROMPTS, COMPLETIONS, strict=True))) - capped).abs().max() > 1


@pytest.mark.parametrize("use_adapter", [True, False])
def test_logprobs_of_the_checks(base, use_adapter):
    policy = make_policy(base)
    batch = pack_sequences(PROMPTS, COMPLETIONS, policy.device)
    pairs = list(zip(PROMPTS, COMPLETIONS, strict=True))

    found = trainer_logprobs(policy, batch, use_adapter=use_adapter, temperatures=(1.0, T))

    for values, temperature in zip(found, (1.0, T), strict=True):
        assert_close(values, logprobs(base, pairs, temperature, use_adapter=use_adapter))


def test_truncated_logprobs_of_the_checks(base):
    policy = make_policy(base)
    completions = [tuple(logits(base, p, c).argmax(-1).tolist())[:1] for p, c in zip(PROMPTS, COMPLETIONS, strict=True)]

    found = truncated_logprobs(
        policy,
        pack_sequences(PROMPTS, completions, policy.device),
        SamplingParams(max_tokens=1, temperature=T, top_k=5),
    )

    assert_close(found, logprobs(base, list(zip(PROMPTS, completions, strict=True)), T, top_k=5))


@pytest.mark.parametrize("options", [{}, {"loss": "gspo"}, {"kl_coef": 0.1, "kl_in": "loss"}])
def test_logprobs_of_a_policy_step(base, options):
    policy, samples = make_policy(base), make_samples()
    batches = pack(samples, tokens_per_microbatch=1000, device="cpu")
    config = AlgorithmConfig(**{"importance": "off", **options})
    optimizer = torch.optim.SGD(policy.parameters(), lr=0.0)

    result = train_step(policy, batches, optimizer, config, temperature=T, max_grad_norm=0)

    assert_close(result.logprobs[0], logprobs(base, pairs_of(samples), T))
    expected = logprobs(base, pairs_of(samples), T, use_adapter=False)
    assert_close(reference_logprobs(policy, batches[0], T), expected)


def test_logprobs_on_the_samplers_support(base):
    policy, samples = make_policy(base), make_samples()
    sampler = SamplingParams(max_tokens=9, temperature=T, top_k=97)  # of 98
    batches = pack(samples, tokens_per_microbatch=1000, device="cpu")
    config = AlgorithmConfig(importance="off", support="sampler", num_updates=2)
    (columns,) = fixed_columns(policy, batches, config, temperature=T, seed=0, sampler=sampler)
    pairs = pairs_of(samples)
    scores = torch.cat([logits(base, *pair) for pair in pairs]) / T
    lowest = (scores.log_softmax(-1)).topk(98).values[:, -2:]  # the last one inside, the only one outside

    assert_close(columns["support_floor"], lowest.mean(-1))
    is_inside = logprobs(base, pairs, T) > columns["support_floor"]
    assert_close(columns["old_logprobs"][is_inside], logprobs(base, pairs, T, top_k=97)[is_inside])


def test_loss_of_supervised_fine_tuning(base):
    rows = [[*p, *c] for p, c in zip(PROMPTS, COMPLETIONS, strict=True)]
    samples = [given_sample(str(i), row, [False, *[True] * (len(row) - 1)]) for i, row in enumerate(rows)]
    found = held_out_loss(make_policy(base), pack(samples, tokens_per_microbatch=1000, device="cpu"))

    expected = -logprobs(base, [(row[:1], row[1:]) for row in rows]).mean()
    assert found["loss/nll"] == pytest.approx(float(expected), rel=1e-5)


def test_logps_of_preferences(base):
    row = PreferenceRow(
        row_id="0", prompt_token_ids=PROMPTS[0], completions=COMPLETIONS[:2], is_desirable=None
    )  # fmt: skip
    batch = make_batch([row], PreferenceConfig(), tokens_per_microbatch=1000, device=torch.device("cpu"))

    found = sequence_logps(make_policy(base), batch.microbatches[0])

    expected = [logprobs(base, [(PROMPTS[0], completion)]).sum() for completion in COMPLETIONS[:2]]
    assert_close(found.detach(), torch.stack(expected))


def test_the_hf_engine_draws_and_scores_with_them(base):
    """Prompts longer and shorter than the window of 4, completions that leave it."""
    engine = HfEngine(base)
    policy = make_policy(base)
    engine.sync(policy.adapter(), 1)

    drawn = engine.generate(PROMPTS, SamplingParams(max_tokens=9), [1, 2, 3])

    pairs = [(prompt, completion.token_ids) for prompt, completion in zip(PROMPTS, drawn, strict=True)]
    assert_close(torch.tensor([x for c in drawn for x in c.sampling_logprobs]), logprobs(base, pairs))
    scores = engine.score(PROMPTS, COMPLETIONS)
    expected = logprobs(base, list(zip(PROMPTS, COMPLETIONS, strict=True)))
    assert_close(torch.tensor([x for part in scores for x in part]), expected)
