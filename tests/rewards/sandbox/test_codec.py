"""What crosses between the processes of a grading job, and what does not."""

import math
from collections import Counter, namedtuple
from decimal import Decimal
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlbench_rewards.sandbox.codec import MAX_DEPTH, MAX_NODES, CodecError, Reference, UnsupportedType, decode, encode

_KEYS = st.none() | st.booleans() | st.integers() | st.text() | st.binary()
_LEAVES = _KEYS | st.floats(allow_nan=False) | st.complex_numbers(allow_nan=False) | st.fractions()
_LEAVES |= st.decimals(allow_nan=False) | st.builds(range, st.integers(-9, 9), st.integers(-9, 9), st.integers(1, 3))
VALUES = st.recursive(
    _LEAVES,
    lambda inner: (
        st.lists(inner)
        | st.lists(inner).map(tuple)
        | st.dictionaries(_KEYS, inner)
        | st.sets(_KEYS)
        | st.frozensets(_KEYS)
    ),
)


def types_in(value) -> object:
    """The value with each leaf as its type and its text."""
    if isinstance(value, dict):
        return dict, {types_in(key): types_in(item) for key, item in value.items()}
    if isinstance(value, (set, frozenset)):
        return type(value), {types_in(item) for item in value}
    if isinstance(value, (list, tuple)):
        return type(value), [types_in(item) for item in value]
    return type(value), repr(value)


@settings(deadline=None)
@given(VALUES)
def test_a_value_comes_back_equal_and_of_the_same_types(value):
    back = decode(encode(value))

    assert back == value and types_in(back) == types_in(value)


@settings(deadline=None)
@given(st.binary(max_size=200) | VALUES.map(encode).flatmap(lambda d: st.integers(0, len(d)).map(lambda n: d[:n])))
def test_any_bytes_are_a_value_or_a_codec_error(data):
    try:
        decode(data)
    except CodecError:
        pass


def test_subclasses_cross_as_their_base_so_that_their_own_equality_stays_behind():
    class Liar(int):
        def __eq__(self, other):
            return True

        __hash__ = int.__hash__

    point = namedtuple("point", "x y")(1, 2)

    assert type(decode(encode(Liar(7)))) is int and decode(encode(Liar(7))) == 7 != 8
    assert decode(encode([True, Counter("aab"), point])) == [True, {"a": 2, "b": 1}, (1, 2)]


def test_special_numbers_cross():
    assert math.isnan(decode(encode(float("nan")))) and decode(encode(-math.inf)) == -math.inf
    assert math.copysign(1, decode(encode(-0.0))) == -1 and decode(encode(-(3**500))) == -(3**500)
    assert decode(encode(Fraction(1, 3))) == Fraction(1, 3) and str(decode(encode(Decimal("1.10")))) == "1.10"


def test_an_iterator_is_drained_and_stays_an_iterator():
    back = decode(encode(x * x for x in range(3)))

    assert back != [0, 1, 4] and list(back) == [0, 1, 4]


def test_other_objects_cross_as_references_or_not_at_all():
    thing = object()

    with pytest.raises(UnsupportedType, match="type object"):
        encode([thing])
    assert decode(encode([thing], lambda value: Reference(3)), lambda reference: reference.number) == [3]
    with pytest.raises(CodecError):
        decode(encode([thing], lambda value: Reference(3)))


def test_what_is_too_deep_large_or_cyclic_is_refused_on_both_sides():
    cyclic: list = []
    cyclic.append(cyclic)
    for value in (cyclic, [0] * (MAX_NODES + 1), b"x" * 2**23, 1 << 2**20, iter(int, 1)):
        with pytest.raises(CodecError):
            encode(value)
    for data in (b"L\x01\x00\x00\x00" * (MAX_DEPTH + 2) + b"N", b"L\xff\xff\xff\xff", b"I\xff\xff\xff\xff", b"NN", b""):
        with pytest.raises(CodecError):
            decode(data)
