"""The records that pass along one step: Prompt -> Completion -> Rollout -> RolloutGroup -> TrainingSample.

Small frozen dataclasses of plain Python values, so that they can be hashed, compared, written to parquet and
printed. Tensors first appear in `Microbatch` (`rlbench.data.packing`) and `LossInputs` (`rlbench.algorithms`).
One field name is used along the whole chain.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

FINISH_STOP = "stop"  # the completion's last token is a stop token, or completed a stop string
FINISH_LENGTH = "length"  # the token limit was reached first


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """One problem, rendered and tokenised once.

    Example:
        Prompt(prompt_id="train/17", text="<|im_start|>user...", token_ids=(1, 9690), columns={"answer": "42"})
    """

    prompt_id: str  # "<split>/<row>": stable over shuffling, resume and limits
    text: str  # after the chat template
    token_ids: tuple[int, ...]
    columns: Mapping[str, Any] = field(default_factory=dict)  # the data row; rewards read it by name


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How an engine draws tokens, fully resolved.

    Logits pass the guide, the penalties, the temperature, then min_p, top_k and top_p, in this order. The penalties of
    a token: logit / repetition_penalty if it is positive, else logit * repetition_penalty, where the token is in the
    prompt or in the completion so far; minus frequency_penalty * (its count in the completion); minus presence_penalty
    where that count is not 0.

    Example:
        SamplingParams(max_tokens=64, temperature=1.0, stop_token_ids=(2,))

    Source: repetition penalty, Keskar et al. 2019, arXiv:1909.05858, section 4.1; the others as in the OpenAI API.
    """

    max_tokens: int
    temperature: float = 1.0  # 0 is greedy
    top_p: float = 1.0  # 1 keeps every token
    top_k: int = 0  # 0 keeps every token
    min_p: float = 0.0  # 0 keeps every token
    repetition_penalty: float = 1.0  # 1 changes nothing
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    stop_token_ids: tuple[int, ...] = ()
    stop: tuple[str, ...] = ()  # texts that end a completion, in its decoded text without special tokens
    guided_choice: tuple[str, ...] = ()  # the completion is one of these texts
    guided_regex: str = ""  # the completion matches this

    @property
    def is_guided(self) -> bool:
        return bool(self.guided_choice or self.guided_regex)

    @property
    def has_penalties(self) -> bool:
        return (self.repetition_penalty, self.presence_penalty, self.frequency_penalty) != (1.0, 0.0, 0.0)

    @property
    def is_plain(self) -> bool:
        """Whether tokens are drawn with the softmax of the model's logits over the temperature, unchanged."""
        is_truncated = self.temperature > 0 and (self.top_p < 1 or self.top_k > 0 or self.min_p > 0)
        return not (is_truncated or self.has_penalties or self.is_guided)

    @property
    def is_only_truncated(self) -> bool:
        """Whether top_p, top_k or min_p and nothing else changes that softmax."""
        return not (self.is_plain or self.has_penalties or self.is_guided)


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """What an engine sampled for one prompt and one seed.

    `sampling_logprobs[t]` is the log-probability with which token t was drawn: log-softmax of the penalised logits
    divided by the temperature, renormalised over the tokens that the guide, top_p, top_k and min_p kept. Greedy
    sampling reports the log-softmax of the penalised logits.

    `plain_logprobs[t]` is the log-softmax of the model's own logits divided by the temperature, without any of that:
    what a trainer's logprobs compare with. Where only truncation is on, the log of the probability mass that was kept
    is plain_logprobs - sampling_logprobs.

    Example:
        Completion(token_ids=(5, 2), sampling_logprobs=(-0.1, -1.2), finish_reason="stop", seed=7, policy_version=3,
                   adapter_fingerprint="9f2c...")
    """

    token_ids: tuple[int, ...]  # a stop token that ended the completion is included
    sampling_logprobs: tuple[float, ...]
    finish_reason: str
    seed: int
    policy_version: int  # of the weights that sampled
    adapter_fingerprint: str  # of the adapter, or of all trained weights, that sampled; "base" for none
    plain_logprobs: tuple[float, ...] = ()  # empty: equal to sampling_logprobs

    @property
    def is_empty(self) -> bool:
        """Whether it has no tokens: no policy sampled it, but a recorded file may hold it."""
        return not self.token_ids

    @property
    def engine_logprobs(self) -> tuple[float, ...]:
        """Logprobs of the engine's model at the temperature of sampling, one a token."""
        return self.plain_logprobs or self.sampling_logprobs


@dataclass(frozen=True, slots=True, kw_only=True)
class RewardComponent:
    """The outcome of one reward function on one rollout.

    Example:
        RewardComponent(status="value", value=1.0, weight=1.0)
        RewardComponent(status="timeout", value=None, weight=1.0, message="no verdict within 5 s")
    """

    status: str  # "value", "error", "timeout" or "skipped" (does not apply to this row)
    value: float | None  # None unless status is "value"
    weight: float
    message: str = ""
    details: Mapping[str, Any] = field(default_factory=dict)  # e.g. the extracted answer


@dataclass(frozen=True, slots=True, kw_only=True)
class Rollout:
    """One prompt, one completion, its score.

    `reward` is made of the components as `rewards.combine` says, or None when one of them broke: such a rollout is
    counted and left out, never scored 0.
    """

    rollout_id: str  # "<step>/<prompt_id>/<sample_index>"
    prompt: Prompt
    completion: Completion
    completion_text: str
    sample_index: int
    components: Mapping[str, RewardComponent]
    reward: float | None
    replay_age: int | None = None  # policy versions since it was sampled, of a replayed one; None: of its own step

    @property
    def is_comparable(self) -> bool:
        """Whether there is a reward, and a token that it can be credit for."""
        return self.reward is not None and not self.completion.is_empty


@dataclass(frozen=True, slots=True, kw_only=True)
class RolloutGroup:
    """The rollouts of one prompt, in the order of their sample index."""

    prompt: Prompt
    rollouts: tuple[Rollout, ...]

    @property
    def rewards(self) -> tuple[float, ...]:
        """Rewards of the rollouts that have one."""
        return tuple(r.reward for r in self.rollouts if r.reward is not None)


@dataclass(frozen=True, slots=True, kw_only=True)
class StateValues:
    """A critic's values along one completion.

    Example:
        StateValues(values=(0.4, 0.5, 0.9), last=0.0)
    """

    values: tuple[float, ...]  # of the state before each token
    last: float  # of the state after the last token; 0 where nothing comes after it


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingSample:
    """One completion with its credit; samples of one group share `group_id` and `prompt_token_ids`."""

    group_id: str
    prompt_token_ids: tuple[int, ...]
    token_ids: tuple[int, ...]
    sampling_logprobs: tuple[float, ...]
    advantages: tuple[float, ...]  # per token
    loss_mask: tuple[bool, ...]  # True on trained tokens
    plain_logprobs: tuple[float, ...] = ()  # empty: equal to sampling_logprobs
    values: tuple[float, ...] = ()  # of a critic before its update; empty: there is none
    returns: tuple[float, ...] = ()  # what the critic learns, as `values`
    is_replayed: bool = False  # sampled by the policy of an earlier step

    @property
    def engine_logprobs(self) -> tuple[float, ...]:
        """As in `Completion`."""
        return self.plain_logprobs or self.sampling_logprobs
