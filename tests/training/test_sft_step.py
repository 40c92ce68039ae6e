"""The packed step of supervised fine-tuning against a plain one (PEFT, padded rows, cross-entropy) and TRL's."""

import warnings

import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset
from transformers import AutoTokenizer

from rlbench.config.schema import LoraConfig
from rlbench.data.packing import pack
from rlbench.data.supervised import given_sample
from rlbench.engine.vllm_process import clean_start
from rlbench.models.base import share_base
from rlbench.models.lora import add_lora, unfuse_lora
from rlbench.training.sft_step import held_out_loss, sft_step
from tests.models.test_lora import gradients, randomise
from tests.training.test_step import make_policy

with warnings.catch_warnings(), clean_start():  # TRL imports vLLM where it is installed
    warnings.simplefilter("ignore")
    from trl import SFTConfig, SFTTrainer


def make_rows(seed: int = 0) -> list[tuple[list[int], list[bool]]]:
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for length in (2, 5, 9, 14, 3):
        ids = torch.randint(2, 98, (length,), generator=generator).tolist()
        mask = (torch.rand(length, generator=generator) < 0.6).tolist()
        rows.append((ids, [False, *mask[1:-1], True]))  # holes among the trained tokens
    return rows


def ours(base, rows, budget):
    policy = make_policy(base)
    samples = [given_sample(str(i), ids, mask) for i, (ids, mask) in enumerate(rows)]
    batches = pack(samples, tokens_per_microbatch=budget, device="cpu")
    held_out = held_out_loss(policy, batches)

    class Capture(torch.optim.SGD):
        def step(self, closure=None):
            self.captured = gradients(policy.model)

    optimizer = Capture(policy.parameters(), lr=0.0)
    result = sft_step(policy, batches, optimizer, max_grad_norm=0)
    assert result.is_applied and len(batches) == (1 if budget > 100 else len(batches))
    assert held_out["loss/nll"] == pytest.approx(result.metrics["loss/nll"], rel=1e-6)
    return result.metrics["loss/nll"], optimizer.captured, len(batches)


def plain_model(base):
    model = add_lora(share_base(base), LoraConfig(rank=4, alpha=8), seed=0)
    unfuse_lora(model)
    randomise(model)
    return model


def plain(base, rows):
    model = plain_model(base)
    length = max(len(ids) for ids, _ in rows)
    token_ids = torch.tensor([ids + [0] * (length - len(ids)) for ids, _ in rows])
    labels = torch.tensor(
        [
            [t if m else -100 for t, m in zip(ids, mask, strict=True)] + [-100] * (length - len(ids))
            for ids, mask in rows
        ]
    )
    attention_mask = torch.tensor([[1] * len(ids) + [0] * (length - len(ids)) for ids, _ in rows])
    logits = model(input_ids=token_ids, attention_mask=attention_mask).logits[:, :-1]
    loss = F.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten())
    loss.backward()
    return loss.item(), gradients(model)


@pytest.mark.parametrize("budget", [1000, 16])
def test_loss_and_gradients_are_those_of_cross_entropy_whatever_the_split(tiny_base, budget):
    rows = make_rows()

    loss, grads, num_batches = ours(tiny_base, rows, budget)
    expected, expected_grads = plain(tiny_base, rows)

    assert num_batches == 1 if budget == 1000 else num_batches > 1
    assert loss == pytest.approx(expected, rel=1e-5)
    assert max(g.abs().max() for g in expected_grads.values()) > 1e-3
    for (name, grad), theirs in zip(grads.items(), expected_grads.values(), strict=True):
        torch.testing.assert_close(grad, theirs, rtol=1e-3, atol=1e-5, msg=name)


def test_loss_and_gradients_are_those_of_sft_trainer(tiny_base, tiny_folder, tmp_path):
    rows, model = make_rows(), plain_model(tiny_base)
    args = SFTConfig(
        output_dir=str(tmp_path), report_to=[], use_cpu=True, bf16=False, disable_tqdm=True,
        gradient_checkpointing=False, per_device_train_batch_size=len(rows), max_length=None, completion_only_loss=True,
    )  # fmt: skip
    trainer = SFTTrainer(
        model=model, args=args, processing_class=AutoTokenizer.from_pretrained(tiny_folder),
        train_dataset=Dataset.from_list([{"input_ids": ids, "completion_mask": mask} for ids, mask in rows]),
    )  # fmt: skip
    batch = trainer.data_collator(list(trainer.train_dataset))
    expected = trainer.compute_loss(model, batch)
    expected.backward()

    loss, grads, _ = ours(tiny_base, rows, 1000)

    assert (batch["labels"] != -100).sum() == sum(sum(mask) for _, mask in rows)
    assert loss == pytest.approx(expected.item(), rel=1e-5)
    for (name, grad), theirs in zip(grads.items(), gradients(model).values(), strict=True):
        torch.testing.assert_close(grad, theirs, rtol=1e-3, atol=1e-5, msg=name)
