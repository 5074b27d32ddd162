"""The adapter contract and the way adapters are found: entry points in the group `usae_probe.adapters`.

For who writes one (`examples/plugin_adapter/` is a whole distribution to copy): an adapter is a class with a
no-argument constructor and the methods `load(spec)` and `adopt(module)` of `Adapter`; there is nothing to inherit from.
A distribution offers it in its pyproject.toml by

    [project.entry-points."usae_probe.adapters"]
    my-hub = "my_package:MyAdapter"

Once that is installed, `my-hub:some-model` is a model for `attach` and `usae-probe layers`, a config says
`adapter = "my-hub"`, and `usae-probe adapters` shows whether it can be imported. It imports this module,
`usae_probe.hooks`, `usae_probe.shapes` and `usae_probe.errors`, nothing else of `usae_probe`. Its own import should be
cheap: every installed adapter is imported and made when a live module is attached to. One that cannot be imported is
named where it is asked for and is in nobody's way.

**load** builds what `spec` names:
- `spec.name` is all behind `my-hub:`, in a grammar of the adapter's own. A path in it is relative to `spec.base` (the
  folder of the config, or the working directory): `spec.base / Path(name).expanduser()`.
- `spec.checkpoint`, if not None, are local weights (joined to `base` already); `spec.pretrained` is False then. Load
  them strictly and never unpickle code (`safetensors`, or `torch.load(..., weights_only=True)`).
- `spec.pretrained` asks for the adapter's own weights. False must work without a network. Parameters may be drawn at
  random: the generator is seeded before the call and put back after it, so a run can go on with the same weights.
- `spec.options` are keyword arguments from the user. One that is unknown is an error, never left out in silence.

The model comes back in eval mode, on the CPU or wherever it has to be; `attach` then moves and casts it as asked.

**adopt** is asked about every live module that is attached to, of any library; the first adapter in the order of names
that does not return None is believed. Recognise your own models by their type or what they carry, without importing a
heavy library for it and without changing the module. Return None for all others, and where there is nothing to add.

**LoadedModel**, what both return:
- `module`: the model; its forward takes the preprocessed pictures [b,3,h,w]. From `adopt`, the module it was given.
- `preprocessing`: how it wants its pictures, if that is known for certain. None otherwise: the user is then asked for
  image_size, mean and std. Whatever the user gives replaces the adapter's.
- `layout_rule`: (model, shape of each layer's output without the batch axis) to a `hooks.Layout` for each layer that
  it is sure of, or None for one whose output is none. Layouts are found by tracing the axes through the model; a rule
  comes before that, and is needed only where tracing fails.
- `points`: for a library with hook names of its own, {name: `hooks.Point(module, convert, revert)`}. They are the
  layers then, instead of all submodules by their paths; several names may be one point.

**Errors** are of `usae_probe.errors`, one line that says what was given and what was expected, with `hint=` for what to
do: `UsageError` where name or options are wrong (exit status 2; `nearest(name, names)` makes the hint), `AdapterError`
where building fails (no network, a missing library), `CheckpointError` where local weights cannot be read or do not fit
(both exit status 1). Anything else from `load` is shown as a bug. `adopt` should not raise: the next adapter is asked.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable
from urllib.parse import unquote

from torch import nn

from .errors import AdapterError, UnknownAdapterError, nearest
from .hooks import LayoutRule, Point
from .images import Preprocessing

GROUP = "usae_probe.adapters"

__all__ = [
    "Adapter",
    "AdapterEntry",
    "LoadedModel",
    "ModelSpec",
    "Preprocessing",
    "all_entries",
    "installed_adapters",
    "load_adapter",
]


@dataclass(frozen=True)
class ModelSpec:
    """What an adapter is asked to build.

    Attributes:
        name: the adapter's own name for the model.
        pretrained: whether to load the adapter's own weights.
        checkpoint: local weights to load instead.
        options: keyword arguments for the adapter's factory.
        base: folder that relative paths in `name` start from.
    """

    name: str
    pretrained: bool = True
    checkpoint: Path | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    base: Path = field(default_factory=Path.cwd)


class LoadedModel(NamedTuple):
    """What an adapter gives back.

    Attributes:
        module: the live model.
        preprocessing: how pictures become its input; None when the adapter cannot know.
        layout_rule: layouts the adapter is sure of; they come before what tracing the model's axes finds.
        points: layers under names of the library's own, instead of module paths.
    """

    module: nn.Module
    preprocessing: Preprocessing | None = None
    layout_rule: LayoutRule | None = None
    points: Mapping[str, Point] | None = None


@runtime_checkable
class Adapter(Protocol):
    """Builds live models from names, and recognises live models of its library."""

    def load(self, spec: ModelSpec) -> LoadedModel:
        """Build the model that `spec` names, in eval mode.

        Raises:
            UsageError: when the name or an option is wrong.
            AdapterError: when the model cannot be built.
            CheckpointError: when weights do not fit.
        """
        ...

    def adopt(self, module: nn.Module) -> LoadedModel | None:
        """Add what the adapter knows to a live model of its library; None for any other model."""
        ...


class AdapterEntry(NamedTuple):
    """An installed adapter.

    Attributes:
        name: what configs and `adapter:model` call it.
        target: its class, as `module:attribute`.
        distribution, version: what brought it.
        entry: its entry point.
        rivals: further ones under the same name, from other distributions.
    """

    name: str
    target: str
    distribution: str
    version: str
    entry: EntryPoint
    rivals: tuple[AdapterEntry, ...] = ()

    @property
    def origin(self) -> str:
        """Where its distribution is: the folder it was installed in, or from if it is editable."""
        dist = self.entry.dist
        if dist is None:
            return "?"
        source: dict[str, Any] = json.loads(dist.read_text("direct_url.json") or "{}")
        editable = source.get("dir_info", {}).get("editable")
        return unquote(source["url"].removeprefix("file://")) if editable else str(dist.locate_file(""))

    def load(self) -> Adapter:
        """Import and make it.

        Raises:
            AdapterError: when that fails, or what it makes is no adapter.
        """
        named = f"adapter '{self.name}' ({self.target}, {self.distribution} {self.version})"
        hint = "repair or uninstall that distribution; other adapters are not affected"
        try:
            made = self.entry.load()()
        except Exception as error:
            raise AdapterError(f"{named} cannot be imported: {error}", hint=hint) from error
        if not isinstance(made, Adapter):
            raise AdapterError(f"{named} has no methods load(spec) and adopt(module)", hint=hint)
        return made


def installed_adapters() -> dict[str, AdapterEntry]:
    """Find all installed adapters by name, without importing them."""
    found: dict[str, list[AdapterEntry]] = {}
    for entry in sorted(entry_points(group=GROUP), key=lambda entry: entry.name):
        dist = entry.dist
        made = AdapterEntry(entry.name, entry.value, dist.name if dist else "?", dist.version if dist else "?", entry)
        found.setdefault(entry.name, []).append(made)
    return {name: first._replace(rivals=tuple(rest)) for name, (first, *rest) in found.items()}


def all_entries() -> list[AdapterEntry]:
    """Return every installed adapter, those that share a name too."""
    return [each for entry in installed_adapters().values() for each in (entry, *entry.rivals)]


def load_adapter(name: str) -> Adapter:
    """Import one adapter by name.

    Raises:
        UnknownAdapterError: when no installed adapter has that name, or several have.
        AdapterError: when it cannot be imported.
    """
    found = installed_adapters()
    if name not in found:
        listed = f"installed: {', '.join(found) or 'none'}"
        raise UnknownAdapterError(f"no adapter '{name}' is installed", hint=f"{nearest(name, found)} {listed}".strip())
    entry = found[name]
    if entry.rivals:
        several = " and ".join(
            f"{each.distribution} {each.version} (in {each.origin})" for each in (entry, *entry.rivals)
        )
        raise UnknownAdapterError(f"adapter '{name}' is offered by {several}", hint="uninstall all but one of them")
    return entry.load()
