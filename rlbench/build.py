"""From a config to the parts of a run, in the order in which a user's mistake costs least."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlbench.checks.limits import derive_drift_limits
from rlbench.config.derive import Derivation, HardwareFacts, derive
from rlbench.config.full_training import FULL, needs_frozen_copy
from rlbench.config.schema import LoraConfig, RunConfig, SamplingConfig
from rlbench.config.trained_reward import find_trained_rewards
from rlbench.data.prompts import PromptSet, longest_prompt_tokens, make_prompts, prompt_limit, select_rows
from rlbench.data.sources import LoadedRows, RowProblem, check_paths, load_rows
from rlbench.models.held_models import has_reference
from rlbench.models.source import ResolvedModel, resolve_model
from rlbench.models.warm_start import find_adapter, frozen_adapter
from rlbench.records import SamplingParams
from rlbench.rollouts.score import Scorer

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from rlbench.engine.interface import Engine
    from rlbench.engine.recorded_engine import RecordedEngine
    from rlbench.models.policy import Policy
    from rlbench.models.value_head import Critic


@dataclass(frozen=True, slots=True, kw_only=True)
class BaseInputs:
    """What every run knows before weights are loaded."""

    config: RunConfig
    facts: HardwareFacts
    derived: list[Derivation]
    rows: dict[str, LoadedRows]  # by split
    model: ResolvedModel
    tokenizer: Any
    context_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Inputs(BaseInputs):
    """Everything that an online run knows before weights are loaded."""

    train: PromptSet
    evaluation: PromptSet | None
    stop_token_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class BaseParts:
    """The heavy parts that every run has."""

    base: PreTrainedModel
    policy: Policy
    optimizer: torch.optim.Optimizer

    def close(self) -> None:
        """End what runs beside this process."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Parts(BaseParts):
    """The heavy parts of an online run."""

    engine: Engine
    scorer: Scorer
    critic: Critic | None = None  # algorithm.advantage=gae
    critic_optimizer: torch.optim.Optimizer | None = None
    reference: Policy | None = None  # that is not the base: never trained, starts as the policy
    teacher: Policy | None = None  # of algorithm.advantage=teacher; None: the base

    def close(self) -> None:
        self.scorer.close()
        self.engine.close()


def prepare(config: RunConfig) -> Inputs:
    """Derive settings, read data, find the model, render prompts. Loads no weights; fails fast.

    Raises:
        ValueError: anything a user can get wrong.
    """
    basis = prepare_base(config)
    find_trained_rewards(config)
    train, evaluation = prompt_sets(config, basis.rows, basis.tokenizer, basis.context_tokens)
    _check_microbatch(config, train)
    return with_prompts(basis, train, evaluation)


def with_prompts(basis: BaseInputs, train: PromptSet, evaluation: PromptSet | None) -> Inputs:
    """`basis`, with what is derived from the prompts.

    Raises:
        ValueError: the engine does not fit in memory, or a completion could never end.
    """
    from rlbench.models.fit import derive_engine_memory

    config = basis.config
    derived = basis.derived + derive_drift_limits(config)
    longest = longest_sequence(config, train, evaluation)
    return Inputs(
        **shared_fields(
            basis, derived=derive_engine_memory(config, basis.facts, _text_config(basis.model), longest, derived)
        ),
        train=train,
        evaluation=evaluation,
        stop_token_ids=_stop_token_ids(basis, config.sampling),
    )


def prompt_sets(
    config: RunConfig, rows: dict[str, LoadedRows], tokenizer: Any, context_tokens: int
) -> tuple[PromptSet, PromptSet | None]:
    """Training prompts and held-out prompts (None: no evaluation) of an online run.

    Args:
        config: derived.
        rows: from `read_rows`.
        context_tokens: most tokens of a prompt and a completion.

    Raises:
        ValueError: as `make_prompts` and `prompt_limit`.
    """
    limit, reason = prompt_limit(config.sampling.max_tokens, context_tokens)

    def prompts(selected: Any, split: str) -> PromptSet:
        return make_prompts(selected, split, config.data, tokenizer, max_prompt_tokens=limit, limit_reason=reason)

    train_rows, eval_rows = split_rows(config, rows)
    has_evaluation = eval_rows is not None and len(eval_rows)
    return prompts(train_rows, "train"), prompts(eval_rows, "test") if has_evaluation else None


def shared_fields(basis: BaseInputs, **changes: Any) -> dict[str, Any]:
    """The fields of `basis`, for a record that has more."""
    return {f.name: getattr(basis, f.name) for f in fields(BaseInputs)} | changes


