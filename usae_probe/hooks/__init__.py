"""Hooks: live models with nnsight around them."""

from .inspect import LayerInfo
from .layout import Layout, LayoutRule, default_layout
from .model import HookedModel
from .tokens import to_rows

__all__ = ["HookedModel", "LayerInfo", "Layout", "LayoutRule", "default_layout", "to_rows"]
