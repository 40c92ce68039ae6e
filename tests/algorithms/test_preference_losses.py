"""Preference losses against hand-written float64 formulas, their laws, and TRL's own trainers, value and gradient.

TRL's trainers are real; only their forward is replaced, by given logprobs.
"""

import math
import warnings
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

from rlbench.algorithms.preference_losses import (
    DIVERGENCES,
    PREFERENCE_LOSSES,
    UNPAIRED_LOSSES,
    divergence_scores,
    mismatch_kl,
    wpo_log_weights,
)
from rlbench.config.preference import DIVERGENCES as DIVERGENCE_NAMES
from rlbench.config.preference import PREFERENCE_LOSSES as SPECS
from rlbench.config.preference import PreferenceConfig
from rlbench.engine.vllm_process import clean_start
from rlbench.training.preference_objective import Completions, PreferenceObjective

with warnings.catch_warnings(), clean_start():  # TRL imports vLLM where it is installed
    warnings.simplefilter("ignore")
    from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer
    from trl.experimental.cpo import CPOConfig, CPOTrainer
    from trl.experimental.orpo import ORPOConfig, ORPOTrainer

P, L = 6, 7  # pairs, longest completion


def adjacent(num_completions: int) -> torch.Tensor:
    """Chosen and rejected in turn."""
    return torch.arange(num_completions).view(-1, 2)


class Batch:
    """Random ragged per-token logprobs [2P, L] of policy and reference, chosen and rejected in turn."""

    def __init__(self, seed: int, dtype=torch.float32):
        generator = torch.Generator().manual_seed(seed)
        lengths = torch.randint(1, L + 1, (2 * P,), generator=generator)
        self.mask = torch.arange(L) < lengths[:, None]
        self.lengths = lengths

        def draw(scale):
            return scale * torch.rand(2 * P, L, generator=generator, dtype=dtype) - 0.01

        self.ref = -draw(2.0) - 0.05
        self.logprobs = (self.ref - draw(1.0) + 0.4).clamp(max=-0.02).requires_grad_()
        self.log_sum_sq = -draw(1.5) - 0.02  # of the policy's distribution
        self.labels = torch.rand(2 * P, generator=generator) < 0.5
        self.other, self.other_ref = (-draw(2.0).sum(1) for _ in range(2))

    def sums(self, values):
        return (values * self.mask).sum(1)

    def completions(self, *, wpo=False, is_unpaired=False, has_reference=True) -> Completions:
        weights = wpo_log_weights(self.logprobs, 2 * self.logprobs - self.log_sum_sq).detach()
        return Completions(
            logps=self.sums(self.logprobs),
            ref_logps=self.sums(self.ref) * has_reference,
            lengths=self.lengths,
            pairs=adjacent(len(self.lengths)),
            log_weights=self.sums(weights) / self.lengths if wpo else None,
            is_desirable=self.labels if is_unpaired else None,
        )

    def gradient(self, loss):
        return torch.autograd.grad(loss, self.logprobs, retain_graph=True)[0]


def our_loss(batch: Batch, config: PreferenceConfig, kl=None) -> torch.Tensor:
    is_unpaired = config.is_unpaired
    objective = PreferenceObjective(
        config=config,
        num_rows=2 * P if is_unpaired else P,
        num_chosen_tokens=int(batch.lengths[::2].sum()),
        num_desirable=int(batch.labels.sum()),
        kl=kl,
    )
    completions = batch.completions(wpo=config.wpo, is_unpaired=is_unpaired, has_reference=config.needs_reference)
    return objective(completions)[0]


def assert_same(ours, theirs, batch):
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    expected = batch.gradient(theirs)
    assert expected.abs().max() > 1e-5
    torch.testing.assert_close(batch.gradient(ours), expected, rtol=1e-5, atol=1e-5)


PAIR = {"prompt": "ab", "chosen": "c", "rejected": "d"}
LABELLED = [{"prompt": "ab", "completion": "c", "label": i % 2 == 0} for i in range(4)]


