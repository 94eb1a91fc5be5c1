"""Reads what a newer agent says: fields that this side doesn't know are left out, where the types forbid them."""

from typing import Any

import msgspec
from msgspec import inspect


def decode(content: bytes, kind: Any) -> Any:
    """JSON as the type that it has. Raises `msgspec.DecodeError` for what it can't be even without unknown fields."""
    try:
        return msgspec.json.decode(content, type=kind)
    except msgspec.ValidationError:
        return convert(msgspec.json.decode(content), kind)


def convert(value: Any, kind: Any) -> Any:
    """As `decode`, of what was decoded already."""
    try:
        return msgspec.convert(value, kind)
    except msgspec.ValidationError:
        return msgspec.convert(_known(value, inspect.type_info(kind)), kind)


def _known(value: Any, kind: inspect.Type) -> Any:
    """The value without fields that its type hasn't got."""
    if isinstance(kind, inspect.UnionType):
        fitting = (each for each in kind.types if _is_for(value, each))
        return _known(value, next(fitting, inspect.AnyType()))
    if isinstance(value, dict) and isinstance(kind, inspect.StructType):
        fields = {each.encode_name: each.type for each in kind.fields}
        return {key: _known(item, fields[key]) for key, item in value.items() if key in fields}
    if isinstance(value, dict) and isinstance(kind, inspect.DictType):
        return {key: _known(item, kind.value_type) for key, item in value.items()}
    if isinstance(value, list) and isinstance(kind, inspect.TupleType):
        return [_known(item, each) for item, each in zip(value, kind.item_types, strict=False)]
    if isinstance(value, list) and isinstance(kind, inspect.CollectionType):
        return [_known(item, kind.item_type) for item in value]
    return value


def _is_for(value: Any, kind: inspect.Type) -> bool:
    if isinstance(value, dict):
        return isinstance(kind, inspect.StructType | inspect.DictType)
    return isinstance(value, list) and isinstance(kind, inspect.TupleType | inspect.CollectionType)
