"""Made rows with the columns of code data sets, written by us."""

import base64
import json
import pickle
import zlib

MBPP = [
    {
        "task_id": number,
        "text": f"Write a function that adds {number} to a number.",
        "code": f"def add_{number}(x):\n    return x + {number}",
        "test_list": [f"assert add_{number}(1) == {number + 1}", f"assert add_{number}(-2) == {number - 2}"],
        "test_setup_code": "",
        "challenge_test_list": [f"assert add_{number}(10**9) == {10**9 + number}"],
    }
    for number in range(12)
]
HUMANEVAL = [
    {
        "task_id": f"Made/{number}",
        "prompt": f'def times_{number}(x: int) -> int:\n    """Multiply x by {number}."""\n',
        "entry_point": f"times_{number}",
        "canonical_solution": f"    return x * {number}\n",
        "test": f"def check(candidate):\n    assert candidate(3) == {3 * number}\n",
    }
    for number in range(12)
]


def _packed(cases: list[dict]) -> str:
    return base64.b64encode(zlib.compress(pickle.dumps(json.dumps(cases)))).decode()


def _case(given: int, number: int) -> dict:
    return {"input": f"{given}\n", "output": f"{given - number}\n", "testtype": "stdin"}


LIVECODEBENCH = [
    {
        "question_title": f"Less {number}",
        "question_content": f"Read a whole number and print it less {number}.",
        "starter_code": "",
        "public_test_cases": json.dumps([_case(5, number)]),
        "private_test_cases": _packed([_case(100, number), _case(0, number)]),
        "metadata": "{}",
    }
    for number in range(12)
]
ROWS = {"mbpp": MBPP, "humaneval": HUMANEVAL, "livecodebench": LIVECODEBENCH}


def program(name: str, row: dict, number: int) -> str:
    """A right program for row `number`."""
    solutions = {"mbpp": row.get("code"), "humaneval": row.get("canonical_solution")}
    return solutions.get(name) or f"print(int(input()) - {number})"


def write(path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)
