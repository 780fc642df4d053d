"""The layers of docs/design.md: which package may import which, and no import circle between modules."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
DESIGN = ROOT / "docs" / "design.md"
UPWARD = {
    # LMFusion.draw, caption, generate and stream import the engine when they are called.
    ("lmfusion.model.modeling", "lmfusion.generation"),
}
"""Imports that may go up a layer: made inside a function, when it is called."""
COMPILED = {"lmfusion_kernels._layout_native"}
"""Modules in C++, which import nothing of ours."""

pytestmark = pytest.mark.skipif(not DESIGN.is_file(), reason="not a checkout")


def package_of(module: str) -> str:
    """The layer that a module belongs to: lmfusion_kernels, or a folder of lmfusion."""
    parts = module.split(".")
    return parts[0] if parts[0] == "lmfusion_kernels" else ".".join(parts[:2])


def module_names(root: Path) -> dict[str, Path]:
    names = {}
    for path in [*root.glob("lmfusion/**/*.py"), *root.glob("lmfusion_kernels/**/*.py")]:
        parts = path.relative_to(root).with_suffix("").parts
        names[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return names


def imports(text: str, modules: set[str]) -> set[str]:
    """The modules of `modules` that a file imports: at its top, inside functions, and for type checkers alone."""
    found = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ImportFrom) and node.module is not None:
            for alias in node.names:
                name = f"{node.module}.{alias.name}"
                if name not in COMPILED:
                    found.add(name if name in modules else node.module)
        elif isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
    return found & modules


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Strongly connected groups of more than one module, by Tarjan's algorithm."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found = []

    def visit(node: str) -> None:
        index[node] = low[node] = len(index)
        stack.append(node)
        for following in graph[node]:
            if following not in index:
                visit(following)
                low[node] = min(low[node], low[following])
            elif following in stack:
                low[node] = min(low[node], index[following])
        if low[node] == index[node]:
            group = stack[stack.index(node) :]
            del stack[stack.index(node) :]
            if len(group) > 1:
                found.append(sorted(group))

    for node in graph:
        if node not in index:
            visit(node)
    return found


def import_graph() -> dict[str, set[str]]:
    modules = module_names(ROOT)
    graph = {name: imports(path.read_text(), set(modules)) - {name} for name, path in modules.items()}
    for start, end in UPWARD:
        graph[start].discard(end)
    # `import lmfusion` loads nothing: its names are loaded when they are first used.
    return {name: found - {"lmfusion"} for name, found in graph.items()}


def allowed_imports() -> dict[str, set[str]]:
    """The table of docs/design.md: a package, and those it may import."""
    [table] = re.findall(r"\| package \| may import \|[^\n]*\n\| [-| ]+\n((?:\|[^\n]*\n)+)", DESIGN.read_text())
    rows = {}
    for line in table.splitlines():
        package, others = (re.findall(r"`([\w.]+)`", cell) for cell in line.strip("|").split("|")[:2])
        for name in package:
            rows[name] = set(others)
    return {
        name: {other if other == "lmfusion_kernels" else f"lmfusion.{other}" for other in others}
        for name, others in ((key if key == "lmfusion_kernels" else f"lmfusion.{key}", rows[key]) for key in rows)
    }


def test_no_module_imports_itself_through_others():
    assert circles(import_graph()) == []


def test_packages_import_what_the_design_allows():
    allowed = allowed_imports()
    graph = import_graph()
    packages = {package_of(name) for name in graph if "." in name or name == "lmfusion_kernels"}
    assert packages - {"lmfusion.__main__", "lmfusion.hub"} == set(allowed)
    wrong = [
        f"{name} imports {other}"
        for name, found in graph.items()
        for other in sorted(found)
        if package_of(name) in allowed
        and package_of(other) != package_of(name)
        and package_of(other) not in allowed[package_of(name)]
    ]
    assert wrong == []


def test_an_upward_import_is_made_inside_a_function():
    for start, end in UPWARD:
        tree = ast.parse(module_names(ROOT)[start].read_text())
        top = {name for node in tree.body if isinstance(node, ast.ImportFrom) for name in [node.module]}
        assert end not in top
        assert end in imports(ast.unparse(tree), set(module_names(ROOT)))


def test_circles_are_found():
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}}) == [["a", "b", "c"]]
    assert circles({"a": {"b"}, "b": set()}) == []


def test_imports_are_found_wherever_they_are():
    text = "import p.a\ndef f():\n    from p import b\nif TYPE_CHECKING:\n    from p.c import X\nfrom other import y\n"
    assert imports(text, {"p", "p.a", "p.b", "p.c"}) == {"p.a", "p.b", "p.c"}
