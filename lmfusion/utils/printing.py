"""Makes text from files safe to print to a terminal or a log, since names and texts may contain anything."""

MAX_SHOWN = 2000
"""Characters that are shown."""


def printable(text: str) -> str:
    """`text` with everything escaped that could move a terminal's cursor or break a line of a log. Never cut, so that
    different names stay different."""
    return text if text.isprintable() else text.encode("unicode_escape").decode("ascii")


def escape_line(text: str) -> str:
    """`text` on one line: control characters and line breaks escaped, and cut after MAX_SHOWN characters."""
    shown = "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text[:MAX_SHOWN])
    return shown if len(text) <= MAX_SHOWN else f"{shown}... ({len(text)} characters)"


def escape_lines(text: str) -> str:
    """The same for a text that may have several lines."""
    return "\n".join(map(escape_line, text.split("\n")))
