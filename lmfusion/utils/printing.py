"""Makes text from files, which may contain anything, safe to print to a terminal or a log."""

MAX_SHOWN = 2000
"""Characters of a line that are printed."""


def printable(text: str) -> str:
    """`text` with control characters and line breaks escaped. Not truncated, so that different names stay different."""
    return text if text.isprintable() else text.encode("unicode_escape").decode("ascii")


def escape_line(text: str) -> str:
    """`text` on one line: control characters and line breaks escaped, and truncated after MAX_SHOWN characters."""
    shown = "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text[:MAX_SHOWN])
    return shown if len(text) <= MAX_SHOWN else f"{shown}... ({len(text)} characters)"


def escape_lines(text: str) -> str:
    """The same for each line of a text."""
    return "\n".join(map(escape_line, text.split("\n")))
