"""Weights & Biases as an optional sink: it never asks, never blocks, and never stops a run.

One daemon thread makes every wandb call (start, log, finish), fed by a bounded queue; the training loop only puts
into the queue. Whatever goes wrong turns the sink off with one line to the console.
"""

from __future__ import annotations

import netrc
import os
import queue
import secrets
import string
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from rlbench.tracking.plain_json import to_plain

MODES = ("auto", "online", "offline", "disabled")
DEFAULT_HOSTS = ("api.wandb.ai", "api.forge.coreweave.com")  # old and new address of the same public service
IMPORT_DEADLINE_S = 60.0  # reading the package from a slow disk is not a hanging server
QUEUE_SIZE = 10_000  # steps


class WandbTracker:
    """Sends metrics to wandb, or to files that `wandb sync` uploads later.

    Args:
        mode: "auto" is online if an API key is set (WANDB_API_KEY, or netrc for the server), else offline; the
            variable WANDB_MODE (online, offline, disabled) decides before that. "online" without a key writes
            offline and says so, because asking for the key would block the run.
        project: wandb project.
        run_name: name shown by wandb.
        folder: the run's folder; files go to `<folder>/wandb`.
        config: the run's config, as plain values.
        run_id: id of the run to go on with; None makes a new one.
        tags: wandb tags.
        warn: receives one line when the sink is turned off.
        init_deadline_s: how long the run waits for `wandb.init`, in seconds.

    Attributes:
        mode: what was chosen: "online", "offline" or "disabled".
        run_id: pass it again to resume; None if disabled from the start.

    Raises:
        ValueError: for an unknown mode.
    """

    def __init__(
        self,
        mode: str,
        project: str,
        run_name: str,
        folder: str | Path,
        config: Mapping[str, Any],
        run_id: str | None = None,
        tags: Sequence[str] = (),
        *,
        warn: Callable[[str], None] = print,
        init_deadline_s: float = 10.0,
    ) -> None:
        self._warn = warn
        self._api_key = find_api_key()
        self.mode = choose_mode(mode, self._api_key is not None, warn)
        self.is_on = self.mode != "disabled"
        self.run_id = run_id or (_new_run_id() if self.is_on else None)
        self._queue: queue.Queue[dict[str, Any] | None] = queue.Queue(maxsize=QUEUE_SIZE)
        self._imported, self._started, self._finished = threading.Event(), threading.Event(), threading.Event()
        self._failure: str | None = None
        self._init_deadline_s = init_deadline_s
        if self.is_on:
            options = self._init_options(project, run_name, Path(folder), config, tags)
            threading.Thread(target=self._work, args=(options,), name="wandb", daemon=True).start()
            self._wait_for_start()

    def log(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Queue one step's metrics; returns at once. `step` is their x axis."""
        self._report_failure()
        if not self.is_on:
            return
        try:
            self._queue.put_nowait({"step": step, **metrics})
        except queue.Full:
            self._turn_off(f"wandb has not taken {QUEUE_SIZE} steps")

    def finish(self, deadline_s: float = 30.0) -> None:
        """Let wandb write or upload what is queued, for at most `deadline_s` seconds; a second call does nothing."""
        self._report_failure()
        if not self.is_on:
            return
        try:
            self._queue.put_nowait(None)
            done = self._finished.wait(deadline_s)
        except queue.Full:
            done = False
        if not done:
            self._turn_off(f"wandb did not finish within {deadline_s:g} s; `wandb sync` uploads what it stored")
        self._report_failure()
        self.is_on = False

    def _init_options(
        self, project: str, run_name: str, folder: Path, config: Mapping[str, Any], tags: Sequence[str]
    ) -> dict[str, Any]:
        online = self.mode == "online"
        return {
            "mode": self.mode,
            "project": project,
            "name": run_name,
            "dir": str(folder),
            "config": to_plain(config),
            "id": self.run_id,
            "tags": list(tags),
            "resume": "allow" if online else None,
        }

    def _wait_for_start(self) -> None:
        self._imported.wait(IMPORT_DEADLINE_S)
        if not self._started.wait(self._init_deadline_s):
            self._turn_off(f"wandb did not start within {self._init_deadline_s:g} s")
        self._report_failure()

    def _work(self, options: dict[str, Any]) -> None:
        """The thread: start, log until told to finish, finish."""
        run = None
        try:
            run = self._start(options)
            self._started.set()
            while self.is_on and (metrics := self._queue.get()) is not None:
                run.log(metrics)
            run.finish()
        except BaseException as error:  # wandb raises many kinds, SystemExit among them; none may stop the run
            self._failure = f"{type(error).__name__}: {_first_line(error)}"
        finally:
            for event in (self._imported, self._started, self._finished):
                event.set()

    def _start(self, options: dict[str, Any]) -> Any:
        os.makedirs(options["dir"], exist_ok=True)
        import wandb

        self._imported.set()
        # Below the deadline of the waiting thread: wandb then withdraws its request, and leaving Python does not
        # hang on it (seen with wandb 0.31: 80 s in its exit hook without this).
        server_timeout_s = max(0.5, 0.8 * self._init_deadline_s)
        quiet = wandb.Settings(silent=True, console="off")
        wandb.setup(settings=quiet)
        settings = wandb.Settings(
            silent=True,
            console="off",  # stdout stays ours
            init_timeout=server_timeout_s,
            finish_timeout=20.0,  # also bounds wandb's own exit hook
            login_timeout=1.0,
            api_key=self._api_key if self.mode == "online" else None,  # given, it is neither asked for nor stored
        )
        run = wandb.init(settings=settings, **options)
        run.define_metric("step")
        run.define_metric("*", step_metric="step")
        return run

    def _report_failure(self) -> None:
        if self._failure is not None and self.is_on:
            self._turn_off(self._failure)

    def _turn_off(self, reason: str) -> None:
        self.is_on = False
        self._warn(f"wandb is off for the rest of this run ({reason}); metrics.jsonl goes on")


def find_api_key(environment: Mapping[str, str] | None = None) -> str | None:
    """The wandb API key from WANDB_API_KEY, else from netrc (NETRC, ~/.netrc, ~/_netrc) for the server's host.

    Without WANDB_BASE_URL both addresses of the public service are tried. A netrc file that cannot be read counts
    as none.
    """
    env = os.environ if environment is None else environment
    if key := env.get("WANDB_API_KEY", "").strip():
        return key
    base_url = env.get("WANDB_BASE_URL", "")
    hosts = (urlsplit(base_url).netloc,) if base_url else DEFAULT_HOSTS
    for path in [env["NETRC"]] if env.get("NETRC") else ["~/.netrc", "~/_netrc"]:
        try:
            logins = netrc.netrc(os.path.expanduser(path))
        except (OSError, netrc.NetrcParseError, UnicodeDecodeError):
            continue
        for host in hosts:
            if (login := logins.hosts.get(host)) and login[2]:
                return login[2]
    return None


def choose_mode(mode: str, has_key: bool, warn: Callable[[str], None]) -> str:
    if mode not in MODES:
        raise ValueError(f"tracking.wandb mode must be one of {list(MODES)}, got {mode!r}")
    from_environment = os.environ.get("WANDB_MODE", "")
    if mode == "auto" and from_environment in MODES[1:]:
        mode = from_environment
    if mode == "auto":
        return "online" if has_key else "offline"
    if mode == "online" and not has_key:
        warn("wandb: online was asked for but no API key is set (WANDB_API_KEY or netrc); writing offline files")
        return "offline"
    return mode


def _new_run_id() -> str:
    return "".join(secrets.choice(string.ascii_lowercase + string.digits) for _ in range(8))


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or ["no message"])[0][:200]
