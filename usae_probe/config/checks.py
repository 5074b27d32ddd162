"""Values checked by a table, with errors a person can act on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import UnionType
from typing import Any, TypeVar, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from ..errors import ConfigError, nearest
from .tables import Table

T = TypeVar("T", bound=BaseModel)


def checked(model: type[T], data: Mapping[str, Any]) -> T:
    """Validate `data` by a pydantic model, with errors a person can act on.

    Raises:
        ConfigError: for the first thing that is wrong.
    """
    try:
        return model.model_validate(data)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        path = _without_union_tag(model, tuple(first["loc"]))
        key = ".".join(str(part) for part in path) or model.__name__.removesuffix("Config").lower()
        if first["type"] == "extra_forbidden":
            table = _table_at(model, path[:-1])
            known = list(table.model_fields) if table else []
            listed = f"known keys: {', '.join(known)}"
            hint = nearest(str(path[-1]), known)
            raise ConfigError(f"unknown config key '{key}'", hint=f"{hint} {listed}".strip()) from None
        if first["type"] == "missing":
            raise ConfigError(f"config key '{key}' is missing", hint=_description(model, path)) from None
        reason = first["msg"].removeprefix("Value error, ")
        if not path and issubclass(model, Table) and model.several:  # the reason names the keys
            raise ConfigError(reason) from None
        given = "" if isinstance(first["input"], dict) else f", given {first['input']!r}"
        raise ConfigError(f"config key '{key}': {reason}{given}", hint=_description(model, path)) from None


def settled(tables: Sequence[Table], settings: Mapping[str, Any]) -> tuple[Any, ...]:
    """Return the tables with single settings put into the one that has a key of that name, checked.

    Raises:
        ConfigError: for a setting that no table has, or a value that its table refuses.
    """
    known = [key for table in tables for key in type(table).model_fields]
    for key in settings:
        if key not in known:
            hint = f"{nearest(key, known)} known: {', '.join(known)}".strip()
            raise ConfigError(f"unknown setting '{key}'", hint=hint)
    return tuple(
        checked(
            type(table),
            table.model_dump(exclude_unset=True)  # a recipe's keys are the recipe's to set again
            | {key: value for key, value in settings.items() if key in type(table).model_fields},
        )
        for table in tables
    )


def _description(model: type[BaseModel], path: tuple[str | int, ...]) -> str:
    field = field_at(model, path)
    return (field.description or "") if field else ""


def field_at(model: type[BaseModel], path: tuple[str | int, ...]) -> FieldInfo | None:
    """Return the field that `path` (table names and a key) leads to, if there is one."""
    table = _table_at(model, path[:-1])
    return table.model_fields.get(str(path[-1])) if table and path else None


def _table_at(model: type[BaseModel], path: tuple[str | int, ...]) -> type[BaseModel] | None:
    """Follow `path` (table names, and the free names inside `models`) to the pydantic model it ends in."""
    here: Any = model
    for part in path:
        if isinstance(here, type) and issubclass(here, BaseModel):
            field = here.model_fields.get(str(part))
            here = field.annotation if field else None
        else:
            here = next((arg for arg in get_args(here) if isinstance(arg, type) and issubclass(arg, BaseModel)), None)
    return here if isinstance(here, type) and issubclass(here, BaseModel) else None


def _without_union_tag(model: type[BaseModel], path: tuple[str | int, ...]) -> tuple[str | int, ...]:
    """Leave out what pydantic appends for a key of several types: which of them the mistake is about."""
    field = field_at(model, path[:-1]) if len(path) > 1 else None
    several_types = field is not None and get_origin(field.annotation) in (Union, UnionType)
    return path[:-1] if several_types else path
