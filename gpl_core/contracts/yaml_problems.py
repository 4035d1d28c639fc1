"""What pydantic found wrong with a YAML file, one line per problem."""

from collections.abc import Mapping, Sequence
from typing import Any, get_args, get_origin

from pydantic import ValidationError

from gpl_core.errors import did_you_mean

_MAPPING = "expected a mapping of keys to values"
# Kind of a pydantic error -> what to write in YAML, where pydantic speaks of Python.
_EXPECTED = {
    "model_type": _MAPPING, "dict_type": _MAPPING, "dataclass_type": _MAPPING,
    "tuple_type": "expected a list, such as [a, b]",
}  # fmt: skip


def problems_of(
    error: ValidationError, model: type, body: Any = None, removed: Mapping[str, str] | None = None
) -> list[str]:
    """Every problem of a file whose content `body` does not fit `model`: where, what, and the bad value.

    `removed` says of keys of earlier releases what to do about them.
    """
    return list(dict.fromkeys(_problem(e, model, body, removed or {}) for e in error.errors()))


def _problem(error: Any, model: type, body: Any, removed: Mapping[str, str]) -> str:
    loc, kind = error["loc"], error["type"]
    where = _place(loc, body) or "the file"
    if kind in ("extra_forbidden", "unexpected_keyword_argument"):
        if where in removed:
            return f"{where}: was removed; {removed[where]}"
        return f"{where}: unknown key" + (did_you_mean(str(loc[-1]), _keys_at(loc[:-1], model)) or "; remove it")
    if kind == "missing":
        return f"{where}: required, but not given"
    said = str(_EXPECTED.get(kind, error["msg"])).replace("Input should be", "expected")
    if kind == "value_error":  # a check of our own, which names what is wrong
        return f"{where}: {said.removeprefix('Value error, ')}"
    return f"{where}: {said} (got {error['input']!r:.200})"


def _place(loc: Sequence[str | int], body: Any) -> str:
    """`loc` with dots; an entry of a list by its `name` where it has one."""
    parts = []
    for part in loc:
        inside = (isinstance(body, dict) and part in body) or (isinstance(body, list) and isinstance(part, int))
        body = body[part] if inside else None
        named = isinstance(part, int) and isinstance(body, dict) and body.get("name")
        parts.append(str(named or part))
    return ".".join(parts)


def _keys_at(loc: Sequence[str | int], model: Any) -> list[str]:
    """The keys that the section at `loc` of `model` knows, as they are written in YAML."""
    for part in loc:
        if isinstance(part, str):
            model = model.__pydantic_fields__[part].annotation
        model = get_args(model)[0] if get_origin(model) is tuple else model
    return [field.alias or name for name, field in model.__pydantic_fields__.items()]
