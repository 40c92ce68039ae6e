"""From a config to the parts of a run on given completions: no engine, no rewards."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from rlbench.build import (
    BaseInputs,
    BaseParts,
    frozen_base,
    policy_and_optimizer,
    prepare_base,
    shared_fields,
    split_rows,
)
from rlbench.config.schema import RunConfig
from rlbench.data.preferences import PreferenceSet, make_preferences, preference_problem
from rlbench.data.supervised import SampleSet, make_samples, supervised_problem

if TYPE_CHECKING:
    from rlbench.models.policy import Policy


@dataclass(frozen=True, slots=True, kw_only=True)
class SftInputs(BaseInputs):
    """Everything that supervised fine-tuning knows before weights are loaded."""

    train: SampleSet
    evaluation: SampleSet | None


@dataclass(frozen=True, slots=True, kw_only=True)
class PreferenceInputs(BaseInputs):
    """Everything that the preference loop knows before weights are loaded."""

    train: PreferenceSet
    evaluation: PreferenceSet | None


def prepare_sft(config: RunConfig) -> SftInputs:
    """Derive settings, read data, find the model, tokenise rows. Loads no weights; fails fast.

    Raises:
        ValueError: anything a user can get wrong.
    """
    basis = prepare_base(config, supervised_problem)

    def samples(rows: Any, split: str) -> SampleSet:
        limit, reason = token_limit(basis)
        return make_samples(
            rows,
            split,
            config.data,
            basis.tokenizer,
            loss_on=config.sft.loss_on,
            max_tokens=limit,
            limit_reason=reason,
        )

    train, evaluation = both_splits(basis, samples)
    return SftInputs(**shared_fields(basis), train=train, evaluation=evaluation)


def prepare_preference(config: RunConfig) -> PreferenceInputs:
    """As `prepare_sft`, of rows with preferences.

    Raises:
        ValueError: anything a user can get wrong.
    """
    is_unpaired = config.preference.is_unpaired
    basis = prepare_base(config, partial(preference_problem, is_unpaired=is_unpaired))

    def preferences(rows: Any, split: str) -> PreferenceSet:
        limit, reason = token_limit(basis)
        return make_preferences(
            rows,
            split,
            config.data,
            basis.tokenizer,
            is_unpaired=is_unpaired,
            max_tokens=limit,
            max_packed_tokens=config.training.tokens_per_microbatch or 1,
            limit_reason=reason,
        )

    train, evaluation = both_splits(basis, preferences)
    return PreferenceInputs(**shared_fields(basis), train=train, evaluation=evaluation)


def prepare_reward_model(config: RunConfig) -> PreferenceInputs:
    """As `prepare_preference`, of pairs alone; a row's margin is read.

    Raises:
        ValueError: anything a user can get wrong.
    """
    basis = prepare_base(config, partial(preference_problem, is_unpaired=False, reads_margin=True))

    def preferences(rows: Any, split: str) -> PreferenceSet:
        limit, reason = token_limit(basis)
        return make_preferences(
            rows,
            split,
            config.data,
            basis.tokenizer,
            is_unpaired=False,
            reads_margin=True,
            max_tokens=limit,
            # both completions keep their last token
            max_packed_tokens=(config.training.tokens_per_microbatch or 1) - 2,
            limit_reason=reason,
        )

    train, evaluation = both_splits(basis, preferences)
    return PreferenceInputs(**shared_fields(basis), train=train, evaluation=evaluation)


def build_offline(inputs: BaseInputs) -> BaseParts:
    """Load the base and make policy and optimizer around it.

    Raises:
        ValueError: the model has an architecture that is not supported, or `lora.init_from` does not fit it.
    """
    from rlbench.models.policy import Policy

    return _build_around_base(inputs, Policy)


def build_reward_model(inputs: BaseInputs) -> BaseParts:
    """As `build_offline`; the policy is a reward model.

    Raises:
        ValueError: as `build_offline`.
    """
    from rlbench.models.reward_model import RewardModel

    return _build_around_base(inputs, RewardModel)


def _build_around_base(inputs: BaseInputs, make: type[Policy]) -> BaseParts:
    import torch

    from rlbench.models.base import load_base

    config = inputs.config
    device = "cuda" if config.hardware.profile == "gpu" else "cpu"
    if device == "cpu":
        torch.set_num_threads(config.hardware.num_threads or 1)
    base = load_base(
        str(inputs.model.folder),
        dtype=getattr(torch, config.model.dtype),
        device=device,
        quantization=config.model.quantization,
    )
    policy, optimizer = policy_and_optimizer(base, frozen_base(base, config), config, make)
    return BaseParts(base=base, policy=policy, optimizer=optimizer)


def token_limit(basis: BaseInputs) -> tuple[int, str]:
    """Most tokens of a sequence, and why."""
    budget, context = basis.config.training.tokens_per_microbatch or 1, basis.context_tokens
    return (budget, "training.tokens_per_microbatch") if budget < context else (context, "the model's context")


def both_splits(basis: BaseInputs, make: Callable[[Any, str], Any]) -> tuple[Any, Any]:
    """What `make` makes of the training rows and of the held-out rows (None: no evaluation)."""
    train_rows, eval_rows = split_rows(basis.config, basis.rows)
    has_evaluation = eval_rows is not None and len(eval_rows)
    return make(train_rows, "train"), make(eval_rows, "test") if has_evaluation else None
