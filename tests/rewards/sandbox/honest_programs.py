# ruff: noqa: E501
"""Honest programs, each with the mutant that must fail on the same row."""

from collections.abc import Mapping
from typing import Any

from tests.rewards.sandbox.cases import Case


def _check(entry_point: str, body: str, prompt: str = "") -> dict[str, Any]:
    row = {"entry_point": entry_point, "test": f"def check(candidate):\n{body}"}
    return {**row, "prompt": prompt} if prompt else row


def _programs(*pairs: tuple[str, str]) -> dict[str, Any]:
    return {"tests": [{"input": given, "output": output} for given, output in pairs]}


# name: (row, program, what to replace in it, by what)
_TASKS: dict[str, tuple[Mapping[str, Any], str, str, str]] = {
    "closure and recursion": (
        _check("fib", "    assert [candidate(n) for n in range(8)] == [0, 1, 1, 2, 3, 5, 8, 13]\n"),
        "from functools import lru_cache\n@lru_cache(None)\ndef fib(n):\n    return n if n < 2 else fib(n - 1) + fib(n - 2)",
        "n < 2",
        "n < 3",
    ),
    "typed signature from the prompt": (
        _check(
            "has_close",
            "    assert candidate([1.0, 2.0, 3.9, 4.0], 0.3) == True\n    assert candidate([1.0, 2.0], 0.05) == False\n",
            'from typing import List\n\ndef has_close(xs: List[float], t: float) -> bool:\n    """Any two within t?"""\n',
        ),
        "def has_close(xs: List[float], t: float) -> bool:\n    xs = sorted(xs)\n"
        "    return any(b - a < t for a, b in zip(xs, xs[1:]))",
        "< t",
        "> t",
    ),
    "exceptions are seen": (
        {
            "test_list": [
                "try:\n    parse('x')\n    assert False\nexcept ValueError as e:\n    assert 'bad' in str(e)",
                "assert parse('12') == 12",
            ]
        },
        "def parse(s):\n    if not s.isdigit():\n        raise ValueError(f'bad number {s}')\n    return int(s)",
        "ValueError(",
        "KeyError(",
    ),
    "objects of a class": (
        {
            "test_list": [
                "c = Counter2(10)\nc.add(5)\nassert c.total == 15\nassert c.history() == [10, 15]",
                "assert combine([Counter2(1), Counter2(2)]) == 3",
            ]
        },
        "class Counter2:\n    def __init__(self, start):\n        self.total = start\n        self._all = [start]\n"
        "    def add(self, n):\n        self.total += n\n        self._all.append(self.total)\n"
        "    def history(self):\n        return self._all\n"
        "def combine(items):\n    return sum(i.total for i in items)",
        "+= n",
        "-= n",
    ),
    "containers of the standard library": (
        {
            "test_list": [
                "assert count('aab') == {'a': 2, 'b': 1}",
                "assert point() == (1, 2)",
                "assert list(numbers()) == [0, 1, 2]",
                "assert as_set([1, 1, 2]) == {1, 2} and half() == Fraction(1, 2)",
            ],
            "test_imports": ["from fractions import Fraction"],
        },
        "from collections import Counter, namedtuple\nfrom fractions import Fraction\nP = namedtuple('P', 'x y')\n"
        "def count(s):\n    return Counter(s)\ndef point():\n    return P(1, 2)\ndef numbers():\n    yield from range(3)\n"
        "def as_set(x):\n    return set(x)\ndef half():\n    return Fraction(2, 4)",
        "P(1, 2)",
        "P(2, 1)",
    ),
    "large and special numbers": (
        _check(
            "f",
            "    assert candidate(3) == 3**500\n    assert candidate(-1) == float('inf')\n"
            "    assert candidate(0) != candidate(0)\n    assert candidate(1j) == 1j and candidate(b'x') == b'x'\n",
        ),
        "def f(x):\n    if x == -1:\n        return float('inf')\n    if x == 0:\n        return float('nan')\n"
        "    return x**500 if x == 3 else x",
        "**500",
        "**501",
    ),
    "class Solution": (
        {
            "public_test_cases": '[{"input": "[2, 7, 11]\\n9", "output": "[0, 1]", "testtype": "functional"}]',
            "private_test_cases": '[{"input": "[3, 3]\\n6", "output": "[0, 1]", "testtype": "functional"}]',
            "metadata": '{"func_name": "twoSum"}',
        },
        "from typing import List\nclass Solution:\n    def twoSum(self, nums: List[int], target: int) -> List[int]:\n"
        "        seen = {}\n        for i, n in enumerate(nums):\n            if target - n in seen:\n"
        "                return [seen[target - n], i]\n            seen[n] = i",
        "target - n in seen",
        "target + n in seen",
    ),
    "tests as functions": (
        {
            "test": "from solution import is_even\n\ndef test_even():\n    assert is_even(4)\n\ndef test_odd():\n    assert not is_even(3)\n"
        },
        "def is_even(n):\n    return n % 2 == 0",
        "== 0",
        "== n % 2",
    ),
    "lines of input": (
        _programs(("3\n1 2 3\n", "6\n"), ("1\n5\n", "5\n")),
        "n = int(input())\nprint(sum(map(int, input().split())))",
        "sum(",
        "max(",
    ),
    "all of the input, buffered output": (
        _programs(("1\n2\n3\n", "3\n2\n1\n"), ("", "")),
        "import sys\nlines = sys.stdin.read().split()\nsys.stdout.write('\\n'.join(reversed(lines)))",
        "reversed(lines)",
        "lines",
    ),
    "main guard and exit status": (
        _programs(("", "done\n")),
        "import sys\ndef main():\n    print('done')\n    sys.exit(0)\nif __name__ == '__main__':\n    main()",
        "'done'",
        "'Done'",
    ),
    "threads and deep recursion": (
        _programs(("", "20000 4\n")),
        "import sys, threading\nsys.setrecursionlimit(10**6)\nthreading.stack_size(2**27)\n"
        "def depth(n):\n    return 0 if n == 0 else 1 + depth(n - 1)\ndef main():\n    print(depth(20000), 2 + 2)\n"
        "t = threading.Thread(target=main)\nt.start()\nt.join()",
        "2 + 2",
        "2 + 3",
    ),
    "scratch files": (
        _programs(("x", "x x\n")),
        "import os, tempfile\nwith tempfile.NamedTemporaryFile('w+') as f:\n    f.write(input())\n    f.seek(0)\n"
        "    text = f.read()\nopen('a', 'w').write(text)\nos.rename('a', 'b')\nprint(text, open('b').read())",
        "print(text,",
        "print('',",
    ),
    "random, time and os.urandom": (
        _programs(("", "True\n")),
        "import os, random, time\nrandom.seed(time.time())\nprint(0 <= random.random() < 1 and len(os.urandom(8)) == 8)",
        "== 8",
        "== 9",
    ),
    "asyncio": (
        _programs(("", "3\n")),
        "import asyncio\nasync def one():\n    await asyncio.sleep(0.001)\n    return 1\n"
        "async def main():\n    print(sum(await asyncio.gather(one(), one(), one())))\nasyncio.run(main())",
        "print(sum(",
        "print(-sum(",
    ),
    "much output": (
        _programs(("", "\n".join(map(str, range(200_000))))),
        "for i in range(200_000):\n    print(i)",
        "200_000",
        "199_999",
    ),
    "expected values of APPS": (
        {"input_output": '{"fn_name": "double", "inputs": [[2], [3]], "outputs": [[4], [6]]}'},
        "def double(x):\n    return 2 * x",
        "2 * x",
        "3 * x",
    ),
}