def prepare_base(config: RunConfig, row_problem: RowProblem | None = None) -> BaseInputs:
    """Check paths, read rows, derive settings, find the model and its tokenizer.

    Args:
        config: changed in place: derived values are filled in.
        row_problem: as in `load_rows`.

    Raises:
        ValueError: anything a user can get wrong.
    """
    # What costs nothing to check comes first: a wrong path must not wait for rows to be made or torch to be imported.
    check_paths(config.data)
    find_adapter(config.lora)
    _check_teacher(config)
    _check_model_exists(config)
    rows = read_rows(config, row_problem)

    from rlbench.models.device import hardware_facts
    from rlbench.models.device_cap import set_device_cap
    from rlbench.models.fit import derive_sizes

    facts = hardware_facts(config.hardware.profile, config.hardware.memory_gib)
    if facts.device == "cuda":
        set_device_cap(config.hardware.memory_gib)
    derived = derive(config, facts)
    model = resolve_model(config.model)
    from transformers import AutoTokenizer

    derived = derive_sizes(config, facts, _text_config(model), derived)
    tokenizer = AutoTokenizer.from_pretrained(str(model.folder), local_files_only=True)
    return BaseInputs(
        config=config,
        facts=facts,
        derived=derived,
        rows=rows,
        model=model,
        tokenizer=tokenizer,
        context_tokens=int(_text_config(model).max_position_embeddings),
    )


def build(inputs: Inputs) -> Parts:
    """Load the base once and make policy, engine, optimizer and reward workers around it.

    Raises:
        ValueError: a reward cannot be built, or the model has an architecture that is not supported.
    """
    import torch

    from rlbench.models.policy import Policy
    from rlbench.rollouts.recorded_scorer import RecordedScorer

    config = inputs.config
    recorded = _recorded(inputs) if config.engine.kind == "recorded" else None
    columns = list(inputs.train.prompts[0].columns)
    scorer = RecordedScorer(config.rewards, recorded) if recorded else Scorer(config.rewards, columns=columns)
    try:
        device = "cuda" if config.hardware.profile == "gpu" else "cpu"
        if device == "cpu":
            torch.set_num_threads(config.hardware.num_threads or 1)
        base, engine = _base_and_engine(inputs, device, recorded)
        frozen = frozen_base(base, config)
        policy, optimizer = policy_and_optimizer(base, frozen, config)
        critic, critic_optimizer = _critic(base, config)
        if recorded is None:
            _attach_reward_models(scorer, frozen, config)
        return Parts(
            base=base,
            policy=policy,
            engine=engine,
            optimizer=optimizer,
            scorer=scorer,
            teacher=_teacher(frozen, inputs, device),
            critic=critic,
            critic_optimizer=critic_optimizer,
            reference=Policy(base, config.lora, seed=config.seed) if has_reference(config) else None,
        )
    except BaseException:
        scorer.close()
        raise


def frozen_base(base: PreTrainedModel, config: RunConfig) -> PreTrainedModel:
    """The model that stays as it is: the base, or where that is trained a copy of it, if the run needs one."""
    if not needs_frozen_copy(config):
        return base
    from rlbench.models.full_policy import frozen_copy

    return frozen_copy(base)


def policy_and_optimizer(
    base: PreTrainedModel, frozen: PreTrainedModel, config: RunConfig, make: type[Policy] | None = None
) -> tuple[Policy, torch.optim.Optimizer]:
    """What training.parameters says, and the optimizer over it.

    Args:
        base: its tensors are shared, of a run of all weights trained.
        frozen: from `frozen_base`.
        make: of an adapter; None: `Policy`.
    """
    from rlbench.models.full_policy import FullPolicy
    from rlbench.models.policy import Policy
    from rlbench.training.optim import make_optimizer

    if config.training.parameters == FULL:
        policy = FullPolicy(base, frozen=None if frozen is base else frozen)
    else:
        policy = (make or Policy)(base, config.lora, seed=config.seed)
    policy.set_recompute(config.training)
    optimizer = make_optimizer(policy.parameters(), config.optim, tables=policy.table_parameters())
    policy.follow(optimizer)
    return policy, optimizer


def _critic(base: PreTrainedModel, config: RunConfig) -> tuple[Critic | None, torch.optim.Optimizer | None]:
    if not config.algorithm.has_critic:
        return None, None
    from rlbench.models.value_head import Critic
    from rlbench.training.optim import make_optimizer

    critic = Critic(base, config.lora, seed=config.seed)
    critic.set_recompute(config.training)
    return critic, make_optimizer(critic.parameters(), replace(config.optim, lr=config.algorithm.critic.lr))


def _attach_reward_models(scorer: Scorer, base: PreTrainedModel, config: RunConfig) -> None:
    for name, reward in find_trained_rewards(config).items():
        from rlbench.rollouts.trained_reward import RewardModelScorer

        budget = config.training.tokens_per_microbatch or 1
        scorer.attach(name, RewardModelScorer(name, base, reward, tokens_per_microbatch=budget).score)


