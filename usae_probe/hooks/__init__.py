"""Hooks: live models with nnsight around them."""

from .blocks import evenly, find_blocks
from .catalogue import LayerName
from .inspect import Call, LayerInfo, Output
from .layout import Grid, Layout, LayoutRule, default_layout
from .model import HookedModel
from .points import Point
from .tokens import coarsest, from_rows, resample, to_rows

__all__ = [
    "Call",
    "Grid",
    "HookedModel",
    "LayerInfo",
    "LayerName",
    "Layout",
    "LayoutRule",
    "Output",
    "Point",
    "coarsest",
    "default_layout",
    "evenly",
    "find_blocks",
    "from_rows",
    "resample",
    "to_rows",
]