def build(trainer_class, config_class, folder, output, rows, **options):
    args = config_class(
        output_dir=str(output), report_to=[], use_cpu=True, bf16=False, disable_tqdm=True,
        gradient_checkpointing=False, per_device_train_batch_size=2, **options,
    )  # fmt: skip
    reference = (
        {}
        if trainer_class in (CPOTrainer, ORPOTrainer)
        else {"ref_model": AutoModelForCausalLM.from_pretrained(folder)}
    )
    trainer = trainer_class(
        model=AutoModelForCausalLM.from_pretrained(folder), **reference, args=args,
        train_dataset=Dataset.from_list(rows), processing_class=AutoTokenizer.from_pretrained(folder),
    )  # fmt: skip
    trainer.model.train()
    return trainer


@pytest.fixture(scope="module")
def dpo_trainer(tiny_folder, tmp_path_factory):
    return build(DPOTrainer, DPOConfig, tiny_folder, tmp_path_factory.mktemp("dpo"), [PAIR] * 4)


def order(values):
    """Ours are in turn, TRL's chosen first."""
    return torch.cat([values[::2], values[1::2]])


def unread(batch: Batch) -> dict[str, torch.Tensor]:
    """What TRL's fused head returns besides, for its metrics."""
    shape = batch.mask.shape
    return {
        "entropy": torch.zeros(shape),
        "mean_logits": torch.zeros(shape),
        "is_top1": torch.zeros(shape, dtype=torch.bool),
    }


def their_dpo_loss(trainer, batch: Batch, losses, weights=None, **settings):
    trainer.loss_types, trainer.loss_weights = losses, weights or [1.0] * len(losses)
    trainer.beta, trainer.label_smoothing = settings.get("beta", 0.1), settings.get("label_smoothing", 0.0)
    trainer.f_divergence_type = settings.get("divergence", "reverse_kl")
    trainer.f_alpha_divergence_coef = settings.get("alpha", 0.5)
    trainer.use_weighting = settings.get("wpo", False)
    trainer.args.discopop_tau = settings.get("tau", 0.05)
    trainer.precompute_ref_logps = True
    mask = torch.cat([torch.zeros(2 * P, 1, dtype=torch.long), order(batch.mask).long()], dim=1)
    ref = order(batch.sums(batch.ref))
    inputs = {
        "input_ids": torch.full_like(mask, 5),
        "attention_mask": torch.ones_like(mask),
        "completion_mask": mask,
        "ref_chosen_logps": ref[:P],
        "ref_rejected_logps": ref[P:],
    }
    outputs = SimpleNamespace(
        log_probs=order(batch.logprobs * batch.mask), log_sum_sq_probs=order(batch.log_sum_sq), **unread(batch)
    )
    return trainer._compute_loss(lambda **_: outputs, inputs, False)


