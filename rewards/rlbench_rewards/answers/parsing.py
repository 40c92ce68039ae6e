"""The grammar of answers: LaTeX and plain text to a tree with sympy expressions. Nothing is ever evaluated as code.

answer   := clauses separated by ; , and, or        (inside a bracket: its items)
clause   := side (relation side)*                   (with \\pm: both readings)
side     := part (\\cup part)* | ratio a : b : c
part     := a structure, a matrix, or an expression (`expressions.py`)
"""

from __future__ import annotations

from rlbench_rewards.answers.bounds import AnswerTooBig, check_items, check_text
from rlbench_rewards.answers.expressions import ExpressionParser, Factor
from rlbench_rewards.answers.text import clean, text_key
from rlbench_rewards.answers.tokens import NUMBER, SIGN, WORD, NotMath, Token, tokenise
from rlbench_rewards.answers.tree import LIST, SET, Matrix, Node, Ratio, Relation, Sequence_, Text, UnionOf, Value
from rlbench_rewards.answers.units import drop_unit

_RELATIONS = ("=", "<", ">", "<=", ">=", "!=", "in", "~")
_SEPARATORS = ("and", "or", ",and", ",or", "and/or")
_OPENING, _CLOSING = ("(", "[", "\\{", "{", "begin"), (")", "]", "\\}", "}", "end")


def parse_answer(text: str) -> Node:
    """The tree of a whole answer.

    Raises:
        AnswerTooBig: over a bound of `bounds.py`.
        NotMath: the grammar does not know it; nothing of the text is left over in a tree.
    """
    check_text(text)
    cleaned = clean(text)
    if not cleaned:
        raise NotMath("an empty answer")
    try:
        return _Parser().items(tokenise(cleaned))
    except NotMath:
        if all(char.isalpha() or char in " -'.,()" for char in _without_text_commands(cleaned)):
            return Text(text_key(cleaned))
        raise


def _without_text_commands(text: str) -> str:
    import re

    return re.sub(r"\\(?:text|textbf|textit|textrm|textnormal|mbox|mathrm|mathbf)\s*\{([^{}]*)\}", r"\1", text)


class _Parser:
    """Splits token lists at one bracket level after the other; the leaves are expressions."""

    def items(self, tokens: list[Token]) -> Node:
        """A bare list, or the single clause."""
        clauses = [self.clause(part) for part in _split_items(tokens)]
        flat: list[Node] = []
        for clause in clauses:
            flat += clause if isinstance(clause, list) else [clause]
        check_items(len(flat))
        if len(flat) == 1:
            return flat[0]
        return Sequence_(LIST, tuple(flat))

    def clause(self, tokens: list[Token]) -> Node | list[Node]:
        """One clause; two if it holds a plus-minus sign; several if it holds items separated one level deeper."""
        if any(token.text in ("pm", "mp") and token.kind == SIGN for token in tokens):
            return [self.clause_of_one_sign(tokens, sign) for sign in ("+", "-")]
        return self.relation(tokens)

    def clause_of_one_sign(self, tokens: list[Token], sign: str) -> Node:
        other = "-" if sign == "+" else "+"
        signs = {"pm": sign, "mp": other}
        return self.relation([Token(SIGN, signs[t.text]) if t.kind == SIGN and t.text in signs else t for t in tokens])

    def relation(self, tokens: list[Token]) -> Node:
        if not tokens:
            raise NotMath("an empty item")
        if any(t.kind == SIGN and t.text in (";", ",") for t in _top_level(tokens)):
            return self.items(tokens)
        parts, operators = _split(tokens, _RELATIONS)
        if "~" in operators:  # what is behind "approximately" only restates
            if operators == ["~"] and len(parts[0]) == 1 and parts[0][0].kind != NUMBER:
                return Relation(("=",), (self.side(parts[0]), self.side(parts[1])))
            cut = operators.index("~")
            parts, operators = parts[: cut + 1], operators[:cut]
        if "in" in operators:
            if operators != ["in"]:
                raise NotMath("a chain with \\in")
            return self.side(parts[1])
        sides = tuple(self.side(part) for part in parts)
        return Relation(tuple(operators), sides) if operators else sides[0]

    def side(self, tokens: list[Token]) -> Node:
        parts, operators = _split(tokens, ("cup",))
        if operators:
            return UnionOf(tuple(self.side(part) for part in parts))
        parts, operators = _split(tokens, (":",))
        if operators:
            return Ratio(tuple(self.side(part) for part in parts))
        return self.part(tokens)

    def part(self, tokens: list[Token]) -> Node:
        if not tokens:
            raise NotMath("an operand is missing")
        if tokens[0].kind == SIGN and tokens[0].text in _OPENING and _closing(tokens, 0) == len(tokens) - 1:
            node = self.bracketed(tokens)
            if node is not None:
                return node
        if all(token.kind == WORD for token in tokens):
            return Text(text_key(" ".join(token.text for token in tokens)))
        return self.expression(drop_unit(tokens))

    def bracketed(self, tokens: list[Token]) -> Node | None:
        """The structure in the brackets; None for brackets that only group an expression."""
        opening, closing, inner = tokens[0].text, tokens[-1].text, tokens[1:-1]
        if opening == "begin":
            return Matrix(self.matrix(inner))
        if opening == "{":
            return self.items(inner) if inner else None
        if opening == "\\{":
            return Sequence_(SET, _items_of(self.items(inner))) if inner else Sequence_(SET, ())
        if not inner:
            raise NotMath("empty brackets")
        node = self.items(inner)
        is_many = isinstance(node, Sequence_) and node.brackets == LIST
        if is_many:
            return Sequence_(opening + closing, _items_of(node))
        if opening == "[" and closing == "]":
            return Sequence_("[]", (node,)) if isinstance(node, Sequence_) else node
        return node if opening + closing == "()" else None

    def expression(self, tokens: list[Token]) -> Node:
        parser = ExpressionParser(tokens, lambda inner: tuple(tuple(v.expr for v in r) for r in self.matrix(inner)))
        factor: Factor = parser.whole()
        if factor.rows is not None:
            return Matrix(tuple(tuple(Value(entry) for entry in row) for row in factor.rows))
        return Value(factor.expr, decimals=factor.decimals, is_percent=factor.is_percent)

    def matrix(self, tokens: list[Token]) -> tuple[tuple[Value, ...], ...]:
        """Rows of a matrix from the tokens between `\\begin` and `\\end`."""
        rows = [_split(row, ("&",))[0] for row in _split(tokens, ("\\\\",))[0] if row]
        values = tuple(tuple(self._entry(cell) for cell in row) for row in rows)
        if not values or len({len(row) for row in values}) != 1:
            raise NotMath("a matrix with rows of different lengths")
        check_items(len(values) * len(values[0]))
        return values

    def _entry(self, tokens: list[Token]) -> Value:
        node = self.part(tokens)
        if not isinstance(node, Value):
            raise NotMath("a matrix entry that is no expression")
        return node


