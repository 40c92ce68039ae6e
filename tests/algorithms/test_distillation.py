"""On-policy distillation against the exact reverse KL: all completions of a tiny vocabulary, weighed by the student."""

import warnings
from itertools import product

import pytest
import torch

from rlbench.algorithms import POLICY_LOSSES
from rlbench.algorithms.advantages import GroupReturns
from rlbench.algorithms.distillation import teacher
from rlbench.algorithms.loss_inputs import LossInputs
from rlbench.engine.vllm_process import clean_start

with warnings.catch_warnings(), clean_start():  # TRL imports vLLM where it is installed
    warnings.simplefilter("ignore")
    from trl.experimental.gkd import GKDTrainer

V, LENGTH = 3, 3


def group(gaps) -> GroupReturns:
    return GroupReturns(returns=[[0.0] * len(tokens) for tokens in gaps], teacher_gaps=gaps)


def test_advantages_by_hand():
    gaps = [[0.5, -1.0, 0.25], [2.0]]

    assert teacher([group(gaps)], gamma=0.0) == [[[-0.5, 1.0, -0.25], [-2.0]]]
    assert teacher([group(gaps)], gamma=1.0) == [[[0.25, 0.75, -0.25], [-2.0]]]
    assert teacher([group(gaps)], gamma=0.5)[0][0] == pytest.approx([-0.5 + 0.5 * 0.875, 1.0 - 0.125, -0.25])


def test_a_student_that_is_its_teacher_has_nothing_to_learn():
    assert not any(teacher([group([[0.0, 0.0]])], gamma=1.0)[0][0])


class Model:
    """Logits of the next token after every beginning."""

    def __init__(self, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.beginnings = [b for n in range(LENGTH) for b in product(range(V), repeat=n)]
        self.logits = torch.randn(len(self.beginnings), V, dtype=torch.float64, generator=generator).requires_grad_()

    def logprobs(self, completion) -> torch.Tensor:
        rows = [self.beginnings.index(completion[:n]) for n in range(LENGTH)]
        return self.logits.log_softmax(-1)[rows, list(completion)]  # [LENGTH]


def expected_gradient(student: Model, other: Model, gamma: float) -> torch.Tensor:
    """Of the loss as a run computes it, in expectation over the student's completions."""
    total = torch.zeros(())
    for completion in product(range(V), repeat=LENGTH):
        logprobs = student.logprobs(completion)
        gaps = (logprobs - other.logprobs(completion)).detach().tolist()
        inputs = LossInputs(
            logprobs=logprobs,
            old_logprobs=logprobs.detach(),
            sampling_logprobs=logprobs.detach(),
            advantages=torch.tensor(teacher([group([gaps])], gamma=gamma)[0][0], dtype=torch.float64),
            loss_mask=torch.ones(LENGTH, dtype=torch.bool),
            weights=torch.ones(LENGTH, dtype=torch.float64),
            sequence_ids=torch.zeros(LENGTH, dtype=torch.int64),
            num_sequences=1,
            num_loss_tokens=LENGTH,
        )
        total = total + logprobs.sum().exp().detach() * POLICY_LOSSES["reinforce"](inputs).loss
    return torch.autograd.grad(total, student.logits)[0]


def exact_kl(student: Model, other: Model, *, has_fixed_states: bool) -> torch.Tensor:
    """KL(student || teacher) of whole completions, as a sum over states of their probability times the next token's."""
    total = torch.zeros((), dtype=torch.float64)
    for index, beginning in enumerate(student.beginnings):
        logprobs, theirs = student.logits[index].log_softmax(-1), other.logits[index].log_softmax(-1).detach()
        reach = torch.ones((), dtype=torch.float64)
        for n, token in enumerate(beginning):
            reach = reach * student.logits[student.beginnings.index(beginning[:n])].softmax(-1)[token]
        reach = reach.detach() if has_fixed_states else reach
        total = total + reach * (logprobs.exp() * (logprobs - theirs)).sum()
    return total


@pytest.mark.parametrize(("gamma", "has_fixed_states"), [(0.0, True), (1.0, False)])
def test_the_expected_gradient_is_that_of_the_exact_reverse_kl(gamma, has_fixed_states):
    student, other = Model(0), Model(1)

    ours = expected_gradient(student, other, gamma)
    (exact,) = torch.autograd.grad(exact_kl(student, other, has_fixed_states=has_fixed_states), student.logits)

    assert exact.abs().max() > 0.05
    torch.testing.assert_close(ours, exact, rtol=1e-9, atol=1e-12)


def test_in_expectation_value_and_gradient_are_those_of_gkd_trainer():
    """TRL computes the reverse KL (beta=1) from all logits; ours is its expectation over the student's tokens."""
    torch.manual_seed(0)
    student = torch.randn(4, V, dtype=torch.float64, requires_grad=True)  # of one sequence with given states
    other = torch.randn(4, V, dtype=torch.float64)
    theirs = GKDTrainer.generalized_jsd_loss(student[None], other[None], beta=1.0, reduction="sum") / len(student)

    log_p, log_q = student.log_softmax(-1), other.log_softmax(-1)
    gaps = (log_p - log_q).detach()
    found = teacher([group(gaps[:, [token]].tolist()) for token in range(V)], gamma=0.0)
    advantages = torch.tensor([[tokens[0] for tokens in one] for one in found]).T  # [states, V]
    ours = (log_p.detach().exp() * -advantages * log_p).sum() / len(student)

    assert (log_p.detach().exp() * gaps).sum().item() / len(student) == pytest.approx(theirs.item())
    expected = torch.autograd.grad(theirs, student)[0]
    assert expected.abs().max() > 1e-2
    torch.testing.assert_close(torch.autograd.grad(ours, student)[0], expected, rtol=1e-5, atol=1e-7)


def test_advantages_follow_a_permutation_within_a_group():
    gaps = [[0.5, -1.0], [2.0], [0.1, 0.2, 0.3]]

    straight, permuted = (teacher([group(part)], gamma=0.7)[0] for part in (gaps, [gaps[2], gaps[0], gaps[1]]))

    assert permuted == [straight[2], straight[0], straight[1]]
