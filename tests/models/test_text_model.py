"""Models whose logits are more than their head's are refused before anything is loaded."""

import pytest
from transformers import CohereConfig, GraniteConfig, LlamaConfig

from rlbench.models.base import check_text_model


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (GraniteConfig(logits_scaling=8.0), r"a granite model with logits_scaling=8\.0"),
        (CohereConfig(logit_scale=0.0625), r"a cohere model with logit_scale=0\.0625"),
    ],
)
def test_scaled_logits_are_refused_by_name(config, message):
    with pytest.raises(ValueError, match=message):
        check_text_model(config, "folder")


@pytest.mark.parametrize("config", [LlamaConfig(), GraniteConfig(logits_scaling=1.0)])
def test_a_scale_of_one_is_no_scale(config):
    check_text_model(config, "folder")