def _check_teacher(config: RunConfig) -> None:
    """Without torch.

    Raises:
        ValueError: the teacher is not there, or it is what the student starts as.
    """
    if not config.algorithm.has_teacher:
        return
    teacher, start = config.algorithm.teacher, config.lora.init_from
    if teacher.adapter is not None:
        frozen_adapter(teacher.adapter, "algorithm.teacher.adapter")
    elif teacher.model is None and start is None:
        raise ValueError(
            "algorithm.teacher.model and algorithm.teacher.adapter are null, so the base teaches, but the student "
            "starts as the base; expected a teacher, or lora.init_from"
        )


def _teacher(base: PreTrainedModel, inputs: Inputs, device: str) -> Policy | None:
    """
    Raises:
        ValueError: the teacher has other tokens than the student, or its adapter does not fit.
    """
    import torch
    from transformers import AutoTokenizer

    from rlbench.models.base import load_base
    from rlbench.models.policy import Policy

    config, teacher = inputs.config, inputs.config.algorithm.teacher
    if not config.algorithm.has_teacher or (teacher.model is None and teacher.adapter is None):
        return None
    if teacher.model is not None:
        found = resolve_model(replace(config.model, path=teacher.model))
        vocabulary = AutoTokenizer.from_pretrained(str(found.folder), local_files_only=True).get_vocab()
        if vocabulary != inputs.tokenizer.get_vocab():
            raise ValueError(
                f"algorithm.teacher.model is {teacher.model}, whose tokenizer has other tokens than "
                f"{inputs.model.name}; expected a model with the same tokens"
            )
        dtype = getattr(torch, config.model.dtype)
        base = load_base(str(found.folder), dtype=dtype, device=device, quantization=config.model.quantization)
    # an adapter that was never trained changes nothing: its B is zero
    adapter = teacher.adapter
    lora = frozen_adapter(adapter, "algorithm.teacher.adapter") if adapter is not None else LoraConfig(rank=1)
    frozen = Policy(base, lora, seed=config.seed)
    for parameter in frozen.parameters():
        parameter.requires_grad_(False)
    return frozen


def training_sampling(inputs: Inputs) -> SamplingParams:
    sampling = inputs.config.sampling
    return SamplingParams(
        max_tokens=sampling.max_tokens,
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=sampling.top_k,
        min_p=sampling.min_p,
        repetition_penalty=sampling.repetition_penalty,
        presence_penalty=sampling.presence_penalty,
        frequency_penalty=sampling.frequency_penalty,
        **_ends_and_guides(inputs),
    )


def greedy_sampling(inputs: Inputs) -> SamplingParams:
    """Of evaluation: argmax without penalties, with the ends and guides of training."""
    return SamplingParams(max_tokens=inputs.config.sampling.max_tokens, temperature=0.0, **_ends_and_guides(inputs))


def _ends_and_guides(inputs: Inputs) -> dict[str, Any]:
    sampling = inputs.config.sampling
    return {
        "stop_token_ids": inputs.stop_token_ids,
        "stop": tuple(sampling.stop),
        "guided_choice": tuple(sampling.guided_choice),
        "guided_regex": sampling.guided_regex,
    }


def _recorded(inputs: Inputs) -> RecordedEngine:
    from rlbench.engine.recorded_engine import RecordedEngine
    from rlbench.rollouts.recorded_scorer import check_recorded_rewards

    config = inputs.config
    engine = RecordedEngine(Path(config.engine.recorded_from or "").expanduser())
    if (config.training.num_steps or 0) > engine.num_steps:
        raise ValueError(
            f"training.num_steps is {config.training.num_steps}, but engine.recorded_from "
            f"({config.engine.recorded_from}) holds rollouts of {engine.num_steps} steps"
        )
    check_recorded_rewards(config.rewards, Path(config.engine.recorded_from or "").expanduser())
    return engine


def _base_and_engine(inputs: Inputs, device: str, recorded: RecordedEngine | None) -> tuple[PreTrainedModel, Engine]:
    """The engine, and the trainer's base: the engine's own tensors where they can be shared, else loaded apart."""
    import torch

    from rlbench.models.base import load_base

    config = inputs.config
    folder, dtype = str(inputs.model.folder), getattr(torch, config.model.dtype)
    load = partial(load_base, folder, dtype=dtype, device=device, quantization=config.model.quantization)
    if config.engine.kind == "vllm":
        from rlbench.models.shared_base import bind_base

        longest = longest_sequence(config, inputs.train, inputs.evaluation)
        engine = start_vllm(config, folder, device, longest, config.engine.max_num_seqs or 64)
        if config.engine.share:
            return bind_base(folder, engine.base_weights(), dtype=dtype), engine
        return load(), engine
    if recorded is not None:
        return load(), recorded
    from rlbench.engine.hf_engine import HfEngine

    base = load()
    return base, HfEngine(base, max_num_seqs=config.engine.max_num_seqs or 64, tokenizer=inputs.tokenizer)


