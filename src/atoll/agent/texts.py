"""What the code says about the fields of its types: the sentence below each."""

import ast
import inspect
import textwrap
from functools import cache
from typing import Any


@cache
def field_texts(kind: type[Any]) -> dict[str, str]:
    """Field -> its sentence; empty for a type that isn't written down in a file."""
    try:
        parsed = ast.parse(textwrap.dedent(inspect.getsource(kind))).body[0]
    except (OSError, TypeError):
        return {}
    assert isinstance(parsed, ast.ClassDef)
    found: dict[str, str] = {}
    for field, text in zip(parsed.body, parsed.body[1:], strict=False):
        if (
            isinstance(field, ast.AnnAssign)
            and isinstance(field.target, ast.Name)
            and isinstance(text, ast.Expr)
            and isinstance(text.value, ast.Constant)
            and isinstance(text.value.value, str)
        ):
            found[field.target.id] = inspect.cleandoc(text.value.value)
    return found
