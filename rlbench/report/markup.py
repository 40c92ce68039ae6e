"""HTML out of Python values: every text is escaped unless it is `Html` already."""

from __future__ import annotations

from html import escape

from rlbench.tracking.safe_text import printable

_VOID = {"meta", "br", "input", "line", "path", "rect", "circle", "polygon"}


class Html(str):
    """Markup that is safe as it stands. Everything else is text."""


def tag(name: str, /, *children: object, **attributes: object) -> Html:
    """An element: `tag("p", "a < b", class_="note")` is `<p class="note">a &lt; b</p>`.

    Args:
        name: of the element.
        children: `Html` as it is, None left out, anything else as text: escaped, control characters made visible.
        attributes: a trailing underscore is dropped, others become hyphens; True stands alone, None and False are left
            out.
    """
    opened = "".join(_attribute(key, value) for key, value in attributes.items())
    if name in _VOID:
        return Html(f"<{name}{opened}>" if name in ("meta", "br", "input") else f"<{name}{opened}/>")
    return Html(f"<{name}{opened}>{join(*children)}</{name}>")


def join(*children: object) -> Html:
    """Children one after the other, as in `tag`."""
    return Html("".join(_child(child) for child in children if child is not None))


def _child(child: object) -> str:
    if isinstance(child, Html):
        return child
    return escape(printable(str(child), keep_newlines=True), quote=True)


def _attribute(key: str, value: object) -> str:
    name = key.rstrip("_").replace("_", "-") if key != "viewBox" else key
    if value is None or value is False:
        return ""
    if value is True:
        return f" {name}"
    return f' {name}="{escape(printable(str(value)), quote=True)}"'
