"""A Hugging Face `datasets` data set as an image source: from Python, a folder on disk, or a name on the hub."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import ImageError, UsageError, first_line, nearest
from .decode import decode_file

PREFIX = "datasets:"
_LABELS = ("label", "labels", "class", "fine_label", "target")
_SAMPLED = 64
_BATCH = 1024


class HuggingFaceSource:
    """The pictures of one column of a `datasets.Dataset`, with the labels of another.

    Pictures are decoded here, from the bytes or files that the column holds, by the rules of every other source.

    Args:
        dataset: a map-style `datasets.Dataset`.
        image: the column of pictures; default: the only one there is.
        label: the column of labels (class labels, integers or strings); default: `label` and its like, or else the only
            column of class labels.
        location: where it came from, for people to read.

    Raises:
        UsageError: for a column that there is not, or when several could be meant.
        ImageError: when it has no rows.
    """

    kind = "dataset"

    def __init__(
        self, dataset: Any, *, image: str | None = None, label: str | None = None, location: str = "datasets.Dataset"
    ) -> None:
        from datasets import Image

        self.location = location
        if len(dataset) == 0:
            raise ImageError(f"data set {location} is empty")
        self.image = _image_column(dataset.features, image, location)
        self._pictures = dataset.select_columns([self.image]).cast_column(self.image, Image(decode=False))
        self.labels, self.class_names = _labels(dataset, _label_column(dataset.features, label, location))

    def __len__(self) -> int:
        return len(self._pictures)

    def load(self, index: int) -> np.ndarray:
        """Decode one picture to uint8 [H, W, 3]; see `decode_file`."""
        stored, name = self._pictures[index][self.image], self.describe(index)
        if stored is None:
            raise ImageError(f"{name} is empty: its column '{self.image}' holds no picture there")
        data = stored["bytes"]
        return decode_file(Path(stored["path"]) if data is None else io.BytesIO(data), name)

    def describe(self, index: int) -> str:
        """`dataset[17]`."""
        return f"dataset[{index}]"

    def label(self, index: int) -> int | None:
        """The label's place in `class_names`, or the integer that the column holds."""
        return None if self.labels is None else int(self.labels[index])

    def fingerprint(self) -> str:
        """SHA-256 over labels and size and file name of every picture, and the bytes of 64 pictures spread evenly."""
        digest = hashlib.sha256(f"datasets\0{len(self)}\0{self.class_names}\0".encode())
        if self.labels is not None:
            digest.update(self.labels.tobytes())
        sampled = set(np.linspace(0, len(self) - 1, _SAMPLED).round().astype(int).tolist())
        for start in range(0, len(self), _BATCH):
            for index, stored in enumerate(self._pictures[start : start + _BATCH][self.image], start):
                data, path = (None, None) if stored is None else (stored["bytes"], stored["path"])
                digest.update(f"{Path(path or '').name}:{-1 if data is None else len(data)}\0".encode())
                if index in sampled and data is not None:
                    digest.update(data)
        return digest.hexdigest()


def is_saved(folder: Path) -> bool:
    """Whether a folder was written by `save_to_disk`."""
    return (folder / "dataset_dict.json").is_file() or all(
        (folder / name).is_file() for name in ("state.json", "dataset_info.json")
    )


def open_hugging_face(name: str, options: Mapping[str, Any]) -> HuggingFaceSource:
    """Open a folder that `save_to_disk` wrote, or whatever `datasets.load_dataset` takes.

    Args:
        name: a folder, or a name on the hub.
        options: `image` and `label` name columns, `split` the split; all others go to `load_dataset`.

    Raises:
        UsageError: for a split, column or option that there is not.
        ImageError: when it cannot be loaded, offline for instance.
    """
    given = dict(options)
    columns = {key: given.pop(key, None) for key in ("image", "label")}
    split = given.pop("split", None)
    location = f"{PREFIX}{name}"
    with _quiet():
        loaded = _of_split(_loaded(name, given), split, location)
    if not hasattr(loaded, "__getitem__") or not hasattr(loaded, "select_columns") or not hasattr(loaded, "__len__"):
        raise UsageError(f"{location} has no rows by number", hint="leave out streaming: rows are drawn by number")
    return HuggingFaceSource(loaded, **columns, location=location)


