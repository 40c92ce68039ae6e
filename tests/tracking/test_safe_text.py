"""Hostile text is shown, not obeyed."""

import io

from rlbench.tracking.formats import format_duration, format_fraction, format_number
from rlbench.tracking.safe_text import SafeFile, printable, shorten


def test_control_characters_are_shown_as_escapes():
    assert printable("a\x1b[31mb\x00\r\x9b\u202e\ud800\u2028") == "a\\x1b[31mb\\x00\\r\\x9b\\u202e\\ud800\\u2028"
    assert printable("one\ntwo\tx") == "one\\ntwo    x"
    assert printable("one\ntwo", keep_newlines=True) == "one\ntwo"


def test_ordinary_text_of_any_script_is_unchanged():
    text = "naïve 日本語 עברית 👩\u200d🔬 [bold]x[/bold]"
    assert printable(text) == text


def test_shortening_keeps_the_wanted_end_and_counts_the_rest():
    assert shorten("abcdef", 6) == "abcdef"
    assert shorten("abcdefghij", 3, keep="end") == "[... 7 characters ...] hij"
    assert shorten("abcdefghij", 3) == "ab [... 7 characters ...] j"


def test_a_stream_escapes_what_its_encoding_lacks_and_goes_silent_when_closed():
    raw = io.BytesIO()
    file = SafeFile(io.TextIOWrapper(raw, encoding="ascii"))
    file.write("é\ud800")
    file.flush()
    assert raw.getvalue() == b"\\xe9\\ud800"
    file.close()
    file.write("more")
    assert file.is_gone


def test_durations_and_numbers_stay_short():
    durations = [0, 4.24, 9.96, 59.7, 125, 3725, 86399, 2 * 86400 + 3600, None, float("nan")]
    assert [format_duration(s) for s in durations] == [
        *("0.0s", "4.2s", "10s", "1m00s", "2m05s", "1h02m", "23h59m", "2d01h", "-", "-")
    ]
    numbers = [0, 0.1254, 0.00012, 1.234, 12.34, 123.4, 9994, 21733, 999_960, 1.5e6, -12.5, float("nan"), None]
    assert [format_number(n) for n in numbers] == [
        *("0.000", "0.125", "1e-04", "1.23", "12.3", "123", "9994", "21.7k", "1.00M", "1.50M", "-12.5", "nan", "-")
    ]
    assert format_fraction(0.253, 1) == "25.3%"


class Interrupted(io.StringIO):
    """Its first write is interrupted by a handler that writes to the same stream, as Python's buffers refuse it."""

    def __init__(self):
        super().__init__()
        self.handler = None
        self.is_writing = False

    def write(self, text):
        if self.is_writing:
            raise RuntimeError("reentrant call inside <_io.BufferedWriter>")
        self.is_writing = True
        handler, self.handler = self.handler, None
        if handler is not None:
            handler()
        self.is_writing = False
        return super().write(text)


def test_what_a_signal_handler_writes_into_a_write_comes_with_the_next_one():
    stream = Interrupted()
    file = SafeFile(stream)
    stream.handler = lambda: (file.write("SIGINT: finishing this step\n"), file.flush())

    file.write("update ...\n")
    file.flush()

    assert stream.getvalue() == "update ...\nSIGINT: finishing this step\n"
