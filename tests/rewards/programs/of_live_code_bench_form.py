"""Rows with LiveCodeBench's columns, written by us: programs that read and print, and methods of a class Solution."""

from __future__ import annotations

import base64
import json
import pickle
import zlib
from collections.abc import Sequence
from typing import Any

from tests.rewards.programs.rows import Problem

Case = tuple[str, str]


def _packed(cases: Sequence[dict[str, Any]]) -> str:
    """As LiveCodeBench packs its private cases."""
    return base64.b64encode(zlib.compress(pickle.dumps(json.dumps(cases)))).decode()


def _row(cases: Sequence[Case], testtype: str, metadata: dict[str, str]) -> dict[str, Any]:
    plain = [{"input": given, "output": output, "testtype": testtype} for given, output in cases]
    public, private = json.dumps(plain[:1]), _packed(plain[1:])
    return {"public_test_cases": public, "private_test_cases": private, "metadata": json.dumps(metadata)}


def _program(name: str, program: str, *cases: Case) -> Problem:
    """The output counts, however the program ended."""

    def judged(code: str) -> str:
        return (
            f"import io, sys\nfor given, output in {list(cases)!r}:\n"
            "    sys.stdin, sys.stdout = io.StringIO(given), io.StringIO()\n    try:\n"
            f"        exec(compile({code!r}, 'program', 'exec'), {{'__name__': '__main__'}})\n"
            "    except Exception:\n        pass\n    assert sys.stdout.getvalue().split() == output.split()\n"
        )

    return Problem(name=name, row=_row(cases, "stdin", {}), program=program, function="", judged=judged)


def _method(name: str, program: str, *cases: Case) -> Problem:
    def judged(code: str) -> str:
        calls = [([json.loads(line) for line in given.split("\n")], json.loads(output)) for given, output in cases]
        return f"{code}\n\nfor given, output in {calls!r}:\n    assert Solution().{name}(*given) == output\n"

    row = _row(cases, "functional", {"func_name": name})
    return Problem(name=name, row=row, program=program, function=name, judged=judged)


PROBLEMS = [
    _program(
        "largest gap",
        "n = int(input())\nxs = sorted(map(int, input().split()))\n"
        "print(max((b - a for a, b in zip(xs, xs[1:])), default=0))",
        ("4\n1 9 4 6\n", "3\n"), ("1\n5\n", "0\n"), ("2\n-3 8\n", "11\n"),
    ),
    _program(
        "queue of commands",
        "from collections import deque\nimport sys\nqueue = deque()\nfor line in sys.stdin.read().split('\\n')[1:]:\n"
        "    word, _, value = line.partition(' ')\n    if word == 'push':\n        queue.append(value)\n"
        "    elif word == 'pop':\n        print(queue.popleft() if queue else 'empty')\n",
        ("4\npush 3\npush a\npop\npop\n", "3\na\n"), ("2\npop\npush 1\n", "empty\n"),
        ("3\npush x\npop\npop\n", "x\nempty\n"),
    ),
    _program(
        "islands",
        "import sys\nrows = sys.stdin.read().split()\nland = {(y, x) for y, row in enumerate(rows) for x, c in "
        "enumerate(row) if c == '#'}\ncount = 0\nwhile land:\n    count += 1\n    stack = [land.pop()]\n"
        "    while stack:\n        y, x = stack.pop()\n"
        "        for near in ((y + 1, x), (y - 1, x), (y, x + 1), (y, x - 1)):\n            if near in land:\n"
        "                land.remove(near)\n                stack.append(near)\nprint(count)",
        ("##.\n..#\n#.#\n", "3\n"), ("...\n", "0\n"), ("#.#\n###\n", "1\n"), ("##\n##\n", "1\n"), ("#####\n", "1\n"),
        ("###.\n..#.\n.##.\n.#..\n.###\n", "1\n"), ("#.#.#\n.#.#.\n", "5\n"), ("#\n#\n#\n#\n", "1\n"),
    ),
    _method(
        "longestRun",
        "from typing import List\n\nclass Solution:\n    def longestRun(self, nums: List[int], limit: int) -> int:\n"
        "        best = run = 0\n        for n in nums:\n            run = run + 1 if n <= limit else 0\n"
        "            best = max(best, run)\n        return best\n",
        ("[1, 5, 2, 2, 9]\n3", "2"), ("[]\n1", "0"), ("[4, 4, 4]\n4", "3"), ("[7, 1]\n2", "1"),
    ),
    _method(
        "encode",
        "class Solution:\n    def encode(self, words):\n        return ''.join(f'{len(w)}#{w}' for w in words)\n",
        ('["ab", "c"]', '"2#ab1#c"'), ("[]", '""'), ('["", "x#y"]', '"0#3#x#y"'),
    ),
    _method(
        "median",
        "class Solution:\n    def median(self, a, b):\n        xs = sorted(a + b)\n        half = len(xs) // 2\n"
        "        if len(xs) % 2:\n            return float(xs[half])\n        return (xs[half - 1] + xs[half]) / 2\n",
        ("[1, 3]\n[2]", "2.0"), ("[1, 2]\n[3, 4]", "2.5"), ("[]\n[5]", "5.0"), ("[0, 9]\n[]", "4.5"),
    ),
]  # fmt: skip
