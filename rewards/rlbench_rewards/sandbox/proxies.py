"""What the tests see of the candidate: proxies whose calls cross to the other process and bring builtins back."""

from __future__ import annotations

import _socket
import builtins

from rlbench_rewards.sandbox.codec import CodecError, Reference, UnsupportedType, decode, encode
from rlbench_rewards.sandbox.frames import ChannelClosed, receive_frame, send_frame

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

_NEVER_RAISED = (StopIteration, StopAsyncIteration)  # in `all(map(f, xs))` they would end the loop and pass the test


class CandidateError(Exception):
    """The candidate raised something that has no builtin name, or answered outside of the protocol."""


class Candidate:
    """The tester's end of the channel."""

    def __init__(self, channel: _socket.socket) -> None:
        self._channel = channel
        self._num_requests = 0
        self.names: dict[str, bool] = {}  # the code's top-level names; True for what can be called
        self.unsupported = ""  # an argument of a test that cannot cross: a fault of the row, not of the candidate

    def wait_until_loaded(self) -> str:
        """ "" once the code is loaded, else why it is not."""
        try:
            first = decode(receive_frame(self._channel))
        except ChannelClosed:
            return "the program ended while it was loaded"
        except CodecError:
            return "the program wrote into its channel"
        if type(first) is dict and type(first.get("loaded")) is dict:
            self.names = {name: bool(value) for name, value in first["loaded"].items() if type(name) is str}
            return ""
        return _text_of_raised(first)

    def request(self, op: str, on: Reference | None, name: str, args: tuple = (), kwargs: dict | None = None) -> Any:
        """The value of one operation, or the exception that the candidate raised."""
        self._num_requests += 1
        number = self._num_requests
        message = {"number": number, "op": op, "on": on, "name": name, "args": args, "kwargs": kwargs or {}}
        try:
            send_frame(self._channel, encode(message, _reference_of))
            reply = decode(receive_frame(self._channel), lambda reference: Proxy(self, reference))
        except UnsupportedType as error:
            self.unsupported = f"a test passes {error}"
            raise
        except ChannelClosed:
            raise CandidateError("the program ended") from None
        if type(reply) is not dict or reply.get("number") != number:
            raise CandidateError("the program wrote into its channel")
        if "raised" in reply:
            raise _exception_of(reply["raised"])
        return reply.get("value")

    def name(self, name: str) -> NamedProxy:
        return NamedProxy(self, name)


def _refuse(self, *_: object):
    raise TypeError("an object of the candidate has no comparison, truth or hash of its own here")


class Proxy:
    """An object that stayed with the candidate. It equals nothing: every comparison raises."""

    __slots__ = ("_candidate", "_reference")

    def __init__(self, candidate: Candidate, reference: Reference | None) -> None:
        self._candidate = candidate
        self._reference = reference

    def __call__(self, *args, **kwargs):
        return self._candidate.request("call", self._reference, "", args, kwargs)

    def __getattr__(self, name: str):
        if name.startswith("__"):
            raise AttributeError(name)
        return self._candidate.request("get", self._reference, name)

    def __str__(self) -> str:
        return self._candidate.request("str", self._reference, "")

    def __repr__(self) -> str:
        return self._candidate.request("repr", self._reference, "")

    def __len__(self) -> int:
        return self._candidate.request("len", self._reference, "")

    def __iter__(self):
        return iter(self._candidate.request("iter", self._reference, ""))

    def __getitem__(self, key):
        return self._candidate.request("item", self._reference, "", (key,))

    def __contains__(self, item) -> bool:
        return self._candidate.request("contains", self._reference, "", (item,))

    __bool__ = __eq__ = __ne__ = __lt__ = __le__ = __gt__ = __ge__ = __hash__ = _refuse  # type: ignore[assignment]


class NamedProxy(Proxy):
    """A top-level function or class of the candidate."""

    __slots__ = ("_name",)

    def __init__(self, candidate: Candidate, name: str) -> None:
        super().__init__(candidate, None)
        self._name = name

    def __call__(self, *args, **kwargs):
        return self._candidate.request("call", None, self._name, args, kwargs)

    def __getattr__(self, name: str):
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self._candidate.request("get", None, self._name), name)


def _reference_of(value: object) -> Reference | None:
    if type(value) is Reference:
        return value
    if type(value) is Proxy:
        return value._reference
    if type(value) is NamedProxy:
        fetched = value._candidate.request("get", None, value._name)
        if type(fetched) is Proxy:
            return fetched._reference
        raise CandidateError(f"{value._name} is no longer a function or class")
    return None


def _exception_of(described: object) -> Exception:
    """The builtin exception of that name; of those only ones that a caller may catch, and none that ends a loop."""
    if type(described) is not list or len(described) != 2 or not all(type(part) is str for part in described):
        return CandidateError("the program wrote into its channel")
    name, text = described
    kind = getattr(builtins, name, None)
    if not isinstance(kind, type) or not issubclass(kind, Exception) or issubclass(kind, _NEVER_RAISED):
        return CandidateError(f"{name}: {text}")
    try:
        return kind(text)
    except TypeError:
        return CandidateError(f"{name}: {text}")


def _text_of_raised(first: object) -> str:
    if type(first) is dict and "raised" in first:
        error = _exception_of(first["raised"])
        return f"{type(error).__name__}: {error}" if not isinstance(error, CandidateError) else str(error)
    return "the program wrote into its channel"
