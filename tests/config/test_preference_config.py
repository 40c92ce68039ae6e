"""What is set must be read by a chosen loss; defaults come with their reason."""

import pytest

from rlbench.config.derive import derive
from rlbench.config.preference import PREFERENCE_LOSSES, PreferenceConfig
from rlbench.config.schema import LoraConfig, RunConfig
from tests.config.test_algorithm_config import FACTS

ERRORS = {
    "no loss": ({"losses": []}, "preference.losses is empty"),
    "an unknown loss": ({"losses": ["dpo"]}, "preference.losses is 'dpo', expected one of: sigmoid"),
    "weights": ({"loss_weights": [1.0, 2.0]}, "preference.loss_weights has 2 numbers for 1 losses"),
    "an option of another loss": (
        {"reward_margin": 0.5}, r"preference.reward_margin is 0.5, but .* do not read it; .* losses that do: simpo"
    ),
    "a divergence that is not read": (
        {"losses": ["simpo"], "divergence": "js"}, "preference.divergence is js, but .* do not read it"
    ),
    "alpha without its divergence": ({"divergence_alpha": 0.5}, "preference.divergence_alpha is 0.5 with"),
    "the divergence without alpha": ({"divergence": "alpha"}, "preference.divergence_alpha is None with"),
    "pairs and singles": ({"losses": ["kto", "sigmoid"]}, "a loss on single completions stands alone"),
    "wpo of singles": ({"losses": ["kto"], "wpo": True}, "preference.wpo is true, but kto has no pairs"),
    "wpo of sorted pairs": (
        {"losses": ["sigmoid", "aot_pair"], "wpo": True}, "preference.wpo is true, but aot_pair sorts the pairs of a"
    ),
    "a reference for none": ({"losses": ["orpo"], "reference": "base"}, "preference.reference is base, but .* need no"),
    "a start that is not kept": (
        {"reference": "start", "precompute_reference": False}, "preference.precompute_reference is false with"
    ),
    "exo without smoothing": ({"losses": ["exo_pair"], "label_smoothing": 0.0}, "at which exo_pair is not defined"),
    "robust at one half": ({"losses": ["robust"], "label_smoothing": 0.5}, "at which robust is not defined"),
}  # fmt: skip


@pytest.mark.parametrize("name", ERRORS)
def test_what_would_be_ignored_is_an_error(name):
    options, message = ERRORS[name]

    with pytest.raises(ValueError, match=message):
        PreferenceConfig(**options)


@pytest.mark.parametrize("loss", PREFERENCE_LOSSES)
def test_defaults_are_filled_in_and_stay_valid(loss):
    config = RunConfig(stage="preference", preference=PreferenceConfig(losses=[loss]))
    derive(config, FACTS)

    for name, default in PREFERENCE_LOSSES[loss].options.items():
        assert getattr(config.preference, name) == default
    assert config.preference.reference == ("base" if PREFERENCE_LOSSES[loss].needs_reference else None)
    PreferenceConfig(**vars(config.preference))  # what config.yaml holds can be read back


def test_after_a_warm_start_the_reference_is_the_policy_that_training_starts_from():
    config = RunConfig(stage="preference", lora=LoraConfig(init_from="somewhere"))
    derive(config, FACTS)

    assert config.preference.reference == "start" and config.preference.precompute_reference is True


def test_losses_that_differ_in_a_default_keep_their_own():
    config = PreferenceConfig(losses=["sigmoid", "simpo"])

    assert "beta" not in config.resolved_defaults(has_warm_start=False)
    assert [options["beta"] for _, _, options in config.weighted_losses()] == [0.1, 2.0]


@pytest.mark.parametrize("stage", ["sft", "preference"])
def test_a_quantized_base_needs_no_engine(stage):
    config = RunConfig(stage=stage)
    config.model.quantization = "nf4"

    derive(config, FACTS)

    assert config.model.quantization == "nf4"
