"""Commands about models before anything runs on them: adapters, layers."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import UsaeProbeError, UsageError
from .common import Json, guard, show

if TYPE_CHECKING:
    from ..report.layers import ModelLayers


def adapters(as_json: Json = False) -> None:
    """List the installed adapters: name, version, origin, and whether they work."""
    with guard(as_json):
        from ..adapter import all_entries, load_adapter
        from ..report.terminal import adapter_table

        rows = []
        for entry in all_entries():
            try:
                load_adapter(entry.name)
                state = "ok"
            except UsaeProbeError as error:
                state = error.message
            shown = {key: value for key, value in entry._asdict().items() if isinstance(value, str)}
            rows.append({**shown, "origin": entry.origin, "state": state})
        show(as_json, {"adapters": rows}, lambda: adapter_table(rows))


def layers(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="timm:resnet18, module:file.py:factory, or a CONFIG.toml.")
    ],
    option: Annotated[list[str] | None, typer.Option("--option", help="key=value for the adapter's factory.")] = None,
    image_size: Annotated[int | None, typer.Option("--image-size", help="Pixels; default: the model's own.")] = None,
    depth: Annotated[
        int | None, typer.Option("--depth", min=0, help="Levels of the tree; 0: all; default: what fits a screen.")
    ] = None,
    grep: Annotated[
        str | None,
        typer.Option("--grep", help="Only layers whose name, alias or kind holds this (regex, case does not matter)."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Show a model's layers as a tree, in execution order, with what sites can read there (no weights are loaded)."""
    with guard(as_json):
        from ..report.layer_tree import layer_trees
        from ..report.layers import described, matching

        found = list(_hooked_layers(model, option or [], image_size))
        matches = None if grep is None else matching(found, grep)
        data = {model.title: described(model, matches[at] if matches else None) for at, model in enumerate(found)}
        show(as_json, {"models": data}, lambda: layer_trees(found, depth=depth, matches=matches), crop=False)


def _hooked_layers(model: str, option: list[str], image_size: int | None) -> Iterator[ModelLayers]:
    from ..attaching import attach
    from ..report.layers import survey

    if model.endswith(".toml"):
        from ..config import RunConfig

        config = RunConfig.load(model)
        keys = {"options", "image_size", "mean", "std", "interpolation", "crop_pct", "layout"}
        for name, entry in config.models.items():
            given = entry.model_dump(include=keys)
            with attach(
                entry.name, adapter=entry.adapter, name=name, base=config.base, pretrained=False, **given
            ) as hooked:
                yield survey(hooked, name, entry.layers)
        return
    zeros, ones = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)  # values do not matter for shapes
    options = dict(_parsed_option(text) for text in option)
    with attach(model, pretrained=False, options=options, image_size=image_size, mean=zeros, std=ones) as hooked:
        yield survey(hooked, model)


def _parsed_option(text: str) -> tuple[str, Any]:
    key, equals, value = text.partition("=")
    if not equals:
        raise UsageError(f"--option '{text}' is not key=value", hint="e.g. --option img_size=112")
    try:
        return key, json.loads(value)
    except ValueError:
        return key, value
