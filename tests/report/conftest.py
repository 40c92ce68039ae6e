"""Run folders written as a run writes them."""

import base64
import gzip
import json
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import pytest
import yaml

from rlbench.records import Completion, Prompt, RewardComponent, Rollout, RolloutGroup
from rlbench.tracking.jsonl import JsonlWriter
from rlbench.tracking.rollout_store import write_rollouts

VOID = {"meta", "br", "input"}


def make_rollout(step, prompt_id, index, text, reward, *, is_cut=False, message="", prompt="What is 2 + 2?"):
    status = "error" if reward is None else "value"
    tokens = tuple(range(1, 2 + index))
    return Rollout(
        rollout_id=f"{step}/{prompt_id}/{index}",
        prompt=Prompt(prompt_id=prompt_id, text=prompt, token_ids=(5, 6), columns={"answer": f"{prompt_id} is 4"}),
        completion=Completion(
            token_ids=tokens,
            sampling_logprobs=(-0.5,) * len(tokens),
            finish_reason="length" if is_cut else "stop",
            seed=index,
            policy_version=step,
            adapter_fingerprint="9f2c",
        ),
        completion_text=text,
        sample_index=index,
        components={"accuracy": RewardComponent(status=status, value=reward, weight=1.0, message=message)},
        reward=reward,
    )


def make_group(step, prompt_id="train/7", texts=("four", "five"), rewards=(1.0, 0.0), **options) -> RolloutGroup:
    rollouts = tuple(
        make_rollout(step, prompt_id, i, text, reward, **options)
        for i, (text, reward) in enumerate(zip(texts, rewards, strict=True))
    )
    return RolloutGroup(prompt=rollouts[0].prompt, rollouts=rollouts)


def write_run(
    folder: Path,
    num_steps: int = 10,
    *,
    train: Callable[[int], dict] = lambda step: {},
    config: dict | None = None,
    derived: dict | None = None,
    groups: Callable[[int], list[RolloutGroup]] | None = lambda step: [make_group(step)],
) -> Path:
    writer = JsonlWriter(folder / "metrics.jsonl")
    for step in range(1, num_steps + 1):
        metrics = {"reward/mean": 0.1 * step, "reward/std": 0.2, "time/update_s": 1.0, "time/step_s": 1.5}
        writer.write(step, metrics | train(step))
        if groups is not None:
            made = groups(step)
            first = made[0].rollouts[0].rollout_id
            write_rollouts(folder, step, made, {first: 1.25})
    writer.write(num_steps, {"eval/accuracy": 0.5, "eval/num": 4.0}, phase="eval")
    writer.close()
    settings = {"name": "demo", "seed": 1, "optim": {"lr": 3e-4}} if config is None else config
    (folder / "config.yaml").write_text(yaml.safe_dump(settings, sort_keys=False))
    (folder / "derived.json").write_text(json.dumps(derived or {"optim.lr": {"value": 3e-4, "reason": "because"}}))
    return folder


class Page(HTMLParser):
    """Tags with attributes, and the text of each element of interest."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.raw = text
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.blocks: dict[str, str] = {}
        self.code = {"script": "", "style": ""}
        self.text = ""
        self.depth: list[str] = []
        self._open: dict[str, str | None] = {}
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self._open = dict(attrs)
        self.tags.append((tag, self._open))
        if tag not in VOID:
            self.depth.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.depth.pop() == tag, f"</{tag}> closes another element"

    def handle_data(self, data):
        inside = self.depth[-1] if self.depth else ""
        if inside == "script" and self._open.get("id"):
            name = self._open["id"] or ""
            self.blocks[name] = self.blocks.get(name, "") + data
        elif inside in self.code:
            self.code[inside] += data
        else:
            self.text += data

    @property
    def data(self) -> dict:
        return json.loads(self.blocks["data"])

    def chunk(self, number: int) -> dict:
        return json.loads(gzip.decompress(base64.b64decode(self.blocks[f"chunk-{number}"])))

    @property
    def policy(self) -> str:
        return next(a["content"] or "" for tag, a in self.tags if a.get("http-equiv") == "Content-Security-Policy")

    @property
    def chart_titles(self) -> list[str]:
        return [re.sub("<.*", "", m) for m in re.findall(r"<figcaption><h3>(.*?)</h3>", self.raw)]


@pytest.fixture
def read_page() -> Callable[[Path], Page]:
    return lambda path: Page(path.read_text(encoding="utf-8"))
