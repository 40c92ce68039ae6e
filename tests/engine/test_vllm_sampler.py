"""Plain logprobs beside the sampled ones, for the sampler of vLLM's second model runner, which only GPUs run."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from rlbench.engine.vllm_requests import plain_key
from rlbench.engine.vllm_sampler import report_plain_logprobs

TEMPERATURE = torch.tensor([0.5, 0.0, 1.0, 2.0])  # by request
ROWS = np.array([2, 0, 1])  # request of each row
SAMPLED = torch.tensor([3, 0, 4])


class Sampler:
    """As far as `vllm.v1.worker.gpu.sample.sampler.Sampler` matters here: it writes into the logits."""

    def __init__(self, num_logprobs: int) -> None:
        self.sampling_states = SimpleNamespace(
            max_num_logprobs=lambda rows: num_logprobs, temperature=SimpleNamespace(gpu=TEMPERATURE)
        )

    def __call__(self, logits, input_batch):
        logits.fill_(0.0)
        reported = SimpleNamespace(
            logprob_token_ids=torch.stack([SAMPLED, torch.full_like(SAMPLED, 7)], dim=1),
            logprobs=torch.full((3, 2), -1.0),
        )
        return SimpleNamespace(sampled_token_ids=SAMPLED[:, None].int(), logprobs_tensors=reported)


def sample(num_logprobs: int):
    torch.manual_seed(0)
    logits = torch.randn(3, 8)
    expected = logits / torch.tensor([1.0, 0.5, 1.0])[:, None]
    sampler = Sampler(num_logprobs)
    report_plain_logprobs(sampler)
    report_plain_logprobs(sampler)
    batch = SimpleNamespace(idx_mapping_np=ROWS, expanded_idx_mapping=torch.from_numpy(ROWS))
    return sampler(logits, batch).logprobs_tensors, expected.log_softmax(-1)[torch.arange(3), SAMPLED]


def test_column_one_becomes_the_plain_logprob_under_another_token_id():
    reported, expected = sample(1)

    torch.testing.assert_close(reported.logprobs[:, 1], expected)
    assert reported.logprobs[:, 0].tolist() == [-1.0] * 3
    assert reported.logprob_token_ids[:, 1].tolist() == [plain_key(token) for token in SAMPLED.tolist()]


def test_other_requests_are_left_alone():
    reported, _ = sample(0)

    assert reported.logprob_token_ids[:, 1].tolist() == [7] * 3 and reported.logprobs[:, 1].tolist() == [-1.0] * 3


def test_an_unknown_sampler_is_refused():
    with pytest.raises(ValueError, match="whose plain logprobs cannot be read"):
        report_plain_logprobs(SimpleNamespace())
