"""Health rules on what the policy learns: learning rate, entropy, and whether reward and accuracy agree."""

from __future__ import annotations

from statistics import correlation

from rlbench.checks.health_history import NOTE, PROBLEM, WARNING, Finding, History, now, percent
from rlbench.tracking.intervals import difference_interval
from rlbench.tracking.metrics import component_names

MIN_STEPS = 8
LOST_REWARD = 0.25  # of the best quarter of a run
GREW_NOISY = 1.5  # entropy of the last quarter over the first
GRAD_GREW = 5.0
CLIPPED = 0.3
KL_LARGE = 0.5  # nats a token
KL_STEP_LARGE = 0.1  # nats a token that one step moves the policy
COLLAPSED_NATS, COLLAPSED_SHARE = 0.2, 0.3
MOVED_NATS = 0.005  # what an adapter that does something changes a logprob by
LENGTH_GREW, LENGTH_GREW_UNSEEN = 1.1, 1.3  # where rollouts were read; where only their means are known
LENGTH_CORRELATION, LENGTH_CORRELATION_UNSEEN = 0.5, 0.8
LENGTH_JUMP = 3.0
RISE_SHARE = 0.8


def learning_rate_too_high(history: History) -> Finding | None:
    """At least two signs of a policy that is thrown about, one of them that it got worse or moved far."""
    worse, others = _signs_of_damage(history), _signs_of_haste(history)
    if len(history.train) < MIN_STEPS or not worse or len(worse) + len(others) < 2:
        return None
    lr = history.number("optim.lr")
    return Finding(
        rule="learning_rate_too_high",
        severity=PROBLEM,
        title="The learning rate is too high",
        evidence="; ".join(worse + others),
        meaning="Updates are so large that the policy forgets more than it learns; the reward does not come back "
        "from this by itself.",
        settings={"optim.lr": f"{lr / 10:.1e}{now(lr)}" if lr else "a tenth", "algorithm.kl_coef": "0.01 or more"},
    )


def _signs_of_damage(history: History) -> list[str]:
    signs = [sign for sign in (_reward_loss(history), _held_out_loss(history)) if sign]
    kl, kl_first = history.late("kl/reference"), history.early("kl/reference")
    if kl is not None and kl > KL_LARGE and kl > 5 * (kl_first or 0):
        signs.append(f"KL to the reference policy reached {kl:.2f} nats a token")
    if history.non_finite:
        signs.append(f"{len(history.non_finite)} steps were not finite")
    return signs


def _reward_loss(history: History) -> str | None:
    """The reward of the last quarter against the best stretch: clearly lower, or nothing left of it and no signal."""
    reward, change, late = history.values("reward/mean"), history.change("reward/mean"), history.late("reward/mean")
    size = max(2, history.num_late)
    best = max((sum(reward[i : i + size]) / size for i in range(len(reward) - size + 1)), default=0.0)
    if late is None or change is None or late >= (1 - LOST_REWARD) * best:
        return None
    no_signal = history.late("groups/no_signal_frac")
    is_gone = late < 0.1 * best and no_signal is not None and no_signal > 0.9
    if not is_gone and best - late <= change.two_standard_errors:
        return None
    lost = f"the reward fell to {late:.3f} from {best:.3f} at its best ({size} steps each)"
    return f"{lost} and {percent(no_signal)} of groups have no signal left" if is_gone and no_signal else lost


def _held_out_loss(history: History) -> str | None:
    rewards, nums = history.evaluated("eval/reward"), history.evaluated("eval/num")
    if len(rewards) < 2 or not nums or min(nums) < 16 or rewards[-1] >= 0.5 * rewards[0]:
        return None
    return f"the held-out reward fell from {rewards[0]:.3f} to {rewards[-1]:.3f}"


def _signs_of_haste(history: History) -> list[str]:
    signs = []
    first, last = history.early("policy/entropy"), history.late("policy/entropy")
    if first and last and last > GREW_NOISY * first and last > first + 0.5:
        signs.append(f"entropy rose from {first:.2f} to {last:.2f} nats a token: the text turns to noise")
    if first and last is not None and last < 0.1 * first:
        signs.append(f"entropy fell from {first:.2f} to {last:.3f} nats a token")
    first, last = history.early("optim/grad_norm"), history.late("optim/grad_norm")
    if first and last and last > GRAD_GREW * first:
        signs.append(f"the gradient norm grew {last / first:.0f} times, from {first:.2g} to {last:.2g}")
    clipped = history.mean("loss/clip_frac")
    if clipped is not None and clipped > CLIPPED:
        signs.append(f"the clip removed the gradient of {percent(clipped)} of tokens")
    moved = history.mean("policy/kl_to_old")
    if moved is not None and moved > KL_STEP_LARGE:
        signs.append(f"one step moves the policy by {moved:.2f} nats a token")
    first, last = history.early("completion/truncated_frac"), history.late("completion/truncated_frac")
    if first is not None and last is not None and last > first + 0.3:
        signs.append(f"completions cut at the limit rose from {percent(first)} to {percent(last)}")
    lengths, last = history.values("completion/length_tokens_mean"), history.late("completion/length_tokens_mean")
    if lengths and last and not lengths[0] / LENGTH_JUMP < last < lengths[0] * LENGTH_JUMP:
        signs.append(f"completions went from {lengths[0]:.0f} to {last:.0f} tokens")
    return signs


