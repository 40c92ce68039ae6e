"""The kinds of run that soak_kills.py kills: every stage, and all that a run carries from step to step."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from tests.tiny import save_tiny_model

REWARD = "path:tests.loops.letter_reward"
SFT, PAIRS, REWARD_MODEL = ["+exp=sft_gsm8k"], ["+exp=dpo_gsm8k"], ["+exp=reward_model_gsm8k"]
FULL = ["training.parameters=full", "optim.lr=0.003"]
SFT_FULL = [*SFT, *FULL]


@dataclass(frozen=True, slots=True)
class Kind:
    """`{run}` in an override is the folder of the undisturbed run of `after`; `{other}` another model."""

    overrides: list[str]
    data: str = "prompts"
    after: str = ""
    every: int = 3  # steps from evaluation to evaluation
    reward: str = "share_of_a"  # at_all: a rare one, as accuracy; "": none but those of the overrides


KINDS = {
    "grpo": Kind([]),
    "grpo_updates": Kind(["algorithm.num_updates=4", "algorithm.num_minibatches=2", "optim.lr=0.01"]),
    "grpo_replay": Kind(
        ["algorithm.replay.is_on=true", "data.limit=8", "algorithm.group_size=4", "optim.lr=0.005"], reward="at_all"
    ),
    "grpo_curriculum": Kind(["algorithm.curriculum.is_on=true"]),
    "dapo": Kind(["algorithm=dapo", "algorithm.group_size=4", "optim.lr=0.005"], reward="at_all"),
    "grpo_slow_rewards": Kind(
        ["rewards.overlap=true", "rewards.num_workers=2", f"+rewards.components.slow={{{REWARD}.takes_its_time}}"]
    ),
    "grpo_schedule": Kind(["optim.schedule=linear", "optim.warmup_steps=5", "optim.weight_decay=0.1"]),
    "grpo_reference": Kind(["algorithm.kl_coef=0.05", "algorithm.reference_refresh_steps=3",
                            "algorithm.reference_refresh_frac=0.5"]),
    "grpo_entropy": Kind(["algorithm.entropy_target=2.0"]),
    "grpo_keep_best": Kind(["checkpoint.keep_best=eval/share", "checkpoint.keep_last=1"], every=1),
    "grpo_sampled_eval": Kind(["evaluation.num_samples=2", "checkpoint.keep_last=1"]),
    "grpo_muon": Kind(["optim=muon", "optim.lr=0.01"]),
    "grpo_full": Kind([*FULL, "algorithm.kl_coef=0.01", "model.dtype=bfloat16"]),
    "grpo_fp8": Kind(["model.quantization=fp8"]),
    "ppo": Kind(["algorithm=ppo", "algorithm.critic.warmup_steps=2", "algorithm.kl_coef=0.05", "optim.lr=0.005"]),
    "online_dpo": Kind(["algorithm=online_dpo", "preference=dpo", "algorithm.reference_refresh_steps=2",
                        "algorithm.reference_refresh_frac=0.5", "optim.lr=0.005"]),
    "distillation": Kind(["algorithm=distillation", "algorithm.teacher.model={other}", "optim.lr=0.005"]),
    "sft": Kind(SFT, "answers"),
    "sft_dropout": Kind([*SFT, "lora.dropout=0.3"], "answers"),
    "sft_full": Kind(SFT_FULL, "answers"),
    "sft_adamw_8bit": Kind([*SFT_FULL, "optim=adamw_8bit"], "answers"),
    "sft_galore": Kind([*SFT_FULL, "optim=galore", "optim.galore.rank=8", "optim.galore.interval=3"], "answers"),
    "sft_galore_8bit": Kind(
        [*SFT_FULL, "optim=galore_8bit", "optim.galore.rank=16", "optim.galore.interval=3"], "answers"
    ),
    "dpo": Kind([*PAIRS, "preference.reference=start", "preference.precompute_reference=true",
                 "preference.pairs_per_step=4"], "pairs"),
    "dpo_dropout": Kind([*PAIRS, "preference.precompute_reference=false", "preference.pairs_per_step=4",
                         "lora.dropout=0.2"], "pairs"),
    "kto": Kind(["+exp=kto_gsm8k", "preference.pairs_per_step=8"], "pairs"),
    "reward_model": Kind([*REWARD_MODEL, "reward_model.pairs_per_step=4", "optim.lr=0.005"], "pairs"),
    "grpo_reward_model": Kind(
        ["+rewards.components.preference={{path:reward_model,kwargs:{{run:{run}}}}}", "optim.lr=0.005"],
        after="reward_model", reward="",
    ),
    "chain": Kind(['chain=[{name:sft,overrides:["stage=sft"]},{name:grpo,overrides:["stage=rl"]}]'], "chain"),
}  # fmt: skip


def make_data(folder: Path) -> None:
    """The models and rows of all kinds."""
    save_tiny_model(folder / "model")
    save_tiny_model(folder / "other", num_layers=1, seed=1)
    sums = [(a, b) for a in range(8) for b in range(5)]
    given = {
        "prompts": [{"question": f"{a}+{b}", "answer": str(a + b)} for a, b in sums],
        "answers": [{"question": f"{a}+{b}", "answer": "aaa" if a % 2 else f"a{b}b"} for a, b in sums],
        "pairs": [{"prompt": f"{a}+{b}=", "chosen": f"a{a}b{b}a", "rejected": f"b{b}a{a}b"} for a, b in sums],
    }
    given["chain"] = given["answers"]
    for name, rows in given.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def overrides_of(name: str, folder: Path, num_steps: int, runs: dict[str, Path]) -> list[str]:
    """
    Args:
        name: of the kind.
        folder: given to `make_data`.
        num_steps: of the run.
        runs: folders of undisturbed runs by kind.
    """
    kind = KINDS[name]
    shared = [
        f"name={name}", f"model.path={folder / 'model'}", "model.dtype=float32", "hardware.num_threads=1",
        f"data.path={folder / kind.data}.jsonl", "evaluation.num_prompts=8", f"evaluation.every_steps={kind.every}",
        "optim.lr=0.02", "optim.warmup_steps=0", "checkpoint.every_steps=2", f"training.num_steps={num_steps}",
    ]  # fmt: skip
    if kind.data == "pairs":
        shared += ["data=file", "training.tokens_per_microbatch=60"]
    else:
        shared += ["data.system_prompt=null", "data.examples=[]"]
    components = {
        "share_of_a": {"share": "share_of_a", "accuracy": "accuracy,weight:0.0"},
        "at_all": {"accuracy": "at_all"},
        "": {"accuracy": "accuracy,weight:0.0"},
    }[kind.reward]
    online = [
        "~rewards.components.format", "~rewards.components.accuracy", "rewards.num_workers=1",
        *(f"+rewards.components.{key}={{{REWARD}.{value}}}" for key, value in components.items()),
        "rewards.allowed_prefixes=[tests.loops.letter_reward]", "sampling.max_tokens=12",
        "algorithm.prompts_per_step=4", "algorithm.group_size=8",
    ]  # fmt: skip
    of_sft = ["sft.rows_per_step=8", "training.tokens_per_microbatch=80"]
    shared += {"prompts": online, "answers": of_sft, "pairs": [], "chain": [*online, *of_sft]}[kind.data]
    places = {"run": runs.get(kind.after), "other": folder / "other"}
    own = [o.format(**places) if "{run}" in o or "{other}" in o else o for o in kind.overrides]
    experiment = [override for override in own if override.startswith("+exp")]
    return [*experiment, *shared, *(override for override in own if override not in experiment)]
