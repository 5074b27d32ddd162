"""The split of images into training, validation and holdout: drawn by image and by seed, never by row."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np

from .errors import ConfigError, UsageError, nearest

SplitName = Literal["train", "validation", "holdout"]
SPLITS: tuple[SplitName, ...] = get_args(SplitName)


def known_split(split: str) -> str:
    """Return the split's name.

    Raises:
        UsageError: when there is no such split.
    """
    if split not in SPLITS:
        raise UsageError(f"'{split}' is no split", hint=nearest(split, SPLITS) or f"one of {', '.join(SPLITS)}")
    return split


def spoken(split: str) -> str:
    """Return what rows of a split are called: `held-out` for the holdout, else its name."""
    return "held-out" if split == "holdout" else split


@dataclass(frozen=True)
class Split:
    """Which images of a source are used for what.

    Attributes:
        train, validation, holdout: indices into the source, int64, disjoint, in the order in which they are read.
    """

    train: np.ndarray
    validation: np.ndarray
    holdout: np.ndarray

    def __getitem__(self, name: str) -> np.ndarray:
        return {"train": self.train, "validation": self.validation, "holdout": self.holdout}[name]

    def __iter__(self) -> Iterator[tuple[SplitName, np.ndarray]]:
        return ((name, self[name]) for name in SPLITS)

    @property
    def n_images(self) -> int:
        """Images drawn in all."""
        return sum(len(indices) for _, indices in self)

    def digest(self) -> str:
        """SHA-256 over the three index lists: equal digests mean the same images in the same order."""
        digest = hashlib.sha256()
        for name, indices in self:
            digest.update(f"{name}:{len(indices)}:".encode())
            digest.update(np.ascontiguousarray(indices, dtype="<i8").tobytes())
        return digest.hexdigest()


def draw_split(
    n: int, *, limit: int | None = None, holdout: float = 0.1, validation: float = 0.1, seed: int = 0
) -> Split:
    """Draw `limit` of `n` images, then `holdout` of those, then `validation` of what is left for training.

    Counts are rounded; a share above zero gets at least one image, and at least one image stays for training.

    Args:
        n: images in the source.
        limit: images to draw over the whole source (not the first ones); None for all.
        holdout: share of the drawn images kept for evaluation, in [0, 1).
        validation: share of the remaining training images kept for choices, in [0, 1).
        seed: the same seed gives the same split.

    Raises:
        ConfigError: when no image is left for training.
    """
    drawn = np.random.default_rng(seed).permutation(n)[: n if limit is None else limit]
    n_holdout = _share(len(drawn), holdout)
    n_validation = _share(len(drawn) - n_holdout, validation)
    train = drawn[n_holdout + n_validation :]
    if len(train) == 0:
        raise ConfigError(
            f"{len(drawn)} images leave none for training after holdout={holdout} and validation={validation}",
            hint="give more images, or set holdout and validation to smaller shares (0 switches them off)",
        )
    return Split(
        train=train.astype(np.int64),
        validation=drawn[n_holdout : n_holdout + n_validation].astype(np.int64),
        holdout=drawn[:n_holdout].astype(np.int64),
    )


def _share(n: int, share: float) -> int:
    return max(1, round(n * share)) if share > 0 else 0
