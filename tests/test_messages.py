"""Foreign text in messages, read back by Python and by what a terminal obeys."""

import ast
import unicodedata

import pytest

from custom_ddpm.messages import in_markdown, one_line, quoted, shown, shown_value

HOSTILE = [
    "\x1b[2J",
    "\x9b31m",
    "a\r\nb",
    "\u202egnp.exe",
    "\ud800",
    "\0",
    '");import os;("',
    "\\",
    "\u2028",
    "\U000e0001",
]


@pytest.mark.parametrize("text", [*HOSTILE, "".join(HOSTILE) * 10, "plain", "数字"])
def test_foreign_text_is_printable_and_the_literal_means_it(text):
    for line in (shown(text), quoted(text), shown_value([text]), in_markdown(text), one_line(ValueError(text))):
        assert not any(unicodedata.category(c)[0] == "C" or c in "\u2028\u2029" for c in line)
        line.encode()
    assert ast.literal_eval(quoted(text)) == text


def test_long_text_is_cut():
    long = "x" * 30_000_000
    assert shown(long) == "x" * 100 + "…"
    for line in (shown_value(long), shown_value([[long] * 10] * 10), shown_value({long: long}), in_markdown(long)):
        assert len(line) < 400
    assert len(one_line(ValueError(long))) < 2100
    assert shown("a plain name.txt") == in_markdown("a plain name.txt") == "a plain name.txt"
