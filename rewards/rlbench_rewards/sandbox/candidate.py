"""The process that holds the model-written code: it loads the code once, then answers one request at a time.

There is nothing here to steal: no test, no expected value, no verdict. Whatever the code does to this process, it can
only choose what it answers.

Requests: {"number", "op", "on", "name", "args", "kwargs"}; replies {"number", "value"} or {"number", "raised"}.
"""

from __future__ import annotations

import _socket
import os
import sys

from rlbench_rewards.sandbox.codec import CodecError, Reference, decode, encode
from rlbench_rewards.sandbox.frames import ChannelClosed, receive_frame, send_frame

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

_MODULE = "solution"
_MAX_REFERENCES = 10_000
_MAX_TEXT = 300


def serve(channel: _socket.socket, code: str) -> None:
    """Load `code`, say so, answer until the tester hangs up."""
    objects = _Objects()
    module = type(sys)(_MODULE)
    sys.modules[_MODULE] = module
    try:
        exec(compile(code, "solution.py", "exec", dont_inherit=True), module.__dict__)
        names = {name: callable(value) for name, value in list(vars(module).items()) if not name.startswith("__")}
        first: dict[str, object] = {"loaded": names}
    except BaseException as error:
        first = {"raised": _described(error)}
    try:
        send_frame(channel, encode(first))
        while True:
            send_frame(channel, _answer(decode(receive_frame(channel), objects.find), module, objects))
    except ChannelClosed:
        os._exit(0)


class _Objects:
    """Objects that only their number crosses for: instances of the code's classes, functions it returned."""

    def __init__(self) -> None:
        self._objects: list[object] = []

    def keep(self, value: object) -> Reference | None:
        if len(self._objects) >= _MAX_REFERENCES:
            return None
        self._objects.append(value)
        return Reference(len(self._objects) - 1)

    def find(self, reference: Reference) -> object:
        return self._objects[reference.number]


def _answer(request: dict, module, objects: _Objects) -> bytes:
    number = request["number"]
    try:
        return encode({"number": number, "value": _OPERATIONS[request["op"]](request, module)}, objects.keep)
    except BaseException as error:
        return encode({"number": number, "raised": _described(error)})


def _call(request: dict, module) -> object:
    return _target(request, module)(*request["args"], **request["kwargs"])


def _target(request: dict, module) -> Any:
    """A name of the module, or of LeetCode's `class Solution`; an object, or one of its attributes."""
    on, name = request["on"], request["name"]
    if on is not None:
        return getattr(on, name) if name else on
    if name in vars(module):
        return vars(module)[name]
    if "Solution" in vars(module):
        return getattr(vars(module)["Solution"](), name)
    raise NameError(f"name {name!r} is not defined")


def _described(error: BaseException) -> list[str]:
    """The name of the exception's builtin type, and its text."""
    kind = next((c.__name__ for c in type(error).__mro__ if c.__module__ == "builtins"), "Exception")
    try:
        arguments = error.args
        text = arguments[0] if len(arguments) == 1 and type(arguments[0]) is str else str(error)
    except BaseException:
        text = ""
    if isinstance(error, CodecError):
        kind = "CodecError"
    return [kind, text[:_MAX_TEXT]]


_OPERATIONS = {
    "call": _call,
    "get": _target,
    "str": lambda request, module: str(request["on"]),
    "repr": lambda request, module: repr(request["on"]),
    "len": lambda request, module: len(request["on"]),
    "iter": lambda request, module: list(request["on"]),
    "item": lambda request, module: request["on"][request["args"][0]],
    "contains": lambda request, module: request["args"][0] in request["on"],
}
