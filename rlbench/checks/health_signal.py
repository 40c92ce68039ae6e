"""Health rules on what a step can learn from: verifiers, groups, truncation, diversity, the size of evaluations."""

from __future__ import annotations

from rlbench.checks.health_history import NOTE, PROBLEM, WARNING, Finding, History, now, percent
from rlbench.config.algorithm import ADVANTAGES

MIN_STEPS = 4
ERRORS_WARN, ERRORS_PROBLEM = 0.01, 0.1
NO_SIGNAL, ALMOST_NO_SIGNAL = 0.5, 0.8
EASY, HARD = 0.9, 0.1
TRUNCATED = 0.2
SMALL_GROUP = 4
EQUAL_SHARE = 0.5
WIDE_INTERVAL = 0.2
LENGTH_GREW = 1.5


def verifier_errors(history: History) -> Finding | None:
    """Rollouts whose verifier broke or timed out, over the run."""
    errors, timeouts = history.mean("reward/error_frac") or 0.0, history.mean("reward/timeout_frac") or 0.0
    if errors + timeouts < ERRORS_WARN:
        return None
    timeout = history.number("rewards.timeout_s")
    settings = {"rewards.max_retries": f"1{now(history.setting('rewards.max_retries'))}"}
    if timeouts >= ERRORS_WARN:
        settings["rewards.timeout_s"] = f"{2 * timeout:g}{now(timeout)}" if timeout else "longer"
    if errors >= ERRORS_WARN:
        settings["rewards.components"] = "the reward that raises; its messages are in the samples below"
    return Finding(
        rule="verifier_errors",
        severity=PROBLEM if errors + timeouts >= ERRORS_PROBLEM else WARNING,
        title="Verifiers fail",
        evidence=f"{percent(errors)} of rollouts had a verifier that broke, {percent(timeouts)} one that timed out; "
        "they were left out, not scored 0",
        meaning="What is trained on is what the verifier could judge. If it fails on one kind of answer, that kind is "
        "never rewarded and never punished.",
        settings=settings,
    )


def prompts_too_hard(history: History) -> Finding | None:
    """Most groups of the last quarter have equal rewards because no completion is right."""
    no_signal, accuracy = _late_signal(history)
    if no_signal is None or accuracy is None or no_signal < NO_SIGNAL or accuracy > HARD:
        return None
    return Finding(
        rule="prompts_too_hard",
        severity=PROBLEM if no_signal >= ALMOST_NO_SIGNAL else WARNING,  # with half of its groups a run still learns
        title="Most groups teach nothing: hardly any completion is right",
        evidence=_signal_evidence(history, no_signal, accuracy),
        meaning="A group whose rewards are all equal has no better half to learn from. The problems are beyond this "
        "model, so what other rewards are left are quickly learned and then end too.",
        settings={
            "data.name": "easier problems, or data.path with a selection",
            "model.path": "a model that is right now and then",
            "algorithm.group_size": f"larger{now(history.setting('algorithm.group_size'))}",
        },
    )


def prompts_too_easy(history: History) -> Finding | None:
    """Most groups of the last quarter have equal rewards because every completion is right."""
    no_signal, accuracy = _late_signal(history)
    if no_signal is None or accuracy is None or no_signal < NO_SIGNAL or accuracy < EASY:
        return None
    return Finding(
        rule="prompts_too_easy",
        severity=WARNING,
        title="Most groups teach nothing: nearly every completion is right",
        evidence=_signal_evidence(history, no_signal, accuracy),
        meaning="The model solves these problems already; steps spend time on them and move nothing.",
        settings={
            "data.name": "harder problems, or data.path with a selection",
            "algorithm.max_refills": f"1 or more, they are drawn anew{now(history.setting('algorithm.max_refills'))}",
        },
    )


def no_signal(history: History) -> Finding | None:
    """Most groups of the last quarter have equal rewards, and accuracy does not say why."""
    share, accuracy = _late_signal(history)
    if share is None or share < NO_SIGNAL or (accuracy is not None and not HARD < accuracy < EASY):
        return None
    return Finding(
        rule="no_signal",
        severity=WARNING,
        title="Most groups teach nothing: their rewards are equal",
        evidence=_signal_evidence(history, share, accuracy),
        meaning="Completions of one prompt earn the same, so none is preferred. Prompts are solved always or never, or "
        "the reward is too coarse.",
        settings={
            "algorithm.group_size": f"larger{now(history.setting('algorithm.group_size'))}",
            "algorithm.max_refills": f"1 or more{now(history.setting('algorithm.max_refills'))}",
            "sampling.temperature": f"higher{now(history.number('sampling.temperature'))}",
        },
    )


def _late_signal(history: History) -> tuple[float | None, float | None]:
    """Groups without signal and accuracy, over the last quarter."""
    if len(history.train) < MIN_STEPS:
        return None, None
    return history.late("groups/no_signal_frac"), history.late("accuracy/train")