def _items_of(node: Node) -> tuple[Node, ...]:
    return node.items if isinstance(node, Sequence_) and node.brackets == LIST else (node,)


def _closing(tokens: list[Token], opening: int) -> int:
    """Index of the bracket that closes the one at `opening`; (a, b] and [a, b) close each other.

    Raises:
        NotMath: there is none.
    """
    depth = 0
    for index in range(opening, len(tokens)):
        if tokens[index].kind == SIGN:
            depth += (tokens[index].text in _OPENING) - (tokens[index].text in _CLOSING)
            if depth == 0:
                return index
    raise NotMath("a bracket that is not closed")


def _top_level(tokens: list[Token]) -> list[Token]:
    """Tokens outside of all brackets.

    Raises:
        NotMath: a bracket is not closed or not opened.
    """
    outside, index = [], 0
    while index < len(tokens):
        token = tokens[index]
        if token.kind == SIGN and token.text in _OPENING:
            index = _closing(tokens, index) + 1
            continue
        if token.kind == SIGN and token.text in _CLOSING:
            raise NotMath("a bracket that is not opened")
        outside.append(token)
        index += 1
    return outside


def _split(
    tokens: list[Token], signs: tuple[str, ...], words: tuple[str, ...] = ()
) -> tuple[list[list[Token]], list[str]]:
    """Parts between the signs (or words) outside of brackets, and the signs found."""
    parts: list[list[Token]] = [[]]
    found: list[str] = []
    index = 0
    while index < len(tokens):
        token = tokens[index]
        if token.kind == SIGN and token.text in _OPENING:
            end = _closing(tokens, index)
            parts[-1] += tokens[index : end + 1]
            index = end + 1
            continue
        if token.kind == SIGN and token.text in _CLOSING:
            raise NotMath("a bracket that is not opened")
        is_sign = token.kind == SIGN and token.text in signs
        is_word = token.kind == WORD and "".join(token.text.split()).casefold() in words
        if is_sign or is_word:
            found.append(token.text)
            parts.append([])
        else:
            parts[-1].append(token)
        index += 1
    return parts, found


def _split_items(tokens: list[Token]) -> list[list[Token]]:
    """Items: at semicolons if there are any (commas then separate one level deeper), else at commas, `and`, `or`."""
    by_semicolon, found = _split(tokens, (";",))
    parts = by_semicolon if found else _split(tokens, (",",), _SEPARATORS)[0]
    if found and all(not _split(part, (",",))[1] for part in parts):
        parts = [piece for part in parts for piece in _split(part, (), _SEPARATORS)[0]]
    parts = [part for index, part in enumerate(parts) if part or index == 0]  # "19, 46, and 82"
    if not parts or not parts[0]:
        raise NotMath("an empty item")
    return parts


__all__ = ["AnswerTooBig", "NotMath", "parse_answer"]