def start_vllm(config: RunConfig, folder: str, device: str, max_model_len: int, max_num_seqs: int) -> Any:
    """vLLM with the run's settings, over the model in `folder`."""
    from rlbench.engine.vllm_engine import VllmEngine

    return VllmEngine(
        folder,
        device=device,
        dtype=config.model.dtype,
        quantization=config.model.quantization,
        dense_copies=config.engine.dense_copies or "none",
        max_model_len=max_model_len,
        max_num_seqs=max_num_seqs,
        lora_rank=None if config.training.parameters == FULL else config.lora.rank,
        kv_cache_gib=config.engine.kv_cache_gib or 1.0,
        kv_cache_dtype=config.engine.kv_cache_dtype,
        with_tokenizer=bool(config.sampling.stop) or config.sampling.is_guided,
        deterministic=config.engine.deterministic,
    )


def longest_sequence(config: RunConfig, train: PromptSet, evaluation: PromptSet | None) -> int:
    """Tokens of the longest prompt plus the longest completion."""
    prompts = [*train.prompts, *(evaluation.prompts if evaluation else ())]
    return longest_prompt_tokens(prompts) + config.sampling.max_tokens


def _check_microbatch(config: RunConfig, train: PromptSet) -> None:
    """Every rollout that could be sampled fits; the last token of a completion predicts nothing and is not packed."""
    longest, sampling = longest_prompt_tokens(train.prompts), config.sampling
    budget, needed = config.training.tokens_per_microbatch or 1, longest + sampling.max_tokens - 1
    if needed > budget:
        raise ValueError(
            f"training.tokens_per_microbatch is {budget}, but the longest prompt ({longest} tokens) with a completion "
            f"of sampling.max_tokens ({sampling.max_tokens}) takes {needed}; expected at least "
            f"training.tokens_per_microbatch={needed}, or a smaller sampling.max_tokens"
        )


def _check_model_exists(config: RunConfig) -> None:
    """Without torch: a model that was named must be somewhere."""
    if config.model.path is not None:
        from rlbench.models.source import check_model_path

        check_model_path(config.model.path)


def _text_config(model: ResolvedModel) -> Any:
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(str(model.folder), local_files_only=True).get_text_config()


def _stop_token_ids(basis: BaseInputs, sampling: SamplingConfig) -> tuple[int, ...]:
    """The ids that end a completion."""
    model, text_config = basis.model, _text_config(basis.model)
    eos = text_config.eos_token_id
    ids = {basis.tokenizer.eos_token_id, *(eos if isinstance(eos, (list, tuple)) else [eos])} - {None}
    if not ids:
        raise ValueError(f"model.path: {model.name} names no end-of-sequence token, so no completion could ever end")
    for token_id in sampling.stop_token_ids:
        if not 0 <= token_id < text_config.vocab_size:
            last = text_config.vocab_size - 1
            raise ValueError(f"sampling.stop_token_ids names {token_id}, but {model.name} has tokens 0 to {last}")
    ids |= set(sampling.stop_token_ids)
    return tuple(sorted(ids))


def read_rows(config: RunConfig, row_problem: RowProblem | None = None) -> dict[str, LoadedRows]:
    """Rows by split; "test" where there is one of its own and it is read.

    Args:
        row_problem: as in `load_rows`.

    Raises:
        ValueError: as `load_rows`.
    """
    rows = {"train": load_rows(config.data, "train", row_problem)}
    has_test = config.data.path is None or config.data.eval_path is not None
    if has_test and config.evaluation.num_prompts != 0:
        rows["test"] = load_rows(config.data, "test", row_problem)
    return rows


def split_rows(config: RunConfig, rows: dict[str, LoadedRows]) -> tuple[Any, Any]:
    """Training rows and held-out rows (None: no evaluation)."""
    num_eval = config.evaluation.num_prompts or 0
    shuffle_seed = config.data.seed if config.data.shuffle else None
    if "test" in rows:
        eval_rows = select_rows(rows["test"], limit=num_eval, shuffle_seed=None)
        return select_rows(rows["train"], limit=config.data.limit, shuffle_seed=shuffle_seed), eval_rows
    everything = select_rows(rows["train"], limit=None, shuffle_seed=shuffle_seed)
    num_eval = min(num_eval, len(everything) // 5)  # a file of its own: at most a fifth is held out
    eval_rows = everything.select(range(num_eval)) if num_eval else None
    train_rows = everything.select(range(num_eval, len(everything)))
    if config.data.limit is not None:
        train_rows = train_rows.select(range(min(config.data.limit, len(train_rows))))
    return train_rows, eval_rows