CASES = {
    # name: (TRL's loss types and settings, our settings)
    "sigmoid": ((["sigmoid"], {}), {}),
    "hinge": ((["hinge"], {}), {"losses": ["hinge"]}),
    "ipo": ((["ipo"], {"beta": 0.3}), {"losses": ["ipo"], "beta": 0.3}),
    "sigmoid_norm": ((["sigmoid_norm"], {"beta": 5.0}), {"losses": ["sigmoid_norm"]}),
    "exo_pair": ((["exo_pair"], {"label_smoothing": 0.01}), {"losses": ["exo_pair"], "label_smoothing": 0.01}),
    "nca_pair": ((["nca_pair"], {}), {"losses": ["nca_pair"]}),
    "robust": ((["robust"], {"label_smoothing": 0.2}), {"losses": ["robust"], "label_smoothing": 0.2}),
    "bco_pair": ((["bco_pair"], {}), {"losses": ["bco_pair"]}),
    "sppo_hard": ((["sppo_hard"], {"beta": 0.5}), {"losses": ["sppo_hard"], "beta": 0.5}),
    "aot_pair": ((["aot"], {"label_smoothing": 0.1}), {"losses": ["aot_pair"], "label_smoothing": 0.1}),
    "aot_unpaired": ((["aot_unpaired"], {}), {"losses": ["aot_unpaired"]}),
    "apo_zero": ((["apo_zero"], {}), {"losses": ["apo_zero"]}),
    "apo_down": ((["apo_down"], {}), {"losses": ["apo_down"]}),
    "discopop": ((["discopop"], {}), {"losses": ["discopop"]}),
    "sft": ((["sft"], {}), {"losses": ["sft"]}),
    "mpo": (
        (["sigmoid", "bco_pair", "sft"], {"weights": [0.8, 0.2, 1.0]}),
        {"losses": ["sigmoid", "bco_pair", "sft"], "loss_weights": [0.8, 0.2, 1.0]},
    ),
    "wpo": ((["sigmoid"], {"wpo": True}), {"wpo": True}),
    "wpo of a sum": ((["ipo", "nca_pair"], {"wpo": True}), {"losses": ["ipo", "nca_pair"], "wpo": True}),
    "forward_kl": ((["sigmoid"], {"divergence": "forward_kl"}), {"divergence": "forward_kl"}),
    "js": ((["sigmoid"], {"divergence": "js_divergence"}), {"divergence": "js"}),
    "alpha": (
        (["hinge"], {"divergence": "alpha_divergence", "alpha": 0.4}),
        {"losses": ["hinge"], "divergence": "alpha", "divergence_alpha": 0.4},
    ),
    "js of means": (
        (["ipo"], {"divergence": "js_divergence"}), {"losses": ["ipo"], "divergence": "js"}
    ),
}  # fmt: skip


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("case", CASES)
def test_losses_on_pairs_are_those_of_dpo_trainer(dpo_trainer, case, seed):
    (losses, settings), options = CASES[case]
    batch = Batch(seed)

    theirs = their_dpo_loss(dpo_trainer, batch, losses, **settings)

    assert_same(our_loss(batch, PreferenceConfig(**options)), theirs, batch)


@pytest.mark.parametrize(
    ("loss", "options"),
    [
        ("cpo", {"beta": 0.3, "nll_coef": 0.7}),
        ("simpo", {"beta": 2.0, "reward_margin": 0.4}),
    ],
)
def test_cpo_trainer(tiny_folder, tmp_path, loss, options):
    batch = Batch(2)
    theirs = {"loss_type": "sigmoid" if loss == "cpo" else "simpo", "cpo_alpha": options.get("nll_coef", 0.0)}
    theirs |= {"beta": options["beta"], "simpo_gamma": options.get("reward_margin", 0.5)}
    trainer = build(CPOTrainer, CPOConfig, tiny_folder, tmp_path, [PAIR] * 4, **theirs)
    sums = batch.sums(batch.logprobs) / (batch.lengths if loss == "simpo" else 1)
    chosen_tokens = batch.logprobs[::2][batch.mask[::2]]
    zero = torch.zeros(P, 1)
    trainer.concatenated_forward = lambda *_: (sums[::2], sums[1::2], zero, zero, -chosen_tokens.mean())

    expected = trainer.get_batch_loss_metrics(trainer.model, {})[0]

    assert_same(our_loss(batch, PreferenceConfig(losses=[loss], **options)), expected, batch)


def test_orpo_trainer(tiny_folder, tmp_path):
    batch = Batch(3)
    trainer = build(ORPOTrainer, ORPOConfig, tiny_folder, tmp_path, [PAIR] * 4, beta=0.2)
    means = batch.sums(batch.logprobs) / batch.lengths
    chosen_tokens = batch.logprobs[::2][batch.mask[::2]]
    zero = torch.zeros(P, 1)
    trainer.concatenated_forward = lambda *_: (means[::2], means[1::2], zero, zero, -chosen_tokens.mean())

    expected = trainer.get_batch_loss_metrics(trainer.model, {})[0]

    assert_same(our_loss(batch, PreferenceConfig(losses=["orpo"], beta=0.2)), expected, batch)