# The same, of programs that may start processes.
_WITH_PROCESSES: dict[str, tuple[Mapping[str, Any], str, str, str]] = {
    "children that read their parent's memory": (
        _programs(("", "0 0 0 0 0 0 0 0\n")),
        "import os, time\nkept = b'x' * (60 << 20)\npids = []\nfor _ in range(8):\n    pid = os.fork()\n    if pid == 0:\n"
        "        found = kept.count(b'x')\n        time.sleep(0.3)\n        os._exit(found != 60 << 20)\n    pids.append(pid)\n"
        "print(*[os.waitpid(pid, 0)[1] for pid in pids])",
        "!= 60",
        "== 60",
    ),
    "a program of the system": (
        _programs(("", "hi\n")),
        "import subprocess\nprint(subprocess.run(['/bin/echo', 'hi'], capture_output=True, text=True).stdout.strip())",
        "'hi'",
        "'ho'",
    ),
    "a pool of processes": (
        _programs(("", "[0, 1, 4, 9]\n")),
        "import multiprocessing\nrow = [multiprocessing.get_context('fork').Pipe() for _ in range(4)]\n"
        "def square(n):\n    row[n][1].send(n * n)\n"
        "all_of = [multiprocessing.get_context('fork').Process(target=square, args=(n,)) for n in range(4)]\n"
        "for p in all_of:\n    p.start()\nfor p in all_of:\n    p.join()\nprint([a.recv() for a, _ in row])",
        "n * n",
        "n + n",
    ),
}
_GROUPS: list[tuple[dict[str, tuple[Mapping[str, Any], str, str, str]], dict[str, Any]]] = [
    (_TASKS, {}),
    (_WITH_PROCESSES, {"allow_subprocess": True, "memory_mib": 128}),
]

HONEST = [
    Case(name=name, category="honest", code=code, row=row, value=1.0, options=options)
    for tasks, options in _GROUPS
    for name, (row, code, _, _) in tasks.items()
]
MUTANTS = [
    Case(name=f"mutant: {name}", category="mutants", code=code.replace(old, new), row=row, options=options)
    for tasks, options in _GROUPS
    for name, (row, code, old, new) in tasks.items()
]
