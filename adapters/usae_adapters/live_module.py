"""Adapter `module`: a factory in a file or package, or a live `nn.Module` from Python."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import nn

from usae_probe.adapter import LoadedModel, ModelSpec
from usae_probe.errors import AdapterError, UsageError, nearest

from .weights import load_checkpoint


class ModuleAdapter:
    """Call a user's factory: `file.py:factory` or `package.mod:factory`, with `options` as keyword arguments."""

    def load(self, spec: ModelSpec) -> LoadedModel:
        """Import the factory, call it, and load `checkpoint` if one is given.

        Raises:
            UsageError: when file, package or factory do not exist, or the result is no `nn.Module`.
            AdapterError: when importing or calling raises.
        """
        where, colon, attribute = spec.name.rpartition(":")
        if not colon or not where or not attribute:
            raise UsageError(
                f"'{spec.name}' names no factory", hint="write 'file.py:factory' or 'package.module:factory'"
            )
        source = _import_file(spec.base / Path(where).expanduser()) if where.endswith(".py") else _import_package(where)
        factory = getattr(source, attribute, None)
        if not callable(factory):
            names = [name for name in vars(source) if not name.startswith("_")]
            raise UsageError(f"'{where}' has no factory '{attribute}'", hint=nearest(attribute, names))
        module = _call(factory, spec)
        if spec.checkpoint is not None:
            load_checkpoint(module, spec.checkpoint, model=spec.name)
        return LoadedModel(module)

    def adopt(self, module: nn.Module) -> LoadedModel | None:
        """Know nothing about a live model: the general rules apply."""
        return None


def _call(factory: Any, spec: ModelSpec) -> nn.Module:
    try:
        module = factory(**spec.options)
    except Exception as error:
        raise AdapterError(
            f"factory '{spec.name}' raised {type(error).__name__}: {error}",
            hint=f"called with options {dict(spec.options)}",
        ) from error
    if not isinstance(module, nn.Module):
        raise UsageError(f"factory '{spec.name}' returned {type(module).__name__}, expected a torch.nn.Module")
    return module


def _import_file(path: Path) -> ModuleType:
    path = path.resolve()
    if not path.is_file():
        raise UsageError(f"'{path}' does not exist", hint="a path in a config is relative to the config file")
    name = f"_usae_probe_user_{path.stem}_{hashlib.sha256(str(path).encode()).hexdigest()[:8]}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise UsageError(f"'{path}' is no Python file")
    source = importlib.util.module_from_spec(spec)
    sys.modules[name] = source
    try:
        with _on_path(path.parent):
            spec.loader.exec_module(source)
    except Exception as error:
        del sys.modules[name]
        raise AdapterError(f"'{path}' cannot be imported: {type(error).__name__}: {error}") from error
    return source


def _import_package(name: str) -> ModuleType:
    try:
        with _on_path(Path.cwd()):
            return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise UsageError(
            f"no module '{name}': {error}", hint="a file is named by its path: 'my_file.py:factory'"
        ) from error
    except Exception as error:
        raise AdapterError(f"module '{name}' cannot be imported: {type(error).__name__}: {error}") from error


@contextmanager
def _on_path(folder: Path) -> Iterator[None]:
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        sys.path.remove(str(folder))
