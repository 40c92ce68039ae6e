"""What every loop does alike: steps, checkpoints, evaluations, stops, and the end after non-finite gradients."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar

from rlbench.build import BaseInputs, BaseParts
from rlbench.checks.health_watch import HealthWatch, finding_line, is_due
from rlbench.data.packing import Microbatch
from rlbench.engine.interface import EngineDeadError
from rlbench.loops.evaluate import Evaluation, without_old_answers
from rlbench.loops.stopping import StepAbandoned, StopRequest
from rlbench.loops.watchdog import Watchdog
from rlbench.records import TrainingSample
from rlbench.rollouts.credit import RewardFailure
from rlbench.tracking.bad_batch import write_bad_batch
from rlbench.tracking.console import RunConsole
from rlbench.tracking.environment import environment
from rlbench.tracking.errors import TrackingError
from rlbench.tracking.phase_memory import PhaseMemory
from rlbench.tracking.step_profile import profiled
from rlbench.tracking.tracker import Tracker
from rlbench.training.checkpoint import Beside, Checkpoint, restore, save_checkpoint
from rlbench.training.microbatch_budget import MicrobatchBudget, RunMemoryError, phase_memory

_PROFILED = ("update", "critic update")  # phases
_CHECKPOINT_STEPS = 10  # between two checkpoints at least, where the user says nothing
_CHECKPOINT_FRAC = 0.02  # of the time
InputsT = TypeVar("InputsT", bound=BaseInputs)
PartsT = TypeVar("PartsT", bound=BaseParts)


class NonFiniteError(Exception):
    """Loss or gradient stayed non-finite."""


@dataclass(slots=True)
class TrainingLoop(Generic[InputsT, PartsT]):
    """State of a run. A loop fills in the steps marked "of the loop"."""

    inputs: InputsT
    parts: PartsT
    tracker: Tracker
    console: RunConsole
    run_folder: Path
    stop: StopRequest
    watchdog: Watchdog
    step: int = 0  # batches trained on, skipped ones included
    policy_version: int = 0  # optimizer steps applied to the adapter
    num_bad_steps: int = 0  # in a row
    history: list[Mapping[str, Any]] = field(default_factory=list)
    evaluations: list[Evaluation] = field(default_factory=list)
    last_checkpoint: Path | None = None
    num_failed_saves: int = 0
    budget: MicrobatchBudget = field(init=False)
    _saved_step: int | None = None
    _before: dict[str, Any] | None = None  # state before the step that is being made; None: between two steps
    _is_changed: bool = False  # since `_before` an optimizer step was made
    _saved_at: float = 0.0  # monotonic seconds; at first when the first step began
    _save_s: float = 0.0  # that the last checkpoint took
    _seconds: dict[str, float] = field(default_factory=dict)
    _profiled: set[str] = field(default_factory=set)
    _environment: dict[str, Any] = field(default_factory=environment)
    _health: HealthWatch | None = None
    _memory: PhaseMemory = field(default_factory=lambda: PhaseMemory(None))  # in `run` that of the device

    def __post_init__(self) -> None:
        tokens = self.inputs.config.training.tokens_per_microbatch or 1
        self.budget = MicrobatchBudget(tokens, self.console.warning)
        for optimizer in [self.parts.optimizer, *(optimizer for _, optimizer in self._beside().values())]:
            if optimizer is not None:
                optimizer.register_step_pre_hook(self._note_change)

    def resume(self, checkpoint: Checkpoint) -> None:
        """Continue where `checkpoint` was written."""
        restore(checkpoint, self.parts.policy, self.parts.optimizer, self._beside())
        state = checkpoint.state
        self.step = state["step"]
        self.policy_version = state["policy_version"]
        self.num_bad_steps = state["num_bad_steps"]
        self.evaluations = without_old_answers([Evaluation(**e) for e in state["evaluations"]])
        self.last_checkpoint = checkpoint.folder
        self._saved_step = self.step
        self.budget.tokens = min(self.budget.tokens, state.get("tokens_per_microbatch", self.budget.tokens))
        self._restore(state)

    def run(self) -> None:
        """Train to the last step, or to the end of the step in which a stop was asked for.

        Raises:
            NonFiniteError: too many steps in a row without a finite gradient.
            ValueError: checkpoint.keep_best names no number of the evaluations.
            TrackingError: metrics, rollouts or a checkpoint could not be written.
            StepAbandoned: a stop or the watchdog could not wait for the step's end.
            RunMemoryError: a phase does not fit in memory.
            Exception: what the steps of the loop raise.
        """
        try:
            self._run()
        except (StepAbandoned, EngineDeadError, RewardFailure, RunMemoryError):
            self._rescue()
            raise

    def _run(self) -> None:
        config = self.inputs.config
        num_steps = config.training.num_steps or 0
        self._memory = PhaseMemory.of_hardware(config.hardware, self._released_bytes)
        self._begin()
        self._saved_at = time.monotonic()
        # An evaluation that a stop put off is made up for here, when the run goes on.
        self._evaluate_if_due(num_steps)
        while self.step < num_steps and self.stop.signal_number is None:
            self._before, self._is_changed = self._checkpoint_state(), False
            self.parts.policy.begin_step(self.step + 1)
            self._step(num_steps)
            self._before = None
            self._evaluate_if_due(num_steps)
            if (self._is_checkpoint_due() or self.best_step == self.step) and self.step < num_steps:
                self.save()
        self.save()

    def save(self) -> None:
        """Write a checkpoint of the present state."""
        self._save(self._checkpoint_state())

    def _save(self, state: Mapping[str, Any]) -> None:
        start = time.monotonic()
        with self.stop.shielded(), self._phase("checkpoint"), self._survived_if_asked():
            self.last_checkpoint = save_checkpoint(
                self.run_folder,
                self.parts.policy,
                self.parts.optimizer,
                {
                    **{key: value() if callable(value) else value for key, value in state.items()},
                    "adapter_fingerprint": self.parts.policy.weights().fingerprint(),
                    "config": asdict(self.inputs.config),
                    "environment": self._environment,
                },
                base_name=self.inputs.model.name,
                keep_last=self.inputs.config.checkpoint.keep_last,
                keep_steps=[self.best_step] if self.best_step else [],
                beside=self._beside(),
            )
        self._saved_step, self._save_s, self._saved_at = state["step"], time.monotonic() - start, time.monotonic()

    def _checkpoint_state(self) -> dict[str, Any]:
        """All of a checkpoint but tensors and what is computed from them.

        Each step begins with it, so what takes long is a function, called when the checkpoint is written.
        """
        evaluations = list(self.evaluations)
        return {
            "step": self.step,
            "policy_version": self.policy_version,
            "num_bad_steps": self.num_bad_steps,
            "tokens_per_microbatch": self.budget.tokens,
            "evaluations": lambda: [asdict(evaluation) for evaluation in evaluations],
            "wandb_run_id": self.tracker.wandb.run_id if self.tracker.wandb else None,
            **self._state(),
        }

    def _rescue(self) -> None:
        """Save the end of the last whole step, if weights and optimizer are still what they were then."""
        state = self._before or self._checkpoint_state()
        if self._before is not None and self._is_changed:
            self.console.warning(f"step {state['step'] + 1} had begun to change the weights, so it is lost")
        elif state["step"] != self._saved_step:
            try:
                self._save({**state, "tokens_per_microbatch": self.budget.tokens})
            except (TrackingError, RuntimeError) as error:  # a device that failed cannot be read any more
                self.console.warning(f"the end of step {state['step']} could not be saved: {error}")

    def _note_change(self, *_: Any) -> None:
        self._is_changed = True

    @contextmanager
    def _survived_if_asked(self) -> Iterator[None]:
        """With checkpoint.on_error=go_on a checkpoint that cannot be written is a warning; the next is tried anew."""
        try:
            yield
        except TrackingError as error:
            if self.inputs.config.checkpoint.on_error != "go_on":
                raise
            self.num_failed_saves += 1
            kept = f"the last one is {self.last_checkpoint}" if self.last_checkpoint else "there is none yet"
            self.console.warning(f"step {self.step}: {error}; going on without it, {kept}")

    def _is_checkpoint_due(self) -> bool:
        every = self.inputs.config.checkpoint.every_steps
        if every is not None:
            return bool(every) and self.step % every == 0
        is_worth_it = time.monotonic() - self._saved_at >= self._save_s / _CHECKPOINT_FRAC
        return self.step - (self._saved_step or 0) >= _CHECKPOINT_STEPS and is_worth_it

    @property
    def best_step(self) -> int | None:
        """Of the evaluation with the best checkpoint.keep_best so far, the first of equals; None: not asked for."""
        key = self.inputs.config.checkpoint.keep_best
        if not key or not self.evaluations:
            return None
        sign = -1.0 if key.endswith("loss") else 1.0
        return max(self.evaluations, key=lambda evaluation: sign * evaluation.metrics[key]).step

    def _evaluate_if_due(self, num_steps: int) -> None:
        """Before training, every so many steps, and after training; never twice at one step, nor once a stop is due."""
        every = self.inputs.config.evaluation.every_steps
        is_due = not self.evaluations or (
            self.evaluations[-1].step != self.step
            and (self.step >= num_steps or bool(every and self.step % every == 0))
        )
        if is_due and self.stop.signal_number is None:
            self._evaluate()

    def _beside(self) -> Beside:
        """Of the loop: what checkpoints hold beside the policy."""
        return {}

    def _begin(self) -> None:
        """Of the loop: what comes before the first step of this process."""
        raise NotImplementedError

    def _step(self, num_steps: int) -> None:
        """Of the loop: one batch; counts `step` up and records its metrics."""
        raise NotImplementedError

    def _evaluate(self) -> None:
        """Of the loop: append to `evaluations`, or do nothing if there is no held-out data."""
        raise NotImplementedError

    def _state(self) -> dict[str, Any]:
        """Of the loop: what it adds to a checkpoint, each value JSON-able or a function that makes one."""
        raise NotImplementedError

    def _restore(self, state: Mapping[str, Any]) -> None:
        """Of the loop: take back what `_state` gave."""
        raise NotImplementedError

    def _count_updates(
        self, num_applied: int, is_finite: bool, metrics: Mapping[str, float], samples: Sequence[Any]
    ) -> None:
        """
        Args:
            samples: dataclasses that the update read; kept in a file if it was not finite.
        """
        self.policy_version += num_applied
        if is_finite:
            self.num_bad_steps = 0
            return
        self.num_bad_steps += 1
        facts = {"policy_version": self.policy_version, **metrics}
        kept = write_bad_batch(self.run_folder, self.step + 1, samples, facts)
        limit = self.inputs.config.training.max_bad_steps
        self.console.warning(
            f"step {self.step + 1}: loss {metrics['loss/total']}, gradient norm {metrics['optim/grad_norm']}: "
            f"not finite, the update is skipped ({self.num_bad_steps} in a row, training.max_bad_steps is {limit}); "
            f"its batch: {kept}"
        )
        if self.num_bad_steps >= limit:
            raise NonFiniteError(f"no finite gradient in {limit} steps in a row; a lower optim.lr is the usual cure")

    def _sizes(self, microbatches: Sequence[Microbatch]) -> dict[str, float | None]:
        num_tokens = sum(len(microbatch.token_ids) for microbatch in microbatches)
        return {
            "training/num_microbatches": float(len(microbatches)),
            "training/tokens_per_microbatch": float(self.budget.tokens),
            "training/num_tokens": float(num_tokens),
            "tokens/training_per_s": num_tokens / self._seconds["update"],
        }

    def _released_bytes(self) -> int:
        """As `Engine.released_bytes`."""
        return 0

    def _log_evaluation(self, evaluation: Evaluation) -> None:
        key = self.inputs.config.checkpoint.keep_best
        if key and key not in evaluation.metrics:
            raise ValueError(
                f"checkpoint.keep_best is {key}, but the evaluations have {', '.join(sorted(evaluation.metrics))}"
            )
        self.tracker.log_evaluation(self.step, evaluation.metrics)
        self.evaluations = without_old_answers([*self.evaluations, evaluation])
        if key and self.step and self.best_step == self.step:
            self.console.note(f"best {key} so far: {evaluation.metrics[key]:.4g}; its checkpoint is kept")

    def _log_step(self, step: int, metrics: dict[str, float | None], start: float) -> None:
        """Add the step's times and memory and hand its metrics on."""
        metrics["policy_version"] = float(self.policy_version)
        if self.num_failed_saves:
            metrics["checkpoint/num_failed"] = float(self.num_failed_saves)
        metrics |= {f"time/{name.replace(' ', '_')}_s": seconds for name, seconds in self._seconds.items()}
        metrics["time/step_s"] = time.monotonic() - start
        metrics |= self._memory.take()
        self.tracker.log_step(step, metrics)
        self.history.append({"step": step, **metrics})
        if is_due(step):
            self._tell_findings(step)

    def _tell_findings(self, step: int) -> None:
        """What the health rules find for the first time."""
        if self._health is None:
            self._health = HealthWatch(asdict(self.inputs.config))
        for finding in self._health.news(self.history, [{"step": e.step, **e.metrics} for e in self.evaluations]):
            self.console.warning(f"step {step}: {finding_line(finding)}")

    @contextmanager
    def _phase(self, name: str) -> Iterator[None]:
        start = time.monotonic()
        with self.console.phase(name), self._memory.phase(name), self.watchdog.phase(name), phase_memory(name):
            with self._profile(name):
                yield
        self._seconds[name] = self._seconds.get(name, 0.0) + time.monotonic() - start

    def _profile(self, name: str) -> AbstractContextManager[None]:
        """tracking.profile_step: of the first updates from that step on."""
        config = self.inputs.config
        first = config.tracking.profile_step
        if name not in _PROFILED or name in self._profiled or first is None or self.step + 1 < first:
            return nullcontext()
        self._profiled.add(name)
        file_name = f"step-{self.step + 1:06d} {name}".replace(" ", "_")
        return profiled(self.run_folder / "profile", file_name, config.hardware.profile, self.console.note)


def samples_of(microbatches: Sequence[Microbatch]) -> list[TrainingSample]:
    return [sample for microbatch in microbatches for sample in microbatch.samples]
