"""What came from a file, made fit for a terminal or a log: names and texts in there may hold anything."""

MAX_SHOWN = 2000
"""Characters that are shown."""


def on_one_line(text: str) -> str:
    """`text` on one line, without anything that moves a cursor or changes colours, and not endless."""
    shown = "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text[:MAX_SHOWN])
    return shown if len(text) <= MAX_SHOWN else f"{shown}... ({len(text)} characters)"


def on_its_lines(text: str) -> str:
    """The same for a text that may have several lines."""
    return "\n".join(map(on_one_line, text.split("\n")))
