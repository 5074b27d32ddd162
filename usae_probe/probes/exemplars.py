"""The images of a run that fire a latent most, to stand beside the pictures that were made for it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch

from ..buffer import ActivationBuffer
from ..errors import UsageError
from ..split import SPLITS, SplitName
from ..usae import USAE, Codes
from .rows import CHUNK_ROWS, RowProgress, check_sites, one_site_per_model


class Exemplar(NamedTuple):
    """An image that fires a latent.

    Attributes:
        image: its number in the source.
        value: z of the latent, in units of the code; the largest where the image has several rows.
        split: what the image was used for.
    """

    image: int
    value: float
    split: SplitName


class NaturalFires(NamedTuple):
    """What natural images do to one latent in one site.

    Attributes:
        exemplars: the images that fire it most, most active first; images with z = 0 are none.
        held_out_maximum: the largest z on held-out images; 0 where none of them fires it.
        n_held_out: held-out images looked at, firing or not.
    """

    exemplars: list[Exemplar]
    held_out_maximum: float
    n_held_out: int


@torch.no_grad()
def find_exemplars(
    usae: USAE,
    buffer: ActivationBuffer,
    latents: Sequence[int],
    *,
    sites: Sequence[str] | None = None,
    n: int = 4,
    progress: Callable[[int, int], None] | None = None,
) -> dict[int, dict[str, NaturalFires]]:
    """Find the images of a buffer, of all splits, that fire given latents most in each site.

    One pass over the rows; memory O(latents · sites · n) and a chunk of rows.

    Args:
        usae: a trained USAE.
        buffer: activations of (at least) the sites.
        latents: which ones.
        sites: which ones; one per model by default.
        n: images per latent and site, at most. Of equally active ones those with the smaller number come first.
        progress: called with (rows done, rows in all).

    Returns:
        {latent: {site: NaturalFires}}.

    Raises:
        UsageError: for a number that is no latent, or n below 1 (SiteError: for an unknown site).
        BufferIntegrityError: when the buffer lacks a site.
    """
    chosen = one_site_per_model(usae.sites) if sites is None else tuple(dict.fromkeys(sites))
    wanted = _known_latents(usae, latents)
    if n < 1:
        raise UsageError(f"{n} exemplars were asked for; n must be at least 1")
    for site in chosen:
        usae.site_index(site)
    check_sites(usae, buffer, chosen)
    best = {site: _Best(wanted, usae.n_latents, n) for site in chosen}
    done = RowProgress(progress, sum(buffer.n_rows(split) for split in SPLITS))
    for split in SPLITS if best and wanted else ():
        for rows in buffer.chunks(split, CHUNK_ROWS, list(chosen)):
            for site, values in rows.values.items():
                best[site].add(usae.encode(torch.from_numpy(values), site), rows.image_index, split)
            done.add(rows.n)
    n_held_out = buffer.n_images("holdout")
    return {
        latent: {site: best[site].natural(slot, n_held_out) for site in chosen} for slot, latent in enumerate(wanted)
    }


class _Best:
    """The most active images of each wanted latent in one site, so far.

    Attributes:
        slot, image, split: [kept] int64: place among the wanted latents, image, place among the splits.
        value: [kept] z.
        held_out_maximum: [wanted].
    """

    def __init__(self, wanted: Sequence[int], n_latents: int, n: int) -> None:
        self.n = n
        self.slot_of = np.full(n_latents, -1, dtype=np.int64)
        self.slot_of[list(wanted)] = np.arange(len(wanted))
        self.slot = self.image = self.split = np.empty(0, dtype=np.int64)
        self.value = np.empty(0)
        self.held_out_maximum = np.zeros(len(wanted))

    def add(self, codes: Codes, image_index: np.ndarray, split: SplitName) -> None:
        values, indices = (part.cpu().numpy() for part in codes)
        slots = self.slot_of[indices]
        row, entry = np.nonzero((values > 0) & (slots >= 0))
        slot, value = slots[row, entry], values[row, entry].astype(np.float64)
        if split == "holdout":
            np.maximum.at(self.held_out_maximum, slot, value)
        self.slot = np.append(self.slot, slot)
        self.image = np.append(self.image, image_index[row])
        self.split = np.append(self.split, np.full(len(slot), SPLITS.index(split)))
        self.value = np.append(self.value, value)
        self._prune()

    def natural(self, slot: int, n_held_out: int) -> NaturalFires:
        mine = self.slot == slot
        found = zip(self.image[mine].tolist(), self.value[mine].tolist(), self.split[mine].tolist(), strict=True)
        images = [Exemplar(image, value, SPLITS[split]) for image, value, split in found]
        return NaturalFires(images, float(self.held_out_maximum[slot]), n_held_out)

    def _prune(self) -> None:
        """Keep the best row of every image, then the n best images of every slot; an image dropped may come again."""
        self._keep(np.lexsort((-self.value, self.image, self.slot)))
        self._keep(_new(self.slot) | _new(self.image))
        self._keep(np.lexsort((self.image, -self.value, self.slot)))
        begins = np.flatnonzero(_new(self.slot))
        rank = np.arange(len(self.slot)) - np.repeat(begins, np.diff(begins, append=len(self.slot)))
        self._keep(rank < self.n)

    def _keep(self, places: np.ndarray) -> None:
        self.slot, self.image, self.split, self.value = (
            part[places] for part in (self.slot, self.image, self.split, self.value)
        )


def _new(sorted_values: np.ndarray) -> np.ndarray:
    """Mark the entries that differ from the one before."""
    return np.append(True, sorted_values[1:] != sorted_values[:-1])[: len(sorted_values)]


def _known_latents(usae: USAE, latents: Sequence[int]) -> list[int]:
    wanted = [int(latent) for latent in dict.fromkeys(latents)]
    for latent in wanted:
        if not 0 <= latent < usae.n_latents:
            raise UsageError(
                f"there is no latent {latent}", hint=f"the USAE's latents are numbered 0 to {usae.n_latents - 1}"
            )
    return wanted
