"""The records that pass along one step: Prompt -> Completion -> Rollout -> RolloutGroup -> TrainingSample.

Small frozen dataclasses of plain Python values, so that they can be hashed, compared, written to parquet and
printed. Tensors first appear in `Microbatch` (`rlbench.data.packing`) and `LossInputs` (`rlbench.algorithms`).
One field name is used along the whole chain.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

FINISH_STOP = "stop"  # a stop token was drawn; it is the completion's last token
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

    Example:
        SamplingParams(max_tokens=64, temperature=1.0, stop_token_ids=(2,))
    """

    max_tokens: int
    temperature: float = 1.0  # 0 is greedy
    top_p: float = 1.0  # 1 keeps every token
    top_k: int = 0  # 0 keeps every token
    min_p: float = 0.0  # 0 keeps every token
    stop_token_ids: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """What an engine sampled for one prompt and one seed.

    `sampling_logprobs[t]` is the log-probability with which token t was drawn: log-softmax of the logits divided by
    the temperature, renormalised over the tokens that top_p, top_k and min_p kept. Greedy sampling reports the
    log-softmax of the plain logits.

    Example:
        Completion(token_ids=(5, 2), sampling_logprobs=(-0.1, -1.2), finish_reason="stop", seed=7, policy_version=3,
                   adapter_fingerprint="9f2c...")
    """

    token_ids: tuple[int, ...]  # a stop token that ended the completion is included
    sampling_logprobs: tuple[float, ...]
    finish_reason: str
    seed: int
    policy_version: int  # of the weights that sampled
    adapter_fingerprint: str  # of the adapter tensors that sampled; "base" for none


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
class TrainingSample:
    """One completion with its credit; samples of one group share `group_id` and `prompt_token_ids`."""

    group_id: str
    prompt_token_ids: tuple[int, ...]
    token_ids: tuple[int, ...]
    sampling_logprobs: tuple[float, ...]
    advantages: tuple[float, ...]  # per token
    loss_mask: tuple[bool, ...]  # True on trained tokens
