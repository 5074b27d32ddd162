"""What the images of a run do to latents: z_pre and z of chosen ones in every row, moments and rates of all."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from ..buffer import ActivationBuffer
from ..errors import NoLatentsError
from ..split import SPLITS
from ..usae import USAE
from .firing import image_begins
from .rows import RowProgress, check_sites, one_site_per_model, whole_images

PerImage = Literal["mean", "max"] | None
"""How the rows of an image become one activation; None: every row is one."""


@dataclass(frozen=True, eq=False)
class SiteNatural:
    """What natural images do to latents in one site.

    An *activation* is a row's z_pre, or the mean or maximum of an image's rows.

    Attributes:
        slots: column of each chosen latent.
        z: [rows, chosen], 0 where the latent is not selected.
        activation: [activations, chosen].
        mean, sd: [n_latents], of the activations of every latent.
        rate: [n_latents], share of rows that fire it.
    """

    slots: dict[int, int]
    z: Float[np.ndarray, "rows chosen"]
    activation: Float[np.ndarray, "activations chosen"]
    mean: Float[np.ndarray, " n"]
    sd: Float[np.ndarray, " n"]
    rate: Float[np.ndarray, " n"]

    def standardised(
        self, latent: int, activation: Float[np.ndarray, " activations"]
    ) -> Float[np.ndarray, " activations"]:
        """Return how many standard deviations activations lie above the latent's natural mean."""
        score: np.ndarray = (activation.astype(np.float64) - self.mean[latent]) / self.sd[latent]
        return score

    def score(self, latent: int, activation: float) -> float:
        """Return how many standard deviations one activation lies above the latent's natural mean."""
        return float(self.standardised(latent, np.array([activation]))[0])

    def strongest(self, latent: int) -> float:
        """Return the `score` of the largest natural activation of a chosen latent."""
        return self.score(latent, float(self.of(latent).max()))

    def of(self, latent: int) -> Float[np.ndarray, " activations"]:
        """Return the natural activations of a chosen latent, in the order of the rows."""
        return self.activation[:, self.slots[latent]]

    def fires(self, latent: int) -> Float[np.ndarray, " rows"]:
        """Return z of a chosen latent in every row."""
        return self.z[:, self.slots[latent]]


@dataclass(frozen=True, eq=False)
class NaturalActivations:
    """What the images of a buffer, of all splits, do to latents; see `natural_activations`.

    Attributes:
        sites: by site, in order.
        image: [rows] number of each row's image in the source; the rows of an image lie together.
        split: [rows] what it was used for, as a place in `SPLITS`.
        per_image: how activations are made of rows.
    """

    sites: dict[str, SiteNatural]
    image: Int[np.ndarray, " rows"]
    split: Int[np.ndarray, " rows"]
    per_image: PerImage

    @property
    def n(self) -> int:
        """Number of activations of a latent in a site."""
        return len(self.images) if self.per_image else len(self.image)

    @property
    def unit(self) -> str:
        """What an activation is of: `rows`, or `images`."""
        return "images" if self.per_image or len(self.images) == len(self.image) else "rows"

    @cached_property
    def begins(self) -> Int[np.ndarray, " images"]:
        """First row of every image."""
        return image_begins(self.image)

    @cached_property
    def images(self) -> Int[np.ndarray, " images"]:
        """Numbers of the images, in the order of their rows."""
        numbers: np.ndarray = self.image[self.begins]
        return numbers

    def strongest(self, values: Float[np.ndarray, " rows"]) -> Float[np.ndarray, " images"]:
        """Return the largest of each image's values; those that are one per image already stay as they are."""
        if len(values) == len(self.images):
            return values
        largest: np.ndarray = np.maximum.reduceat(values, self.begins)
        return largest

    def demand_live(self, latent: int) -> None:
        """Check that some image fires a latent somewhere.

        Raises:
            NoLatentsError: when none does: its encoder rows were never trained to mean anything.
        """
        if not any((found.fires(latent) > 0).any() for found in self.sites.values()):
            raise NoLatentsError(
                f"latent {latent} is dead: none of {len(self.images):,} images fires it in {', '.join(self.sites)}",
                hint="choose others: latents.csv has the class of every latent",
            )


