"""What is drawn at random in a step: a function of seed and step alone, so that a resumed training draws it again.

Every purpose has a stream of its own, so that one never shifts another.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from ..buffer import Rows
from ..config import TrainConfig
from ..errors import ConfigError
from ..shapes import RowMatrix
from ..world import current
from .kernels.base import Entries

SOURCE, PAIRING, PARTNER, NOISE, DROPOUT, ROWS, ALIGNED = 1, 2, 3, 4, 5, 6, 7
_AND = " + "


def draw_source(sites: Sequence[str], how: TrainConfig, step: int) -> str:
    """Return the site whose code is decoded in a step, or `all`; with weights w, site i is drawn with w_i / Σ w.

    With one site there is nothing to draw, and weights are not looked at.
    """
    if how.source == "all":
        return "all"
    draw = np.random.default_rng((how.seed, SOURCE, step))
    if isinstance(how.source, str) or len(sites) == 1:
        return sites[int(draw.integers(len(sites)))]
    given = np.array([how.source.get(site, 0.0) for site in sites])
    return sites[int(draw.choice(len(sites), p=given / given.sum()))]


def draw_aligned(sites: Sequence[str], how: TrainConfig, step: int) -> str:
    """Return the `align_sites` sites that share a support in a step, joined by ` + `; `all` where there are no more."""
    if len(sites) <= how.align_sites:
        return "all"
    draw = np.random.default_rng((how.seed, ALIGNED, step))
    return _AND.join(sites[i] for i in sorted(draw.choice(len(sites), how.align_sites, replace=False)))


def sources_of(source: str, sites: Sequence[str]) -> Sequence[str]:
    """Return the sites that a step's source names: all, or those joined by ` + `.

    Example:
        >>> sources_of("a + c", ["a", "b", "c"]), sources_of("all", ["a", "b"])
        (['a', 'c'], ['a', 'b'])
    """
    return sites if source == "all" else source.split(_AND)


def draw_partner(sites: Sequence[str], source: str, how: TrainConfig, step: int) -> str:
    """Return another site than `source`, for the contrastive term; all others are equally likely."""
    others = [site for site in sites if site != source]
    return others[int(np.random.default_rng((how.seed, PARTNER, step)).integers(len(others)))]


def check_weighted_sites(sites: Sequence[str], how: TrainConfig) -> None:
    """Check that `source` and `site_weights` name sites of this training; with one site neither means anything.

    Raises:
        ConfigError: for an unknown site.
    """
    tables: dict[str, str | dict[str, float] | None] = {"source": how.source, "site_weights": how.site_weights}
    for key, given in tables.items():
        if not isinstance(given, dict) or len(sites) == 1:
            continue
        unknown = [site for site in given if site not in sites]
        if unknown:
            raise ConfigError(
                f"train.{key} has a weight for '{unknown[0]}', which is no site of this training",
                hint=f"sites: {', '.join(sites)}",
            )


def demand_labels(how: TrainConfig, labels: np.ndarray | None) -> None:
    """Check that there are labels where rows are to be paired by them.

    Raises:
        ConfigError: when there are none.
    """
    if how.pairing == "label" and labels is None:
        raise ConfigError(
            "train.pairing = 'label' needs a label for every image",
            hint="use images with labels (class folders, or label arrays in an .npz), or give labels=",
        )


class Mispairing:
    """Pairs the rows of different sites at random within a batch, in every step anew.

    Args:
        how: `pairing` and `seed`.
        labels: [images of the source] whole numbers: with `pairing = "label"` only rows of images with the same one
            are exchanged.

    Raises:
        ConfigError: when labels are needed and missing.
    """

    def __init__(self, how: TrainConfig, labels: np.ndarray | None) -> None:
        demand_labels(how, labels)
        self._seed = how.seed
        self._labels = np.asarray(labels, dtype=np.int64) if how.pairing == "label" else None

    def of(self, rows: Rows, step: int, share: slice) -> dict[str, np.ndarray]:
        """Return the share of each site's rows in one step, in an order of the site's own.

        Raises:
            ConfigError: when an image has no label.
        """
        draw = np.random.default_rng((self._seed, PAIRING, step))
        if self._labels is None:
            return {site: values[draw.permutation(len(values))[share]] for site, values in rows.values.items()}
        if len(rows.image_index) and rows.image_index.max() >= len(self._labels):
            raise ConfigError(
                f"{len(self._labels)} labels were given, none for image {rows.image_index.max()}",
                hint="give one for every image of the source that was harvested",
            )
        label = self._labels[rows.image_index]
        return {site: values[exchanged(draw, label)[share]] for site, values in rows.values.items()}


def exchanged(draw: np.random.Generator, label: np.ndarray) -> np.ndarray:
    """Return a random order of [n] things in which every one is exchanged with one of the same label.

    Example:
        >>> exchanged(np.random.default_rng(0), np.array([1, 2, 1])).tolist()[1]
        1
    """
    order = np.empty(len(label), dtype=np.int64)
    order[np.argsort(label, kind="stable")] = np.lexsort((draw.random(len(label)), label))
    return order


class Perturbation:
    """Noise on the encoder's input and dropout of latents in one training step.

    Args:
        how: `input_noise` and `seed`.
        step: number of the step.
    """

    def __init__(self, how: TrainConfig, step: int) -> None:
        self.noise = how.input_noise
        self._seed, self._step = how.seed, step
        self._generators: dict[int, torch.Generator] = {}

    def rows(self, x: RowMatrix) -> RowMatrix:
        """Return x̃ + σ ε with ε ~ N(0, 1) per entry; σ is in units of the rows' own spread, because E‖x̃‖² = d_in."""
        if not self.noise:
            return x
        return x + self.noise * self._draw(torch.randn, NOISE, x)

    def values(self, z: Entries, dropout: float) -> Entries:
        """Return z with each entry left out with probability `dropout` = p, the others divided by 1 − p."""
        if not dropout:
            return z
        kept = self._draw(torch.rand, DROPOUT, z) >= dropout
        return torch.where(kept, z / (1.0 - dropout), torch.zeros_like(z))

    def _draw(self, distribution: Callable[..., Tensor], stream: int, like: Tensor) -> Tensor:
        """Draw for the whole batch and return this process's share: several processes draw what one would."""
        if stream not in self._generators:
            words = np.random.SeedSequence((self._seed, stream, self._step)).generate_state(1, np.uint64)
            self._generators[stream] = torch.Generator(like.device).manual_seed(int(words[0] >> np.uint64(1)))
        generator = self._generators[stream]

        def draw(n: int) -> Tensor:
            return distribution((n, *like.shape[1:]), generator=generator, device=like.device, dtype=like.dtype)

        return current().drawn(draw, len(like))
