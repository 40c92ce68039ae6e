"""What vLLM does to the process that hosts it, and how most of it is undone.

Importing and starting vLLM sets a dozen environment variables (LD_PRELOAD and TORCHINDUCTOR_COMPILE_THREADS among
them, which child processes would inherit), reseeds Python's, NumPy's and torch's random streams, lowers torch's thread
count and, on a CPU, replaces `torch.set_num_threads` by a function that only warns. All of that is put back.

What stays: a gloo process group of one process (until `close`); on a CPU also memory bound to the NUMA node of the
first allowed core, and no-ops for `torch.Event`, `torch.cuda.Event`, `torch.cuda.Stream`,
`torch.accelerator.synchronize` and `Tensor.pin_memory`, which matter to nobody without a GPU.
"""

from __future__ import annotations

import logging
import os
import random
import sys
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import numpy as np
import torch

# Needed while vLLM starts. Values that the user has set win, except for the first: without it vLLM starts a process.
_IN_PROCESS = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
_DEFAULTS = {
    "VLLM_LOGGING_LEVEL": "ERROR",  # its warnings are about servers: LD_PRELOAD, chat templates, tokenizers
    "VLLM_NO_USAGE_STATS": "1",  # it would report to its makers over the network
    "VLLM_USE_FLASHINFER_SAMPLER": "0",  # it draws without a sample's own seed
}


@contextmanager
def clean_start() -> Iterator[None]:
    """Import or start vLLM inside; environment, random streams and torch's threads are as before afterwards."""
    environment = dict(os.environ)
    num_threads, set_num_threads = torch.get_num_threads(), torch.set_num_threads
    is_quiet = "VLLM_LOGGING_LEVEL" not in environment
    os.environ.update({k: v for k, v in _DEFAULTS.items() if k not in environment} | _IN_PROCESS)
    try:
        with untouched_random_state(), _quiet() if is_quiet else nullcontext():
            yield
    finally:
        os.environ.clear()
        os.environ.update(environment)
        torch.set_num_threads = set_num_threads
        torch.set_num_threads(num_threads)


@contextmanager
def untouched_random_state() -> Iterator[None]:
    """Random streams of Python, NumPy and torch (CPU) go on afterwards as if nothing had been drawn inside.

    vLLM on a CPU draws from torch's global stream at every step, seeded requests or not.
    """
    python_state, numpy_state = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)


def graph_sizes(max_num_seqs: int) -> list[int]:
    """Tokens of a batch that gets a CUDA graph; others are padded to the next: above 64 by less than an eighth.

    The last is twice `max_num_seqs`: where sequences that end make room for waiting prompts, a batch holds both. vLLM's
    own list is three times as long, since it goes on to 512 in equal steps; each is captured at every start.
    """
    sizes, size = [1, 2, 4], 8
    while size < 2 * max_num_seqs:
        sizes.append(size)
        size += max(8, 2 ** (size.bit_length() - 4))
    return sorted({*(size for size in sizes if size < 2 * max_num_seqs), max_num_seqs, 2 * max_num_seqs})


@contextmanager
def _quiet() -> Iterator[None]:
    """vLLM logs errors only, from now on. What C++ code writes to stderr inside is shown if the start fails."""
    logging.getLogger("vllm").setLevel(logging.ERROR)
    sys.stderr.flush()
    with tempfile.TemporaryFile() as held, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        stderr = os.dup(2)
        os.dup2(held.fileno(), 2)
        try:
            yield
        except BaseException:
            held.seek(0)
            os.write(stderr, held.read())
            raise
        finally:
            sys.stderr.flush()
            os.dup2(stderr, 2)
            os.close(stderr)
            logging.getLogger("vllm").setLevel(logging.ERROR)
