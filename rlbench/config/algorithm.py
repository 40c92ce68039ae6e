"""Every setting of the online algorithms: advantages, policy loss, KL penalty, off-policy correction, sampling control.

Options that only some losses or advantages read are null by default. `LOSSES` and `ADVANTAGES` say which of them each
choice reads and with which default; one that is set although the choice does not read it is an error.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from rlbench.config.checks import RefusedSetting, check_choice, check_range
from rlbench.config.curriculum import CurriculumConfig
from rlbench.config.pairs import PairsConfig, check_unread_with_pairs
from rlbench.config.replay import ReplayConfig, check_replay
from rlbench.config.support import SUPPORTS
from rlbench.config.teacher import TeacherConfig

NORMALIZATIONS = ["token_mean", "sequence_mean", "sequence_sum", "constant", "microbatch_token_mean"]


@dataclass(frozen=True, slots=True, kw_only=True)
class LossSpec:
    """What a policy loss reads and needs. Its function is in `rlbench.algorithms.policy_losses.POLICY_LOSSES`.

    Example:
        LossSpec(options={"clip_ratio_low": 3e-4, "clip_ratio_high": 4e-4}, needs_sequences=True)
    """

    options: Mapping[str, float | None] = field(default_factory=dict)  # keys of AlgorithmConfig, with defaults
    needs_sequences: bool = False  # it sums over whole sequences: evaluated once a microbatch, not chunk by chunk
    is_sequence_level: bool = False  # one ratio a sequence, whose gradient reaches all of its tokens
    needs_selection: bool = False  # it reads a choice of tokens that is made over the whole batch before the update
    weighs_sampler: bool = False  # its own weights are against the sampling policy: no other correction is made


CLIP = {"clip_ratio_low": 0.2, "clip_ratio_high": 0.2}
LOSSES: dict[str, LossSpec] = {
    "reinforce": LossSpec(),
    "clipped_surrogate": LossSpec(options={**CLIP, "clip_ratio_max": None}),
    "cispo": LossSpec(options={"clip_ratio_max": 5.0}),
    "sapo": LossSpec(options={"gate_temperature_pos": 1.0, "gate_temperature_neg": 1.05}),
    "clip_cov": LossSpec(
        options={**CLIP, "covariance_frac": 2e-4, "covariance_low": 1.0, "covariance_high": 5.0}, needs_selection=True
    ),
    "kl_cov": LossSpec(options={"covariance_frac": 2e-3, "covariance_kl_coef": 1.0}, needs_selection=True),
    "gspo": LossSpec(
        options={"clip_ratio_low": 3e-4, "clip_ratio_high": 4e-4}, needs_sequences=True, is_sequence_level=True
    ),
    "gspo_token": LossSpec(options={"clip_ratio_low": 3e-4, "clip_ratio_high": 4e-4}, needs_sequences=True),
    "sequence_surrogate": LossSpec(options=CLIP, needs_sequences=True, is_sequence_level=True),
    "gmpo": LossSpec(
        options={"clip_log_ratio_low": 0.4, "clip_log_ratio_high": 0.4}, needs_sequences=True, is_sequence_level=True
    ),
    "vespo": LossSpec(
        options={"gamma_k_pos": 2.0, "gamma_lambda_pos": 3.0, "gamma_k_neg": 3.0, "gamma_lambda_neg": 2.0},
        needs_sequences=True,
        weighs_sampler=True,
    ),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class AdvantageSpec:
    """What an advantage reads and needs. Its function is in `rlbench.algorithms.advantages.ADVANTAGES`."""

    default_scale: str | None = None  # of algorithm.advantage_scale; None: it has no such option
    scales: tuple[str, ...] = ()
    min_group_size: int = 2  # completions of one prompt that it compares
    reads_components: bool = False  # each reward apart, not their sum
    refuses_negative: bool = False  # it is defined for rewards of at least 0
    needs_critic: bool = False  # values of states
    needs_teacher: bool = False  # logprobs of a teacher; rewards are not read


ADVANTAGES: dict[str, AdvantageSpec] = {
    "group_relative": AdvantageSpec(default_scale="group", scales=("group", "batch", "none")),
    "leave_one_out": AdvantageSpec(default_scale="none", scales=("batch", "none")),
    "gdpo": AdvantageSpec(reads_components=True),
    "reinforce_plus_plus": AdvantageSpec(min_group_size=1),
    "reinforce_plus_plus_baseline": AdvantageSpec(),
    "maxrl": AdvantageSpec(refuses_negative=True),
    "teacher": AdvantageSpec(min_group_size=1, needs_teacher=True),
    "gae": AdvantageSpec(default_scale="batch", scales=("batch", "none"), min_group_size=1, needs_critic=True),
}


@dataclass
class CriticConfig:
    """Of advantage=gae: a second adapter (as `lora` says) with a value head on the same base.

    It makes as many updates from a batch as the policy, with an optimizer of its own, so there is no coefficient of the
    value loss.
    """

    lr: float = 1e-4  # in place of optim.lr; the rest of `optim` holds for the critic too
    gae_lambda: float = 0.95  # of the policy's advantages
    returns_lambda: float | None = None  # of the returns that the critic learns; null: gae_lambda
    gamma: float = 1.0  # discount a token
    clip_value: float | None = 0.2  # furthest that an update may move a value, in units of the reward; null: no clip
    warmup_steps: int = 0  # first steps in which only the critic is trained
    bootstrap_truncated: bool = False  # completions cut at the token limit: the value after the cut counts as reward

    def __post_init__(self) -> None:
        check_range("algorithm.critic.lr", self.lr, low=0, is_low_open=True)
        for name in ("gae_lambda", "returns_lambda", "gamma"):
            check_range(f"algorithm.critic.{name}", getattr(self, name), low=0, high=1)
        check_range("algorithm.critic.clip_value", self.clip_value, low=0, is_low_open=True)
        check_range("algorithm.critic.warmup_steps", self.warmup_steps, low=0)


@dataclass
class AlgorithmConfig:
    prompts_per_step: int | None = None  # prompts of one batch of rollouts
    group_size: int | None = None  # completions per prompt

    advantage: str = "group_relative"  # a key of ADVANTAGES
    advantage_scale: str | None = None  # group | batch | none: the standard deviation that divides the advantages
    critic: CriticConfig = field(default_factory=CriticConfig)  # read by advantage=gae
    teacher: TeacherConfig = field(default_factory=TeacherConfig)  # read by advantage=teacher
    pairs: PairsConfig = field(default_factory=PairsConfig)  # online DPO: preference losses in place of a policy loss

    loss: str = "clipped_surrogate"  # a key of LOSSES
    normalization: str = "token_mean"  # NORMALIZATIONS: how token losses become the step's loss
    clip_ratio_low: float | None = None  # distance below 1 at which a ratio is clipped
    clip_ratio_high: float | None = None  # distance above 1; larger than the lower one: DAPO's clip-higher
    clip_ratio_max: float | None = None  # cap of the ratio itself: dual clip, two-sided clip (delta); CISPO's cap
    clip_log_ratio_low: float | None = None  # gmpo: distances of log ratios from 0
    clip_log_ratio_high: float | None = None  # gmpo: distance above 0
    gate_temperature_pos: float | None = None  # sapo: steepness of the gate, by sign of the advantage
    gate_temperature_neg: float | None = None  # of negative advantages
    gamma_k_pos: float | None = None  # vespo: exponents of the Gamma weighting, by sign of the advantage
    gamma_lambda_pos: float | None = None  # the rate of that Gamma
    gamma_k_neg: float | None = None  # the exponent for negative advantages
    gamma_lambda_neg: float | None = None  # the rate for negative advantages
    covariance_frac: float | None = None  # clip_cov, kl_cov: share of the batch's tokens that are singled out
    covariance_low: float | None = None  # clip_cov: bounds of the covariances that are drawn from
    covariance_high: float | None = None  # the upper bound
    covariance_kl_coef: float | None = None  # kl_cov: penalty on the tokens singled out

    kl: str = "k3"  # k1 | k2 | k3 | k3_unbiased
    kl_coef: float = 0.0  # 0: no reference forward is made
    kl_in: str = "loss"  # loss | reward
    reference_refresh_steps: int = 0  # the reference moves to the policy every so many steps; 0: it stays the base
    reference_refresh_frac: float | None = None  # how far it moves: 1 copies the policy, less is a moving average

    support: str = "full"  # full | sampler: logprobs over all tokens, or over those that top_p, top_k and min_p leave
    importance: str | None = None  # off | truncate | mask: correction from the engine's to the trainer's policy
    importance_level: str | None = None  # token | sequence | geometric
    importance_low: float | None = None  # smallest weight that is kept
    importance_high: float | None = None  # largest
    off_policy_threshold: float | None = None  # nats a token: bad samples that the policy left behind are left out

    num_updates: int = 1  # optimizer steps made from one batch of rollouts
    num_minibatches: int = 1  # parts of the batch; update i takes part i modulo this

    entropy_coef: float = 0.0  # bonus on the mean entropy of a token; with a target: where the control starts
    entropy_target: float | None = None  # nats a token: the coefficient rises while the entropy is below, falls above
    entropy_coef_delta: float | None = None  # change of the coefficient per update
    entropy_coef_min: float | None = None  # the control keeps the coefficient at or above it
    entropy_coef_max: float | None = None  # and at or below it
    top_entropy_frac: float = 1.0  # train on this share of the batch's tokens, those of highest entropy

    mask_truncated: bool = False  # completions cut at the token limit are not trained on
    overlong_buffer_tokens: int = 0  # soft penalty over the last tokens before sampling.max_tokens; 0: none
    overlong_penalty: float | None = None  # subtracted from the reward at the limit
    curriculum: CurriculumConfig = field(default_factory=CurriculumConfig)  # prompts by their measured success rates
    replay: ReplayConfig = field(default_factory=ReplayConfig)  # right answers of earlier steps for all-fail groups
    max_refills: int = 0  # dynamic sampling: times that a step may draw prompts for groups without signal; 0: off

    def __post_init__(self) -> None:
        check_choice("algorithm.advantage", self.advantage, list(ADVANTAGES))
        check_choice("algorithm.loss", self.loss, list(LOSSES))
        check_choice("algorithm.normalization", self.normalization, NORMALIZATIONS)
        check_choice("algorithm.kl", self.kl, ["k1", "k2", "k3", "k3_unbiased"])
        check_choice("algorithm.kl_in", self.kl_in, ["loss", "reward"])
        check_choice("algorithm.support", self.support, SUPPORTS)
        self._check_ranges()
        if self.pairs.is_on:
            check_unread_with_pairs(self)
        self._check_loss_options()
        self._check_advantage()
        self._check_kl()
        self._check_importance()
        self._check_updates_and_entropy()
        check_replay(self)

    @property
    def loss_spec(self) -> LossSpec:
        return LOSSES[self.loss]

    def loss_options(self) -> dict[str, Any]:
        """Keyword values of the loss: what is set, else the loss's defaults."""
        return {name: self._or(name, default) for name, default in self.loss_spec.options.items()}

    def resolved_defaults(self) -> dict[str, tuple[Any, str]]:
        """Values of options left null, by key, each with the choice that decides it."""
        penalty = {"overlong_penalty": (1.0, "default of the soft penalty")} if self.overlong_buffer_tokens else {}
        if self.pairs.is_on:
            return penalty
        values: dict[str, tuple[Any, str]] = {
            name: (default, f"default of loss={self.loss}")
            for name, default in self.loss_spec.options.items()
            if default is not None
        }
        scale = ADVANTAGES[self.advantage].default_scale
        if scale is not None:
            values["advantage_scale"] = (scale, f"default of advantage={self.advantage}")
        why = "it weighs against the engine's policy itself" if self.loss_spec.weighs_sampler else "on by default"
        values["importance"] = (self.importance_method, f"loss={self.loss}: {why}")
        if self.importance_method != "off":
            bounds = {"importance_level": "token"} | self._bounds()
            values |= {name: (v, f"default of importance={self.importance_method}") for name, v in bounds.items()}
        if self.entropy_target is not None:
            values |= {name: (v, "default of entropy control") for name, v in _ENTROPY_CONTROL.items()}
        return values | penalty

    @property
    def importance_method(self) -> str:
        return self.importance or ("off" if self.loss_spec.weighs_sampler else "truncate")

    def importance_options(self) -> dict[str, Any]:
        """Keyword values `level`, `low`, `high` of the correction."""
        defaults = self._bounds()
        return {
            "level": self.importance_level or "token",
            "low": self._or("importance_low", defaults.get("importance_low")),
            "high": self._or("importance_high", defaults.get("importance_high")),
        }

    def entropy_control(self) -> dict[str, float]:
        """`entropy_coef_delta`, `entropy_coef_min`, `entropy_coef_max`: what is set, else the defaults."""
        return {name: self._or(name, default) for name, default in _ENTROPY_CONTROL.items()}

    @property
    def has_critic(self) -> bool:
        return ADVANTAGES[self.advantage].needs_critic

    @property
    def has_teacher(self) -> bool:
        return ADVANTAGES[self.advantage].needs_teacher

    @property
    def reads_components(self) -> bool:
        return ADVANTAGES[self.advantage].reads_components

    @property
    def refuses_negative_rewards(self) -> bool:
        return ADVANTAGES[self.advantage].refuses_negative

    def gae_options(self) -> dict[str, float]:
        """Keyword values of `rlbench.algorithms.gae.gae`, for the policy's advantages."""
        return {"gamma": self.critic.gamma, "gae_lambda": self.critic.gae_lambda}

    def target_options(self) -> dict[str, float]:
        """The same for what the critic learns."""
        of_returns = self.critic.returns_lambda
        return self.gae_options() | ({} if of_returns is None else {"gae_lambda": of_returns})

    @property
    def has_entropy_bonus(self) -> bool:
        return self.entropy_coef != 0 or self.entropy_target is not None

    @property
    def has_kl_loss(self) -> bool:
        return self.kl_coef > 0 and self.kl_in == "loss"

    @property
    def refresh_frac(self) -> float:
        return self._or("reference_refresh_frac", 1.0)

    @property
    def has_kl_reward(self) -> bool:
        return self.kl_coef > 0 and self.kl_in == "reward"

    @property
    def needs_sequences(self) -> bool:
        """The objective sums over whole sequences."""
        has_sequence_weights = self.importance_method != "off" and self.importance_level in ("sequence", "geometric")
        return self.loss_spec.needs_sequences or has_sequence_weights or self.off_policy_threshold is not None

    @property
    def needs_old_forward(self) -> bool:
        """A forward over the batch before its first update is needed."""
        return self.num_updates > 1 or self.top_entropy_frac < 1 or self.loss_spec.needs_selection

    @property
    def needs_every_sample(self) -> bool:
        """Samples without advantage change the gradient: through another term, or through statistics of the batch."""
        has_statistics = self.top_entropy_frac < 1 or self.loss_spec.needs_selection
        is_local = self.normalization == "microbatch_token_mean"
        return self.has_kl_loss or self.has_entropy_bonus or has_statistics or is_local or self.has_critic

    def _or(self, name: str, default: Any) -> Any:
        value = getattr(self, name)
        return default if value is None else value

    def _bounds(self) -> dict[str, Any]:
        return _IMPORTANCE_BOUNDS.get((self.importance_method, self.importance_level or "token"), {})

    def _check_ranges(self) -> None:
        for name in ("prompts_per_step", "num_updates", "num_minibatches"):
            check_range(f"algorithm.{name}", getattr(self, name), low=1)
        check_range("algorithm.group_size", self.group_size, low=ADVANTAGES[self.advantage].min_group_size)
        for name in ("clip_ratio_low", "covariance_frac", "top_entropy_frac", "reference_refresh_frac"):
            check_range(f"algorithm.{name}", getattr(self, name), low=0, high=1, is_low_open=True)
        for name in (
            "clip_ratio_high", "clip_ratio_max", "clip_log_ratio_low", "clip_log_ratio_high", "gate_temperature_pos",
            "gate_temperature_neg", "gamma_k_pos", "gamma_lambda_pos", "gamma_k_neg", "gamma_lambda_neg",
            "importance_high", "entropy_target", "entropy_coef_delta",
        ):  # fmt: skip
            check_range(f"algorithm.{name}", getattr(self, name), low=0, is_low_open=True)
        for name in (
            "kl_coef", "covariance_kl_coef", "importance_low", "off_policy_threshold", "entropy_coef",
            "entropy_coef_min", "entropy_coef_max", "overlong_buffer_tokens", "overlong_penalty", "max_refills",
            "reference_refresh_steps",
        ):  # fmt: skip
            check_range(f"algorithm.{name}", getattr(self, name), low=0)

    def _check_loss_options(self) -> None:
        every = {name for spec in LOSSES.values() for name in spec.options}
        for name in sorted(every - set(self.loss_spec.options)):
            if getattr(self, name) is not None:
                readers = ", ".join(loss for loss, spec in LOSSES.items() if name in spec.options)
                raise ValueError(
                    f"algorithm.{name} is {getattr(self, name)}, but algorithm.loss={self.loss} does not read it; "
                    f"expected null, or one of the losses that do: {readers}"
                )
        if self.loss == "clipped_surrogate" and self.clip_ratio_max is not None:
            lowest = 1 + self.loss_options()["clip_ratio_high"]
            check_range("algorithm.clip_ratio_max", self.clip_ratio_max, low=lowest, is_low_open=True)
        if self.loss == "clip_cov" and self.loss_options()["covariance_low"] > self.loss_options()["covariance_high"]:
            raise ValueError("algorithm.covariance_low is above algorithm.covariance_high, expected low <= high")

    def _check_advantage(self) -> None:
        spec = ADVANTAGES[self.advantage]
        for section, is_read, reader in (
            ("critic", spec.needs_critic, "gae"),
            ("teacher", spec.needs_teacher, "teacher"),
        ):
            part = getattr(self, section)
            changed = next((f.name for f in fields(part) if getattr(part, f.name) != f.default), None)
            if changed is not None and not is_read:
                raise ValueError(
                    f"algorithm.{section}.{changed} is {getattr(part, changed)}, but algorithm.advantage="
                    f"{self.advantage} has no {section}; expected its default, or algorithm.advantage={reader}"
                )
        if spec.needs_teacher:
            self._check_no_reward_is_shaped()
        if self.advantage_scale is None:
            return
        if not spec.scales:
            raise ValueError(
                f"algorithm.advantage_scale is {self.advantage_scale}, but algorithm.advantage={self.advantage} "
                "fixes its own scale; expected null"
            )
        check_choice("algorithm.advantage_scale", self.advantage_scale, list(spec.scales))

    def _check_no_reward_is_shaped(self) -> None:
        kl_in = self.kl_in if self.has_kl_reward else None
        names = {"max_refills": self.max_refills, "overlong_buffer_tokens": self.overlong_buffer_tokens, "kl_in": kl_in}
        for name, value in names.items():
            if value:
                raise ValueError(
                    f"algorithm.{name} is {value}, but algorithm.advantage=teacher does not read rewards; expected its "
                    "default"
                )

    def _check_kl(self) -> None:
        if not self.reference_refresh_steps:
            self._check_unset("algorithm.reference_refresh_steps is 0", "reference_refresh_frac")
        elif not self.kl_coef and not self.pairs.is_on:
            raise ValueError(
                f"algorithm.reference_refresh_steps is {self.reference_refresh_steps}, but algorithm.kl_coef is 0 and "
                "nothing reads the reference; expected 0, or a penalty"
            )
        if not self.has_kl_reward:
            return
        if self.kl == "k3_unbiased":
            raise ValueError("algorithm.kl is k3_unbiased with algorithm.kl_in=reward; expected k1, k2 or k3")
        if self.reads_components:
            raise ValueError(
                f"algorithm.kl_in is reward with algorithm.advantage={self.advantage}, which normalises each reward "
                "apart; expected algorithm.kl_in=loss"
            )

    def _check_importance(self) -> None:
        if self.importance is not None:
            check_choice("algorithm.importance", self.importance, ["off", "truncate", "mask"])
        if self.importance_level is not None:
            check_choice("algorithm.importance_level", self.importance_level, ["token", "sequence", "geometric"])
        if self.loss_spec.weighs_sampler and self.importance_method != "off":
            raise ValueError(
                f"algorithm.importance is {self.importance}, but algorithm.loss={self.loss} weighs against the "
                "engine's policy itself; expected off or null"
            )
        if self.importance_method == "off":
            self._check_unset("algorithm.importance is off", "importance_level", "importance_low", "importance_high")
        low, high = self.importance_options()["low"], self.importance_options()["high"]
        if low is not None and high is not None and low > high:
            raise ValueError(f"algorithm.importance_low is {low}, expected at most algorithm.importance_high ({high})")

    def _check_updates_and_entropy(self) -> None:
        if self.num_updates % self.num_minibatches:
            raise ValueError(
                f"algorithm.num_updates is {self.num_updates}, expected a multiple of algorithm.num_minibatches "
                f"({self.num_minibatches}), so that every rollout is used equally often"
            )
        if self.entropy_target is None:
            self._check_unset("algorithm.entropy_target is null", *_ENTROPY_CONTROL)
        lowest, highest = (self.entropy_control()[f"entropy_coef_{end}"] for end in ("min", "max"))
        if lowest > highest:
            raise ValueError(
                f"algorithm.entropy_coef_min is {lowest}, expected at most algorithm.entropy_coef_max ({highest})"
            )
        if not self.overlong_buffer_tokens:
            self._check_unset("algorithm.overlong_buffer_tokens is 0", "overlong_penalty")
        if self.max_refills and self.group_size == 1:
            raise RefusedSetting(
                f"algorithm.max_refills is {self.max_refills}, but with algorithm.group_size=1 no rewards of a "
                "group differ; expected 0, or larger groups",
                "algorithm.max_refills",
                0,
            )
        if self.top_entropy_frac < 1 and self.loss_spec.is_sequence_level:
            raise ValueError(
                f"algorithm.top_entropy_frac is {self.top_entropy_frac}, but algorithm.loss={self.loss} has one ratio "
                "a sequence, which moves all of its tokens; expected 1, or a loss of single tokens"
            )

    def _check_unset(self, because: str, *names: str) -> None:
        for name in names:
            if getattr(self, name) is not None:
                raise ValueError(f"algorithm.{name} is {getattr(self, name)}, but {because}; expected null")


_ENTROPY_CONTROL = {"entropy_coef_delta": 0.005, "entropy_coef_min": 0.0, "entropy_coef_max": 1.0}
_IMPORTANCE_BOUNDS: dict[tuple[str, str], dict[str, float]] = {
    ("truncate", "token"): {"importance_high": 2.0},
    ("truncate", "sequence"): {"importance_high": 2.0},
    ("truncate", "geometric"): {"importance_high": 2.0},
    ("mask", "token"): {"importance_low": 0.5, "importance_high": 5.0},  # IcePop's
    ("mask", "sequence"): {"importance_high": 3.0},
    ("mask", "geometric"): {"importance_low": 0.99, "importance_high": 1.01},
}
