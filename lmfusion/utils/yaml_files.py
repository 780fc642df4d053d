"""Reads YAML from users safely: without running code, and without duplicate keys and alias bombs."""

from typing import Any

import yaml

from lmfusion.utils.config_values import short_repr, truncate

MAX_NODES = 100_000
"""Keys and values of a file; those that aliases repeat are counted each time."""


class _Loader(yaml.SafeLoader):
    """YAML's plain types without dates: 2031-01-01 is a text, as in JSON."""


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:timestamp"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


def read_yaml(text: str) -> Any:
    """The value that a YAML text describes.

    Raises ValueError, with the line, for text that is not YAML, for a duplicate key in a mapping, and for more than
    MAX_NODES values, which a few lines of aliases can produce.
    """
    try:
        loader = _Loader(text)
        try:
            node = loader.get_single_node()
            if node is None:
                return None
            _count(node, {})
            return _copied(loader.construct_document(node))
        finally:
            loader.dispose()
    except yaml.YAMLError as error:
        raise ValueError(f"not valid YAML: {truncate(str(error))}") from error
    except RecursionError:
        raise ValueError("the YAML is nested too deeply; write it with fewer levels") from None


def _copied(value: Any) -> Any:
    """A copy in which aliases share nothing, so that changing one of them does not change the others."""
    if isinstance(value, dict):
        return {key: _copied(item) for key, item in value.items()}
    return [_copied(item) for item in value] if isinstance(value, list) else value


def _count(node: yaml.Node, known: dict[int, int]) -> int:
    """Values in `node`, including itself. Each node is visited once, however many aliases it has."""
    if id(node) in known:
        if known[id(node)] == 0:
            raise ValueError(f"line {_line(node)}: the value contains itself through an alias")
        return known[id(node)]
    known[id(node)] = 0  # being counted
    children: list[yaml.Node] = []
    if isinstance(node, yaml.MappingNode):
        _check_keys(node)
        children = [part for pair in node.value for part in pair]
    elif isinstance(node, yaml.SequenceNode):
        children = node.value
    total = 1 + sum(_count(child, known) for child in children)
    if total > MAX_NODES:
        raise ValueError(f"line {_line(node)}: the value holds more than {MAX_NODES:,} values; write fewer aliases")
    known[id(node)] = total
    return total


def _check_keys(node: yaml.MappingNode) -> None:
    lines: dict[str, int] = {}
    for key, _ in node.value:
        if isinstance(key, yaml.ScalarNode):
            if key.value in lines and key.tag != "tag:yaml.org,2002:merge":
                raise ValueError(
                    f"{short_repr(key.value)} is given twice, in line {lines[key.value]} and in line {_line(key)}; "
                    "write it once"
                )
            lines[key.value] = _line(key)


def _line(node: yaml.Node) -> int:
    return node.start_mark.line + 1
