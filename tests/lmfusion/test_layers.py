"""The packages below generation and data import each other in one direction only, without circles."""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

PACKAGE = Path(__file__).parents[2] / "lmfusion"
LAYERS = ("utils", "images", "text", "conversion", "model")
"""From the lowest up."""
LAZY = ("lmfusion.model.modeling", "lmfusion.generation")
"""The one import of a higher layer: LMFusion.draw, generate, caption and stream import generation when called."""


def module_name(path):
    name = ".".join(("lmfusion", *path.relative_to(PACKAGE).with_suffix("").parts))
    return name.removesuffix(".__init__")


MODULES = {module_name(path): path for path in PACKAGE.rglob("*.py")}


def imports(name):
    """Modules of the package that a module imports anywhere: in functions and under TYPE_CHECKING, too."""
    found = set()
    for node in ast.walk(ast.parse(MODULES[name].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            members = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {member if member in MODULES else node.module for member in members}
    return {other for other in found & set(MODULES) if other != name and (name, other) != LAZY}


def layer(name):
    """Position in LAYERS; beyond them for the rest of the package."""
    part = name.split(".")[1] if "." in name else ""
    return LAYERS.index(part) if part in LAYERS else len(LAYERS)


def test_no_module_imports_a_higher_layer():
    lower = [name for name in MODULES if layer(name) < len(LAYERS)]
    assert len(lower) > 40
    upward = {(name, other) for name in lower for other in imports(name) if layer(other) > layer(name)}
    assert not upward


def test_there_is_no_circle():
    graph = {name: imports(name) for name in MODULES if layer(name) < len(LAYERS)}
    tuple(TopologicalSorter(graph).static_order())  # raises CycleError, which names the circle
