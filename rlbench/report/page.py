"""One self-contained HTML page: our own style and script inline, nothing from elsewhere, and a policy that says so."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Sequence
from importlib.resources import files
from typing import Any

from rlbench.report.markup import Html, join, tag

_SCRIPTS = ("charts.js", "samples.js")


def render_page(title: str, body: Sequence[object], data: dict[str, Any], chunks: Sequence[str] = ()) -> str:
    """The whole document.

    Args:
        title: of the page.
        body: elements, escaped as `tag` does.
        data: for the scripts, JSON values only.
        chunks: compressed texts, base64.
    """
    style = _asset("report.css")
    script = "\n".join(_asset(name) for name in _SCRIPTS)
    head = join(
        tag("meta", charset="utf-8"),
        tag("meta", http_equiv="Content-Security-Policy", content=_policy(style, script)),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name="color-scheme", content="light dark"),
        tag("meta", name="referrer", content="no-referrer"),
        tag("title", title),
        Html(f"<style>{style}</style>"),
    )
    blocks = [_data_block("data", json_for_html(data))]
    blocks += [_data_block(f"chunk-{i}", chunk) for i, chunk in enumerate(chunks)]
    parts = tag(
        "html", Html("<head>"), head, Html("</head>\n"), tag("body", *body, *blocks, _script(script)), lang="en"
    )
    return f"<!DOCTYPE html>\n{parts}\n"


def json_for_html(data: Any) -> str:
    """JSON that cannot end the script element that holds it, whatever its texts say."""
    text = json.dumps(data, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _policy(style: str, script: str) -> str:
    return (
        f"default-src 'none'; style-src {_hash(style)}; script-src {_hash(script)}; base-uri 'none'; form-action 'none'"
    )


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def _asset(name: str) -> str:
    text = (files("rlbench.report") / "assets" / name).read_text(encoding="utf-8")
    assert "</s" not in text.lower(), f"{name} would end its own element"
    return text


def _data_block(name: str, content: str) -> Html:
    return Html(f'<script type="application/json" id="{name}">{content}</script>\n')


def _script(content: str) -> Html:
    return Html(f"<script>{content}</script>")