def _signal_evidence(history: History, no_signal: float, accuracy: float | None) -> str:
    skipped = history.values("optim/is_skipped")
    text = f"{percent(no_signal)} of groups in the last {history.num_late} steps had equal rewards"
    if accuracy is not None:
        text += f"; accuracy there is {percent(accuracy)}"
    if sum(skipped):
        text += f"; {sum(skipped):.0f} of {len(history.train)} steps made no update at all"
    return text


def truncation(history: History) -> Finding | None:
    """More than TRUNCATED of completions of the last quarter are cut at the token limit."""
    share = history.late("completion/truncated_frac")
    if share is None or share <= TRUNCATED or len(history.train) < MIN_STEPS:
        return None
    limit = history.number("sampling.max_tokens")
    return Finding(
        rule="truncation",
        severity=WARNING,
        title="Many completions are cut at the token limit",
        evidence=f"{percent(share)} of completions in the last {history.num_late} steps were cut"
        + (f" at {limit:.0f} tokens" if limit else ""),
        meaning="A cut completion shows no answer, so it is judged wrong whatever it was going to say: the policy "
        "learns to be short rather than right.",
        settings={
            "sampling.max_tokens": f"{2 * limit:.0f}{now(limit)}" if limit else "twice as many",
            "algorithm.mask_truncated": f"true{now(history.setting('algorithm.mask_truncated'))}",
        },
    )


def length_runaway(history: History) -> Finding | None:
    """Completions grow, more of them are cut, and accuracy does not rise."""
    length, accuracy = history.change("completion/length_tokens_mean"), history.change("accuracy/train")
    cut = history.change("completion/truncated_frac")
    if length is None or cut is None or length.verdict != "rose" or cut.verdict != "rose":
        return None
    if length.last < LENGTH_GREW * length.first or cut.last < 0.1 or (accuracy and accuracy.verdict == "rose"):
        return None
    return Finding(
        rule="length_runaway",
        severity=WARNING,
        title="Completions grow without getting better",
        evidence=f"mean length went from {length.first:.0f} to {length.last:.0f} tokens, completions cut at the limit "
        f"from {percent(cut.first)} to {percent(cut.last)}; accuracy did not rise",
        meaning="Length costs time in every phase and is not buying accuracy.",
        settings={
            "algorithm.overlong_buffer_tokens": "a penalty near the token limit",
            "algorithm.normalization": f"token_mean{now(history.setting('algorithm.normalization'))}",
        },
    )


def group_too_small(history: History) -> Finding | None:
    """Fewer than SMALL_GROUP completions a prompt, with an advantage that compares within the group."""
    size, advantage = history.number("algorithm.group_size"), ADVANTAGES.get(history.setting("algorithm.advantage"))
    if size is None or size >= SMALL_GROUP or (advantage is not None and advantage.min_group_size < 2):
        return None
    share = history.mean("groups/no_signal_frac")
    return Finding(
        rule="group_too_small",
        severity=WARNING,
        title="Groups are too small to compare",
        evidence=f"{size:.0f} completions a prompt"
        + (f"; {percent(share)} of groups had equal rewards" if share is not None else ""),
        meaning="The advantage is a reward minus the mean of its own few neighbours: mostly noise.",
        settings={"algorithm.group_size": f"8{now(int(size))}", "algorithm.prompts_per_step": "fewer, for equal cost"},
    )


def equal_completions(history: History) -> Finding | None:
    """More than EQUAL_SHARE of completions of the last quarter repeat, word for word, another of their group."""
    share = history.late("groups/repeated_completion_frac")
    if share is None or share <= EQUAL_SHARE or len(history.train) < MIN_STEPS:
        return None
    return Finding(
        rule="equal_completions",
        severity=WARNING,
        title="The completions of a group are the same text",
        evidence=f"{percent(share)} of completions in the last {history.num_late} steps repeat another of their group "
        "word for word",
        meaning="Equal texts earn equal rewards; they cost as much as different ones and teach nothing.",
        settings={
            "sampling.temperature": f"higher{now(history.number('sampling.temperature'))}",
            "algorithm.entropy_coef": f"0.001 to 0.01{now(history.number('algorithm.entropy_coef'))}",
        },
    )


def evaluation_too_small(history: History) -> Finding | None:
    """The 95% interval of held-out accuracy is wider than WIDE_INTERVAL."""
    lows, highs = history.evaluated("eval/accuracy_low"), history.evaluated("eval/accuracy_high")
    nums = history.evaluated("eval/num")
    if not lows or not highs or not nums or highs[-1] - lows[-1] <= WIDE_INTERVAL:
        return None
    return Finding(
        rule="evaluation_too_small",
        severity=NOTE,
        title="The evaluation is too small to see a change",
        evidence=f"{nums[-1]:.0f} held-out problems: the 95% interval of accuracy is {percent(lows[-1])} to "
        f"{percent(highs[-1])}",
        meaning=f"Changes under about {100 * (highs[-1] - lows[-1]) / 2:.0f} points cannot be told from chance.",
        settings={"evaluation.num_prompts": f"{4 * nums[-1]:.0f}{now(int(nums[-1]))} halves the interval"},
    )