def learning_rate_too_low(history: History) -> Finding | None:
    """The adapter changes next to nothing after a good part of the run, though groups had a signal."""
    effects = history.values("identity/adapter_effect_mean")
    no_signal, change = history.mean("groups/no_signal_frac"), history.change("reward/mean")
    if len(history.train) < 20 or len(effects) < 2 or effects[-1] >= MOVED_NATS:
        return None
    if no_signal is None or no_signal > 0.5 or change is None or change.verdict != "no clear change":
        return None
    lr = history.number("optim.lr")
    return Finding(
        rule="learning_rate_too_low",
        severity=WARNING,
        title="The learning rate is too low",
        evidence=f"after {len(history.train)} steps the adapter changes a token's logprob by {effects[-1]:.1e} nats on "
        f"average; the reward went from {change.first:.3f} to {change.last:.3f} "
        f"(+- {change.two_standard_errors:.3f}), although {percent(1 - no_signal)} of groups had a signal",
        meaning="The policy that samples is still the one that the run began with.",
        settings={"optim.lr": f"{lr * 5:.1e}{now(lr)}" if lr else "five times as much", "optim.warmup_steps": "fewer"},
    )


def entropy_collapse(history: History) -> Finding | None:
    """Entropy of the last quarter under COLLAPSED_NATS and under COLLAPSED_SHARE of the first."""
    first, last = history.early("policy/entropy"), history.late("policy/entropy")
    if len(history.train) < MIN_STEPS or not first or last is None:
        return None
    if last >= COLLAPSED_NATS or last >= COLLAPSED_SHARE * first:
        return None
    return Finding(
        rule="entropy_collapse",
        severity=PROBLEM,
        title="The entropy has collapsed",
        evidence=f"entropy fell from {first:.2f} to {last:.3f} nats a token (first and last quarter of steps)",
        meaning="The policy writes nearly the same text every time; a group then holds nothing to compare, and what "
        "was not found by now will not be found.",
        settings={
            "algorithm.entropy_coef": f"0.001 to 0.01{now(history.number('algorithm.entropy_coef'))}",
            "algorithm.clip_ratio_high": f"0.28{now(history.number('algorithm.clip_ratio_high'))}",
            "optim.lr": f"lower{now(history.number('optim.lr'))}",
        },
    )


def kl_blow_up(history: History) -> Finding | None:
    """KL to the reference policy of the last quarter above KL_LARGE."""
    first, last = history.early("kl/reference"), history.late("kl/reference")
    if len(history.train) < MIN_STEPS or last is None or last <= KL_LARGE:
        return None
    return Finding(
        rule="kl_blow_up",
        severity=WARNING,
        title="The policy has left the reference policy far behind",
        evidence=f"KL to the reference policy is {last:.2f} nats a token in the last quarter of steps"
        + (f", {first:.3f} in the first" if first is not None else ""),
        meaning="At this distance the text usually loses what the reward does not look at: language, form, facts.",
        settings={
            "algorithm.kl_coef": f"higher{now(history.number('algorithm.kl_coef'))}",
            "optim.lr": f"lower{now(history.number('optim.lr'))}",
        },
    )


def reward_without_accuracy(history: History) -> Finding | None:
    """The reward rises while accuracy, on training prompts or held out, falls by more than chance."""
    reward = history.change("reward/mean")
    if reward is None or reward.verdict != "rose":
        return None
    falls = []
    accuracy = history.change("accuracy/train")
    if accuracy and accuracy.verdict == "fell":
        falls.append(f"accuracy on training prompts fell from {percent(accuracy.first)} to {percent(accuracy.last)}")
    held_out = _held_out_change(history)
    if held_out and held_out[1] < 0:
        values = history.evaluated("eval/accuracy")
        falls.append(f"held-out accuracy fell from {percent(values[0])} to {percent(values[-1])}")
    if not falls:
        return None
    return Finding(
        rule="reward_without_accuracy",
        severity=PROBLEM,
        title="The reward rises while accuracy falls",
        evidence=f"the reward rose from {reward.first:.3f} to {reward.last:.3f}; " + "; ".join(falls),
        meaning="The policy has found a way to be paid that is not the task. Read the best-paid completions below.",
        settings={
            "rewards.components": "less weight on what is not accuracy, or gate_min on accuracy",
            "algorithm.kl_coef": f"higher{now(history.number('algorithm.kl_coef'))}",
        },
    )


