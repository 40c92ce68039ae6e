"""Plain logprobs beside the sampled ones, for the sampler of vLLM's second model runner, which only GPUs run; and how
logprobs are kept until a request is finished."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from rlbench.engine import vllm_requests
from rlbench.engine.interface import EngineCorruptedError
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


def test_column_one_becomes_the_plain_logprob():
    reported, expected = sample(1)

    torch.testing.assert_close(reported.logprobs[:, 1], expected)
    assert reported.logprobs[:, 0].tolist() == [-1.0] * 3
    assert reported.logprob_token_ids[:, 0].equal(SAMPLED)


def test_other_requests_are_left_alone():
    reported, _ = sample(0)

    assert reported.logprobs[:, 1].tolist() == [-1.0] * 3


def test_an_unknown_sampler_is_refused():
    with pytest.raises(ValueError, match="whose plain logprobs cannot be read"):
        report_plain_logprobs(SimpleNamespace())


class Processor:
    """As far as `vllm.v1.engine.logprobs.LogprobsProcessor` matters here."""

    def __init__(self, *, num_logprobs: int | None, prompt_logprobs: list | None = None) -> None:
        self.num_logprobs, self.prompt_logprobs = num_logprobs, prompt_logprobs
        self.logprobs = None if num_logprobs is None else []

    def update_from_output(self, output) -> None:
        if self.logprobs is not None:
            self.logprobs.append("a dict")


def step_output(token_ids: list[list[int]], logprobs: list[list[float]]):
    arrays = SimpleNamespace(logprob_token_ids=np.array(token_ids), logprobs=np.array(logprobs, dtype=np.float32))
    return SimpleNamespace(new_logprobs=arrays)


def kept(num_logprobs: int, *steps):
    processor = Processor(num_logprobs=num_logprobs)
    vllm_requests._keep_numbers_only(processor)
    for step in steps:
        processor.update_from_output(step)
    return processor.logprobs


def test_logprobs_are_kept_as_numbers_in_the_order_of_the_tokens():
    logprobs = kept(0, step_output([[5]], [[-0.25]]), SimpleNamespace(new_logprobs=None),
                    step_output([[6], [5]], [[-1.5], [-0.125]]))  # fmt: skip
    output = SimpleNamespace(token_ids=[5, 6, 5], logprobs=logprobs)

    assert vllm_requests.sampled_logprobs(output) == ((-0.25, -1.5, -0.125), ())


def test_the_second_column_is_the_plain_logprob_whatever_its_token_id():
    logprobs = kept(1, step_output([[5, 5]], [[-0.25, -0.5]]), step_output([[6, 9]], [[-1.5, -2.0]]))

    found = vllm_requests.sampled_logprobs(SimpleNamespace(token_ids=[5, 6], logprobs=logprobs))

    assert found == ((-0.25, -1.5), (-0.5, -2.0))


@pytest.mark.parametrize("token_ids", [[6], [5, 5], []])
def test_logprobs_of_other_tokens_are_an_error(token_ids):
    logprobs = kept(0, step_output([[5]], [[-0.25]]))

    with pytest.raises(EngineCorruptedError, match=f"returned {len(token_ids)} tokens, but 1 logprobs of other ones"):
        vllm_requests.sampled_logprobs(SimpleNamespace(token_ids=token_ids, logprobs=logprobs))


def test_more_columns_than_were_asked_for_are_an_error():
    logprobs = kept(0, step_output([[5, 7]], [[-0.25, -0.1]]))

    with pytest.raises(EngineCorruptedError, match="expected 1 of each token"):
        vllm_requests.sampled_logprobs(SimpleNamespace(token_ids=[5], logprobs=logprobs))


@pytest.mark.parametrize("options", [{"num_logprobs": None}, {"num_logprobs": 0, "prompt_logprobs": [None]}])
def test_requests_without_logprobs_and_those_that_score_a_prompt_stay_vllms(options):
    processor = Processor(**options)
    vllm_requests._keep_numbers_only(processor)

    assert type(processor) is Processor
