"""The parts of a run's page."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rlbench.checks.health import Finding
from rlbench.report.curves import Chart, column
from rlbench.report.markup import Html, join, tag
from rlbench.report.run_folder import RunRecord
from rlbench.report.svg_chart import LEFT, NUM_COLOURS, RIGHT, WIDTH, colour_class, colours, draw, x_range
from rlbench.tracking.formats import format_duration, format_number
from rlbench.tracking.metrics import metric_spec
from rlbench.tracking.run_summary import quarter_change

_SYMBOLS = {"problem": "Problem", "warning": "Warning", "note": "Note"}


def section(anchor: str, title: str, *content: object) -> Html:
    return tag("section", tag("h2", title), *content, id=anchor)


def header(title: str, tiles: Sequence[tuple[str, str, str]], links: Sequence[tuple[str, str]]) -> Html:
    """Title, key numbers (label, value, remark) and links (anchor, text) to the sections."""
    cards = [
        tag("div", tag("dt", label), tag("dd", value, tag("small", remark) if remark else None), class_="tile")
        for label, value, remark in tiles
    ]
    return join(
        tag("a", "Skip to the findings", href="#health", class_="skip"),
        tag("header", tag("h1", title), tag("dl", *cards, class_="tiles"), _links(links)),
    )


def _links(links: Sequence[tuple[str, str]]) -> Html:
    return tag("nav", *(tag("a", text, href=f"#{anchor}") for anchor, text in links), aria_label="Sections")


def key_numbers(run: RunRecord) -> list[tuple[str, str, str]]:
    """Tiles of a run: steps, reward, held-out accuracy, time, tokens."""
    tiles = []
    planned = run.config.get("training", {}).get("num_steps") if isinstance(run.config.get("training"), dict) else None
    done = run.train[-1]["step"] if run.train else 0
    tiles.append(("Steps", f"{done}", f"of {planned}" if planned and planned != done else ""))
    change = quarter_change(column(run.train, "reward/mean"))
    if change:
        tiles.append(("Reward, first and last quarter", f"{change.first:.3f} → {change.last:.3f}", change.verdict))
    accuracies = [v for v in column(run.evaluations, "eval/accuracy") if v is not None]
    if accuracies:
        text = f"{100 * accuracies[0]:.1f}%" + (f" → {100 * accuracies[-1]:.1f}%" if len(accuracies) > 1 else "")
        tiles.append(("Held-out accuracy", text, _interval(run.evaluations[-1])))
    seconds = [v for v in column(run.train, "time/step_s") if v is not None]
    if seconds:
        tiles.append(
            ("Time of all steps", format_duration(sum(seconds)), f"{sum(seconds) / len(seconds):.1f} s a step")
        )
    tokens = [v for v in column(run.train, "completion/num_tokens") if v is not None]
    if tokens:
        tiles.append(("Tokens generated", format_number(sum(tokens)), ""))
    return tiles


def _interval(row: Mapping[str, Any]) -> str:
    low, high, num = (row.get(f"eval/{name}") for name in ("accuracy_low", "accuracy_high", "num"))
    if low is None or high is None:
        return ""
    return f"95%: {100 * low:.1f} to {100 * high:.1f}%" + (f" of {num:.0f}" if num else "")


def findings_list(findings: Sequence[Finding], num_rules: int, heading: str = "h3") -> Html:
    """Findings with evidence, meaning and settings; a sentence if there are none."""
    if not findings:
        return tag("p", f"None of the {num_rules} rules found anything.", class_="all-well")
    return tag("ul", *(_finding(finding, heading) for finding in findings), class_="findings")


def _finding(finding: Finding, heading: str) -> Html:
    settings = [tag("li", tag("code", key), ": ", advice) for key, advice in finding.settings.items()]
    return tag(
        "li",
        tag(heading, tag("span", _SYMBOLS[finding.severity], class_="badge"), " ", finding.title),
        tag("p", f"{finding.evidence[:1].upper()}{finding.evidence[1:]}.", class_="evidence"),
        tag("p", finding.meaning),
        tag("p", "What to change", class_="lead") if settings else None,
        tag("ul", *settings, class_="settings") if settings else None,
        class_=f"finding {finding.severity}",
    )


def notes_list(notes: Sequence[str]) -> Html | None:
    """What could not be read."""
    return tag("ul", *(tag("li", note) for note in notes), class_="notes", role="note") if notes else None


def chart_grid(charts: Sequence[Chart], zero: Sequence[str] = ()) -> Html:
    figures = [_figure(chart, i) for i, chart in enumerate(charts)]
    rest = f"Recorded and zero throughout: {', '.join(zero)}." if zero else None
    return join(tag("div", *figures, class_="charts"), tag("p", rest, class_="quiet") if rest else None)


def _figure(chart: Chart, index: int) -> Html:
    names = [
        tag("span", tag("i", class_=f"key {colour_class(i)}"), curve.label, _dash_text(i), class_="legend-entry")
        for i, curve in zip(colours(chart), chart.curves, strict=True)
    ]
    title = tag("h3", chart.title, tag("small", chart.unit) if chart.unit else None)
    return tag(
        "figure",
        tag("figcaption", title, tag("div", *names, class_="legend")),
        tag("div", draw(chart), class_="plot", tabindex="0", data_chart=index, role="group",
            aria_label=f"{chart.title}. Arrow keys read the values."),
        tag("output", chart.note, class_="readout", data_note=chart.note),
    )  # fmt: skip


def _dash_text(number: int) -> str:
    return ("", " (dashed)", " (dotted)")[min(number // NUM_COLOURS, 2)]


def chart_data(chart: Chart) -> dict[str, Any]:
    """What the page's script needs to read values off a chart."""
    low, high = x_range(chart)
    return {
        "low": low,
        "high": high,
        "left": LEFT,
        "right": WIDTH - RIGHT,
        "width": WIDTH,
        "isShare": chart.is_share,
        "unit": chart.unit,
        "curves": [
            {
                "label": curve.label,
                "steps": list(curve.steps),
                "values": _short(curve.values),
                "low": _short(curve.low),
                "high": _short(curve.high),
            }
            for curve in chart.curves
        ],
    }


