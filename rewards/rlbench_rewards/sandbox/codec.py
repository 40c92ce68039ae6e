"""The closed codec: what may cross between the processes of a grading job, and nothing else.

Exact builtin types (None, bool, int, float, complex, str, bytes, list, tuple, dict, set, frozenset, range), Decimal,
Fraction, iterators (drained), and references to objects that stay on the other side. A frame is its length (uint32)
and one value; a value is a tag byte and its payload. Decoding runs no code of the sender: no pickle, no eval.

An encoder takes the base value of a subclass (an `int` with its own `__eq__` crosses as a plain int), so equality is
always that of builtins. Bounds: MAX_DEPTH, MAX_NODES, MAX_FRAME_BYTES.
"""

from __future__ import annotations

import struct

TYPE_CHECKING = False  # importing typing costs the zygote's start 5 ms
if TYPE_CHECKING:
    from typing import Any

MAX_DEPTH = 150
MAX_NODES = 200_000
MAX_FRAME_BYTES = 4 * 2**20
_MAX_INT_BYTES = 2**16

_SCALARS = {b"N": None, b"T": True, b"F": False}
_SEQUENCES = {b"L": list, b"U": tuple, b"E": set, b"Z": frozenset, b"X": iter}
_TAG_OF = {list: b"L", tuple: b"U", set: b"E", frozenset: b"Z"}
_U32, _I64, _F64 = struct.Struct("<I"), struct.Struct("<q"), struct.Struct("<d")


class CodecError(Exception):
    """A value that cannot cross, or bytes that are none."""


class UnsupportedType(CodecError):
    """An object whose type has no place in the codec."""


class Reference:
    """An object of the other side, known by number."""

    __slots__ = ("number",)

    def __init__(self, number: int) -> None:
        self.number = number


def encode(value: object, to_reference: Any = None) -> bytes:
    """The bytes of `value`.

    Args:
        value: any object.
        to_reference: gives the Reference that stands for an object of another type, or None to refuse it.

    Raises:
        CodecError: too deep, too large, or a type that cannot cross.
    """
    parts: list[bytes] = []
    encoder = _Encoder(parts, to_reference)
    encoder.add(value, 0)
    data = b"".join(parts)
    if len(data) > MAX_FRAME_BYTES:
        raise CodecError(f"a value of {len(data)} bytes, at most {MAX_FRAME_BYTES} can cross")
    return data


def decode(data: bytes, from_reference: Any = None) -> Any:
    """The value of `data`, with `from_reference(Reference)` in the place of each reference.

    Raises:
        CodecError: anything but the bytes of exactly one value within the bounds.
    """
    try:
        decoder = _Decoder(data, from_reference)
        value = decoder.take(0)
    except (struct.error, ValueError, TypeError, ArithmeticError, MemoryError, RecursionError) as error:
        raise CodecError(f"not a value ({type(error).__name__})") from None
    if decoder.position != len(data):
        raise CodecError("bytes behind the value")
    return value


