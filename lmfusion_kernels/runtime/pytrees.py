"""Registers the package's own argument types with torch's pytrees, so that torch.export takes and saves them."""

from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import torch
from torch.utils import _pytree as pytree

T = TypeVar("T")


def register_tree(
    cls: type[T], name: str, to_dict: Callable[[T], dict[str, Any]], from_dict: Callable[[dict[str, Any]], T]
) -> None:
    """Let pytrees flatten objects of `cls` into the values of `to_dict` and rebuild them with `from_dict`.

    name: the name of the class in saved programs. The names of the values must be the same for all objects.
    """

    def flatten(value: T) -> tuple[list[Any], tuple[str, ...]]:
        parts = to_dict(value)
        return list(parts.values()), tuple(parts)

    def flatten_with_keys(value: T) -> tuple[list[tuple[pytree.KeyEntry, Any]], tuple[str, ...]]:
        parts = to_dict(value)
        return [(pytree.GetAttrKey(key), part) for key, part in parts.items()], tuple(parts)

    def unflatten(parts: Iterable[Any], names: pytree.Context) -> T:
        return from_dict(dict(zip(names, parts, strict=True)))

    # torch.export.load reads the example inputs of a program, which hold such objects, without unsafe unpickling.
    torch.serialization.add_safe_globals([cls])
    pytree.register_pytree_node(
        cls,
        flatten,
        unflatten,
        serialized_type_name=name,
        to_dumpable_context=list,
        from_dumpable_context=tuple,
        flatten_with_keys_fn=flatten_with_keys,
    )
