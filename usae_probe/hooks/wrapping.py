"""nnsight's wrapping: what it leaves in the modules' `__dict__`, and how it is taken off again."""

from __future__ import annotations

import threading
from weakref import WeakKeyDictionary

from torch import nn

_KEYS = ("forward", "__nnsight__")
_LOCK = threading.Lock()
_ORIGINALS: WeakKeyDictionary[nn.Module, _Original] = WeakKeyDictionary()


class _Original:
    """What a module's `__dict__` held before it was first wrapped, and how many wrappings are on it now."""

    def __init__(self, module: nn.Module) -> None:
        self.values = {key: module.__dict__[key] for key in _KEYS if key in module.__dict__}
        self.wrappings = 0


class Wrapping:
    """Remembers all modules of a model before nnsight wraps them.

    Several hooked models may stand on one module at a time, and be closed in any order: the last one restores it.
    """

    def __init__(self, module: nn.Module) -> None:
        self._parts = list(module.modules())
        with _LOCK:
            for part in self._parts:
                if part not in _ORIGINALS:
                    _ORIGINALS[part] = _Original(part)
                _ORIGINALS[part].wrappings += 1

    def remove(self) -> None:
        """Give every module that no other wrapping is on its `__dict__` entries back. Safe to call twice."""
        with _LOCK:
            for part in self._parts:
                original = _ORIGINALS[part]
                original.wrappings -= 1
                if not original.wrappings:
                    del _ORIGINALS[part]
                    _restore(part, original)
            self._parts = []


def _restore(part: nn.Module, original: _Original) -> None:
    for key in _KEYS:
        part.__dict__.pop(key, None)
    part.__dict__.update(original.values)
