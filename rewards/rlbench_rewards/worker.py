"""The worker process: reads calls, answers outcomes. Started as `python -m rlbench_rewards.worker`.

Frames are JSON behind a 4-byte big-endian length, on stdin and on the descriptor that stdout was. The first frame
holds the specs; then one call a frame. End of input ends the worker, so it never outlives its parent.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import struct
import sys
from collections.abc import Mapping
from typing import Any, BinaryIO

from rlbench_rewards.contract import ERROR, SKIPPED, VALUE, RewardError, RewardSample, checked_value
from rlbench_rewards.loading import LoadedReward, load_reward

MAX_FRAME_BYTES = 64 * 2**20
_MAX_MESSAGE = 2000
_PR_SET_PDEATHSIG = 1


def read_frame(stream: BinaryIO) -> Any:
    """The next JSON value, or None at the end of input."""
    header = stream.read(4)
    if len(header) < 4:
        return None
    body = stream.read(struct.unpack(">I", header)[0])
    return json.loads(body)


def encode_frame(value: Any) -> bytes:
    body = json.dumps(value, default=str).encode("utf-8", "surrogatepass")
    return struct.pack(">I", len(body)) + body


def main() -> None:
    _die_with_parent()
    replies = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # a reward that prints must not write into the frames
    calls = os.fdopen(os.dup(0), "rb")
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    setup = read_frame(calls)
    sys.path[:] = setup["sys_path"]
    _limit_memory(setup["memory_limit_bytes"])
    rewards: dict[str, LoadedReward] = {}
    try:
        for spec in setup["specs"]:
            rewards[spec["name"]] = _load(spec, setup)
        notes = {name: str(note) for name, reward in rewards.items() if (note := getattr(reward.target, "note", ""))}
        answer: dict[str, Any] = {"status": VALUE, "notes": notes}
    except Exception as error:
        text = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
        answer = {"status": ERROR, "message": text}
    _reply(replies, answer)
    while (call := read_frame(calls)) is not None:
        _reply(replies, {"outputs": run_call(rewards[call["name"]], call["samples"])})


def _load(spec: Mapping[str, Any], setup: Mapping[str, Any]) -> LoadedReward:
    return load_reward(
        spec["name"],
        spec["path"],
        spec["kwargs"],
        setup["allowed_prefixes"],
        columns=setup["columns"],
        as_messages=spec.get("as_messages", False),
    )


def run_call(reward: LoadedReward, samples: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One {"status", "value", "message", "details"} a sample; an exception is the error of them all."""
    try:
        outputs = reward.score([RewardSample(**sample) for sample in samples])
        if not isinstance(outputs, list) or len(outputs) != len(samples):
            got = len(outputs) if isinstance(outputs, list) else type(outputs).__name__
            raise RewardError(f"the reward returned {got} outputs for {len(samples)} samples, expected a list as long")
    except Exception as error:  # whatever a reward raises is an outcome, not the end of the worker
        return [_error(error)] * len(samples)
    return [_as_reply(output) for output in outputs]


def _as_reply(output: Any) -> dict[str, Any]:
    try:
        checked = checked_value(output)
        details = json.loads(json.dumps(dict(checked.details), default=str))
    except Exception as error:
        return _error(error)
    if checked.value is None:
        return {"status": SKIPPED, "details": details}
    return {"status": VALUE, "value": float(checked.value), "details": details}


def _error(error: Exception) -> dict[str, Any]:
    return {"status": ERROR, "message": f"{type(error).__name__}: {error}"[:_MAX_MESSAGE]}


def _reply(replies: BinaryIO, value: dict[str, Any]) -> None:
    replies.write(encode_frame(value))
    replies.flush()


def _die_with_parent() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the trainer, which ends us
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _limit_memory(limit_bytes: int) -> None:
    try:
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (limit_bytes, limit_bytes))
        os.nice(5)
    except (ImportError, ValueError, OSError):
        return  # not to be had on this platform; the deadline still holds


if __name__ == "__main__":
    main()
