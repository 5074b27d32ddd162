"""Sites of a USAE in their live models: run as they are, with other rows in their place, with a probe at the end."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from ..buffer import ActivationBuffer
from ..errors import SiteError, UsageError
from ..harvesting import common_grid
from ..hooks import Grid, HookedModel, resample
from ..images import Annotation, ImageSource, iter_batches
from ..shapes import Images, RowMatrix
from ..sites import Site
from ..split import SplitName
from ..usae import USAE
from .heads import Features, Head, Reading, fit_probe, has_head

AtGrid = Float[Tensor, "r d"]
"""Rows, several per image or resampled: another number than of what they were made of."""
_OUTPUTS = ("logits", None, "pooler_output", "last_hidden_state", "0")
"""Which tensor of a model's output is meant, in the order of trying; None is the only one."""


class LiveSite:
    """A site of a USAE in its live model: run as it is, and with other rows in the site's place.

    Rows are those that the USAE was trained on, in the model's own units: `@patch` rows are at the common grid. Where
    the layer's own grid is finer, a place is shifted by what its rows at the common grid are shifted by, resampled to
    the layer's grid (bilinear): detail that the USAE never sees stays as it is.

    Args:
        usae: on any device.
        model: the hooked model.
        site: a site of both.
        grid: places of `@patch` rows.
    """

    def __init__(self, usae: USAE, model: HookedModel, site: Site, grid: Grid | None) -> None:
        self.usae, self.model, self.site, self.key = usae, model, site, str(site)
        own = model.grid(site) if site.policy == "patch" else None
        self._grids = (own, grid) if own and grid and own != grid else None
        output, values = self._output(torch.zeros(2, *model.input_shape))
        self.head = Head(output, has_head(model, output, values))

    @property
    def rows_per_image(self) -> int:
        """Rows that the USAE has of an image."""
        return self.model.rows_per_image(self.site, self._grids[1] if self._grids else None)

    def fit(self, features: Features, labels: np.ndarray) -> None:
        """Read logits off a linear probe from now on."""
        self.head = replace(self.head, probe=fit_probe(features, labels))

    def clean(self, inputs: Images) -> tuple[AtGrid, Reading]:
        """Run the model as it is; returns the site's rows [b * rows per image, d_in] and the output."""
        seen: list[Tensor] = []

        def keep(rows: RowMatrix) -> RowMatrix:
            seen.append(self._at_common_grid(rows))
            return rows

        output = self.model.splice(inputs, self.site, keep, output=self.head.output)
        return seen[0], self.head.read(output, f"model '{self.site.model}' as it is")

    def replaced(self, inputs: Images, new: Callable[[RowMatrix], RowMatrix], what: str) -> Reading:
        """Run the model with `new` of the site's rows in their place; `what` says in errors what that is."""

        def put(own: RowMatrix) -> RowMatrix:
            rows = self._at_common_grid(own)
            replacement = new(rows).to(rows.device)
            if self._grids is None:
                return replacement
            return own + _resampled(replacement - rows, self._grids[1], self._grids[0])

        output = self.model.splice(inputs, self.site, put, output=self.head.output)
        return self.head.read(output, f"model '{self.site.model}' with {what} in the place of '{self.key}'")

    def mean(self, rows: RowMatrix) -> RowMatrix:
        """Return the mean of the training rows, as often as there are rows."""
        return self.usae.mean[self.usae.columns[self.key]].expand(len(rows), -1)

    def _at_common_grid(self, rows: RowMatrix) -> AtGrid:
        rows = rows if rows.dtype == torch.float64 else rows.float()
        if self._grids is None:
            return rows
        return _resampled(rows, *self._grids)

    def _output(self, inputs: Images) -> tuple[str | None, Tensor]:
        """Find the tensor of the output that is read.

        Raises:
            SiteError: when the layer cannot be spliced, or the output has several tensors of unknown names.
        """
        why: SiteError | None = None
        for name in _OUTPUTS:
            try:
                return name, self.model.splice(inputs, self.site, lambda rows: rows, output=name)
            except SiteError as error:
                why = error if name is None or why is None else why
        raise why or SiteError(f"model '{self.site.model}' has no output")


def _resampled(rows: RowMatrix, now: Grid, then: Grid) -> AtGrid:
    return resample(rows.reshape(-1, *now, rows.shape[1]), then).flatten(0, 2)


