"""The site grammar: one spelling for a model, a layer of it and the way its output becomes rows.

`model/layer[~call][#element][:head][@policy]`, for example `vit/blocks.11`, `vit/blocks.8@mean`, `m/act~1`,
`m/encoder#last_hidden_state`, `tl/blocks.5.attn.hook_z:3`. `@policy` is left out only for `pool`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, get_args

from .errors import SiteError, nearest

Policy = Literal["pool", "cls", "mean", "patch", "all"]
POLICIES: tuple[Policy, ...] = get_args(Policy)

_MODEL = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")
_LAYER = re.compile(
    r"(?P<layer>[^~#:@/\s]+)(?:~(?P<call>\d+))?(?:\#(?P<element>[^~#:@/\s]+))?(?::(?P<head>\d+))?(?:@(?P<policy>\w+))?"
)
_GRAMMAR = "layer[~call][#element][:head][@policy]"


@dataclass(frozen=True)
class Site:
    """A model, one of its layers and a token policy.

    Attributes:
        model: name of the model.
        layer: dotted module path, or the adapter's canonical hook name.
        call: which call of a module that runs more than once in a forward pass; None for its only call.
        element: which element of an output that is no single tensor.
        head: attention head.
        policy: how the layer's output becomes rows.

    >>> str(Site.parse("vit/blocks.8@mean")), str(Site.parse("vit/blocks.8@pool"))
    ('vit/blocks.8@mean', 'vit/blocks.8')
    """

    model: str
    layer: str
    call: int | None = None
    element: str | None = None
    head: int | None = None
    policy: Policy = "pool"

    @classmethod
    def parse(cls, text: str) -> Site:
        """Parse `model/layer…`.

        Raises:
            SiteError: when `text` does not follow the grammar.
        """
        model, slash, layer = text.partition("/")
        if not slash:
            raise SiteError(f"site '{text}' has no model", hint=f"write it as model/{_GRAMMAR}, e.g. vit/blocks.11")
        return cls.of(model, layer)

    @classmethod
    def of(cls, model: str, layer: str) -> Site:
        """Parse the part behind the slash, `layer[~call][#element][:head][@policy]`, for a model given by name.

        Raises:
            SiteError: when the model's name or the layer does not follow the grammar.
        """
        check_model_name(model)
        match = _LAYER.fullmatch(layer)
        if match is None:
            raise SiteError(
                f"'{layer}' is no layer of the form {_GRAMMAR}", hint="e.g. blocks.11, blocks.8@mean, act~1"
            )
        policy = match["policy"] or "pool"
        if policy not in POLICIES:
            raise SiteError(
                f"unknown token policy '@{policy}' in '{model}/{layer}', expected one of {', '.join(POLICIES)}",
                hint=nearest(policy, POLICIES),
            )
        return cls(
            model=model,
            layer=match["layer"],
            call=None if match["call"] is None else int(match["call"]),
            element=match["element"],
            head=None if match["head"] is None else int(match["head"]),
            policy=policy,
        )

    def __str__(self) -> str:
        call = "" if self.call is None else f"~{self.call}"
        element = "" if self.element is None else f"#{self.element}"
        head = "" if self.head is None else f":{self.head}"
        policy = "" if self.policy == "pool" else f"@{self.policy}"
        return f"{self.model}/{self.layer}{call}{element}{head}{policy}"


def check_model_name(name: str) -> None:
    """Check that `name` can stand before the slash of a site.

    Raises:
        SiteError: when it holds anything but letters, digits, `_`, `.` and `-`.
    """
    if _MODEL.fullmatch(name) is None:
        raise SiteError(f"model name '{name}' is not usable in a site", hint="use letters, digits, '_', '.' and '-'")


def model_of(site: str) -> str:
    """Return the model's name in a spelled-out site."""
    return site.partition("/")[0]


def layer_of(site: str) -> str:
    """Return what stands behind the model's name in a spelled-out site: layer, call, element, head and policy."""
    return site.partition("/")[2]


def by_model(sites: Iterable[str]) -> dict[str, list[str]]:
    """Return the sites of each model, in order.

    >>> by_model(["a/x", "b/y", "a/z"])
    {'a': ['a/x', 'a/z'], 'b': ['b/y']}
    """
    found: dict[str, list[str]] = {}
    for site in sites:
        found.setdefault(model_of(site), []).append(site)
    return found


def file_stem(site: str) -> str:
    """Spell a site for file and data-set names: `/` becomes `__`."""
    return site.replace("/", "__")
