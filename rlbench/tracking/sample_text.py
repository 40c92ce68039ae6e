"""One rollout as harmless text: the end of its prompt, the completion, the reward by component."""

from __future__ import annotations

from rlbench.records import RewardComponent, Rollout
from rlbench.tracking.safe_text import printable, shorten

MAX_PROMPT_CHARS = 400
MAX_COMPLETION_CHARS = 1200
MAX_LINES = 24


def sample_parts(rollout: Rollout, step: int, advantage: float | None) -> tuple[str, list[tuple[str, str]]]:
    """Title and (heading, text) parts of a sample, ready to print.

    Args:
        rollout: any rollout; its text may hold anything.
        step: optimizer step that it was made for.
        advantage: its credit; None if it had none.

    Returns:
        The title, and parts in reading order.
    """
    title = f"sample | step {step} | {printable(rollout.prompt.prompt_id)} #{rollout.sample_index}"
    completion = rollout.completion
    reason = {"stop": "ended by itself", "length": "cut at the token limit"}.get(
        completion.finish_reason, completion.finish_reason
    )
    heading = f"completion, {len(completion.token_ids)} tokens, {printable(reason)}"
    return title, [
        ("end of the prompt", _clean(rollout.prompt.text.strip(), MAX_PROMPT_CHARS, keep="end")),
        (heading, _clean(rollout.completion_text, MAX_COMPLETION_CHARS, keep="ends")),
        ("reward", _reward_text(rollout, advantage)),
    ]


def _clean(text: str, max_chars: int, keep: str) -> str:
    lines = text.split("\n")
    if len(lines) > MAX_LINES:
        half = MAX_LINES // 2
        lines = [*lines[:half], f"[... {len(lines) - 2 * half} lines ...]", *lines[-half:]]
    return printable(shorten("\n".join(lines), max_chars, keep=keep), keep_newlines=True)


def _reward_text(rollout: Rollout, advantage: float | None) -> str:
    terms = [_component_text(name, component) for name, component in rollout.components.items()]
    total = "none (left out)" if rollout.reward is None else f"{rollout.reward:.3f}"
    credit = "none" if advantage is None else f"{advantage:+.3f}"
    return f"{total} = {' + '.join(terms) or '0'}; advantage {credit}"


def _component_text(name: str, component: RewardComponent) -> str:
    if component.value is None:
        message = f": {shorten(component.message, 200)}" if component.message else ""
        return printable(f"{name} [{component.status}{message}]")
    weight = f" x {component.weight:g}" if component.weight != 1 else ""
    return printable(f"{name} {component.value:.3f}{weight}")
