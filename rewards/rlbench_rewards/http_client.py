"""JSON over HTTP for rewards: side by side, retried with a growing wait, cached, and within a budget of requests."""

from __future__ import annotations

import asyncio
import hashlib
import json
import sqlite3
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlbench_rewards.contract import RewardError

_RETRIED_STATUSES = (408, 409, 425, 429, 500, 502, 503, 504)
_MAX_WAIT_S = 30.0
_MAX_REPLY_BYTES = 4 * 2**20
_JSON = {"content-type": "application/json"}


@dataclass(frozen=True, slots=True, kw_only=True)
class HttpOptions:
    """How requests are made.

    Args:
        request_timeout_s: of one try.
        max_tries: of one request; a refused connection, a timeout, 429 and 5xx are tried again.
        first_wait_s: before the second try; doubled each time; a Retry-After of the server wins.
        max_concurrent: requests at the same time.
        max_requests: budget of requests in this process; behind it every call is an error, never a 0. null: none.
        cache_path: SQLite file that keeps replies over runs and processes; null: only within this process.
    """

    request_timeout_s: float = 20.0
    max_tries: int = 3
    first_wait_s: float = 0.5
    max_concurrent: int = 16
    max_requests: int | None = None
    cache_path: str | None = None

    def __post_init__(self) -> None:
        for name in ("request_timeout_s", "max_tries", "max_concurrent"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} is {getattr(self, name)}, expected more than 0")


class JsonClient:
    """Posts JSON to one address.

    Args:
        url: of the service.
        headers: sent with every request.
        options: see `HttpOptions`.

    Raises:
        ValueError: not an http(s) address, or httpx is not installed.
    """

    def __init__(self, url: str, headers: Mapping[str, str], options: HttpOptions) -> None:
        if not url.startswith(("http://", "https://")):
            raise ValueError(f"the address is {url!r}, expected http://... or https://...")
        try:
            import httpx
        except ImportError as error:
            raise ValueError("remote rewards need the package httpx; expected: pip install httpx") from error
        self._httpx = httpx
        self._url, self._headers, self._options = url, dict(headers), options
        self._cache = ReplyCache(options.cache_path)
        self.num_requests = 0

    async def post_all(self, bodies: Sequence[Any], read: Callable[[Any], Any]) -> list[Any]:
        """What `read` makes of each reply, in order; a RewardError in the place of a request that failed.

        A reply that `read` refuses with RewardError is asked for again like one that failed, and is not cached.
        """
        limit = asyncio.Semaphore(self._options.max_concurrent)
        async with self._httpx.AsyncClient(timeout=self._options.request_timeout_s, headers=self._headers) as client:

            async def one(body: Any) -> Any:
                async with limit:
                    return await self._post(client, body, read)

            unique = {json.dumps(body, sort_keys=True): body for body in bodies}
            found = await asyncio.gather(*(one(body) for body in unique.values()), return_exceptions=True)
        by_text = dict(zip(unique, found, strict=True))
        results = [by_text[json.dumps(body, sort_keys=True)] for body in bodies]
        for result in results:
            if isinstance(result, BaseException) and not isinstance(result, RewardError):
                raise result
        return results

    async def _post(self, client: Any, body: Any, read: Callable[[Any], Any]) -> Any:
        key = hashlib.sha256(json.dumps([self._url, body], sort_keys=True).encode()).hexdigest()
        cached = self._cache.get(key)
        if cached is not None:
            return read(cached)
        problem = "no try was made"
        for attempt in range(self._options.max_tries):
            reply, problem, wait_s = await self._try(client, body)
            if reply is not None:
                try:
                    value = read(reply)
                except RewardError as error:
                    problem, wait_s = str(error), None
                else:
                    self._cache.put(key, reply)
                    return value
            if attempt + 1 < self._options.max_tries:
                wait = wait_s if wait_s is not None else self._options.first_wait_s * 2**attempt
                await asyncio.sleep(min(wait, _MAX_WAIT_S))
        raise RewardError(f"{self._url}: {problem} (tried {self._options.max_tries} times)")

    async def _try(self, client: Any, body: Any) -> tuple[Any, str, float | None]:
        """The reply (None if there is none), what was wrong, and the wait that the server asks for."""
        budget = self._options.max_requests
        if budget is not None and self.num_requests >= budget:
            raise RewardError(f"{self._url}: the budget of {budget} requests (max_requests) is spent")
        self.num_requests += 1
        try:
            response = await client.post(self._url, content=_encoded(body), headers=_JSON)
        except self._httpx.HTTPError as error:
            return None, f"{type(error).__name__} {error}".strip(), None
        if response.status_code in _RETRIED_STATUSES:
            return None, f"status {response.status_code}", _retry_after(response.headers.get("retry-after"))
        if response.status_code >= 400:
            raise RewardError(f"{self._url}: status {response.status_code}: {response.text[:300]}")
        if len(response.content) > _MAX_REPLY_BYTES:
            raise RewardError(f"{self._url}: a reply of {len(response.content)} bytes")
        try:
            return response.json(), "", None
        except ValueError:
            return None, f"a reply that is no JSON: {response.text[:100]!r}", None


class ReplyCache:
    """Replies by key, in memory and in a file if there is a path. A file that several processes use at once."""

    def __init__(self, path: str | None) -> None:
        self._memory: dict[str, str] = {}
        self._path = path
        if path is not None:
            Path(path).expanduser().parent.mkdir(parents=True, exist_ok=True)
            with self._open() as database:
                database.execute("CREATE TABLE IF NOT EXISTS replies (key TEXT PRIMARY KEY, reply TEXT)")

    def get(self, key: str) -> Any | None:
        text = self._memory.get(key)
        if text is None and self._path is not None:
            with self._open() as database:
                row = database.execute("SELECT reply FROM replies WHERE key = ?", (key,)).fetchone()
            text = row[0] if row else None
        return None if text is None else json.loads(text)

    def put(self, key: str, reply: Any) -> None:
        self._memory[key] = json.dumps(reply)
        if self._path is not None:
            with self._open() as database:
                database.execute("INSERT OR REPLACE INTO replies VALUES (?, ?)", (key, self._memory[key]))

    def _open(self) -> sqlite3.Connection:
        assert self._path is not None
        return sqlite3.connect(Path(self._path).expanduser(), timeout=10)


def _encoded(body: Any) -> bytes:
    """Half a surrogate pair, which a model may write and UTF-8 does not have, becomes a question mark."""
    return json.dumps(body, ensure_ascii=False, allow_nan=False).encode("utf-8", "replace")


def _retry_after(value: str | None) -> float | None:
    try:
        return max(0.0, float(value)) if value is not None else None
    except ValueError:  # a date
        return None
