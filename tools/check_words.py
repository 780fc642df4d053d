"""Checks that retired names and unidiomatic phrases stay out, and that module docstrings are statements.

    python tools/check_words.py [FILE ...]      all tracked text files by default

tools/retired_words.toml lists the names and phrases. Prints FILE:LINE: what was found, and what to write instead; the
exit status is 1 if there is anything.
"""

import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LIST = ROOT / "tools" / "retired_words.toml"
SUFFIXES = {".py", ".pyi", ".md", ".toml", ".yaml", ".cpp", ".h", ".cu", ".cuh"}
# The changelog tells old names, results keep what was measured, and the two files here name what they look for.
LEFT_OUT = ("CHANGELOG.md", "benchmarks/results/", "tools/retired_words.toml", "tests/tools/test_check_words.py")
_DOCSTRING = re.compile(r'\A(?:#[^\n]*\n|\s)*"""(?P<first>[^\n]*)|\A//\s*(?P<comment>[^\n]*)')


def findings(text: str, names: dict[str, str], phrases: dict[str, str]) -> Iterator[tuple[int, str]]:
    """(line number, what is wrong) for each retired name, unidiomatic phrase and question at the top of `text`."""
    first = _DOCSTRING.match(text)
    if first is not None:
        sentence = first["first"] or first["comment"] or ""
        if "?" in sentence.rstrip('"'):
            line = text[: first.end()].count("\n") + 1
            yield line, "the first line asks a question; state what the file does"
    patterns = [(re.compile(rf"(?<!\w){re.escape(name)}(?!\w)"), better) for name, better in names.items()]
    patterns += [(re.compile(phrase), better) for phrase, better in phrases.items()]
    for number, line in enumerate(text.splitlines(), 1):
        for pattern, better in patterns:
            if found := pattern.search(line):
                yield number, f"{found[0]!r}: write {better}"


def tracked_files() -> list[str]:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return listed.splitlines()


def main(arguments: list[str]) -> int:
    content = tomllib.loads(LIST.read_text())
    found = 0
    for name in arguments or tracked_files():
        path = ROOT / name
        if path.suffix not in SUFFIXES or name.startswith(LEFT_OUT) or not path.is_file():
            continue
        for line, message in findings(path.read_text(), content["names"], content["phrases"]):
            print(f"{name}:{line}: {message}")
            found += 1
    return found > 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
