"""The sample explorer's controls; `assets/samples.js` fills it."""

from __future__ import annotations

from rlbench.report.markup import Html, tag


def explorer(num_shown: int, num_rollouts: int, has_tokens: bool) -> Html:
    """Form, status line and an empty list.

    Args:
        num_shown: rollouts in the page.
        num_rollouts: rollouts of the run.
        has_tokens: whether completions can be coloured by token.
    """
    some = (
        f"{num_shown:,} of {num_rollouts:,} rollouts, evenly spread over the run." if num_shown < num_rollouts else None
    )
    missing = None if has_tokens else "No tokenizer file was found, so the text is not split into tokens."
    return tag(
        "div",
        tag("p", some, class_="quiet") if some else None,
        tag("p", missing, class_="quiet") if missing else None,
        tag("form", *_controls(has_tokens), id="filters"),
        tag("p", "The samples need JavaScript.", id="sample-status", role="status", aria_live="polite"),
        tag("div", id="sample-list"),
        tag("button", "Show more", type="button", id="sample-more", hidden=True),
        id="explorer",
    )


def _controls(has_tokens: bool) -> list[Html]:
    colours = [("none", "none"), ("advantage", "advantage")] + ([("logprob", "logprob")] if has_tokens else [])
    return [
        _select("view", "Show", [("groups", "groups side by side"), ("single", "single completions")]),
        _select("step", "Step", [("", "all")]),
        _select("outcome", "Outcome", [("", "any"), ("ended", "ended"), ("cut", "cut at the limit")]),
        _field("Reward from", tag("input", name="min", type="number", step="any", inputmode="decimal")),
        _field("to", tag("input", name="max", type="number", step="any", inputmode="decimal")),
        _field("Text contains", tag("input", name="text", type="search", autocomplete="off", spellcheck="false")),
        _select("sort", "Order", [("step", "by step"), ("high", "highest reward"), ("low", "lowest reward"),
                                  ("long", "longest"), ("short", "shortest")]),
        _select("colour", "Colour by", colours[::-1] if has_tokens else colours),
    ]  # fmt: skip


def _field(label: str, control: Html) -> Html:
    return tag("label", tag("span", label), control)


def _select(name: str, label: str, options: list[tuple[str, str]]) -> Html:
    return _field(label, tag("select", *(tag("option", text, value=value) for value, text in options), name=name))
