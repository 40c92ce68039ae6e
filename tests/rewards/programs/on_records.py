# ruff: noqa: B905
"""Tasks of HumanEval's form on mappings, graphs and grids: a function, and its check; see `rows.py`."""

from collections import deque


def inverted(mapping: dict) -> dict:
    """From each value to the sorted keys that had it."""
    result = {}
    for key, value in mapping.items():
        result.setdefault(value, []).append(key)
    return {value: sorted(keys) for value, keys in result.items()}


def check_inverted(candidate):
    assert candidate({"b": 1, "a": 1, "c": 2}) == {1: ["a", "b"], 2: ["c"]}
    assert candidate({}) == {}


def by_length(words: list) -> dict:
    """The words by their length, words of no letter left out."""
    groups = {}
    for word in words:
        if len(word) > 0:
            groups[len(word)] = groups.get(len(word), []) + [word]
    return groups


def check_by_length(candidate):
    assert candidate(["a", "bb", "", "c"]) == {1: ["a", "c"], 2: ["bb"]}
    assert candidate([]) == {}


def ranking(votes: list) -> list:
    """Names with their votes, most votes first, equals by name.

    >>> ranking(["bo", "al", "bo"])
    [('bo', 2), ('al', 1)]
    """
    counts = {name: votes.count(name) for name in set(votes)}
    return sorted(counts.items(), key=lambda item: (-item[1], item[0]))


def check_ranking(candidate):
    assert candidate(["bo", "al", "bo"]) == [("bo", 2), ("al", 1)]
    assert candidate(list("hgfedcba")) == [(letter, 1) for letter in "abcdefgh"] and candidate([]) == []
    assert candidate(["x", "y", "z", "z", "y", "z"]) == [("z", 3), ("y", 2), ("x", 1)]


def order_total(prices: dict, order: dict) -> float:
    """What an order costs, ten percent less from 100 on; KeyError for what has no price."""
    total = sum(prices[name] * count for name, count in order.items())
    return round(total * 0.9, 2) if total >= 100 else round(total, 2)


def check_order_total(candidate):
    prices = {"pen": 1.25, "desk": 100}
    assert candidate(prices, {"pen": 4}) == 5.0
    assert candidate(prices, {"desk": 1}) == 90.0 and candidate(prices, {"pen": 1, "desk": 1}) == 91.12
    assert candidate({"a": 0.123}, {"a": 1}) == 0.12 and candidate({"a": 99.99}, {"a": 1}) == 99.99
    try:
        candidate(prices, {"lamp": 1})
        raise AssertionError("a lamp has no price")
    except KeyError:
        pass


def quotient(a: float, b: float) -> float:
    """a over b; ValueError if b is 0."""
    if b == 0:
        raise ValueError("b is 0")
    return a / b


def check_quotient(candidate):
    assert candidate(1, 4) == 0.25 and candidate(-6, 3) == -2
    caught = False
    try:
        candidate(1, 0)
    except ValueError as error:
        caught = str(error) == "b is 0"
    assert caught


def at_path(record: dict, path: str, default=None):
    """The value at a path such as "a.b.0" through mappings and lists, else the default."""
    here = record
    for part in path.split("."):
        if isinstance(here, list) and part.isdigit() and int(part) < len(here):
            here = here[int(part)]
        elif isinstance(here, dict) and part in here:
            here = here[part]
        else:
            return default
    return here


def check_at_path(candidate):
    record = {"a": {"b": [10, 20]}, "c": None}
    assert candidate(record, "a.b.1") == 20 and candidate(record, "a.b.0") == 10
    assert candidate(record, "a.b.2") is None and candidate(record, "a.x", 5) == 5
    assert candidate(record, "c", 1) is None and candidate(record, "a.b.x", "no") == "no"
    assert candidate(record, "c.d", 0) == 0


def histogram(values: list, edges: list) -> list:
    """How many values lie in each bin from one edge up to, not including, the next."""
    counts = [0] * (len(edges) - 1)
    for value in values:
        for index in range(len(counts)):
            if edges[index] <= value < edges[index + 1]:
                counts[index] += 1
    return counts


def check_histogram(candidate):
    assert candidate([1, 2, 2.5, 4], [0, 2, 4]) == [1, 2]
    assert candidate([], [0, 1]) == [0] and candidate([0, 1, 5, -1], [0, 1, 2, 3]) == [1, 1, 0]


def build_order(needs: dict) -> list:
    """Names so that each comes behind what it needs, the first by name where several can; [] if there is a cycle."""
    order = []
    for _ in needs:
        ready = sorted(name for name in needs if name not in order and all(n in order for n in needs[name]))
        if not ready:
            return []
        order.append(ready[0])
    return order


def check_build_order(candidate):
    assert candidate({"app": ["lib", "log"], "lib": [], "log": ["lib"]}) == ["lib", "log", "app"]
    assert candidate({"a": ["b"], "b": ["a"]}) == [] and candidate({}) == []
    assert candidate({"z": [], "y": [], "x": ["z"]}) == ["y", "z", "x"]