def live_sites(usae: USAE, models: Sequence[HookedModel], sites: Sequence[str]) -> list[LiveSite]:
    """Match sites with live models, each once.

    Raises:
        SiteError: when there are none, for one that the USAE does not have, that its model cannot serve or that has
            another width there, and where sites have different numbers of rows per image.
        UsageError: when a site's model is not given, or two models have one name.
    """
    by_name = {model.name: model for model in models}
    if len(by_name) < len(models):
        raise UsageError("two of the models given have one name", hint="names tell the models apart")
    if not sites:
        raise SiteError("sites is empty", hint=f"choose from: {', '.join(usae.sites)}")
    for name in sites:
        usae.site_index(name)
    wanted = [Site.parse(site) for site in dict.fromkeys(sites)]
    missing = list(dict.fromkeys(site.model for site in wanted if site.model not in by_name))
    if missing:
        raise UsageError(
            f"sites of {', '.join(missing)} are wanted, but the models given are: {', '.join(by_name) or 'none'}",
            hint="attach them with name=, as their sites spell it",
        )
    of_usae = [Site.parse(site) for site in usae.sites]
    grid = usae.grid or common_grid((by_name[site.model], site) for site in of_usae if site.model in by_name)
    for site in wanted:
        found, expected = by_name[site.model].d_in(site), usae.d_in[str(site)]
        if found != expected:
            raise SiteError(
                f"site '{site}' has d_in = {expected} in the USAE, but {found} in the model given",
                hint="attach the model that the USAE was trained on",
            )
    live = [LiveSite(usae, by_name[site.model], site, grid) for site in wanted]
    for one in live:
        if one.rows_per_image != live[0].rows_per_image:
            raise SiteError(
                f"rows of '{live[0].key}' and '{one.key}' do not pair up: {live[0].rows_per_image} and "
                f"{one.rows_per_image} per image",
                hint="choose sites of one token policy",
            )
    return live


class Probing:
    """Linear probes of the models without a head."""

    def __init__(
        self,
        headless: Sequence[LiveSite],
        buffer: ActivationBuffer,
        source: ImageSource,
        labels: Annotation,
        n: int,
        seed: int,
    ) -> None:
        if len(labels.values) != len(source):
            raise UsageError(f"there are {len(labels.values)} labels for {len(source)} pictures of {source.location}")
        images = images_of(buffer, source, "train")
        self.headless, self.source, self.labels = headless, source, labels.values
        self.images = drawn(images[labels.values[images] >= 0], n, (seed, 1))

    def n_batches(self, batch_size: int) -> int:
        """Forward batches that `fit` takes."""
        return len(self.headless) * -(-len(self.images) // batch_size)

    def fit(self, batch_size: int) -> Iterator[None]:
        """Fit the probes, if the images have two labels; yields after every forward batch."""
        features: dict[str, list[Tensor]] = defaultdict(list)
        decoded: list[int] = []
        for batch in iter_batches(self.source, self.images, batch_size):
            decoded += batch.indices.tolist()
            for one in self.headless:
                if batch.pictures:
                    _, reading = one.clean(one.model.preprocess(batch.pictures))
                    features[one.key] += [] if reading.features is None else [reading.features]
                yield
        if len(np.unique(self.labels[decoded])) >= 2:
            for one in self.headless:
                one.fit(torch.cat(features[one.key]), self.labels[decoded])

    def accuracy(self, images: Sequence[int], clean: Mapping[str, Reading]) -> dict[str, float]:
        """Return for each probe the share of the measured images whose label it finds; NaN where none is known."""
        labels = self.labels[list(images)]
        found = {}
        for one in self.headless:
            logits, probe = clean[one.key].logits, one.head.probe
            if logits is not None and probe is not None:
                right = probe.classes[logits.argmax(1).numpy()] == labels
                found[one.key] = float(right[labels >= 0].mean()) if (labels >= 0).any() else math.nan
        return found


def images_of(buffer: ActivationBuffer, source: ImageSource, split: SplitName) -> np.ndarray:
    """Return the numbers of a split's images, ascending.

    Raises:
        UsageError: when the source does not have them.
    """
    images: np.ndarray = np.unique(buffer.read(split, []).image_index)
    if len(images) and images[-1] >= len(source):
        raise UsageError(
            f"the buffer has image {images[-1]}, but {source.location} has {len(source)} pictures",
            hint="give the images that were harvested",
        )
    return images


def drawn(images: np.ndarray, n: int, seed: tuple[int, int]) -> np.ndarray:
    """Return at most n of the images, drawn by seed, ascending."""
    some: np.ndarray = np.sort(np.random.default_rng(seed).permutation(images)[:n])
    return some
