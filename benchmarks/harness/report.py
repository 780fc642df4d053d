"""Writes pages from benchmark results.

python -m benchmarks.harness.report                               docs/performance.md, and beside each file of
                                                                  benchmarks/results a .md with all its rows
python -m benchmarks.harness.report --keep runs/x/results.json    first take a run into benchmarks/results
python -m benchmarks.harness.report runs/x/results.json           results.md with all rows, and plots, beside it
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.harness.output import file_name, read_results
from benchmarks.harness.summary import summary_page
from benchmarks.harness.tables import PREFIX, Results, tables_page

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results"
PAGE = ROOT / "docs" / "performance.md"
IMAGES = ROOT / "docs" / "images"


def committed() -> list[Results]:
    """The results of benchmarks/results, GPUs first."""
    found = [read_results(path) for path in sorted(RESULTS.glob("*.json"))]
    return sorted(found, key=lambda results: results["device"]["type"] != "cuda")


def keep(path: Path) -> Path:
    """Copy a run into benchmarks/results, in place of the earlier run of its device. Returns the new path."""
    results = read_results(path)
    target = RESULTS / file_name(results)
    RESULTS.mkdir(exist_ok=True)
    for old in RESULTS.glob(target.name.rsplit("-", 3)[0] + "-[0-9]*.*"):
        old.unlink()
    target.write_text(json.dumps(results, indent=1) + "\n")
    return target


def pages() -> dict[Path, str]:
    """The text of every page and plot that is written from the committed results, by path."""
    all_results = committed()
    texts = {PAGE: summary_page(all_results, "images/", "../benchmarks/results/")}
    for results in all_results:
        text, plots = tables_page([results], "../../docs/images/")
        texts[(RESULTS / file_name(results)).with_suffix(".md")] = text
        texts |= {IMAGES / name: drawing for name, drawing in plots.items()}
    return texts


def written() -> list[Path]:
    """The pages and plots of committed results that are there now."""
    return [PAGE, *RESULTS.glob("*.md"), *IMAGES.glob(f"{PREFIX}*.svg")]


def write_pages() -> None:
    for old in written():
        old.unlink(missing_ok=True)
    for path, text in pages().items():
        path.write_text(text)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", nargs="?", type=Path, help="a results.json; default: the committed ones")
    parser.add_argument("--keep", action="store_true", help="take it into benchmarks/results and write the pages again")
    options = parser.parse_args(arguments)
    if options.results is None:
        if options.keep:
            parser.error("--keep needs a results.json")
        write_pages()
    elif options.keep:
        print(keep(options.results))
        write_pages()
    else:
        text, plots = tables_page([read_results(options.results)], "")
        for name, drawing in plots.items():
            options.results.with_name(name).write_text(drawing)
        options.results.with_name("results.md").write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
