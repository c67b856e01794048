"""Text of messages to the user: an error as a single line."""


def one_line(error: BaseException) -> str:
    """The message of an exception without line breaks; the name of its type if it has no message."""
    return " ".join(str(error).split()) or type(error).__name__
