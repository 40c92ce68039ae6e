"""Every setting of a run, its default and its meaning. The one home of a default; YAML files only override.
The settings of the algorithm are in `rlbench.config.algorithm`.

`null` (None) means "derived": the value is chosen from the hardware profile or from other settings when the run starts,
and printed with its reason (`rlbench.config.derive`). Setting it by hand always wins.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any

from rlbench.config.algorithm import AlgorithmConfig
from rlbench.config.checks import RefusedSetting, check_choice, check_pattern, check_range, nearest
from rlbench.config.full_training import LORA, PARAMETERS, check_full_training
from rlbench.config.negative_rewards import check_no_reward_is_negative
from rlbench.config.optim import OptimConfig
from rlbench.config.preference import PreferenceConfig
from rlbench.config.reward_model import RewardModelConfig
from rlbench.config.sft import SftConfig
from rlbench.config.support import check_support
from rlbench.config.unread import check_settings_are_read
from rlbench.config.watchdog import WatchdogConfig

AUTO = "auto"
STAGES = {  # what a run trains on, and the sections that it does not read
    "rl": ("sft", "preference", "reward_model"),
    "sft": ("rewards", "algorithm", "sampling", "engine", "checks", "preference", "reward_model"),
    "preference": ("rewards", "algorithm", "sampling", "engine", "checks", "sft", "reward_model"),
    "reward_model": ("rewards", "algorithm", "sampling", "engine", "checks", "sft", "preference"),
}


@dataclass
class HardwareConfig:
    profile: str = AUTO  # auto | cpu | gpu
    num_threads: int | None = None  # CPU threads of torch
    memory_gib: float | None = None  # most memory for this run: of the GPU, else of the host; null: all that is free

    def __post_init__(self) -> None:
        check_choice("hardware.profile", self.profile, [AUTO, "cpu", "gpu"])
        check_range("hardware.num_threads", self.num_threads, low=1, high=1024)  # a million crashes OpenMP
        check_range("hardware.memory_gib", self.memory_gib, low=0, is_low_open=True)


@dataclass
class ModelConfig:
    path: str | None = None  # hub id, local folder, or GGUF file
    dtype: str = AUTO  # auto (measured) | bfloat16 | float32
    quantization: str = "none"  # none | nf4 (bitsandbytes) | fp8: the base in 4 or 8 bits, quantised while it is loaded
    cache_dir: str = "~/.cache/rlbench"  # where converted GGUF files are kept

    def __post_init__(self) -> None:
        check_choice("model.dtype", self.dtype, [AUTO, "bfloat16", "float32"])
        check_choice("model.quantization", self.quantization, ["none", "nf4", "fp8"])


@dataclass
class LoraConfig:
    rank: int = 16  # columns of A and B: the adapter of a linear layer is B A, scaled
    alpha: float = 32.0  # the scale of B A is alpha / rank
    targets: str = "all-linear"  # or a comma-separated list: q_proj,v_proj
    rslora: bool = False  # scale by alpha / sqrt(rank) instead of alpha / rank
    # share of each adapter's input that is set to 0 in training forwards alone, the rest scaled up; 0: off. stage=rl
    # refuses it: ratios and drift compare the trainer's logprobs with the sampler's, which drops nothing
    dropout: float = 0.0
    init_from: str | None = None  # folder of a finished run or of a PEFT adapter: training starts from its weights

    def __post_init__(self) -> None:
        check_range("lora.rank", self.rank, low=1)
        check_range("lora.alpha", self.alpha, low=0, is_low_open=True)
        check_range("lora.dropout", self.dropout, low=0, high=1, is_high_open=True)
        if "lm_head" in [name.strip() for name in self.targets.split(",")]:
            raise ValueError(
                f"lora.targets is {self.targets}, but the head stays as it is: logprobs are computed with its own "
                "weight; expected all-linear, or names without lm_head"
            )


@dataclass
class ExampleConfig:
    prompt: str = "???"
    answer: str = "???"


@dataclass
class DataConfig:
    name: str = "gsm8k"  # gsm8k | math | mbpp | reasoning_gym/TASK
    path: str | None = (
        None  # file with the training rows (JSONL, JSON array, CSV, TSV, Parquet); replaces the named data set
    )
    eval_path: str | None = None  # file with the held-out rows; null: cut from `path`
    task_params: dict[str, Any] = field(
        default_factory=dict
    )  # of a task of reasoning-gym (data.name=reasoning_gym/TASK)
    source: str = AUTO  # auto (hub, else generated problems) | hub | generated
    prompt_column: str = "question"  # holds the problem
    answer_column: str = "answer"  # holds the right answer; of given completions, what is trained on
    answer_remove: str | None = None  # regex: what it matches is left out of answers, e.g. a calculator's notes
    shown_columns: list[str] = field(
        default_factory=list
    )  # follow the prompt, e.g. the tests; a list is one item a line
    limit: int | None = None  # use the first rows only
    shuffle: bool = True  # of the training rows, once, by data.seed
    seed: int = 0  # of the shuffling and of generated problems
    system_prompt: str | None = None  # the first turn of every chat; null: none
    prompt_template: str = "{prompt}"  # {prompt} is replaced by the prompt column
    examples: list[ExampleConfig] = field(default_factory=list)  # solved problems, shown as earlier turns of the chat
    max_bad_rows: int = 0  # rows that cannot be used: skipped and listed up to this many, then an error
    long_prompts: str = "error"  # error | skip: what happens to prompts longer than the context allows

    def __post_init__(self) -> None:
        check_choice("data.source", self.source, [AUTO, "hub", "generated"])
        check_choice("data.long_prompts", self.long_prompts, ["error", "skip"])
        check_range("data.limit", self.limit, low=1)
        check_pattern("data.answer_remove", self.answer_remove)
        check_range("data.max_bad_rows", self.max_bad_rows, low=0)
        if "{prompt}" not in self.prompt_template:
            raise ValueError(f"data.prompt_template is {self.prompt_template!r}, expected it to contain {{prompt}}")


@dataclass
class RewardConfig:
    path: str = "???"  # dotted path of a function or class, e.g. rlbench_rewards.math_answer.MathAnswer
    weight: float = 1.0  # 0: only watched
    kwargs: dict[str, Any] = field(default_factory=dict)
    gate_min: float | None = None  # a value below it makes the whole reward rewards.gated_value
    batch_size: int = 1  # completions of one call
    timeout_s: float | None = None  # per call; null: rewards.timeout_s
    as_messages: bool = False  # TRL-style functions: completions as lists of chat messages


@dataclass
class RewardsConfig:
    components: dict[str, Any] = field(default_factory=dict)  # by name, each a RewardConfig
    combine: str = "sum"  # sum | product | normalised_sum (each component normalised within its group, then summed)
    gated_value: float = 0.0  # the reward behind a closed gate
    allowed_prefixes: list[str] = field(default_factory=list)  # besides rlbench_rewards.: where rewards may come from
    timeout_s: float = 5.0  # per call; the worker is killed then
    num_workers: int | None = None  # processes that score completions
    max_retries: int = 0  # how often a call that ended in an error or a timeout is tried again
    max_pending: int = 1024  # calls that wait for a worker; above it, submitting waits
    overlap: bool = True  # score finished completions while others are generated; false: after all are
    on_invalid: str = "drop_sample"  # drop_sample | drop_group | stop: when a reward has no value for a rollout
    max_invalid_frac: float = 0.2  # of a step's rollouts; above it the run stops

    def __post_init__(self) -> None:
        self.components = {name: _reward_config(name, value) for name, value in self.components.items()}
        check_choice("rewards.combine", self.combine, ["sum", "product", "normalised_sum"])
        check_choice("rewards.on_invalid", self.on_invalid, ["drop_sample", "drop_group", "stop"])
        check_range("rewards.timeout_s", self.timeout_s, low=0, is_low_open=True)
        check_range("rewards.num_workers", self.num_workers, low=1)
        check_range("rewards.max_retries", self.max_retries, low=0)
        check_range("rewards.max_pending", self.max_pending, low=1)
        check_range("rewards.max_invalid_frac", self.max_invalid_frac, low=0, high=1)


def _reward_config(name: str, value: Any) -> RewardConfig:
    if isinstance(value, RewardConfig):
        return value
    known = [f.name for f in fields(RewardConfig)]
    key = f"rewards.components.{name}"
    if not isinstance(value, dict):
        raise ValueError(f"{key} is {value!r}, expected a mapping with {', '.join(known)}")
    for part in value:
        if part not in known:
            raise ValueError(
                f"there is no key '{key}.{part}'; nearest valid keys: {', '.join(nearest(part, known) or known)}"
            )
    if not isinstance(value.get("path"), str) or value["path"] == "???":
        raise ValueError(f"{key}.path is missing, expected the dotted path of a reward")
    for part in ("weight", "gate_min", "batch_size", "timeout_s"):
        number = value.get(part, getattr(RewardConfig, part))
        if number is not None and (isinstance(number, bool) or not isinstance(number, (int, float))):
            raise ValueError(f"{key}.{part} is {number!r}, expected a number")
    check_range(f"{key}.batch_size", value.get("batch_size"), low=1)
    check_range(f"{key}.timeout_s", value.get("timeout_s"), low=0, is_low_open=True)
    return RewardConfig(
        **{**value, "weight": float(value.get("weight", 1.0)), "kwargs": dict(value.get("kwargs") or {})}
    )


@dataclass
class SamplingConfig:
    temperature: float = 1.0  # divides the logits; evaluation is greedy
    top_p: float = 1.0  # keep the likeliest tokens up to this probability in sum; 1: off
    top_k: int = 0  # 0: off
    min_p: float = 0.0  # keep tokens of at least this share of the likeliest one's probability; 0: off
    repetition_penalty: float = 1.0  # 1: off
    presence_penalty: float = 0.0  # subtracted from the logit of a token that was sampled before; 0: off
    frequency_penalty: float = 0.0  # the same, times how often it was sampled; 0: off
    max_tokens: int = 64  # per completion
    stop: list[str] = field(default_factory=list)  # texts that end a completion; they stay in it
    stop_token_ids: list[int] = field(default_factory=list)  # besides the model's own end-of-sequence tokens
    guided_choice: list[str] = field(default_factory=list)  # engine=vllm: the completion is one of these texts
    guided_regex: str = ""  # engine=vllm: the completion matches this regular expression

    def __post_init__(self) -> None:
        check_range("sampling.repetition_penalty", self.repetition_penalty, low=0, is_low_open=True)
        check_range("sampling.presence_penalty", self.presence_penalty, low=-2, high=2)
        check_range("sampling.frequency_penalty", self.frequency_penalty, low=-2, high=2)
        if not all(self.stop):
            raise ValueError(f"sampling.stop is {self.stop}, expected texts of at least one character")
        if self.guided_choice and self.guided_regex:
            raise ValueError("sampling.guided_choice and sampling.guided_regex are both set, expected one of them")
        if self.is_guided and self.temperature != 1:
            raise ValueError(
                f"sampling.temperature is {self.temperature}, but guided decoding needs 1: the logprobs without the "
                "guide are scored afterwards, which vLLM does at temperature 1 only"
            )
        check_range("sampling.temperature", self.temperature, low=0, is_low_open=True)
        check_range("sampling.top_p", self.top_p, low=0, high=1, is_low_open=True)
        check_range("sampling.top_k", self.top_k, low=0)
        check_range("sampling.min_p", self.min_p, low=0, high=1)
        check_range("sampling.max_tokens", self.max_tokens, low=1)

    @property
    def is_guided(self) -> bool:
        return bool(self.guided_choice or self.guided_regex)


@dataclass
class EngineConfig:
    kind: str = AUTO  # auto (the faster one that is installed) | hf | vllm | recorded: no generation
    recorded_from: str | None = None  # engine=recorded: folder of the run whose rollouts and rewards are trained on
    max_num_seqs: int | None = None  # most sequences decoded together
    kv_cache_gib: float | None = None  # vllm: memory for keys and values, held only while it generates
    kv_cache_dtype: str = AUTO  # vllm: keys and values in model.dtype (auto) | fp8: one byte a number, twice the tokens
    share: bool | None = None  # one copy of the base for engine and trainer
    # vllm on a GPU: 16-bit copies of the linear layers while it generates; faster, given back while training.
    # none | base: of an NF4 base | merged: with the adapter in them, bfloat16
    dense_copies: str | None = None
    deterministic: bool = False  # vllm on a GPU: kernels whose results do not depend on the batch; slower

    def __post_init__(self) -> None:
        check_choice("engine.kind", self.kind, [AUTO, "hf", "vllm", "recorded"])
        if (self.kind == "recorded") != (self.recorded_from is not None):
            raise ValueError(
                f"engine.kind is {self.kind} and engine.recorded_from is {self.recorded_from}; expected both "
                "engine=recorded and the folder of a run, or neither"
            )
        if self.dense_copies is not None:
            check_choice("engine.dense_copies", self.dense_copies, ["none", "base", "merged"])
        check_range("engine.max_num_seqs", self.max_num_seqs, low=1)
        check_choice("engine.kv_cache_dtype", self.kv_cache_dtype, [AUTO, "fp8"])
        check_range("engine.kv_cache_gib", self.kv_cache_gib, low=0, is_low_open=True)


@dataclass
class ChecksConfig:
    """Proof that engine and trainer hold the same weights, and what happens when their logprobs drift apart."""

    identity_every_steps: int | None = None  # engine and trainer score the same tokens: first step, then this often
    identity_tokens: int | None = None  # most tokens of one such comparison, prompts included
    identity_limit_scale: float = 1.0  # multiplies the limits of rlbench/checks/limits.py
    drift_warn_nats: float | None = None  # mean |trainer - engine| of a batch: a warning
    drift_correct_ess_frac: float = 0.98  # effective sample size / tokens: below it importance weights are called for
    drift_stop_nats: float | None = None  # mean |trainer - engine| of a batch: the run stops
    drift_stop_ess_frac: float = 0.5  # below it the run stops
    drift_max_ratio: float = 2.0  # importance ratios are truncated here

    def __post_init__(self) -> None:
        check_range("checks.identity_every_steps", self.identity_every_steps, low=1)
        check_range("checks.identity_tokens", self.identity_tokens, low=16)
        check_range("checks.identity_limit_scale", self.identity_limit_scale, low=0, is_low_open=True)
        check_range("checks.drift_warn_nats", self.drift_warn_nats, low=0, is_low_open=True)
        check_range("checks.drift_correct_ess_frac", self.drift_correct_ess_frac, low=0, high=1)
        check_range("checks.drift_stop_nats", self.drift_stop_nats, low=0, is_low_open=True)
        check_range("checks.drift_stop_ess_frac", self.drift_stop_ess_frac, low=0, high=1)
        check_range("checks.drift_max_ratio", self.drift_max_ratio, low=1)


@dataclass
class TrainingConfig:
    # lora: an adapter, see `lora` | full: all weights, with float32 masters of a bfloat16 model. Full training takes 18
    # bytes a weight with AdamW; an optim.lr that is set for an adapter is far too high for it
    parameters: str = LORA
    num_steps: int | None = None  # optimizer steps
    tokens_per_microbatch: int | None = None  # packed tokens of one forward
    # what is computed again in the backward pass: auto (as little as fits) | none | mlp: gate and up |
    # full: all from a layer's input on
    recompute: str = AUTO
    recompute_layers: int | None = None  # the first layers that do it; null: derived with recompute=auto, else all
    offload: bool = False  # recompute=full or mlp: what these layers keep waits in host memory
    max_bad_steps: int = 3  # steps in a row with a loss or gradient that is not finite: skipped, then the run stops
    # after SIGINT or SIGTERM the step may go on for so long, then it is given up and what was before it is saved;
    # schedulers (Slurm, Kubernetes) kill 30 s after SIGTERM
    stop_grace_s: float = 20.0

    def __post_init__(self) -> None:
        check_choice("training.parameters", self.parameters, PARAMETERS)
        check_range("training.num_steps", self.num_steps, low=1)
        check_range("training.tokens_per_microbatch", self.tokens_per_microbatch, low=1)
        check_choice("training.recompute", self.recompute, [AUTO, "none", "mlp", "full"])
        check_range("training.recompute_layers", self.recompute_layers, low=1)
        if self.recompute_layers is not None and self.recompute == "none":
            raise ValueError(
                f"training.recompute_layers is {self.recompute_layers}, but training.recompute=none recomputes no layer"
            )
        if self.offload and self.recompute not in ("mlp", "full"):
            raise ValueError(
                f"training.offload is true, but training.recompute is {self.recompute}; expected mlp or full"
            )
        check_range("training.max_bad_steps", self.max_bad_steps, low=1)
        check_range("training.stop_grace_s", self.stop_grace_s, low=0, is_low_open=True)


@dataclass
class EvaluationConfig:
    num_prompts: int | None = None  # held-out problems, answered greedily (rl) or rows; 0: no evaluation
    every_steps: int = 0  # besides before and after; 0: never
    num_samples: int = 0  # rl: besides, sampled answers of each, as in training: their accuracy and pass@num_samples

    def __post_init__(self) -> None:
        check_range("evaluation.num_prompts", self.num_prompts, low=0)
        check_range("evaluation.num_samples", self.num_samples, low=0)
        check_range("evaluation.every_steps", self.every_steps, low=0)
        for name in ("every_steps", "num_samples"):
            if self.num_prompts == 0 and getattr(self, name):
                raise RefusedSetting(
                    f"evaluation.{name} is {getattr(self, name)}, but evaluation.num_prompts is 0, so nothing is "
                    "evaluated; expected 0, or evaluation.num_prompts above 0",
                    f"evaluation.{name}",
                    0,
                )


@dataclass
class CheckpointConfig:
    # null: every ten steps or more, so that checkpoints take 2% of the time; 0: only at the end and when stopped
    every_steps: int | None = None
    keep_last: int = 2  # newest checkpoints that stay
    # a number of the evaluations, such as eval/accuracy: the checkpoint of its best value (the lowest, if its name ends
    # in loss) is written and kept too; needs evaluation.every_steps
    keep_best: str | None = None
    on_error: str = "stop"  # stop | go_on: what a run does when a checkpoint cannot be written, e.g. disk full

    def __post_init__(self) -> None:
        check_choice("checkpoint.on_error", self.on_error, ["stop", "go_on"])
        check_range("checkpoint.every_steps", self.every_steps, low=0)
        check_range("checkpoint.keep_last", self.keep_last, low=1)


@dataclass
class TrackingConfig:
    wandb: str = AUTO  # auto (online with a key, else offline) | online | offline | disabled
    wandb_project: str = "rlbench"  # where wandb files the run
    tensorboard: bool = False  # event files in the run's folder
    sample_every_steps: int = 10  # print a completion; 0: never
    save_rollouts: bool = True  # every completion in rollouts/, for the report, replay and rescore
    profile_step: int | None = None  # the first update from this step on under torch's profiler: profile/ in the folder
    quiet: bool = False  # one line at the start, findings, and the summary
    # what a sweeper that optimizes is told: the last evaluation's value, or the mean over the last quarter of steps
    objective: str = "reward/mean"

    def __post_init__(self) -> None:
        check_choice("tracking.wandb", self.wandb, [AUTO, "online", "offline", "disabled"])
        check_range("tracking.sample_every_steps", self.sample_every_steps, low=0)
        check_range("tracking.profile_step", self.profile_step, low=1)


@dataclass
class ChainStageConfig:
    name: str = "???"  # of the stage's folder
    overrides: list[str] = field(default_factory=list)  # of the shared settings: key=value, group=choice or ~key


@dataclass
class RunConfig:
    name: str = "run"  # of the run's folder: outputs/<name>/<time>
    # rl (rollouts of the policy) | sft (given completions) | preference (DPO and its family) | reward_model
    stage: str = "rl"
    seed: int = 0  # of sampling and of the adapter's initial weights
    # folder of a run; or of one of its checkpoints, and later ones move to replaced_checkpoints; auto: the newest valid
    # one, or a new run. A run that was killed before its first checkpoint begins again
    resume: str | None = None
    hardware: HardwareConfig = field(default_factory=HardwareConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    data: DataConfig = field(default_factory=DataConfig)
    rewards: RewardsConfig = field(default_factory=RewardsConfig)
    algorithm: AlgorithmConfig = field(default_factory=AlgorithmConfig)
    sft: SftConfig = field(default_factory=SftConfig)
    preference: PreferenceConfig = field(default_factory=PreferenceConfig)
    reward_model: RewardModelConfig = field(default_factory=RewardModelConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    checks: ChecksConfig = field(default_factory=ChecksConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    watchdog: WatchdogConfig = field(default_factory=WatchdogConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    chain: list[ChainStageConfig] = field(
        default_factory=list
    )  # runs one after the other, each from the last's adapter

    def __post_init__(self) -> None:
        check_choice("stage", self.stage, list(STAGES))
        has_pairs = self.stage == "rl" and self.algorithm.pairs.is_on
        for section in () if self.chain else STAGES[self.stage]:  # of a chain, each stage's own config is checked
            if not (has_pairs and section == "preference"):
                _check_unread(section, getattr(self, section), self.stage)
        if has_pairs:
            self.preference.check_online(self.algorithm.reference_refresh_steps)
        if self.checkpoint.keep_best and not self.evaluation.every_steps:
            raise RefusedSetting(
                f"checkpoint.keep_best is {self.checkpoint.keep_best}, but evaluation.every_steps is 0; expected "
                "evaluations during training, e.g. evaluation.every_steps=10",
                "checkpoint.keep_best",
                None,
            )
        check_support(self.algorithm, self.sampling)
        check_settings_are_read(self)
        check_no_reward_is_negative(self)
        check_full_training(self)
        if self.lora.dropout and self.stage == "rl" and not self.chain:
            raise RefusedSetting(
                f"lora.dropout is {self.lora.dropout}, but stage is rl, where the trainer's logprobs must be those of "
                "the policy that sampled; expected 0, or another stage",
                "lora.dropout",
                0.0,
                is_read=True,
            )
        self._check_reward_deadlines()
        buffer, limit = self.algorithm.overlong_buffer_tokens, self.sampling.max_tokens
        if buffer > limit:
            raise ValueError(
                f"algorithm.overlong_buffer_tokens is {buffer}, expected at most sampling.max_tokens ({limit})"
            )

    def _check_reward_deadlines(self) -> None:
        """
        Raises:
            RefusedSetting: a reward may take longer than the watchdog waits.
        """
        phases = self.watchdog.phase_limits_s
        limit_key = "watchdog.phase_limits_s.rewards" if "rewards" in phases else "watchdog.limit_s"
        rewards, limit_s = self.rewards, self.watchdog.limit_of("rewards")
        deadlines_s = {"rewards.timeout_s": rewards.timeout_s} | {
            f"rewards.components.{name}.timeout_s": component.timeout_s
            for name, component in rewards.components.items()
            if component.timeout_s is not None
        }
        for key, deadline_s in deadlines_s.items():
            if limit_s and deadline_s >= limit_s:
                raise RefusedSetting(
                    f"{key} is {deadline_s:g}, expected less than the {limit_s:g} s after which a run without progress "
                    "ends (watchdog.limit_s, watchdog.phase_limits_s.rewards)",
                    limit_key,
                    0.0,
                    is_read=True,
                )


def _check_unread(section: str, config: Any, stage: str) -> None:
    """
    Raises:
        RefusedSetting: a value of `config` is not its default.
    """
    default = type(config)()
    choice = f" ({section}=none)" if section in ("algorithm", "rewards") else ""
    for name in (f.name for f in fields(config)):
        value, expected = getattr(config, name), getattr(default, name)
        if is_dataclass(value):
            _check_unread(f"{section}.{name}", value, stage)
        elif value != expected:
            shown = ", ".join(value) if isinstance(value, dict) else value
            raise RefusedSetting(
                f"{section}.{name} is {shown}, but stage={stage} does not read it; expected its default{choice}",
                f"{section}.{name}",
                expected,
            )
