"""One validator for values from outside, such as records and answers of devices; errors have the field's path."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeAlias

__all__ = ["Shape", "check_fields"]

# A type, several types, [shape of each entry], {str: shape of each value}, or {"key": shape, "optional?": shape}.
Shape: TypeAlias = "type | tuple[type, ...] | list[Any] | dict[Any, Any]"


def check_fields(value: Any, shape: Shape, *, path: str) -> None:
    """Raise ValueError, which names the field, unless a JSON value has the shape; other fields may be there."""
    if isinstance(shape, list):
        _check_kind(value, list, path)
        for number, entry in enumerate(value):
            check_fields(entry, shape[0], path=f"{path}[{number}]")
    elif isinstance(shape, dict):
        _check_kind(value, dict, path)
        _check_object(value, shape, path)
    else:
        _check_kind(value, shape, path)


def _check_object(value: Mapping[str, Any], shape: Mapping[Any, Any], path: str) -> None:
    if str in shape:
        for key, entry in value.items():
            check_fields(entry, shape[str], path=f"{path}.{key}")
        return
    for name, kind in shape.items():
        key = name.removesuffix("?")
        if key in value:
            check_fields(value[key], kind, path=f"{path}.{key}")
        elif key == name:
            raise ValueError(f"{path}.{key} is missing")


def _check_kind(value: Any, kinds: type | tuple[type, ...], path: str) -> None:
    allowed = kinds if isinstance(kinds, tuple) else (kinds,)
    is_other_bool = isinstance(value, bool) and bool not in allowed  # a bool is an int to isinstance
    if not isinstance(value, allowed) or is_other_bool:
        names = " or ".join(
            {"dict": "object", "NoneType": "null"}.get(kind.__name__, kind.__name__) for kind in allowed
        )
        raise ValueError(f"{path} is {str(value)[:60]!r}; {names} is needed")