def distance(graph: dict, start: str, goal: str) -> int:
    """The fewest edges from start to goal, -1 if there is no way."""
    queue, seen = deque([(start, 0)]), {start}
    while queue:
        node, steps = queue.popleft()
        if node == goal:
            return steps
        for neighbour in graph.get(node, []):
            if neighbour not in seen:
                seen.add(neighbour)
                queue.append((neighbour, steps + 1))
    return -1


def check_distance(candidate):
    graph = {"a": ["b", "c"], "b": ["d"], "c": ["d"], "d": ["a", "e"]}
    assert candidate(graph, "a", "e") == 3 and candidate(graph, "a", "a") == 0
    assert candidate(graph, "e", "a") == -1 and candidate(graph, "a", "c") == 1
    assert candidate({"a": ["b"], "b": ["c"], "c": ["b"]}, "a", "z") == -1


def ways(grid: list) -> int:
    """How many ways lead from the upper left to the lower right, going right or down, not through "#"."""
    counts = [0] * len(grid[0])
    counts[0] = 1
    for row in grid:
        for x, cell in enumerate(row):
            if cell == "#":
                counts[x] = 0
            elif x > 0:
                counts[x] += counts[x - 1]
    return counts[-1]


def check_ways(candidate):
    assert candidate(["...", "...", "..."]) == 6
    assert candidate(["..", "#."]) == 1 and candidate(["#."]) == 0 and candidate(["."]) == 1
    assert candidate(["...", ".#.", "..."]) == 2


def best_value(weights: list, values: list, room: int) -> int:
    """The largest sum of values of things that fit into the room together, each taken at most once."""
    best = [0] * (room + 1)
    for weight, value in zip(weights, values):
        for space in range(room, weight - 1, -1):
            best[space] = max(best[space], best[space - weight] + value)
    return best[room]


def check_best_value(candidate):
    from itertools import product

    weights, values = [3, 4, 5, 2], [4, 5, 6, 3]
    choices = [
        (
            weights[0] * a + weights[1] * b + weights[2] * c + weights[3] * d,
            values[0] * a + values[1] * b + values[2] * c + values[3] * d,
        )
        for a, b, c, d in product([0, 1], repeat=4)
    ]
    for room in range(16):
        assert candidate(weights, values, room) == max(value for weight, value in choices if weight <= room)


def edits(a: str, b: str) -> int:
    """The fewest letters to insert, delete or replace that make b of a."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a):
        last = row
        row = [i + 1]
        for j, y in enumerate(b):
            row.append(min(last[j] + (x != y), last[j + 1] + 1, row[j] + 1))
    return row[-1]


def check_edits(candidate):
    def slow(a, b):
        if not a or not b:
            return len(a) + len(b)
        return min(slow(a[1:], b[1:]) + (a[0] != b[0]), slow(a[1:], b) + 1, slow(a, b[1:]) + 1)

    assert candidate("kitten", "sitting") == 3
    assert candidate("", "abc") == 3 and candidate("abc", "") == 3 and candidate("same", "same") == 0
    for a in ("", "a", "ab", "ba", "abc", "cab", "aabb", "abcd", "bcde"):
        for b in ("b", "ab", "acb", "bca", "abab", "xbcd", "edcba"):
            assert candidate(a, b) == slow(a, b)


def winner(board: list) -> str:
    """The letter that fills a row, a column or a diagonal of a board of three by three; "" if none does."""
    lines = [list(row) for row in board]
    lines += [[row[x] for row in board] for x in range(3)]
    lines += [[board[i][i] for i in range(3)], [board[i][2 - i] for i in range(3)]]
    for line in lines:
        if line[0] != "." and line == [line[0]] * 3:
            return line[0]
    return ""


def check_winner(candidate):
    assert candidate(["xxx", "oo.", "..."]) == "x" and candidate(["xo.", "xo.", ".ox"]) == "o"
    assert candidate(["x.o", ".xo", "..x"]) == "x" and candidate(["x.o", ".o.", "o.x"]) == "o"
    assert candidate(["...", "...", "..."]) == "" and candidate(["xox", "oxo", "oxo"]) == ""
    assert candidate(["..x", "..x", "..x"]) == "x" and candidate(["oo.", "xx.", "..o"]) == ""


def fewest_coins(amount: int, coins: list) -> int:
    """The fewest coins that make the amount, -1 if none do."""
    fewest = [0] + [amount + 1] * amount
    for part in range(1, amount + 1):
        for coin in coins:
            if coin <= part:
                fewest[part] = min(fewest[part], fewest[part - coin] + 1)
    return fewest[amount] if fewest[amount] <= amount else -1


def check_fewest_coins(candidate):
    assert candidate(11, [1, 2, 5]) == 3 and candidate(6, [1, 3, 4]) == 2
    assert candidate(3, [2]) == -1 and candidate(0, [5]) == 0 and candidate(5, [5]) == 1 and candidate(4, [1]) == 4
