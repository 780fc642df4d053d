"""Every stop of docs/tour.md, every path in the documents and the README's tree exist."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TOUR = ROOT / "docs" / "tour.md"
PAGES = sorted([*(ROOT / "docs").glob("*.md"), ROOT / "README.md", ROOT / "CONTRIBUTING.md"])

pytestmark = pytest.mark.skipif(not TOUR.is_file(), reason="not a checkout")


def defined_names(path: Path) -> set[str]:
    """Functions and classes of a module, and methods as Class.method."""
    names = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            names.add(node.name)
        if isinstance(node, ast.ClassDef):
            names.update(f"{node.name}.{item.name}" for item in node.body if isinstance(item, ast.FunctionDef))
    return names


def stops() -> list[tuple[str, str]]:
    return re.findall(r"^### \d+\. `([\w.]+)` in `([\w/.]+)`$", TOUR.read_text(), re.MULTILINE)


def test_there_are_two_walks_of_eight_stops():
    text = TOUR.read_text()
    assert [part.count("\n### ") for part in text.split("\n## ")[1:]] == [8, 8]
    assert len(stops()) == 16


@pytest.mark.parametrize(("name", "path"), stops() if TOUR.is_file() else [])
def test_a_stop_exists(name, path):
    assert name in defined_names(ROOT / path)


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_paths_and_links_of_a_page_exist(page):
    text = page.read_text()
    paths = re.findall(
        r"`((?:lmfusion|lmfusion_kernels|tests|benchmarks|csrc|recipes|tools|examples|docs)/[\w./-]*)`", text
    )
    missing = [path for path in paths if not (ROOT / path).exists()]
    links = [link.split("#")[0] for link in re.findall(r"\]\(([^)\s]+)\)", text) if not link.startswith(("http", "#"))]
    missing += [link for link in links if not (page.parent / link).exists()]
    assert missing == []


def test_the_tree_of_the_readme_exists():
    [tree] = re.findall(r"## Repository\n\n```\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    folders, parent = [], Path()
    for line in tree.splitlines():
        names = re.match(r"( *)((?:[\w.]+/ ?)+)", line)
        if names is None:
            continue
        for name in names[2].split():
            folders.append((parent if names[1] else Path()) / name)
        if not names[1]:
            parent = folders[-1]
    assert len(folders) > 20
    assert [str(folder) for folder in folders if not (ROOT / folder).is_dir()] == []


def test_every_document_is_in_the_index():
    index = (ROOT / "docs" / "index.md").read_text()
    assert [path.name for path in (ROOT / "docs").glob("*.md") if f"({path.name})" not in index] == ["index.md"]
