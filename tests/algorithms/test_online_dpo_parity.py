"""Online DPO from scored rollouts to the loss, value and gradient, against TRL's OnlineDPOTrainer.

The trainer is real; its generation, its forward and its rewards are replaced by given ones. Its `ipo` takes sums over
tokens, ours means, as TRL's DPOTrainer does (test_preference_losses.py).
"""

import warnings

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

from rlbench.config.algorithm import AlgorithmConfig
from rlbench.config.pairs import PairsConfig
from rlbench.config.preference import PreferenceConfig
from rlbench.config.schema import RewardsConfig
from rlbench.engine.vllm_process import clean_start
from rlbench.records import Completion, Prompt, RewardComponent, Rollout, RolloutGroup
from rlbench.rollouts.pairs import pair_up
from rlbench.training.preference_objective import Completions, PreferenceObjective

with warnings.catch_warnings(), clean_start():  # TRL imports vLLM where it is installed
    warnings.simplefilter("ignore")
    from trl.experimental.online_dpo import OnlineDPOConfig, OnlineDPOTrainer

P, L = 5, 7  # prompts, longest completion
BETA = 0.3


class Batch:
    """Two ragged completions of each prompt, all first ones before all second ones, as TRL has them."""

    def __init__(self, seed: int):
        generator = torch.Generator().manual_seed(seed)
        lengths = torch.randint(1, L + 1, (2 * P,), generator=generator)
        self.lengths = lengths.tolist()
        self.mask = torch.arange(L) < lengths[:, None]
        self.ids = torch.randint(2, 90, (2 * P, L), generator=generator)
        self.ref = -2 * torch.rand(2 * P, L, generator=generator) - 0.1
        self.logprobs = (self.ref + 0.5 * torch.randn(2 * P, L, generator=generator)).requires_grad_()
        self.rewards = torch.randn(2 * P, generator=generator)

    def gradient(self, loss: torch.Tensor) -> torch.Tensor:
        return torch.autograd.grad(loss, self.logprobs, retain_graph=True)[0]


@pytest.fixture(scope="module")
def trainer(tiny_folder, tmp_path_factory):
    args = OnlineDPOConfig(
        output_dir=str(tmp_path_factory.mktemp("online")), report_to=[], use_cpu=True, bf16=False, disable_tqdm=True,
        per_device_train_batch_size=P, max_new_tokens=L, max_length=64, beta=BETA, gradient_checkpointing=False,
        missing_eos_penalty=None,
    )  # fmt: skip
    return OnlineDPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(tiny_folder),
        ref_model=AutoModelForCausalLM.from_pretrained(tiny_folder),
        reward_funcs=lambda completions, **_: [0.0] * len(completions),
        args=args,
        train_dataset=Dataset.from_dict({"prompt": ["ab"] * P}),
        processing_class=AutoTokenizer.from_pretrained(tiny_folder),
    )


def their_loss(trainer, batch: Batch) -> torch.Tensor:
    prompt = torch.full((2 * P, 1), 5)
    trainer._generate = lambda *_: (prompt, torch.ones_like(prompt), batch.ids, batch.mask.long(), None)
    trainer._forward = lambda model, *_: batch.ref if model is trainer.ref_model else batch.logprobs
    trainer._calculate_rewards_from_functions = lambda **_: batch.rewards.clone()
    seen = []
    trainer.accelerator.backward = lambda loss, **_: seen.append(loss)
    trainer.training_step(trainer.model, {"prompt": ["ab"] * P})
    return seen[0]


def our_loss(batch: Batch, loss: str) -> torch.Tensor:
    groups = [group_of(batch, prompt) for prompt in range(P)]
    algorithm = AlgorithmConfig(pairs=PairsConfig(choice="best_worst"))
    paired = pair_up(groups, algorithm, RewardsConfig(), max_completion_tokens=L)
    rows = [int(sample.sampling_logprobs[0]) for sample in paired.samples]  # which completion it is
    sums, reference = ((values * batch.mask).sum(1)[rows] for values in (batch.logprobs, batch.ref))
    lengths = torch.tensor([batch.lengths[row] for row in rows])
    assert [len(sample.token_ids) for sample in paired.samples] == lengths.tolist()
    chosen = sum(int(lengths[place]) for place, _ in paired.pairs)
    objective = PreferenceObjective(
        config=PreferenceConfig(losses=[loss], beta=BETA),
        num_rows=len(paired.pairs), num_chosen_tokens=chosen, num_desirable=0,
    )  # fmt: skip
    completions = Completions(logps=sums, ref_logps=reference, lengths=lengths, pairs=torch.tensor(paired.pairs))
    return objective(completions)[0]


def group_of(batch: Batch, prompt: int) -> RolloutGroup:
    own = Prompt(prompt_id=f"train/{prompt}", text="ab", token_ids=(5,))
    rollouts = []
    for index, row in enumerate((prompt, P + prompt)):
        ids, reward = tuple(batch.ids[row, : batch.lengths[row]].tolist()), float(batch.rewards[row])
        completion = Completion(
            token_ids=ids, sampling_logprobs=(float(row),) * len(ids), finish_reason="stop", seed=row, policy_version=0,
            adapter_fingerprint="base",
        )  # fmt: skip
        rollouts.append(
            Rollout(
                rollout_id=f"1/{own.prompt_id}/{index}", prompt=own, completion=completion, completion_text="",
                sample_index=index, components={"a": RewardComponent(status="value", value=reward, weight=1.0)},
                reward=reward,
            )
        )  # fmt: skip
    return RolloutGroup(prompt=own, rollouts=tuple(rollouts))


@pytest.mark.parametrize("seed", range(4))
def test_value_and_gradient_are_those_of_online_dpo_trainer(trainer, seed):
    batch = Batch(seed)
    theirs, ours = their_loss(trainer, batch), our_loss(batch, "sigmoid")

    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(batch.gradient(ours), batch.gradient(theirs), rtol=1e-5, atol=1e-7)
    assert batch.gradient(ours).abs().max() > 1e-3
