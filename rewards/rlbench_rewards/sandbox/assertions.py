"""Test code whose assertions are counted: a failed one counts even if it is swallowed, a skipped one is missed."""

from __future__ import annotations

import ast

OBSERVE = "__observe_assertion__"
_SOLUTION_MODULES = ("solution", "candidate")


class Assertions:
    """What became of the assert statements of one test."""

    def __init__(self, required: frozenset[int]) -> None:
        self._required = required  # those that every run to the end must come by
        self._seen: set[int] = set()
        self.num_failed = 0

    def observe(self, site: int, value: object) -> bool:
        self._seen.add(site)
        truth = True if value else False
        self.num_failed += not truth
        return truth

    @property
    def num_missed(self) -> int:
        return len(self._required - self._seen)


class TestCode:
    """Parsed test code: `code` is compiled, `free_names` are read but defined nowhere in it, and `module_names` are
    those of them that only occur as in `math.pi`.

    Raises:
        SyntaxError: it is no Python.
    """

    def __init__(self, text: str) -> None:
        tree = ast.parse(text)
        self.calls_check = any(_is_call_of(node, "check") for node in tree.body)
        self.free_names = _loaded_names(tree) - _stored_names(tree)
        self.module_names = self.free_names - _bare_names(tree)
        counter = _Counter()
        tree = ast.fix_missing_locations(counter.visit(tree))
        self.required = frozenset(counter.required)
        self.code = compile(tree, "tests.py", "exec", dont_inherit=True)


class _Counter(ast.NodeTransformer):
    """`assert t, m` becomes `if not observe(site, t): raise AssertionError(m)`; `from solution import f` goes."""

    def __init__(self) -> None:
        self.required: list[int] = []
        self._num_sites = 0
        self._num_conditions = 0  # around the present node

    def visit_Assert(self, node: ast.Assert) -> ast.stmt:
        site = self._num_sites
        self._num_sites += 1
        if not self._num_conditions and not isinstance(node.test, ast.Constant):
            self.required.append(site)
        observed = ast.Call(ast.Name(OBSERVE, ast.Load()), [ast.Constant(site), node.test], [])
        error = ast.Call(ast.Name("AssertionError", ast.Load()), [node.msg] if node.msg else [], [])
        body: list[ast.stmt] = [ast.Raise(error, None)]
        return ast.copy_location(ast.If(ast.UnaryOp(ast.Not(), observed), body, []), node)

    def visit_ImportFrom(self, node: ast.ImportFrom) -> ast.stmt:
        return ast.copy_location(ast.Pass(), node) if node.module in _SOLUTION_MODULES else node

    def _visit_conditional(self, node: ast.AST) -> ast.AST:
        self._num_conditions += 1
        node = self.generic_visit(node)
        self._num_conditions -= 1
        return node

    visit_If = visit_While = visit_Try = visit_TryStar = visit_Match = visit_ClassDef = _visit_conditional

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        """`check` and `test_...` are called by us; what other functions assert depends on who calls them."""
        if node.name == "check" or node.name.startswith("test"):
            return self.generic_visit(node)
        return self._visit_conditional(node)


def _is_call_of(node: ast.stmt, name: str) -> bool:
    return (
        isinstance(node, ast.Expr)
        and isinstance(node.value, ast.Call)
        and isinstance(node.value.func, ast.Name)
        and node.value.func.id == name
    )


def _loaded_names(tree: ast.AST) -> set[str]:
    return {n.id for n in ast.walk(tree) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Load)}


def _bare_names(tree: ast.AST) -> set[str]:
    """Names that occur otherwise than before a dot."""
    dotted = {id(n.value) for n in ast.walk(tree) if isinstance(n, ast.Attribute)}
    return {n.id for n in ast.walk(tree) if isinstance(n, ast.Name) and id(n) not in dotted}


def _stored_names(tree: ast.Module) -> set[str]:
    """Names that the code itself binds at its top level."""
    names: set[str] = set()
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef, ast.AsyncFunctionDef)):
            names.add(node.name)
        elif isinstance(node, ast.Import):
            names |= {(alias.asname or alias.name).split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module not in _SOLUTION_MODULES:
            names |= {alias.asname or alias.name for alias in node.names}
        else:
            names |= {n.id for n in ast.walk(node) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
    return names