def _short(values: Sequence[float | None]) -> list[float | None]:
    return [None if value is None else float(f"{value:.5g}") for value in values]


def all_metrics(run: RunRecord) -> Html | None:
    """Every recorded number: first, last, smallest, largest."""
    keys = dict.fromkeys(key for row in [*run.train, *run.evaluations] for key in row if key not in ("step", "phase"))
    rows = []
    for key in sorted(keys):
        values = [v for v in column([*run.train, *run.evaluations], key) if v is not None]
        if values:
            cells = [tag("td", f"{v:.4g}", class_="number") for v in (values[0], values[-1], min(values), max(values))]
            rows.append(tag("tr", tag("th", tag("code", key), scope="row"), tag("td", metric_spec(key).label), *cells))
    if not rows:
        return None
    return tag("details", tag("summary", f"All {len(rows)} recorded metrics"),
               table(("key", "meaning", "first", "last", "smallest", "largest"), rows))  # fmt: skip


def table(columns: Sequence[str], rows: Sequence[Html], **attributes: object) -> Html:
    head = tag("thead", tag("tr", *(tag("th", name, scope="col") for name in columns)))
    return tag("div", tag("table", head, tag("tbody", *rows), **attributes), class_="table", tabindex="0")


def settings_table(config: Mapping[str, Any], derived: Mapping[str, Any]) -> Html:
    """Every setting by its key; those that were derived with the reason."""
    reasons = {key: entry.get("reason") for key, entry in derived.items() if isinstance(entry, Mapping)}
    rows = [
        tag("tr", tag("th", tag("code", key), scope="row"), tag("td", plain(value), class_="value"),
            tag("td", reasons.get(key) or "", class_="reason"), class_="derived" if key in reasons else None)
        for key, value in flatten(config)
    ]  # fmt: skip
    return table(("setting", "value", "derived because"), rows, class_="wide")


def flatten(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of every leaf; an empty mapping is a leaf."""
    for key, value in config.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping) and value:
            yield from flatten(value, f"{name}.")
        else:
            yield name, value


def plain(value: object) -> str:
    """A setting as it would be written in YAML, roughly."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return str(value)


def environment_table(environment: Mapping[str, Any]) -> Html | None:
    if not environment:
        return None
    rows = [
        tag("tr", tag("th", key, scope="row"), tag("td", plain(value), class_="value"))
        for key, value in flatten(environment)
    ]
    return table(("what", "version or value"), rows)


def files_table(files: Sequence[tuple[str, int]]) -> Html:
    rows = [
        tag("tr", tag("th", tag("code", name), scope="row"), tag("td", f"{size:,}", class_="number"))
        for name, size in files
    ]
    return table(("file", "bytes"), rows)
