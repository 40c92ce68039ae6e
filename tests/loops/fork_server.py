"""Processes that begin with torch and transformers imported: a server imports them once, each process is a fork of it.

As `python -m rlbench` or `python -c`, but for the seconds of imports: an own process, with signals, environment,
folder, exit status and an interpreter's end. What a new interpreter does is `run_afresh`'s to prove (conftest.py).
"""

import atexit
import gc
import importlib
import json
import os
import random
import runpy
import signal
import socket
import struct
import sys

import numpy
import torch

STATUS = struct.Struct("i")  # on the status pipe: the process id, then the exit status or minus the signal's number
PRELOADED = (
    "hydra.main",
    "datasets",
    "peft",
    "pyarrow.parquet",
    "transformers.models.llama.modeling_llama",
    "transformers.models.auto.tokenization_auto",
    "transformers.integrations.sdpa_attention",
    "rlbench.commands.train",
    "rlbench.commands.stages",
    "rlbench.loops.rl",
)


def serve(connection: socket.socket) -> dict:
    """Fork a process for each request; returns, in such a process, what it is asked to run. Ends with the connection.

    A request is JSON (`program`: code, "" for `-m rlbench`; `arguments`; `folder`; `environment`) with three file
    descriptors: standard output, standard error, status pipe.
    """
    while True:
        message, descriptors, _, _ = socket.recv_fds(connection, 1 << 20, 3)
        reap()
        if not message:
            sys.exit()
        if os.fork() == 0:
            connection.close()
            return begin(json.loads(message), *descriptors)
        for descriptor in descriptors:
            os.close(descriptor)


def reap() -> None:
    try:
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    except ChildProcessError:
        pass


def begin(request: dict, output: int, errors: int, status: int) -> dict:
    """Become the process, in a session of its own; the one that forks it waits and tells how it ended."""
    process = os.fork()
    if process:
        os.close(output)
        os.close(errors)
        os.write(status, STATUS.pack(process))
        os.write(status, STATUS.pack(os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])))
        os._exit(0)
    os.close(status)
    os.setsid()
    os.chdir(request["folder"])
    for source, target in ((output, 1), (errors, 2)):
        os.dup2(source, target)
        os.close(source)
    os.environ.clear()
    os.environ.update(request["environment"])
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for seed in (random.seed, numpy.random.seed, torch.seed):  # no two interpreters draw the same
        seed()
    return request


def measure_once() -> None:
    """How fast the machine multiplies is measured here, in a process of its own, not by every run anew."""
    from rlbench.models import device

    reading, writing = os.pipe()
    if os.fork() == 0:
        os.write(writing, json.dumps(device._matmul_gflops("cpu")).encode())
        os._exit(0)
    os.wait()
    rates = json.loads(os.read(reading, 1 << 12))
    os.close(reading)
    os.close(writing)
    device._matmul_gflops = lambda _: dict(rates)


def main() -> None:
    for name in PRELOADED:
        importlib.import_module(name)
    measure_once()
    assert len(os.listdir("/proc/self/task")) == 1, "a fork has no thread but the one that forks"
    gc.collect()
    gc.freeze()
    atexit.register(gc.unfreeze)  # for what reports, at an interpreter's end, objects that are still there
    request = serve(socket.socket(fileno=int(sys.argv[1])))
    sys.path[0] = "" if request["program"] else request["folder"]
    sys.argv = ["-c", *request["arguments"]]
    if request["program"]:
        exec(request["program"], {"__name__": "__main__"})
    else:
        runpy.run_module("rlbench", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
