"""Every setting of the preference loop.

Options that only some losses read are null by default. `PREFERENCE_LOSSES` says which of them each loss reads and with
which default; one that is set although no chosen loss reads it is an error.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from rlbench.config.checks import RefusedSetting, check_choice, check_range

DIVERGENCES = ["reverse_kl", "forward_kl", "js", "alpha"]


@dataclass(frozen=True, slots=True, kw_only=True)
class PreferenceLossSpec:
    """What a loss reads and needs. Its function is in `rlbench.algorithms.preference_losses`."""

    options: Mapping[str, float] = field(default_factory=dict)  # keys of PreferenceConfig, with defaults
    needs_reference: bool = True
    reads_divergence: bool = False  # it reads log ratios through the f-divergence
    needs_whole_step: bool = False  # it sorts all pairs of the step: one forward more
    is_unpaired: bool = False  # single completions with a label
    compares_means: bool = False  # of logprobs over tokens, not sums
    needs_mismatch: bool = False  # it reads the KL of completions given to other prompts: a forward more, no gradient


_BETA = {"beta": 0.1}
_LABELS = {"beta": 0.1, "desirable_weight": 1.0, "undesirable_weight": 1.0}
PREFERENCE_LOSSES: dict[str, PreferenceLossSpec] = {
    "sigmoid": PreferenceLossSpec(options=_BETA, reads_divergence=True),
    "cdpo": PreferenceLossSpec(options=_BETA | {"label_smoothing": 0.1}, reads_divergence=True),
    "robust": PreferenceLossSpec(options=_BETA | {"label_smoothing": 0.1}, reads_divergence=True),
    "hinge": PreferenceLossSpec(options=_BETA, reads_divergence=True),
    "ipo": PreferenceLossSpec(options=_BETA, reads_divergence=True, compares_means=True),
    "sigmoid_norm": PreferenceLossSpec(options={"beta": 5.0}, reads_divergence=True, compares_means=True),
    "exo_pair": PreferenceLossSpec(options=_BETA | {"label_smoothing": 1e-3}, reads_divergence=True),
    "nca_pair": PreferenceLossSpec(options=_BETA),
    "bco_pair": PreferenceLossSpec(options=_BETA),
    "sppo_hard": PreferenceLossSpec(options=_BETA),
    "aot_pair": PreferenceLossSpec(options=_BETA | {"label_smoothing": 0.0}, needs_whole_step=True),
    "aot_unpaired": PreferenceLossSpec(options=_BETA | {"label_smoothing": 0.0}, needs_whole_step=True),
    "apo_zero": PreferenceLossSpec(options=_BETA),
    "apo_down": PreferenceLossSpec(options=_BETA),
    "discopop": PreferenceLossSpec(options=_BETA | {"modulation_temperature": 0.05}, reads_divergence=True),
    "simpo": PreferenceLossSpec(
        options={"beta": 2.0, "reward_margin": 0.5}, needs_reference=False, compares_means=True
    ),
    "cpo": PreferenceLossSpec(options=_BETA | {"nll_coef": 1.0}, needs_reference=False),
    "orpo": PreferenceLossSpec(options=_BETA, needs_reference=False, compares_means=True),
    "sft": PreferenceLossSpec(needs_reference=False),
    "kto": PreferenceLossSpec(options=_LABELS, is_unpaired=True, needs_mismatch=True),
    "apo_zero_unpaired": PreferenceLossSpec(options=_LABELS, is_unpaired=True),
}


@dataclass
class PreferenceConfig:
    pairs_per_step: int | None = None  # of one optimizer step; of unpaired losses: completions

    losses: list[str] = field(default_factory=lambda: ["sigmoid"])  # keys of PREFERENCE_LOSSES; several are summed
    loss_weights: list[float] = field(default_factory=list)  # one a loss; empty: 1 each
    beta: float | None = None  # temperature; of orpo the weight of the odds ratio
    label_smoothing: float | None = None  # share of labels taken to be wrong
    reward_margin: float | None = None  # simpo: by how much the chosen one must win
    nll_coef: float | None = None  # cpo: weight of the likelihood of chosen completions
    modulation_temperature: float | None = None  # discopop
    desirable_weight: float | None = None  # kto, apo_zero_unpaired: by label
    undesirable_weight: float | None = None  # of completions with label false

    divergence: str = "reverse_kl"  # reverse_kl | forward_kl | js | alpha
    divergence_alpha: float | None = None  # order of divergence=alpha
    wpo: bool = False  # weigh pairs by how likely the policy is to write them

    reference: str | None = None  # base (the adapter switched off) | start (the policy before the first step)
    precompute_reference: bool | None = None  # once over all data before training, instead of a forward each step

    def __post_init__(self) -> None:
        if not self.losses:
            raise ValueError("preference.losses is empty, expected at least one loss")
        for name in self.losses:
            check_choice("preference.losses", name, list(PREFERENCE_LOSSES))
        if self.loss_weights and len(self.loss_weights) != len(self.losses):
            raise ValueError(
                f"preference.loss_weights has {len(self.loss_weights)} numbers for {len(self.losses)} losses; expected "
                "one a loss, or none"
            )
        check_choice("preference.divergence", self.divergence, DIVERGENCES)
        if self.reference is not None:
            check_choice("preference.reference", self.reference, ["base", "start"])
        self._check_ranges()
        self._check_combination()
        self._check_options()
        self._check_reference()

    @property
    def specs(self) -> list[PreferenceLossSpec]:
        return [PREFERENCE_LOSSES[name] for name in self.losses]

    @property
    def is_unpaired(self) -> bool:
        return self.specs[0].is_unpaired

    @property
    def needs_reference(self) -> bool:
        return any(spec.needs_reference for spec in self.specs)

    @property
    def needs_whole_step(self) -> bool:
        return any(spec.needs_whole_step for spec in self.specs)

    @property
    def needs_mismatch(self) -> bool:
        return any(spec.needs_mismatch for spec in self.specs)

    def weighted_losses(self) -> list[tuple[str, float, dict[str, float]]]:
        """Each loss with its weight and its keyword values: what is set, else its defaults."""
        weights = self.loss_weights or [1.0] * len(self.losses)
        return [
            (name, weight, {key: self._or(key, default) for key, default in PREFERENCE_LOSSES[name].options.items()})
            for name, weight in zip(self.losses, weights, strict=True)
        ]

    @property
    def alpha(self) -> float:
        return self._or("divergence_alpha", 1.0)

    def resolved_defaults(self, *, has_warm_start: bool, is_full: bool = False) -> dict[str, tuple[Any, str]]:
        """Values of options left null, by key, each with the choice that decides it.

        An option on whose default the chosen losses differ stays null: each takes its own.
        """
        values: dict[str, tuple[Any, str]] = {}
        for key in dict.fromkeys(key for spec in self.specs for key in spec.options):
            defaults = {spec.options[key] for spec in self.specs if key in spec.options}
            if len(defaults) == 1:
                values[key] = (defaults.pop(), f"default of losses={','.join(self.losses)}")
        if self.needs_reference:
            values["reference"] = (
                ("start", "training.parameters is full: no second copy of the model is kept")
                if is_full
                else ("start", "lora.init_from is set: the loss is against the policy that is trained on")
                if has_warm_start
                else ("base", "the policy starts as the base")
            )
            reference = self.reference or values["reference"][0]
            values["precompute_reference"] = (
                (True, "the starting policy is not kept") if reference == "start" else (False, "a forward each step")
            )
        return values

    def online_defaults(self, *, has_warm_start: bool, is_refreshed: bool) -> dict[str, tuple[Any, str]]:
        """As `resolved_defaults`, of losses on pairs of rollouts: what will be written is not known before."""
        values = self.resolved_defaults(has_warm_start=has_warm_start or is_refreshed)
        values.pop("precompute_reference", None)
        if is_refreshed and "reference" in values:
            values["reference"] = ("start", "algorithm.reference_refresh_steps moves it")
        return values

    def check_online(self, reference_refresh_steps: int) -> None:
        """
        Raises:
            ValueError: a setting does not fit pairs that are made of rollouts.
        """
        if self.is_unpaired:
            raise ValueError(
                f"preference.losses is {self.losses}, but algorithm.pairs makes pairs; expected losses on pairs, e.g. "
                "sigmoid"
            )
        if self.pairs_per_step is not None:
            raise ValueError(
                f"preference.pairs_per_step is {self.pairs_per_step}, but with algorithm.pairs the pairs are those of "
                "algorithm.prompts_per_step groups; expected null"
            )
        if self.precompute_reference:
            raise ValueError(
                "preference.precompute_reference is true, but rollouts are not known before they are made; expected "
                "null or false"
            )
        if reference_refresh_steps and (not self.needs_reference or self.reference == "base"):
            found = self.reference if self.needs_reference else "not needed by preference.losses"
            raise ValueError(
                f"algorithm.reference_refresh_steps is {reference_refresh_steps}, but preference.reference is {found}; "
                "expected 0, or a loss with preference.reference=start"
            )

    def _or(self, name: str, default: Any) -> Any:
        value = getattr(self, name)
        return default if value is None else value

    def _check_ranges(self) -> None:
        check_range("preference.pairs_per_step", self.pairs_per_step, low=1)
        for name in ("beta", "modulation_temperature"):
            check_range(f"preference.{name}", getattr(self, name), low=0, is_low_open=True)
        for name in ("nll_coef", "desirable_weight", "undesirable_weight", "reward_margin"):
            check_range(f"preference.{name}", getattr(self, name), low=0)
        check_range("preference.label_smoothing", self.label_smoothing, low=0, high=0.5)

    def _check_combination(self) -> None:
        if len({spec.is_unpaired for spec in self.specs}) > 1 or (self.is_unpaired and len(self.losses) > 1):
            raise ValueError(
                f"preference.losses is {self.losses}, but a loss on single completions stands alone; expected one of "
                "kto, apo_zero_unpaired, or losses on pairs"
            )
        if self.wpo and self.is_unpaired:
            raise ValueError(f"preference.wpo is true, but {self.losses[0]} has no pairs; expected false")
        sorting = [name for name in self.losses if PREFERENCE_LOSSES[name].needs_whole_step]
        if self.wpo and sorting:
            raise RefusedSetting(
                f"preference.wpo is true, but {', '.join(sorting)} sorts the pairs of a step, so that no term is one "
                "pair's to weigh; expected false, or losses without it",
                "preference.wpo",
                False,
                is_read=True,
            )

    def _check_options(self) -> None:
        read = {name for spec in self.specs for name in spec.options}
        for name in sorted({name for spec in PREFERENCE_LOSSES.values() for name in spec.options} - read):
            if getattr(self, name) is not None:
                readers = ", ".join(loss for loss, spec in PREFERENCE_LOSSES.items() if name in spec.options)
                raise ValueError(
                    f"preference.{name} is {getattr(self, name)}, but preference.losses={self.losses} do not read it; "
                    f"expected null, or one of the losses that do: {readers}"
                )
        if self.divergence != "reverse_kl" and not any(spec.reads_divergence for spec in self.specs):
            raise ValueError(
                f"preference.divergence is {self.divergence}, but preference.losses={self.losses} do not read it; "
                "expected reverse_kl"
            )
        if (self.divergence_alpha is not None) != (self.divergence == "alpha"):
            raise ValueError(
                f"preference.divergence_alpha is {self.divergence_alpha} with preference.divergence={self.divergence}; "
                "expected a number with divergence=alpha, else null"
            )
        for name, _, options in self.weighted_losses():
            value = options.get("label_smoothing")
            if (name == "exo_pair" and value == 0) or (name == "robust" and value == 0.5):
                raise ValueError(f"preference.label_smoothing is {value}, at which {name} is not defined")

    def _check_reference(self) -> None:
        for name in ("reference", "precompute_reference"):
            if getattr(self, name) is not None and not self.needs_reference:
                raise ValueError(
                    f"preference.{name} is {getattr(self, name)}, but preference.losses={self.losses} need no "
                    "reference; expected null"
                )
        if self.reference == "start" and self.precompute_reference is False:
            raise ValueError(
                "preference.precompute_reference is false with preference.reference=start, whose policy is not kept; "
                "expected true or null"
            )
