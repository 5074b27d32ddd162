"""Outputs that are no single tensor: every tensor has a name, and each can be replaced in a rebuilt container."""

from __future__ import annotations

from collections import OrderedDict, UserDict, defaultdict, namedtuple
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutputWithPooling, ImageClassifierOutput

from usae_probe.errors import SiteError
from usae_probe.hooks.containers import tensors_in, the_element, with_tensor


class Pair(NamedTuple):
    first: Tensor
    second: Any


Old = namedtuple("Old", ["a", "b"])


@dataclass
class Record:
    hidden: Tensor
    note: str = "kept"


@dataclass(frozen=True)
class Frozen:
    hidden: Tensor
    other: Tensor | None = None


@dataclass
class Derived:
    """A field that is no argument of `__init__`, and one that `__init__` makes."""

    hidden: Tensor
    total: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.total = self.hidden.sum()


class Mine(tuple):
    __slots__ = ()


def t(value: float) -> Tensor:
    return torch.full((2, 3), float(value))


CASES: list[tuple[Any, dict[str, float]]] = [
    (t(1), {"": 1}),
    ((t(1), t(2)), {"0": 1, "1": 2}),
    ([t(1), None, t(2)], {"0": 1, "2": 2}),
    (Mine((t(1), t(2))), {"0": 1, "1": 2}),
    ({"x": t(1), "n": 7, "y": t(2)}, {"x": 1, "y": 2}),
    (OrderedDict(b=t(1), a=t(2)), {"b": 1, "a": 2}),
    ({0: t(1), 1: t(2)}, {"0": 1, "1": 2}),
    (UserDict({"x": t(1), "y": t(2)}), {"x": 1, "y": 2}),
    (defaultdict(list, {"x": t(1), "y": t(2)}), {"x": 1, "y": 2}),
    (Pair(t(1), "a note"), {"first": 1}),
    (Old(t(1), t(2)), {"a": 1, "b": 2}),
    (Record(t(1), note="other"), {"hidden": 1}),
    (Frozen(t(1), t(2)), {"hidden": 1, "other": 2}),
    (
        BaseModelOutputWithPooling(last_hidden_state=t(1), pooler_output=t(2), hidden_states=(t(3), t(4))),
        {"last_hidden_state": 1, "pooler_output": 2, "hidden_states.0": 3, "hidden_states.1": 4},
    ),
    (ImageClassifierOutput(logits=t(1)), {"logits": 1}),
    ((t(1), {"a": [t(2), Pair(t(3), (t(4),))]}), {"0": 1, "1.a.0": 2, "1.a.1.first": 3, "1.a.1.second.0": 4}),
    (torch.return_types.max((t(1), t(2))), {"0": 1, "1": 2}),
]
IDS = [type(output).__name__ + str(place) for place, (output, _) in enumerate(CASES)]


def numbers(output: Any) -> dict[str, float]:
    return {name: tensor[0, 0].item() for name, tensor in tensors_in(output).items()}


@pytest.mark.parametrize(("output", "expected"), CASES, ids=IDS)
def test_every_tensor_has_a_name(output: Any, expected: dict[str, float]) -> None:
    assert numbers(output) == expected


@pytest.mark.parametrize(("output", "expected"), CASES, ids=IDS)
def test_each_can_be_replaced_in_a_copy_of_the_same_type(output: Any, expected: dict[str, float]) -> None:
    for name in expected:
        changed = with_tensor(output, name, t(9))
        assert type(changed) is type(output)
        assert numbers(changed) == {**expected, name: 9}
        assert list(tensors_in(changed)) == list(expected)  # in the same order
        assert numbers(output) == expected  # the given one is as it was


def test_what_is_no_tensor_is_carried_over() -> None:
    assert with_tensor({"x": t(1), "n": 7, 3: None}, "x", t(9)) | {"x": None} == {"x": None, "n": 7, 3: None}
    assert with_tensor([t(1), "a", None], "0", t(9))[1:] == ["a", None]
    assert with_tensor(Record(t(1), note="other"), "hidden", t(9)).note == "other"
    assert with_tensor(Pair(t(1), "a note"), "first", t(9)).second == "a note"
    assert with_tensor(OrderedDict(a=t(1), b=t(2)), "a", t(9)).popitem()[0] == "b"
    changed = with_tensor(defaultdict(list, {"x": t(1)}), "x", t(9))
    assert changed["new"] == []


def test_what_a_container_carries_beside_its_items_is_carried_over() -> None:
    output = ImageClassifierOutput(logits=t(1), hidden_states=(t(2), t(3)))
    changed = with_tensor(output, "hidden_states.1", t(9))
    assert changed.logits is output.logits
    assert changed[0] is output.logits  # Hugging Face's can be read by place, key and attribute
    assert changed["hidden_states"][0] is output.hidden_states[0]
    assert changed.hidden_states[1][0, 0] == 9
    assert changed.attentions is None


def test_a_dataclass_is_copied_not_made_anew() -> None:
    record = Derived(t(1))
    changed = with_tensor(record, "total", torch.tensor(5.0))
    assert changed.total == 5
    assert changed.hidden is record.hidden
    assert record.total == 6
    assert with_tensor(record, "hidden", t(2)).total == 6  # what the layer has put there, not what a new one would have


@pytest.mark.parametrize("output", [None, 3, "text", [], (), {}, (None, "a"), Record, SimpleNamespace(x=t(1))])
def test_what_holds_no_tensor_that_can_be_named(output: Any) -> None:
    assert tensors_in(output) == {}


def test_longer_names_are_not_mistaken_for_shorter_ones() -> None:
    output = {"h": [t(1), t(2)], "h1": t(3), "h.1": t(4)}
    assert numbers(with_tensor(output, "h1", t(9)))["h1"] == 9
    eleven = [t(value) for value in range(11)]
    assert numbers(with_tensor(eleven, "10", t(99))) == {**{str(value): value for value in range(10)}, "10": 99}


def test_a_name_that_is_not_there() -> None:
    with pytest.raises(SiteError, match="the output has no element '#z'"):
        with_tensor({"x": t(1)}, "z", t(9))


def test_the_element() -> None:
    assert the_element(["", "x"], "x", "layer") == "x"
    assert the_element({"x": 1}, None, "layer") == "x"
    with pytest.raises(SiteError, match="layer 'l' outputs 2 tensors") as caught:
        the_element(["0", "1.a"], None, "l")
    assert caught.value.hint == "choose one of: l#0, l#1.a"
    with pytest.raises(SiteError, match="layer 'l' outputs no tensor"):
        the_element([], None, "l")
    with pytest.raises(SiteError, match="layer 'l' has no element '#2' in its output") as caught:
        the_element(["0", "1"], "2", "l")
    assert caught.value.hint == "it has: l#0, l#1"


def test_gradients_flow_to_the_tensor_and_to_its_neighbours() -> None:
    neighbour, value = t(1).requires_grad_(), t(2).requires_grad_()
    changed = with_tensor({"a": neighbour, "b": (t(3),)}, "b.0", value)
    (changed["a"] * 2 + changed["b"][0] * 5).sum().backward()
    assert torch.equal(neighbour.grad, t(2))
    assert torch.equal(value.grad, t(5))
