"""What is known about the pictures of a source: their class, or what they were drawn from."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from .arrays import ArraySource
from .datasets import DatasetSource
from .sources import ImageSource

UNKNOWN = -1
"""As a value: nothing is known about this picture."""
CLASS = "class"


class Annotation(NamedTuple):
    """One thing known about every picture of a source.

    Attributes:
        name: `class`, or the factor's name.
        values: int64 [N], for every picture of the source a place in `names`; −1 where unknown.
        names: names of the values.
    """

    name: str
    values: np.ndarray
    names: list[str]


def annotations_of(source: ImageSource) -> list[Annotation]:
    """Return what a source says about its pictures: at most its classes, of an array file also its factors.

    Classes are called `class` (`labels` where an array file has a factor of that name). A label of −1 means unknown, as
    in scikit-learn and torchvision. Named values keep their places; without names every integer that occurs is a value,
    called by its digits.

    A data set is asked for its `targets`, as torchvision's have them. One without is read item by item, which decodes
    every picture once, unless neither its first nor its last item has a label.
    """
    if isinstance(source, ArraySource):
        known = ({} if source.labels is None else {"labels": source.labels}) | source.factors
        called = {"labels": CLASS} if CLASS not in source.factors else {}
        return [
            _annotation(called.get(name, name), values, source.value_names.get(name)) for name, values in known.items()
        ]
    labels = _labels(source)
    return [] if labels is None else [_annotation(CLASS, labels, source.class_names)]


def _annotation(name: str, values: np.ndarray, names: list[str] | None) -> Annotation:
    values = values.astype(np.int64)
    # A data set may name fewer classes than it has labels; such names would be those of other values.
    if names is not None and values.min() >= UNKNOWN and values.max() < len(names):
        return Annotation(name, values, list(names))
    known = values != UNKNOWN
    occurring, places = np.unique(values[known], return_inverse=True)
    coded = np.full(len(values), UNKNOWN, dtype=np.int64)
    coded[known] = places
    return Annotation(name, coded, [str(value) for value in occurring])


def _labels(source: ImageSource) -> np.ndarray | None:
    ends = (0, len(source) - 1)
    labels = [_label(source, i) for i in ends]
    if labels == [UNKNOWN, UNKNOWN]:
        return None
    targets = _targets(source) if isinstance(source, DatasetSource) else None
    # A data set may change its targets on the way into an item.
    if targets is not None and targets[list(ends)].tolist() == labels:
        return targets
    return np.array([_label(source, i) for i in range(len(source))], dtype=np.int64)


def _targets(source: DatasetSource) -> np.ndarray | None:
    """Return a data set's `targets` where they are a whole number per item."""
    try:
        targets = np.asarray(getattr(source.dataset, "targets", None))
    except ValueError:  # a ragged list: boxes and the like
        return None
    return targets if targets.shape == (len(source),) and targets.dtype.kind in "iu" else None


def _label(source: ImageSource, index: int) -> int:
    try:
        label = source.label(index)
    except OSError:  # a data set reads the whole item, and the picture's file is damaged
        return UNKNOWN
    return UNKNOWN if label is None else label
