"""What sources know about their pictures."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import Dataset, TensorDataset

from usae_probe.errors import ImageError
from usae_probe.images import Annotation, ArraySource, annotations_of, open_source

PICTURES = np.zeros((4, 2, 2, 3), dtype=np.uint8)


def listed(found: list[Annotation]) -> list[tuple[str, list[int], list[str]]]:
    assert all(annotation.values.dtype == np.int64 for annotation in found)
    return [(annotation.name, annotation.values.tolist(), annotation.names) for annotation in found]


def named(values: np.ndarray, names: list[str]) -> list[str | None]:
    """What every picture is called."""
    return [None if value < 0 else names[value] for value in values]


class Items(Dataset):
    """A data set of given items that counts how often each is read."""

    def __init__(self, items: list[object], **attributes: object) -> None:
        self.items, self.reads = items, [0] * len(items)
        self.__dict__ |= attributes

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> object:
        self.reads[index] += 1
        if isinstance(self.items[index], Exception):
            raise self.items[index]
        return self.items[index]


# --- folders ---


def test_folders_are_classes(tmp_path: Path) -> None:
    for name in ("cat/a.png", "cat/b.png", "dog/c.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.fromarray(PICTURES[0]).save(tmp_path / name)
    assert listed(annotations_of(open_source(tmp_path))) == [("class", [0, 0, 1], ["cat", "dog"])]
    Image.fromarray(PICTURES[0]).save(tmp_path / "top.png")
    assert annotations_of(open_source(tmp_path)) == []


# --- arrays ---


def test_an_array_alone_says_nothing() -> None:
    assert annotations_of(ArraySource(PICTURES)) == []


def test_labels_and_factors_in_order() -> None:
    # labels 7, −3, 7 and unknown: values −3 and 7, in that order; the −1 of a factor is unknown, too
    source = ArraySource(
        PICTURES,
        labels=np.array([7, -3, 7, -1], dtype=np.int16),
        factors={"hue": np.array([2, 0, 1, -1]), "size": np.array([30, 10, 10, 30], dtype=np.uint8)},
        value_names={"hue": ["red", "green", "blue", "grey"]},
    )
    assert listed(annotations_of(source)) == [
        ("class", [1, 0, 1, -1], ["-3", "7"]),
        ("hue", [2, 0, 1, -1], ["red", "green", "blue", "grey"]),  # places are kept, also of what does not occur
        ("size", [1, 0, 0, 1], ["10", "30"]),
    ]
    assert source.class_names is None


def test_named_labels_are_classes() -> None:
    source = ArraySource(PICTURES, labels=np.array([1, 0, 1, 1]), value_names={"labels": ["cat", "dog"]})
    assert source.class_names == ["cat", "dog"]
    assert listed(annotations_of(source)) == [("class", [1, 0, 1, 1], ["cat", "dog"])]


def test_a_factor_called_class_keeps_its_name() -> None:
    source = ArraySource(PICTURES, labels=np.arange(4), factors={"class": np.zeros(4, dtype=int)})
    assert [annotation.name for annotation in annotations_of(source)] == ["labels", "class"]


def test_nothing_known() -> None:
    source = ArraySource(PICTURES, factors={"hue": np.full(4, -1)})
    assert listed(annotations_of(source)) == [("hue", [-1] * 4, [])]


def test_a_file_with_names(tmp_path: Path) -> None:
    np.savez(
        tmp_path / "x.npz",
        images=PICTURES,
        labels=np.array([0, 1, 0, 1]),
        labels_names=np.array(["cat", "a long-haired dog"]),
        hue=np.array([1, 1, 0, -1]),
        hue_names=np.array(["red", "blaugrün"]),
        depth=np.array([4, 3, 2, 1]),
        other_names=np.array(["of", "nothing"]),  # like any other array that is none of ours
    )
    source = open_source(tmp_path / "x.npz")
    assert source.value_names == {"labels": ["cat", "a long-haired dog"], "hue": ["red", "blaugrün"]}
    assert all(type(name) is str for names in source.value_names.values() for name in names)
    assert listed(annotations_of(source)) == [
        ("class", [0, 1, 0, 1], ["cat", "a long-haired dog"]),
        ("hue", [1, 1, 0, -1], ["red", "blaugrün"]),
        ("depth", [3, 2, 1, 0], ["1", "2", "3", "4"]),
    ]


def test_integers_called_names_are_a_factor(tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", images=PICTURES, hue=np.arange(4), hue_names=np.arange(4))
    assert list(open_source(tmp_path / "x.npz").factors) == ["hue", "hue_names"]


def test_names_do_not_change_the_fingerprint() -> None:
    """Other names mean the same pictures and labels: nothing has to be harvested again."""
    plain = ArraySource(PICTURES, factors={"hue": np.zeros(4, dtype=int)})
    other = ArraySource(PICTURES, factors={"hue": np.zeros(4, dtype=int)}, value_names={"hue": ["red"]})
    assert plain.fingerprint() == other.fingerprint()


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (np.array(["red", "green"]), r"x.npz has 2 names for the values of hue, which go from 0 to 2 \(value v is"),
        (np.array([["red", "green", "blue"]]), r"hue_names of .*x.npz is <U5 \[1, 3\], expected strings .*one axis"),
        (np.array([b"red", b"green", b"blue"]), r"hue_names of .*x.npz is \|S5 \[3\], expected strings \(dtype U\)"),
        (np.array([0.1, 0.2, 0.3]), r"hue_names of .*x.npz is float64 \[3\]"),
    ],
)
def test_names_that_do_not_fit(tmp_path: Path, names: np.ndarray, message: str) -> None:
    np.savez(tmp_path / "x.npz", images=PICTURES, hue=np.array([0, 1, 2, 0]), hue_names=names)
    with pytest.raises(ImageError, match=message):
        open_source(tmp_path / "x.npz")


def test_names_of_nothing_or_of_negative_values() -> None:
    with pytest.raises(ImageError, match="value_names of memory name 'hue', expected one of labels, size"):
        ArraySource(
            PICTURES, labels=np.arange(4), factors={"size": np.arange(4)}, value_names={"hue": ["red", "green"]}
        )
    with pytest.raises(ImageError, match="2 names for the values of size, which go from -2 to 1"):
        ArraySource(PICTURES, factors={"size": np.array([0, 1, -2, 0])}, value_names={"size": ["s", "l"]})


# --- data sets ---


def test_items_with_labels_are_read_one_by_one() -> None:
    dataset = Items([(PICTURES[0], 3), (PICTURES[0], np.int64(9)), PICTURES[0], (PICTURES[0], 3)])
    assert listed(annotations_of(open_source(dataset))) == [("class", [0, 1, -1, 0], ["3", "9"])]


def test_class_names_of_a_data_set() -> None:
    dataset = Items([(PICTURES[0], label) for label in (1, 0, 1)], classes=["cat", "dog", "eel"])
    assert listed(annotations_of(open_source(dataset))) == [("class", [1, 0, 1], ["cat", "dog", "eel"])]
    # more labels than names: those names cannot be trusted
    dataset = Items([(PICTURES[0], label) for label in (1, 0, 3)], classes=["cat", "dog", "eel"])
    assert listed(annotations_of(open_source(dataset))) == [("class", [1, 0, 2], ["0", "1", "3"])]


def test_targets_spare_reading_the_items() -> None:
    items = [(PICTURES[0], label) for label in (2, 1, 0, 1, 2)]
    for targets in ([2, 1, 0, 1, 2], torch.tensor([2, 1, 0, 1, 2])):
        dataset = Items(items, targets=targets)
        assert listed(annotations_of(open_source(dataset))) == [("class", [2, 1, 0, 1, 2], ["0", "1", "2"])]
        assert dataset.reads[1:4] == [0, 0, 0]


@pytest.mark.parametrize("targets", [[5, 1, 0, 1, 5], [2, 1, 0], [[2], [1, 0], [], [1], [2]], ["a"] * 5, None])
def test_targets_that_are_not_the_labels(targets: object) -> None:
    dataset = Items([(PICTURES[0], label) for label in (2, 1, 0, 1, 2)], targets=targets)
    assert listed(annotations_of(open_source(dataset))) == [("class", [2, 1, 0, 1, 2], ["0", "1", "2"])]


def test_pictures_without_labels_are_not_all_read() -> None:
    dataset = Items([PICTURES[0]] * 50)
    assert annotations_of(open_source(dataset)) == []
    assert sum(dataset.reads) == 2


def test_a_damaged_picture_is_unknown() -> None:
    dataset = Items([(PICTURES[0], 4), OSError("truncated"), (PICTURES[0], 4)])
    assert listed(annotations_of(open_source(dataset))) == [("class", [0, -1, 0], ["4"])]


def test_torchs_tensor_data_set() -> None:
    source = open_source(TensorDataset(torch.zeros(3, 3, 2, 2, dtype=torch.uint8), torch.tensor([7, 8, 7])))
    (found,) = annotations_of(source)
    assert named(found.values, found.names) == ["7", "8", "7"]
