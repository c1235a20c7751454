"""Text from elsewhere is judged, compared and shown without harm."""

from __future__ import annotations

import logging

import pytest

from molehill import logs
from molehill.characters import alike, flaw, harmless, recovered


@pytest.mark.parametrize(
    ("text", "wrong"),
    [("fine", ""), ("\u75c5\u9662 \U0001f600", ""), ("a\0b", "zero character (U+0000) at 1"), ("a\udc80", "(U+DC80")],
)
def test_what_is_no_text(text, wrong):
    assert wrong in flaw(text)
    assert bool(wrong) == bool(flaw(text))


def test_bytes_of_another_locale_are_read_again():
    assert recovered("caf\udcc3\udca9") == "caf\u00e9"
    assert recovered("\udcff") == "\udcff"
    assert recovered("caf\u00e9") == "caf\u00e9"


def test_what_a_terminal_would_obey_is_written_out():
    assert harmless("a\x1b[2J\x9b\u202e\ud800\u75c5\nb\tc") == r"a\x1b[2J\x9b\u202e\ud800" + "\u75c5 b c"
    assert harmless("a\nb\r", lines=True) == "a\nb\\x0d"


def test_logs_obey_nothing_either(capsys, monkeypatch):
    monkeypatch.setattr(logging.getLogger(), "handlers", [])
    logs.begin()
    logging.getLogger("molehill.rows").warning("said %s", "\x1b]0;title\x07\nforged line")
    assert "said \\x1b]0;title\\x07 forged line" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("positive", " Positive\u00a0"), ("tr\u00e8s", "tre\u0300s"), ("1", "1.0"), ("010", "10"), ("0", "-0.00"),
        ("a b", "a  b"), ("\uff21", "a"), ("stra\u00dfe", "STRASSE"), ("x", "x\u200b"), ("1e3", "1000"),
        ("not-spam", "Not_Spam"), ("not spam", "not\u2013spam"), ("good", "'good'"), ("good", "Good."), ("n/a", "N/A."),
    ],
)  # fmt: skip
def test_texts_that_people_take_for_the_same(one, other):
    assert alike(one) == alike(other)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("1", "10"),
        ("12345678901234567890", "12345678901234567891"),
        ("a", "b"),
        ("A-", "A"),
        ("-1", "1"),
        ("C", "C++"),
        (".", ""),
        ("notspam", "not spam"),
    ],
)
def test_texts_that_differ(one, other):
    assert alike(one) != alike(other)


@pytest.mark.parametrize("name", ["nan1", "NaN12", "sNaN5", "-nan3"])
def test_names_that_decimal_takes_for_no_number(name):
    assert alike(name) == name.lower()
