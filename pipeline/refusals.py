"""How a problem of the TOML becomes one line: the key, what was got, what is allowed.

The sentence of what is allowed is the description of the key's field.
"""

from __future__ import annotations

import datetime as dt
import difflib
from collections.abc import Iterable
from typing import Any, get_args

import pydantic
from pydantic import BaseModel

_SHOWN_CHARACTERS = 80

Location = tuple[int | str, ...]


def refusal(error: pydantic.ValidationError, tables: dict[str, Any], root: type[BaseModel]) -> str:
    """Render the first problem of a TOML's tables; the count of the others follows.

    root : the model that refused the tables
    """
    problems = error.errors(include_url=False)
    if len(problems) > 1:  # pydantic calls a list too short when its only item was refused
        problems = [problem for problem in problems if problem["type"] != "too_short"]
    # a misspelt key is the cause of a missing one, so it is named first
    problems.sort(key=lambda problem: problem["type"] != "extra_forbidden")
    line = _problem(problems[0], tables, root)
    others = len(problems) - 1
    return line if others == 0 else f"{line} (and {others} more problem{'s' * (others > 1)})"


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return " (did you mean ...?)" for the nearest of the known words, or nothing."""
    near = difflib.get_close_matches(word.lower(), list(known), n=1, cutoff=0.6)
    return f" (did you mean {near[0]!r}?)" if near else ""


def _problem(problem: Any, tables: dict[str, Any], root: type[BaseModel]) -> str:
    names, section, allowed = _locate(problem["loc"], root)
    where = f"{'.'.join(names)}{_which_item(problem['loc'], tables)}"
    if problem["type"] == "extra_forbidden":
        known = list(_keys(section))
        kind = "section" if section is root else "key"
        nested = _nested(names[-1], root) if section is root else ""
        if nested:
            return f"{where}: unknown section (did you mean [{nested}]?); allowed: {', '.join(known)}"
        return f"{where}: unknown {kind}{did_you_mean(names[-1], known)}; allowed: {', '.join(known)}"
    if problem["type"] == "missing":
        return f"{where}: missing; allowed: {allowed}"
    if problem["type"] == "value_error" and str(problem["ctx"]["error"]):
        return f"{where}: {problem['ctx']['error']}"
    return f"{where}: got {_short(_value_at(tables, problem['loc']))}; allowed: {allowed}"


def _locate(loc: Location, root: type[BaseModel]) -> tuple[tuple[str, ...], type[BaseModel], str]:
    """Follow pydantic's location to the key: its dotted name, the section that holds it, what it allows."""
    section = root
    names: list[str] = []
    allowed = "a table"
    for part in loc:
        if isinstance(part, int):
            continue
        names.append(part)
        field = _keys(section).get(part)
        if field is None:
            break
        allowed = field.description or allowed
        inner = [t for t in (field.annotation, *get_args(field.annotation)) if _is_section(t)]
        if not inner:
            break
        section = inner[0]
    return tuple(names), section, allowed


def _keys(section: type[BaseModel]) -> dict[str, Any]:
    """Return a section's fields by the names that a TOML uses."""
    return {str(field.validation_alias or name): field for name, field in section.model_fields.items()}


def _nested(name: str, root: type[BaseModel]) -> str:
    """Return the dotted name of a table within a section that is called so, or nothing."""
    for outer, field in _keys(root).items():
        if _is_section(field.annotation) and name in _keys(field.annotation):
            inner = _keys(field.annotation)[name]
            return f"{outer}.{name}" if _is_section(inner.annotation) else ""
    return ""


def _is_section(annotation: object) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


def _which_item(loc: Location, tables: dict[str, Any]) -> str:
    """Say which table of a list is meant, by number and name."""
    if len(loc) < 2 or not isinstance(loc[1], int) or not isinstance(loc[0], str):
        return ""
    item = tables[loc[0]][loc[1]]
    name = item.get("name") if isinstance(item, dict) else None
    return f" ({loc[0]} {loc[1] + 1}{f', {name!r}' if isinstance(name, str) else ''})"


def _value_at(tables: dict[str, Any], loc: Location) -> object:
    """Return what the user wrote for a key: a list whole, not the item that pydantic stumbled over."""
    value: Any = tables
    for part in loc:
        if isinstance(part, int) and not isinstance(value[part], dict):
            break
        if part not in value if isinstance(value, dict) else not isinstance(part, int):
            break  # not there, or pydantic's own word for a part, such as "[key]"
        value = value[part]
    return value


def _short(value: object) -> str:
    text = str(value) if isinstance(value, dt.date) else repr(value)
    return text if len(text) <= _SHOWN_CHARACTERS else f"{text[: _SHOWN_CHARACTERS - 3]}..."
