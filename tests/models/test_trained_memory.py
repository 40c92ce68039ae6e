"""Bytes of what is trained by optimizer: numbers by hand from shapes that are written out here."""

import pytest

from rlbench.config.algorithm import AlgorithmConfig
from rlbench.config.optim import GaloreConfig
from rlbench.config.schema import OptimConfig, RunConfig
from rlbench.models.layer_shape import LayerShape
from rlbench.models.memory import memory_room
from rlbench.models.moments import MomentBytes, count_moments
from rlbench.models.trained_memory import paged_bytes, policy_bytes
from tests.models.test_fit import MODELS, config_of, derived, facts_of, text_config

LLAMA = MODELS["Llama-3.1-8B"]
ADAPTER = 16 * 32 * 81_920  # numbers of rank 16
# of a layer: A of the down projection, B of gate and up, 14,336 x 16 each; all others have fewer than 100,000
LARGE = 32 * 3 * 14_336 * 16
# q and o 256 x 256, k and v 128 x 256, gate, up and down 512 x 256: 589,824 numbers; two tables of 256,000
SMALL = text_config("llama", 256, 512, 2, 4, 2, 64, 1000, False)
MATRICES, TABLES = 2 * 589_824, 512_000
LARGE_MATRICES = 2 * 3 * 512 * 256


def config(name: str, dtype: str = "bfloat16", parameters: str = "lora", **options) -> RunConfig:
    made = config_of()
    made.optim, made.model.dtype = OptimConfig(name=name, **options), dtype
    made.training.parameters = parameters
    return made


def trained(made: RunConfig, model) -> tuple[int, int]:
    """Bytes on the device, and paged ones."""
    shape = LayerShape.from_config(model)
    return policy_bytes(made, shape, model), paged_bytes(made, shape, model)


@pytest.mark.parametrize(
    ("name", "dtype", "expected"),
    [  # a number and its gradient in float32, the moments, the cast to 16 bits
        ("adamw", "bfloat16", (8 + 8 + 2) * ADAPTER),
        ("adamw", "float32", (8 + 8) * ADAPTER),
        ("adamw_8bit", "bfloat16", (8 + 2 + 2) * ADAPTER),
        ("muon", "bfloat16", (8 + 4 + 2) * ADAPTER),
        ("paged_adamw", "bfloat16", (8 + 8 + 2) * ADAPTER - 8 * LARGE),
        ("paged_adamw_8bit", "bfloat16", (8 + 2 + 2) * ADAPTER - 2 * LARGE),
    ],
)
def test_an_adapter_takes_its_numbers_gradients_moments_and_casts(name, dtype, expected):
    paged = {"paged_adamw": 8 * LARGE, "paged_adamw_8bit": 2 * LARGE}.get(name, 0)

    assert trained(config(name, dtype), LLAMA) == (expected, paged)


# GaLore's rank 64, of a layer: projected, q, k, v and o have 16,384 numbers each, gate, up and down 32,768; the bases
# have 256 x 64, but of k and v 128 x 64
LOW, BASES = 2 * (4 * 16_384 + 3 * 32_768), 2 * (5 * 16_384 + 2 * 8_192)


@pytest.mark.parametrize(
    ("name", "dtype", "moments", "paged"),
    [
        ("adamw", "bfloat16", 8 * (MATRICES + TABLES), 0),
        ("adamw", "float32", 8 * (MATRICES + TABLES), 0),
        ("adamw_8bit", "bfloat16", 2 * (MATRICES + TABLES), 0),
        ("muon", "bfloat16", 4 * MATRICES + 8 * TABLES, 0),
        ("galore", "bfloat16", (8 + 4) * LOW + 4 * BASES + 8 * TABLES, 0),
        ("galore_8bit", "bfloat16", (2 + 4) * LOW + 4 * BASES + 2 * TABLES, 0),
        ("paged_adamw", "bfloat16", 8 * (MATRICES - LARGE_MATRICES), 8 * (LARGE_MATRICES + TABLES)),
        ("paged_adamw_8bit", "float32", 2 * (MATRICES - LARGE_MATRICES), 2 * (LARGE_MATRICES + TABLES)),
    ],
)
def test_all_weights_take_masters_gradients_and_moments(name, dtype, moments, paged):
    options = {"galore": GaloreConfig(rank=64)} if name.startswith("galore") else {}
    made = config(name, dtype, "full", **options)

    masters = 4 * (MATRICES + TABLES) if dtype == "bfloat16" else 0  # a float32 model is its own
    assert trained(made, SMALL) == (masters + 4 * (MATRICES + TABLES) + moments, paged)


def test_8_bits_and_pages_begin_at_bitsandbytes_own_sizes():
    eight_bits, paged = OptimConfig(name="adamw_8bit"), OptimConfig(name="paged_adamw")

    assert [count_moments([(n,)], eight_bits).device for n in (4_095, 4_096)] == [8 * 4_095, 2 * 4_096]
    assert count_moments([(99_999,)], paged) == MomentBytes(device=8 * 99_999)
    assert count_moments([(100_000,)], paged) == MomentBytes(paged=8 * 100_000)


def test_a_step_has_the_room_that_its_optimizer_leaves():
    rooms = {name: memory_room(config(name), facts_of(24.0), LLAMA) for name in ("adamw", "adamw_8bit", "paged_adamw")}

    # 0.9 of 24 GiB, less 14.957 of the base, 18 bytes a number of the adapter and 1.5 GiB reserved
    assert rooms["adamw"] / 2**30 == pytest.approx(21.6 - 14.957 - 18 * ADAPTER / 2**30 - 1.5, abs=1e-3)
    assert rooms["adamw_8bit"] - rooms["adamw"] == 6 * ADAPTER
    assert rooms["paged_adamw"] - rooms["adamw"] == 8 * LARGE


@pytest.mark.parametrize(("advantage", "gib"), [("group_relative", "0.2"), ("gae", "0.3")])
def test_reasons_name_paged_moments_as_not_counted(advantage, gib):
    made = config("paged_adamw")
    made.algorithm = AlgorithmConfig(advantage=advantage)
    found = derived("Llama-3.1-8B", 24.0, made)

    words = f"beside the base, paged moments ({gib} GiB, not counted)"
    assert words in found["engine.kv_cache_gib"].reason and words in found["training.recompute"].reason
    plain = derived("Llama-3.1-8B", 24.0, config("adamw"))
    assert not any("paged" in derivation.reason for derivation in plain.values())