class _Encoder:
    def __init__(self, parts: list[bytes], to_reference: Any) -> None:
        self._parts = parts
        self._to_reference = to_reference
        self._num_nodes = 0
        self._num_bytes = 0

    def add(self, value: Any, depth: int) -> None:
        self._num_nodes += 1
        if depth > MAX_DEPTH or self._num_nodes > MAX_NODES:
            raise CodecError(f"deeper than {MAX_DEPTH} or more than {MAX_NODES} values")
        kind = type(value)
        if value is None:
            self._put(b"N")
        elif kind is bool:
            self._put(b"T" if value else b"F")
        elif isinstance(value, int):
            self._add_int(int.__index__(value))
        elif isinstance(value, float):
            self._put(b"D", _F64.pack(float.__float__(value)))
        elif isinstance(value, str):
            self._add_sized(b"S", str.encode(value, "utf-8", "surrogatepass"))
        elif isinstance(value, (bytes, bytearray)):
            self._add_sized(b"B", bytes(memoryview(value)))
        elif isinstance(value, dict):
            self._add_dict(value, depth)
        else:
            self._add_other(value, depth)

    def _add_other(self, value: Any, depth: int) -> None:
        for base, tag in _TAG_OF.items():
            if isinstance(value, base):
                return self._add_items(tag, list(base.__iter__(value)), depth)
        if type(value) is complex:
            return self._put(b"C", _F64.pack(value.real), _F64.pack(value.imag))
        if type(value) is range:
            return self._add_items(b"R", [value.start, value.stop, value.step], depth)
        module, name = type(value).__module__, type(value).__name__
        if module == "decimal" and name == "Decimal":
            return self._add_sized(b"Q", str(value).encode())
        if module == "fractions" and name == "Fraction":
            return self._add_items(b"V", [value.numerator, value.denominator], depth)
        if module == "numpy" and hasattr(value, "tolist"):
            return self.add(value.tolist(), depth + 1)
        if hasattr(type(value), "__next__") or name in ("dict_keys", "dict_values", "dict_items", "deque"):
            return self._add_items(b"X", self._drained(value), depth)
        reference = self._to_reference(value) if self._to_reference is not None else None
        if reference is None:
            raise UnsupportedType(f"an object of type {name} cannot cross")
        self._put(b"O", _U32.pack(reference.number))

    def _drained(self, iterator: Any) -> list[object]:
        items = []
        for item in iterator:
            items.append(item)
            if len(items) > MAX_NODES:
                raise CodecError(f"an iterator of more than {MAX_NODES} values")
        return items

    def _add_int(self, value: int) -> None:
        if -(2**63) <= value < 2**63:
            return self._put(b"i", _I64.pack(value))
        size = value.bit_length() // 8 + 1
        if size > _MAX_INT_BYTES:
            raise CodecError(f"an integer of {size} bytes, at most {_MAX_INT_BYTES} can cross")
        self._add_sized(b"I", value.to_bytes(size, "little", signed=True))

    def _add_dict(self, value: dict, depth: int) -> None:
        items = list(dict.items(value))
        self._check_count(2 * len(items))
        self._put(b"M", _U32.pack(len(items)))
        for key, item in items:
            self.add(key, depth + 1)
            self.add(item, depth + 1)

    def _add_items(self, tag: bytes, items: list, depth: int) -> None:
        self._check_count(len(items))
        self._put(tag, _U32.pack(len(items)))
        for item in items:
            self.add(item, depth + 1)

    def _check_count(self, count: int) -> None:
        """Refuse at once what would run into the bound later."""
        if self._num_nodes + count > MAX_NODES:
            raise CodecError(f"more than {MAX_NODES} values")

    def _add_sized(self, tag: bytes, data: bytes) -> None:
        self._put(tag, _U32.pack(len(data)), data)

    def _put(self, *parts: bytes) -> None:
        self._num_bytes += sum(map(len, parts))
        if self._num_bytes > MAX_FRAME_BYTES:
            raise CodecError(f"a value of more than {MAX_FRAME_BYTES} bytes")
        self._parts.extend(parts)


class _Decoder:
    def __init__(self, data: bytes, from_reference: Any) -> None:
        self._data = data
        self._from_reference = from_reference
        self._num_nodes = 0
        self.position = 0

    def take(self, depth: int) -> Any:
        self._num_nodes += 1
        if depth > MAX_DEPTH or self._num_nodes > MAX_NODES:
            raise CodecError(f"deeper than {MAX_DEPTH} or more than {MAX_NODES} values")
        tag = self._bytes(1)
        if tag == b"i":
            return _I64.unpack(self._bytes(8))[0]
        if tag in _SCALARS:
            return _SCALARS[tag]
        if tag == b"D":
            return _F64.unpack(self._bytes(8))[0]
        if tag == b"S":
            return self._sized().decode("utf-8", "surrogatepass")
        if tag in _SEQUENCES:
            return _SEQUENCES[tag](self._items(depth))
        if tag == b"M":
            return self._dict(depth)
        return self._rare(tag, depth)

    def _rare(self, tag: bytes, depth: int) -> Any:
        if tag == b"I":
            return int.from_bytes(self._sized(_MAX_INT_BYTES), "little", signed=True)
        if tag == b"B":
            return self._sized()
        if tag == b"C":
            return complex(_F64.unpack(self._bytes(8))[0], _F64.unpack(self._bytes(8))[0])
        if tag == b"R":
            return range(*self._items(depth))
        if tag == b"Q":
            from decimal import Decimal

            return Decimal(self._sized(_MAX_INT_BYTES).decode())
        if tag == b"V":
            from fractions import Fraction

            return Fraction(*self._items(depth))
        if tag == b"O" and self._from_reference is not None:
            return self._from_reference(Reference(self._count()))
        raise CodecError("an unknown tag")

    def _dict(self, depth: int) -> dict:
        result = {}
        for _ in range(self._count()):
            key = self.take(depth + 1)
            result[key] = self.take(depth + 1)
        return result

    def _items(self, depth: int) -> list:
        count = self._count()
        if count > len(self._data) - self.position:
            raise CodecError("a count beyond the data")
        return [self.take(depth + 1) for _ in range(count)]

    def _count(self) -> int:
        return _U32.unpack(self._bytes(4))[0]

    def _sized(self, limit: int = MAX_FRAME_BYTES) -> bytes:
        size = self._count()
        if size > limit:
            raise CodecError("longer than allowed")
        return self._bytes(size)

    def _bytes(self, size: int) -> bytes:
        part = self._data[self.position : self.position + size]
        if len(part) != size:
            raise CodecError("the data ends early")
        self.position += size
        return part