def _loaded(name: str, options: Mapping[str, Any]) -> Any:
    import datasets

    folder = Path(name)
    try:
        if folder.is_dir() and is_saved(folder):
            return datasets.load_from_disk(name, **options)
        return datasets.load_dataset(name, **options)
    except (TypeError, ValueError) as error:  # of its arguments, or of files that hold no data set
        raise UsageError(
            f"'{PREFIX}{name}' cannot be loaded with options {dict(options)}: {first_line(error)}"
        ) from error
    except Exception as error:
        from huggingface_hub.constants import HF_HOME

        hint = (
            f"with network: hf download {name} --repo-type dataset, then copy that machine's HF_HOME here "
            f"({HF_HOME}); or give a folder: {PREFIX}FOLDER"
        )
        raise ImageError(
            f"data set '{name}' cannot be loaded: {type(error).__name__}: {first_line(error)}",
            hint="copy or save it again" if folder.exists() else hint,
        ) from error


def _of_split(loaded: Any, split: str | None, location: str) -> Any:
    if not isinstance(loaded, Mapping):
        if split is not None:
            raise UsageError(f"{location} was saved without splits, but split = '{split}' is asked for")
        return loaded
    if split is None and len(loaded) == 1:
        return next(iter(loaded.values()))
    if split not in loaded:
        found = f"no split '{split}'" if split else f"{len(loaded)} splits"
        hint = f"options = {{split = '{next(iter(loaded))}'}}; there are {', '.join(loaded)}"
        raise UsageError(f"{location} has {found}", hint=hint)
    return loaded[split]


def _image_column(features: Mapping[str, Any], wanted: str | None, location: str) -> str:
    from datasets import Image

    pictures = [name for name, feature in features.items() if isinstance(feature, Image)]
    if wanted is None and len(pictures) == 1:
        return pictures[0]
    if wanted in pictures:
        return str(wanted)
    listed = ", ".join(f"{name}: {getattr(feature, 'dtype', feature)}" for name, feature in features.items())
    if wanted is not None:
        raise UsageError(
            f"{location} has no column of pictures '{wanted}'", hint=f"{nearest(wanted, pictures)} {listed}"
        )
    if pictures:
        hint = f"options = {{image = '{pictures[0]}'}}; there are {', '.join(pictures)}"
        raise UsageError(f"{location} has {len(pictures)} columns of pictures", hint=hint)
    raise UsageError(f"{location} has no column of pictures (datasets.Image): {listed}")


def _label_column(features: Mapping[str, Any], wanted: str | None, location: str) -> str | None:
    from datasets import ClassLabel

    if wanted is not None:
        if wanted not in features:
            raise UsageError(
                f"{location} has no column '{wanted}'", hint=f"{nearest(wanted, features)} {list(features)}"
            )
        return wanted
    classes = [name for name, feature in features.items() if isinstance(feature, ClassLabel)]
    named = [name for name in _LABELS if name in classes] or [name for name in _LABELS if name in features]
    return next(iter(named), classes[0] if len(classes) == 1 else None)


def _labels(dataset: Any, column: str | None) -> tuple[np.ndarray | None, list[str] | None]:
    """The label of every row (−1 where it has none), and the names of the labels."""
    if column is None:
        return None, None
    feature, values = dataset.features[column], dataset.select_columns([column])[:][column]
    names = getattr(feature, "names", None)
    known = [value for value in values if value is not None]
    if names is None and all(isinstance(value, str) for value in known):
        names = sorted(set(known))
        places = {name: place for place, name in enumerate(names)}
        values = [None if value is None else places[value] for value in values]
    elif not all(isinstance(value, int) for value in known):
        raise UsageError(
            f"column '{column}' holds {getattr(feature, 'dtype', feature)}, expected class labels, integers or strings",
            hint="name another one: options = {label = '…'}",
        )
    return np.array([-1 if value is None else value for value in values], dtype=np.int64), names


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the library's bars off the terminal, where ours are."""
    import datasets

    shown = datasets.is_progress_bar_enabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            datasets.enable_progress_bars()
