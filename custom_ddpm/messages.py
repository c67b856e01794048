"""Text of messages to the user: an error as a single line, and foreign text that is safe to print."""

import re
import reprlib

MAX_LINE = 1000  # characters of an error
_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = 60


def shown(text: str, limit: int = 100) -> str:
    r"""Foreign text, such as a file's or a class's name, for a terminal: shortened, on one line, without control codes.

    Args:
        text: any text; "…" stands for what is more than `limit` characters.
        limit: largest number of its characters that are shown.

    Returns:
        The text with every character that cannot be printed (line breaks, escape sequences, marks that change the
        direction of writing, halves of surrogate pairs) written as in Python, such as \x1b.
    """
    # Tokens of the Hub may stand in a file or a command by mistake; a message may be pasted anywhere.
    text = re.sub(r"\bhf_[A-Za-z0-9]{16,}", "hf_***", text[: limit + 100]) + text[limit + 100 :]
    cut = text[:limit] + ("…" if len(text) > limit else "")
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in cut)


def quoted(text: str) -> str:
    """Text as a literal of Python in double quotes, whole, with the same characters escaped as in `shown`."""
    return '"' + shown(text.replace("\\", "\\\\").replace('"', '\\"'), limit=2 * len(text)) + '"'


def shown_value(value: object) -> str:
    """A value from a JSON file as in Python, with long texts and lists shortened and control codes escaped."""
    return shown(_SHORT.repr(value), limit=200)


def in_markdown(text: str, limit: int = 100) -> str:
    """Foreign text for a page in Markdown: as `shown`, and without markup, HTML or links of its own."""
    escaped = re.sub(r"([\\`*_\[\]<>&|~#!$@])", r"\\\1", shown(text, limit))
    # GitHub and the Hub make links of bare addresses.
    return re.sub(r"(?i)\bwww\.", r"www\\.", escaped.replace("://", "\\://"))


def one_line(error: BaseException) -> str:
    """The message of an exception without line breaks, at most `MAX_LINE` characters; its type if it has no message."""
    return shown(" ".join(str(error)[: 4 * MAX_LINE].split()), MAX_LINE) or type(error).__name__