def pays_for_length(history: History) -> Finding | None:
    """Longer completions earn more, completions grow, and accuracy does not."""
    length, reward = history.change("completion/length_tokens_mean"), history.change("reward/mean")
    accuracy = history.change("accuracy/train")
    if length is None or reward is None or reward.verdict != "rose" or length.verdict != "rose":
        return None
    if accuracy is not None and accuracy.verdict == "rose":
        return None
    proof = _length_proof(history, length.last / length.first)
    if proof is None:
        return None
    return Finding(
        rule="pays_for_length",
        severity=PROBLEM,
        title="The reward pays for length",
        evidence=f"completions grew from {length.first:.0f} to {length.last:.0f} tokens and the reward from "
        f"{reward.first:.3f} to {reward.last:.3f} while accuracy did not rise; {proof}",
        meaning="The policy is paid for writing more, not for being right.",
        settings={
            "rewards.components": "the component that grows with length: less weight, or none",
            "algorithm.overlong_buffer_tokens": "a penalty near the token limit",
        },
    )


def _length_proof(history: History, growth: float) -> str | None:
    """Correlation of reward with length within groups where rollouts were read, else of their means over steps."""
    inside = history.mean("groups/length_reward_correlation")
    if inside is not None:
        is_proof = inside >= LENGTH_CORRELATION and growth >= LENGTH_GREW
        return f"within groups, reward and length correlate with {inside:.2f}" if is_proof else None
    lengths, rewards = history.column("completion/length_tokens_mean"), history.column("reward/mean")
    pairs = [(a, b) for a, b in zip(lengths, rewards, strict=True) if a is not None and b is not None]
    if growth < LENGTH_GREW_UNSEEN or min(len({p[0] for p in pairs}), len({p[1] for p in pairs})) < 2:
        return None
    over_steps = correlation(*zip(*pairs, strict=True))
    is_proof = over_steps >= LENGTH_CORRELATION_UNSEEN
    return f"over steps, reward and length correlate with {over_steps:.2f}" if is_proof else None


def rise_from_one_component(history: History) -> Finding | None:
    """Nearly all of the reward's rise comes from a component other than accuracy, and accuracy did not rise."""
    reward, accuracy = history.change("reward/mean"), history.change("reward/accuracy")
    if reward is None or reward.verdict != "rose" or accuracy is None or accuracy.verdict == "rose":
        return None
    weights = history.setting("rewards.components") or {}
    for name in component_names(dict.fromkeys(key for row in history.train for key in row)):
        change, weight = history.change(f"reward/{name}"), (weights.get(name) or {}).get("weight")
        if name == "accuracy" or change is None or not isinstance(weight, int | float):
            continue
        share = weight * change.difference / reward.difference
        if change.verdict == "rose" and share >= RISE_SHARE:
            return Finding(
                rule="rise_from_one_component",
                severity=NOTE,
                title=f"The reward's rise comes from {name}, not from accuracy",
                evidence=f"the reward rose by {reward.difference:.3f}, of which {name} (weight {weight:g}) is "
                f"{percent(min(share, 1.0))}; accuracy went from {percent(accuracy.first)} to "
                f"{percent(accuracy.last)}, no clear change",
                meaning=f"What was learned is {name}. The curve of the whole reward does not speak of the task itself.",
                settings={f"rewards.components.{name}.weight": f"smaller, once it is learned{now(weight)}"},
            )
    return None


def eval_does_not_follow(history: History) -> Finding | None:
    """Accuracy on training prompts rose clearly; held-out accuracy rose by less than half of that, even at best."""
    train, held_out = history.change("accuracy/train"), _held_out_change(history)
    if train is None or train.verdict != "rose" or held_out is None or train.difference < 0.1:
        return None
    difference, high = held_out
    if high >= train.difference / 2:
        return None
    return Finding(
        rule="eval_does_not_follow",
        severity=WARNING,
        title="Held-out accuracy does not follow",
        evidence=f"accuracy on training prompts rose by {100 * train.difference:.1f} points "
        f"({percent(train.first)} to {percent(train.last)}); held-out accuracy changed by {100 * difference:+.1f} "
        f"points, at most {100 * high:+.1f} (95%)",
        meaning="The policy learns these prompts, not the skill; or the held-out problems are of another kind.",
        settings={"data.limit": "more rows, or null", "training.num_steps": "fewer", "algorithm.kl_coef": "higher"},
    )


def _held_out_change(history: History) -> tuple[float, float] | None:
    """Change of held-out accuracy, first to last evaluation, and the upper end of its 95% interval."""
    rows = [row for row in history.evaluations if row.get("eval/accuracy") is not None and row.get("eval/num")]
    if len(rows) < 2:
        return None
    (p1, n1), (p2, n2) = ((row["eval/accuracy"], int(row["eval/num"])) for row in (rows[0], rows[-1]))
    if not (0 <= p1 <= 1 and 0 <= p2 <= 1):
        return None
    return p2 - p1, difference_interval(p1 * n1, n1, p2 * n2, n2)[1]
