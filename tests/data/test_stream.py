"""The prompt stream is seeded, complete and resumable."""

from dataclasses import replace

import pytest

from rlbench.data.stream import PromptStream
from rlbench.records import Prompt

PROMPTS = [Prompt(prompt_id=f"train/{i}", text="", token_ids=(i,)) for i in range(7)]


def ids(stream: PromptStream, count: int) -> list[str]:
    return [prompt.prompt_id for prompt in stream.next(count)]


def test_an_epoch_hands_out_every_prompt_once():
    stream = PromptStream(PROMPTS, seed=3)

    epochs = [ids(stream, 7) for _ in range(3)]

    assert all(sorted(epoch) == sorted(p.prompt_id for p in PROMPTS) for epoch in epochs)
    assert epochs[0] != epochs[1]


def test_a_restored_stream_continues_where_the_other_stopped():
    stream = PromptStream(PROMPTS, seed=3)
    ids(stream, 10)
    restored = PromptStream(PROMPTS, seed=3)
    restored.restore(stream.state())

    assert ids(restored, 20) == ids(stream, 20)


@pytest.mark.parametrize(
    "change",
    [
        lambda prompts: prompts[:-1],
        lambda prompts: [*prompts[1:], prompts[0]],
        lambda prompts: [replace(prompts[0], token_ids=(0, 1)), *prompts[1:]],
        lambda prompts: [replace(prompts[0], columns={"answer": "4"}), *prompts[1:]],
    ],
)
def test_other_rows_than_those_of_the_state_are_refused(change):
    state = PromptStream(PROMPTS, seed=3).state()
    PromptStream([replace(prompt) for prompt in PROMPTS], seed=3).restore(state)

    with pytest.raises(ValueError, match="rows of training data are not those that the run began with"):
        PromptStream(change(PROMPTS), seed=3).restore(state)


def test_the_order_is_a_function_of_the_seed():
    assert ids(PromptStream(PROMPTS, seed=1), 7) == ids(PromptStream(PROMPTS, seed=1), 7)
    assert ids(PromptStream(PROMPTS, seed=1), 7) != ids(PromptStream(PROMPTS, seed=2), 7)


def test_without_shuffling_the_order_is_that_of_the_data():
    assert ids(PromptStream(PROMPTS, seed=1, shuffle=False), 9)[6:] == ["train/6", "train/0", "train/1"]