def test_label_smoothing_of_cdpo_is_that_of_cpo_trainer_on_log_ratios(tiny_folder, tmp_path):
    batch = Batch(4)
    trainer = build(
        CPOTrainer, CPOConfig, tiny_folder, tmp_path, [PAIR] * 4, label_smoothing=0.2, beta=0.3, loss_type="sigmoid"
    )
    ratios = batch.sums(batch.logprobs - batch.ref)

    expected = trainer.cpo_loss(ratios[::2], ratios[1::2])[0].mean()

    assert_same(our_loss(batch, PreferenceConfig(losses=["cdpo"], label_smoothing=0.2, beta=0.3)), expected, batch)


@pytest.mark.parametrize("loss", UNPAIRED_LOSSES)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_losses_on_single_completions_are_those_of_kto_trainer(tiny_folder, tmp_path, loss, seed):
    batch = Batch(seed)
    weights = {"desirable_weight": 1.3, "undesirable_weight": 0.8}
    trainer = build(KTOTrainer, KTOConfig, tiny_folder, tmp_path, LABELLED, loss_type=loss, beta=0.2, **weights)
    trainer.precompute_ref_logps = True
    trainer._compute_kl_logps = lambda *_: batch.other
    mask = torch.cat([torch.zeros(2 * P, 1, dtype=torch.long), batch.mask.long()], dim=1)
    inputs = {
        "input_ids": torch.full_like(mask, 5),
        "attention_mask": torch.ones_like(mask),
        "completion_mask": mask,
        "label": batch.labels,
        "ref_logps": batch.sums(batch.ref),
        "ref_KL_logps": batch.other_ref,
    }
    outputs = SimpleNamespace(log_probs=batch.logprobs * batch.mask, **unread(batch))

    expected = trainer._compute_loss(lambda **_: outputs, inputs, False)

    config = PreferenceConfig(losses=[loss], beta=0.2, **weights)
    kl = mismatch_kl(batch.other, batch.other_ref) if config.needs_mismatch else None
    assert_same(our_loss(batch, config, kl), expected, batch)


def log_sigmoid(x: float) -> float:
    return -math.log1p(math.exp(-x)) if x > 0 else x - math.log1p(math.exp(x))


def sig(x: float) -> float:
    return 1 / (1 + math.exp(-x))


BETA = 0.4
E = 0.15
C, R, NC, NR, RC, RR = -3.0, -4.5, 3, 5, -3.7, -4.1  # logps, lengths, reference logps
DC, DR = C - RC, R - RR
Z = BETA * (DC - DR)
OC, OR = (m - math.log(1 - math.exp(m)) for m in (C / NC, R / NR))
BY_HAND = {
    "sigmoid": -log_sigmoid(Z),
    "cdpo": -(1 - E) * log_sigmoid(Z) - E * log_sigmoid(-Z),
    "robust": (-(1 - E) * log_sigmoid(Z) + E * log_sigmoid(-Z)) / (1 - 2 * E),
    "hinge": max(0.0, 1 - Z),
    "ipo": (DC / NC - DR / NR - 1 / (2 * BETA)) ** 2,
    "sigmoid_norm": -log_sigmoid(BETA * (DC / NC - DR / NR)),
    "exo_pair": sig(Z) * math.log(sig(Z) / (1 - E)) + sig(-Z) * math.log(sig(-Z) / E),
    "nca_pair": -log_sigmoid(BETA * DC) - log_sigmoid(-BETA * DC) / 2 - log_sigmoid(-BETA * DR) / 2,
    "bco_pair": -log_sigmoid(BETA * DC) - log_sigmoid(-BETA * DR),
    "sppo_hard": (DC - 0.5 / BETA) ** 2 + (DR + 0.5 / BETA) ** 2,
    "aot_pair": -(1 - E) * log_sigmoid(Z) - E * log_sigmoid(-Z),
    "aot_unpaired": -(1 - E) * log_sigmoid(Z) - E * log_sigmoid(-Z),
    "apo_zero": 1 - sig(BETA * DC) + sig(BETA * DR),
    "apo_down": sig(BETA * DC) + 1 - sig(Z),
    "discopop": -log_sigmoid(Z) * (1 - sig(Z / 0.05)) + math.exp(-Z) * sig(Z / 0.05),
    "simpo": -log_sigmoid(BETA * (C / NC - R / NR) - 0.5),
    "cpo": -log_sigmoid(BETA * (C - R)) + -C / NC,
    "orpo": -C / NC - BETA * log_sigmoid(OC - OR),
    "sft": -C / NC,
}


