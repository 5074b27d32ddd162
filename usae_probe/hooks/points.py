"""Named points: layers that an adapter offers under names of its own, instead of module paths."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor, nn


class Point(NamedTuple):
    """A place in a model where an activation can be read and replaced.

    Attributes:
        module: the module whose output it is.
        convert: from the module's output to the activation as the adapter's library shows it, such as heads with an
            axis of their own; None where they are the same. Differentiable.
        revert: back again; None where `convert` is None or has no inverse (then the point cannot be spliced).
    """

    module: nn.Module
    convert: Callable[[Tensor], Tensor] | None = None
    revert: Callable[[Tensor], Tensor] | None = None