@torch.no_grad()
def natural_activations(
    usae: USAE,
    buffer: ActivationBuffer,
    latents: Sequence[int],
    *,
    sites: Sequence[str] | None = None,
    per_image: PerImage = None,
    progress: Callable[[int, int], None] | None = None,
) -> NaturalActivations:
    """Measure what the images of a buffer, of all splits, do to latents.

        activation = z_pre of a row, or its mean or maximum over the rows of an image

    One pass over the rows; memory O(rows · latents · sites), 8 bytes each.

    Args:
        usae: a trained USAE.
        buffer: activations of (at least) the sites.
        latents: whose activations are kept.
        sites: which ones; one per model by default.
        per_image: how the rows of an image become one activation; None: every row is one.
        progress: called with (rows done, rows in all).

    Raises:
        UsageError: for a number that is no latent (SiteError: for an unknown site).
        BufferIntegrityError: when the buffer lacks a site.
    """
    chosen = one_site_per_model(usae.sites) if sites is None else tuple(dict.fromkeys(sites))
    wanted = list(dict.fromkeys(int(latent) for latent in latents))
    usae.check_latents(wanted)
    for site in chosen:
        usae.site_index(site)
    check_sites(usae, buffer, chosen)
    parts = {site: _Part(usae, site, wanted, per_image) for site in chosen}
    images, splits = [np.empty(0, dtype=np.int64)], [np.empty(0, dtype=np.int8)]
    done = RowProgress(progress, sum(buffer.n_rows(split) for split in SPLITS))
    for i, split in enumerate(SPLITS):
        for rows in whole_images(buffer, split, chosen):
            begins = torch.from_numpy(image_begins(rows.image_index)) if per_image else None
            for site, values in rows.values.items():
                parts[site].add(torch.from_numpy(values), begins)
            images.append(rows.image_index.astype(np.int64))
            splits.append(np.full(rows.n, i, dtype=np.int8))
            done.add(rows.n)
    found = {site: part.result() for site, part in parts.items()}
    return NaturalActivations(found, np.concatenate(images), np.concatenate(splits), per_image)


class _Part:
    """What is known of one site so far. Moments about the first chunk's means, so that no digits are lost."""

    def __init__(self, usae: USAE, site: str, wanted: Sequence[int], per_image: PerImage) -> None:
        self.usae, self.site, self.per_image = usae, site, per_image
        self.wanted = torch.tensor(wanted, dtype=torch.long)
        self.slot_of = torch.full((usae.n_latents,), -1, dtype=torch.long)
        self.slot_of[self.wanted] = torch.arange(len(wanted))
        self.z, self.activation = [np.empty((0, len(wanted)), np.float32)], [np.empty((0, len(wanted)), np.float32)]
        self.about: Tensor | None = None
        self.sum, self.squares = (torch.zeros(usae.n_latents, dtype=torch.float64) for _ in range(2))
        self.fires = torch.zeros(usae.n_latents, dtype=torch.long)
        self.n_rows = self.n = 0

    def add(self, x: Tensor, begins: Tensor | None) -> None:
        normalised = self.usae.normalise(x, self.site)
        z_pre = self.usae.z_pre(normalised, self.site)
        coded = self.usae.code(normalised, self.site, z_pre)
        codes = coded.support.codes(coded.values)
        active = z_pre.cpu() if begins is None else reduced(z_pre.cpu(), begins, self.per_image)
        self._moments(active)
        self.activation.append(active[:, self.wanted].float().numpy())
        self._fires(codes.values.cpu(), codes.indices.cpu())

    def _moments(self, active: Tensor) -> None:
        if self.about is None:
            self.about = active.double().mean(dim=0)
        centred = active.double() - self.about
        self.sum += centred.sum(dim=0)
        self.squares += centred.square().sum(dim=0)
        self.n += len(active)

    def _fires(self, values: Tensor, indices: Tensor) -> None:
        fired = values > 0
        self.fires += torch.bincount(indices[fired], minlength=self.usae.n_latents)
        self.n_rows += len(values)
        row, entry = torch.nonzero(fired & (self.slot_of[indices] >= 0), as_tuple=True)
        z = torch.zeros(len(values), len(self.wanted))
        z[row, self.slot_of[indices[row, entry]]] = values[row, entry].float()
        self.z.append(z.numpy())

    def result(self) -> SiteNatural:
        mean = self.sum / max(self.n, 1)
        sd = (self.squares / max(self.n, 1) - mean.square()).clamp_min(0).sqrt()
        about = torch.zeros_like(mean) if self.about is None else self.about
        return SiteNatural(
            {latent: slot for slot, latent in enumerate(self.wanted.tolist())},
            np.concatenate(self.z),
            np.concatenate(self.activation),
            (mean + about).numpy(),
            sd.clamp_min(torch.finfo(torch.float32).tiny).numpy(),
            (self.fires / max(self.n_rows, 1)).double().numpy(),
        )


def reduced(z_pre: Float[Tensor, "rows n"], begins: Int[Tensor, " images"], how: PerImage) -> Float[Tensor, "images n"]:
    """Make one number of the rows of each image: their mean or their maximum."""
    counts = torch.diff(begins, append=torch.tensor([len(z_pre)]))
    found: Tensor = torch.segment_reduce(z_pre, "mean" if how == "mean" else "max", lengths=counts, axis=0)
    return found