def one_pair(name: str) -> tuple[torch.Tensor, Completions]:
    spec = SPECS[name]
    options = {key: value for key, value in {"beta": BETA, "label_smoothing": E}.items() if key in spec.options}
    logps = torch.tensor([C, R], dtype=torch.float64, requires_grad=True)
    reference = torch.tensor([RC, RR], dtype=torch.float64) * spec.needs_reference
    completions = Completions(logps=logps, ref_logps=reference, lengths=torch.tensor([NC, NR]), pairs=adjacent(2))
    objective = PreferenceObjective(
        config=PreferenceConfig(losses=[name], **options), num_rows=1, num_chosen_tokens=NC, num_desirable=0
    )
    return objective(completions)[0], completions


@pytest.mark.parametrize("name", PREFERENCE_LOSSES)
def test_one_pair_by_hand_in_float64(name):
    assert one_pair(name)[0].item() == pytest.approx(BY_HAND[name], rel=1e-12)


@pytest.mark.parametrize(
    "name", sorted(set(PREFERENCE_LOSSES) - {"apo_down", "nca_pair", "ipo", "exo_pair", "sppo_hard"})
)
def test_the_gradient_never_lowers_the_chosen_nor_raises_the_rejected(name):
    """Where the margin is small. The five others pull towards fixed values or lower the chosen by design."""
    loss, completions = one_pair(name)

    chosen, rejected = torch.autograd.grad(loss, completions.logps)[0].tolist()

    assert chosen < 0 and (rejected > 0 or name == "sft")


@pytest.mark.parametrize("name", sorted(set(PREFERENCE_LOSSES) - {"aot_pair", "aot_unpaired"}))
def test_the_loss_does_not_depend_on_the_split_into_microbatches(name):
    batch = Batch(5, torch.float64)
    config = PreferenceConfig(losses=[name])
    whole = batch.completions(has_reference=config.needs_reference)
    objective = PreferenceObjective(
        config=config, num_rows=P, num_chosen_tokens=int(batch.lengths[::2].sum()), num_desirable=0
    )

    parts = [
        objective(
            Completions(
                logps=whole.logps[s],
                ref_logps=whole.ref_logps[s],
                lengths=whole.lengths[s],
                pairs=adjacent(len(whole.lengths[s])),
            )
        )
        for s in (slice(0, 4), slice(4, 2 * P))
    ]

    torch.testing.assert_close(parts[0][0] + parts[1][0], objective(whole)[0])
    for key, value in objective(whole)[1].items():
        torch.testing.assert_close(parts[0][1][key] + parts[1][1][key], value)


@pytest.mark.parametrize("name", UNPAIRED_LOSSES)
def test_the_loss_on_single_completions_does_not_depend_on_the_split(name):
    batch = Batch(6, torch.float64)
    whole = batch.completions(is_unpaired=True)
    objective = PreferenceObjective(
        config=PreferenceConfig(losses=[name]), num_rows=2 * P, num_chosen_tokens=0,
        num_desirable=int(batch.labels.sum()), kl=torch.tensor(0.2, dtype=torch.float64),
    )  # fmt: skip

    parts = [objective(rows_of(whole, list(rows)))[0] for rows in (range(5), range(5, 2 * P))]

    torch.testing.assert_close(parts[0] + parts[1], objective(whole)[0])
    torch.testing.assert_close(batch.gradient(parts[0] + parts[1]), batch.gradient(objective(whole)[0]))


