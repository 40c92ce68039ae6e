"""Whether plain PEFT gives the greedy answers that a finished run recorded.

    python scripts/check_adapter.py outputs/grpo_gsm8k/2026-01-31_12-00-00

Loads the run's base with transformers and its `adapter/` with `peft.PeftModel.from_pretrained`, in the run's dtype, and
feeds it each recorded answer of the last evaluation. An answer is reproduced if every recorded token has PEFT's largest
logit. Where it has not, the gap to the largest logit is printed: in bfloat16, whose numbers from 16 to 32 are 0.125
apart, a gap of a few such steps is a near tie that rounding broke the other way. Exit code 1 if a gap is wider than
half a nat in bfloat16, 0.001 in float32.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch
import yaml
from peft import PeftModel
from transformers import AutoModelForCausalLM

from rlbench.config.schema import ModelConfig
from rlbench.models.source import resolve_model
from rlbench.tracking.rollout_store import read_rollouts

MAX_GAP = {torch.bfloat16: 0.5, torch.float32: 1e-3}  # logits


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run_folder", type=Path)
    arguments = parser.parse_args()
    model = load(arguments.run_folder)
    file = max((arguments.run_folder / "rollouts").glob("eval-step-*.parquet"))
    gaps = [answer_gaps(model, row) for row in read_rollouts(file)]
    wrong = [gap for answer in gaps for gap in answer if gap > 0]
    num_reproduced = sum(not any(gap > 0 for gap in answer) for answer in gaps)
    print(f"{file}: {num_reproduced} of {len(gaps)} greedy answers reproduced token for token")
    widest = max(wrong, default=0.0)
    print(f"{len(wrong)} of {sum(map(len, gaps))} tokens lack the largest logit of PEFT; the widest gap is {widest:g}")
    sys.exit(widest > MAX_GAP[model.dtype])


def load(run_folder: Path) -> Any:
    """The run's base with its saved adapter, as any user of PEFT would load it; of all weights its `model/`."""
    config = ModelConfig(**yaml.safe_load((run_folder / "config.yaml").read_text())["model"])
    if (run_folder / "model").is_dir():
        folder, dtype = str(run_folder / "model"), getattr(torch, config.dtype)
        return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, local_files_only=True).eval()
    folder = str(resolve_model(config).folder)
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, config.dtype), local_files_only=True)
    return PeftModel.from_pretrained(base, str(run_folder / "adapter")).eval()


@torch.no_grad()
def answer_gaps(model: Any, row: dict[str, Any]) -> list[float]:
    """Largest logit less the recorded token's, for each token of the answer: 0 where greedy decoding agrees."""
    prompt, answer = list(row["prompt_token_ids"]), list(row["token_ids"])
    logits = model(input_ids=torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1].float()  # [T, V]
    chosen = logits.gather(-1, torch.tensor(answer)[:, None])[:, 0]  # [T]
    return (logits.max(-1).values - chosen).tolist()


if __name__ == "__main__":
    main()
