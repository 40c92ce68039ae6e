"""Rewards in TRL's form: with and without a column of the data."""


def needs_answer(completions, answer, **columns):
    return [float(text == right) for text, right in zip(completions, answer, strict=True)]


def short(completions, **columns):
    return [float(len(text) < 20) for text in completions]