@pytest.mark.parametrize("name", [*PREFERENCE_LOSSES, *UNPAIRED_LOSSES])
def test_the_order_of_rows_does_not_matter(name):
    batch, config = Batch(7, torch.float64), PreferenceConfig(losses=[name])
    whole = batch.completions(is_unpaired=config.is_unpaired, has_reference=config.needs_reference)
    objective = PreferenceObjective(
        config=config, num_rows=2 * P if config.is_unpaired else P,
        num_chosen_tokens=int(batch.lengths[::2].sum()), num_desirable=int(batch.labels.sum()),
        kl=torch.tensor(0.2, dtype=torch.float64),
    )  # fmt: skip
    order = [row for pair in (4, 1, 5, 0, 3, 2) for row in (2 * pair, 2 * pair + 1)]

    one, other = objective(whole)[0], objective(rows_of(whole, order))[0]

    torch.testing.assert_close(other, one)
    torch.testing.assert_close(batch.gradient(other), batch.gradient(one))
    assert batch.gradient(one).abs().max() > 1e-5


def rows_of(whole: Completions, rows: list[int]) -> Completions:
    labels = whole.is_desirable
    return Completions(
        logps=whole.logps[rows],
        ref_logps=whole.ref_logps[rows],
        lengths=whole.lengths[rows],
        pairs=adjacent(len(rows) // 2 * 2),
        is_desirable=None if labels is None else labels[rows],
    )


def test_kto_by_hand_in_float64():
    ratios, kl = [0.7, -0.4], 0.2
    expected = (1.5 * (1 - sig(BETA * (0.7 - kl))) + 0.5 * (1 - sig(BETA * (kl + 0.4)))) / 2
    objective = PreferenceObjective(
        config=PreferenceConfig(losses=["kto"], beta=BETA, desirable_weight=1.5, undesirable_weight=0.5),
        num_rows=2, num_chosen_tokens=0, num_desirable=1, kl=torch.tensor(kl, dtype=torch.float64),
    )  # fmt: skip
    completions = Completions(
        logps=torch.tensor(ratios, dtype=torch.float64), ref_logps=torch.zeros(2, dtype=torch.float64),
        lengths=torch.tensor([1, 1]), pairs=adjacent(0), is_desirable=torch.tensor([True, False]),
    )  # fmt: skip

    assert objective(completions)[0].item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("name", DIVERGENCES)
def test_divergence_scores_are_the_derivative_of_f(name):
    alpha = 0.4
    functions = {
        "reverse_kl": lambda t: t * torch.log(t) - t,
        "forward_kl": lambda t: t - torch.log(t),
        "js": lambda t: t * torch.log(2 * t / (t + 1)) + torch.log(2 / (t + 1)),
        "alpha": lambda t: (t**alpha / alpha - t) / (alpha - 1),
    }
    ratio = torch.tensor([0.2, 1.0, 3.0], dtype=torch.float64, requires_grad=True)

    (derivative,) = torch.autograd.grad(functions[name](ratio).sum(), ratio)

    torch.testing.assert_close(divergence_scores(ratio.detach().log(), name, alpha), derivative)


def test_tables_of_config_and_algorithms_have_the_same_names():
    assert {**PREFERENCE_LOSSES, **UNPAIRED_LOSSES}.keys() == SPECS.keys()
    assert list(DIVERGENCES) == DIVERGENCE_NAMES


def test_wpo_weights_from_two_temperatures_are_those_of_the_distribution():
    logits = torch.randn(5, 11, dtype=torch.float64)
    probabilities, tokens = logits.softmax(-1), torch.arange(5)
    expected = torch.log(probabilities.gather(1, tokens[:, None])[:, 0] / (probabilities**2).sum(-1))

    at_one, at_half = (torch.log_softmax(logits / t, -1).gather(1, tokens[:, None])[:, 0] for t in (1.0, 0.5))

    torch.testing.assert_close(wpo_log_weights(at_one, at_half), expected)


def test_a_certain_completion_gives_orpo_a_finite_gradient():
    logps = torch.tensor([0.0, -3.0], requires_grad=True)
    objective = PreferenceObjective(
        config=PreferenceConfig(losses=["orpo"]), num_rows=1, num_chosen_tokens=2, num_desirable=0
    )
    loss, _ = objective(
        Completions(logps=logps, ref_logps=torch.zeros(2), lengths=torch.tensor([2, 3]), pairs=adjacent(2))
    )

    assert torch.autograd.grad(loss, logps)[0].isfinite().all()
