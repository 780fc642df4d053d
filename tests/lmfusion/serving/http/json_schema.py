"""A validator for the part of JSON Schema that /openapi.json uses, for tests."""

TYPES = {
    "object": dict,
    "array": list,
    "string": str,
    "boolean": bool,
    "null": type(None),
    "integer": int,
    "number": (int, float),
}
NOT_CHECKED = {"title", "description", "default", "required", "components", "prefixItems", "discriminator"}


def fits(value, schema, document):
    """document: contains the schemas of "#/components/schemas/NAME". Raises KeyError for an unknown keyword."""
    return all(WORDS[word](value, schema, document) for word in schema if word not in NOT_CHECKED)


def _is(value, kind):
    return isinstance(value, TYPES[kind]) and not (kind in ("integer", "number") and isinstance(value, bool))


def _same(value, other):
    return value == other and isinstance(value, bool) == isinstance(other, bool)


def _properties(value, schema, document):
    known = schema.get("properties", {})
    if not isinstance(value, dict) or not set(schema.get("required", ())) <= set(value):
        return not isinstance(value, dict)
    return all(fits(value[name], known[name], document) for name in value if name in known)


def _additional(value, schema, document):
    if not isinstance(value, dict):
        return True
    rest = [value[name] for name in value if name not in schema.get("properties", {})]
    allowed = schema["additionalProperties"]
    return (allowed or not rest) if isinstance(allowed, bool) else all(fits(item, allowed, document) for item in rest)


def _number(check):
    return lambda value, schema, _: not _is(value, "number") or check(value, schema)


def _list(check):
    return lambda value, schema, document: not isinstance(value, list) or check(value, schema, document)


WORDS = {
    "$ref": lambda v, s, d: fits(v, d["components"]["schemas"][s["$ref"].rpartition("/")[2]], d),
    "type": lambda v, s, _: any(_is(v, kind) for kind in ([s["type"]] if isinstance(s["type"], str) else s["type"])),
    "const": lambda v, s, _: _same(v, s["const"]),
    "enum": lambda v, s, _: any(_same(v, item) for item in s["enum"]),
    "anyOf": lambda v, s, d: any(fits(v, item, d) for item in s["anyOf"]),
    "oneOf": lambda v, s, d: sum(fits(v, item, d) for item in s["oneOf"]) == 1,
    "properties": _properties,
    "additionalProperties": _additional,
    "minimum": _number(lambda v, s: v >= s["minimum"]),
    "maximum": _number(lambda v, s: v <= s["maximum"]),
    "maxLength": lambda v, s, _: not isinstance(v, str) or len(v) <= s["maxLength"],
    "items": _list(lambda v, s, d: all(fits(item, s["items"], d) for item in v)),
    "contains": _list(lambda v, s, d: any(fits(item, s["contains"], d) for item in v)),
    "minItems": _list(lambda v, s, _: len(v) >= s["minItems"]),
    "maxItems": _list(lambda v, s, _: len(v) <= s["maxItems"]),
}
