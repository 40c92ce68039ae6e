"""Axes, charts, tokens, choices: the parts of a report by hand-computed values."""

import json
import math

import pytest

from rlbench.report.axes import step_ticks, tick_text, ticks
from rlbench.report.curves import Chart, Curve, thin
from rlbench.report.markup import Html, tag
from rlbench.report.rollout_files import choose, read_files
from rlbench.report.samples import _level, pack_samples
from rlbench.report.svg_chart import describe, draw
from rlbench.report.token_pieces import Vocabulary, read_vocabulary
from tests.report.conftest import make_group, write_run


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0.0, 1.0, [0, 0.2, 0.4, 0.6, 0.8, 1.0]),
        (0.0, 0.047, [0, 0.01, 0.02, 0.03, 0.04, 0.05]),
        (-3.0, 17.0, [-5, 0, 5, 10, 15, 20]),
        (2.0, 2.0, [0, 1, 2, 3, 4]),
        (0.0, 0.0, [-1.0, -0.5, 0.0, 0.5, 1.0]),
    ],
)
def test_ticks_are_round_numbers_around_the_values(low, high, expected):
    assert ticks(low, high) == pytest.approx(expected)


def test_steps_are_whole_numbers_inside_the_axis():
    assert step_ticks(1, 24) == [5, 10, 15, 20] and step_ticks(0.5, 1.5) == [1]


def test_ticks_are_written_in_few_characters():
    assert [tick_text(v) for v in (0.25, 25000, 2e-5, 0.0)] == ["0.25", "25k", "2e-05", "0"]
    assert tick_text(0.25, is_share=True) == "25%"


def test_text_is_escaped_and_markup_is_not():
    made = tag("p", "<b> & \x00", Html("<i>x</i>"), class_='a"b', data_n=3, hidden=True, title=None)

    assert made == '<p class="a&quot;b" data-n="3" hidden>&lt;b&gt; &amp; \\x00<i>x</i></p>'


def test_a_step_without_a_value_breaks_the_line():
    curve = Curve(label="x", steps=[1, 2, 3, 4, 5], values=[1.0, 2.0, None, 3.0, 2.0])
    svg = draw(Chart(title="T", unit="", curves=[curve]))

    assert svg.count('class="line c0"') == 2
    assert describe(Chart(title="T", unit="s", curves=[curve])) == "T in s: x from 1 at step 1 to 2 at step 5"


def test_a_lone_value_between_gaps_is_a_dot():
    curve = Curve(label="x", steps=[1, 2, 3], values=[None, 2.0, None])

    assert draw(Chart(title="T", unit="", curves=[curve])).count("<circle") == 1


def test_long_curves_become_means_of_neighbours():
    curve = Curve(label="x", steps=[1, 2, 3, 4], values=[1.0, 3.0, None, 5.0], low=[0.0, 2.0, None, 4.0])

    thinned = thin(curve, max_points=2)

    assert (thinned.steps, thinned.values, thinned.low) == ([1.5, 3.5], [2.0, 5.0], [1.0, 4.0])


def byte_level(folder, tokens, special=()):
    saved = {
        "model": {"vocab": {token: i for i, token in enumerate(tokens)}},
        "decoder": {"type": "ByteLevel"},
        "added_tokens": [{"id": i, "content": tokens[i], "special": True} for i in special],
    }
    (folder / "tokenizer.json").write_text(json.dumps(saved))
    return read_vocabulary(folder)


def test_tokens_of_a_byte_level_vocabulary_are_found_in_the_text(tmp_path):
    # the two tokens of U+00E9 hold one byte each; U+1F600 needs two UTF-16 units
    vocabulary = byte_level(
        tmp_path, ["He", "llo", "\u0120w", "\u00c3", "\u00a9", "\u00f0\u0141\u013a\u0122", "<end>"], (6,)
    )

    assert vocabulary.lengths([0, 1, 2, 3, 4, 5, 6], "Hello w\u00e9\U0001f600") == [2, 3, 2, 1, 0, 2, 0]
    assert vocabulary.lengths([0, 1], "something else") is None


def test_tokens_of_a_sentence_piece_vocabulary_are_found_in_the_text(tmp_path):
    saved = {"model": {"vocab": {"\u2581He": 0, "llo": 1, "<0x0A>": 2}}, "decoder": {"type": "Sequence"}}
    (tmp_path / "tokenizer.json").write_text(json.dumps(saved))

    assert read_vocabulary(tmp_path).lengths([0, 1, 2], "Hello\n") == [2, 3, 1]


def test_without_a_tokenizer_file_there_is_no_vocabulary(tmp_path):
    (tmp_path / "tokenizer.json").write_text("[]")

    assert read_vocabulary(tmp_path) is None and read_vocabulary(tmp_path / "nowhere") is None


def test_tokens_of_the_packaged_model_spell_what_it_wrote():
    tokenizers = pytest.importorskip("tokenizers")
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    from rlbench.report.token_pieces import _byte_alphabet

    assert set(_byte_alphabet()) == set(alphabet)


def test_logprobs_are_kept_finely_where_they_are_small():
    assert [_level(p) for p in (0.0, -0.01, -1.0, -100.0, math.nan)] == [0, 2, 20, 89, 89]


def test_packed_samples_hold_lengths_only_where_tokens_spell_the_text(tmp_path):
    files, _ = read_files(write_run(tmp_path / "run", 1, groups=lambda step: [make_group(step, texts=("ab", "zz"))]))
    samples = pack_samples(files, Vocabulary({1: b"ab", 2: b""}), "answer")
    from tests.report.conftest import base64, gzip

    chunk = json.loads(gzip.decompress(base64.b64decode(samples.chunks[0])))

    assert chunk["lengths"] == ["%", None]  # 35 + 2
    assert samples.index["tokens"] == [1, 2] and samples.index["isCut"] == [0, 0]


def test_group_metrics_are_within_groups(tmp_path):
    def groups(step):
        return [
            make_group(step, "a", ("x", "y", "x"), (0.0, 0.5, 1.0)),  # 1, 2, 3 tokens: longer is better
            make_group(step, "b", ("x", "y"), (9.0, 9.5)),
        ]

    (file,), _ = read_files(write_run(tmp_path / "run", 1, groups=groups))

    metrics = file.metrics
    assert metrics["groups/length_reward_correlation"] == pytest.approx(1.0)
    assert metrics["groups/repeated_completion_frac"] == pytest.approx(1 / 5)


def test_a_choice_of_files_respects_both_limits(tmp_path):
    files, _ = read_files(write_run(tmp_path / "run", 9))

    assert choose(files, 100, 1000) == files
    assert [f.step for f in choose(files, 6, 1000)] == [1, 5, 9]
    assert [f.step for f in choose(files, 100, 9)] == [1, 5, 9]
    assert [f.step for f in choose(files, 1, 1000)] == [9]
    assert choose([], 1, 1) == []
