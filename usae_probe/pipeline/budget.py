"""What a scan can do in a given time: how many layers, images and steps, from a few seconds of trial."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import NamedTuple

import numpy as np
import torch

from ..config import RunConfig
from ..errors import ImageError, UsageError
from ..hooks import HookedModel, evenly
from ..images import ImageSource, iter_batches
from ..probes.scan import pairs_between, times_as_long
from ..sites import Site
from .timing import step_seconds

_RESERVE = 0.8
"""Share of a budget that is planned for: times are estimates."""
_TRIAL_IMAGES = 16
_TRIAL_STEPS = 8
_LEAST_IMAGES = 500
_UPDATES = 25
"""Least updates of each encoder; such a matrix is coarse."""
_HARVEST = 0.6
"""Share of what is left besides the measures that the harvest may take."""


class Chosen(NamedTuple):
    """What a budget has room for.

    Attributes:
        sites: of each model.
        images: drawn from the source.
        steps: of `[train]`, as for a training of two sites.
        harvest, training, measures: seconds that each is expected to take.
    """

    sites: dict[str, tuple[Site, ...]]
    images: int
    steps: int
    harvest: float
    training: float
    measures: float


def fit_budget(
    config: RunConfig,
    models: Sequence[HookedModel],
    source: ImageSource,
    sites: Mapping[str, tuple[Site, ...]],
    *,
    spent: float = 0.0,
) -> Chosen:
    """Choose as many layers, then images, then steps as fit into `scan.budget`; never more than the config asks for.

    A few images and steps are timed. Layers go first because they are what a scan is for; each encoder must get at
    least 25 updates, and 500 images (all, where there are fewer) must be seen. A floor takes half of the time.

    Args:
        config: with a budget.
        models: hooked models, of the same architecture as those of the run.
        source: the images.
        sites: the layers that are wanted, by model.
        spent: seconds of the budget that are gone.

    Raises:
        UsageError: when two layers of each model do not fit.
    """
    began = time.perf_counter()
    budget = config.scan.seconds or 0.0
    n_images = min(len(source), config.images.limit or len(source))
    per_image = _image_seconds(config, models, source, sites)
    deepest = max(len(of_model) for of_model in sites.values())
    candidates = [{name: tuple(evenly(of, n)) for name, of in sites.items()} for n in range(deepest, 0, -1)]
    candidates = [
        c for c in candidates if (sum(map(len, c.values())) > 1 and max(map(len, c.values())) > 1) or c == sites
    ]
    dims = {str(site): model.d_in(site) for model in models for site in sites[model.name]}
    steps_at = _StepSeconds(config, [_widths(c, dims) for c in (candidates[0], candidates[-1])])
    rate = _multiplications_per_second()
    share = 0.5 if config.scan.floor else 1.0
    left = share * (budget * _RESERVE - spent - (time.perf_counter() - began))
    least_images = min(n_images, _LEAST_IMAGES)
    for candidate in candidates:
        widths = _widths(candidate, dims)
        step = _seconds_per_step(config, candidate, dims, steps_at)
        measures = _measure_seconds(config, widths, n_images, rate, steps_at(widths))
        enough = min(2 * _UPDATES, _steps_wanted(config, n_images))
        harvest = min(_HARVEST * left, left - measures - enough * step)
        images = max(least_images, min(n_images, int(harvest / per_image)))
        measures = _measure_seconds(config, widths, images, rate, steps_at(widths))
        room, wanted = left - measures - images * per_image, _steps_wanted(config, images)
        if room >= min(enough, wanted) * step:
            steps = max(1, min(wanted, int(room / step)))
            return Chosen(candidate, images, steps, images * per_image, steps * step, measures)
    need = least_images * per_image + 2 * _UPDATES * step + measures
    raise UsageError(
        f"a budget of {config.scan.budget} is too short: two layers of each model, {least_images} images and "
        f"{2 * _UPDATES} steps take about {need / _RESERVE:.0f} seconds here"
        f"{', and the floor as long' if config.scan.floor else ''}",
        hint="give it more time, or smaller models, n_latents or batch_size",
    )


def _seconds_per_step(
    config: RunConfig, sites: Mapping[str, Sequence[Site]], dims: Mapping[str, int], steps_at: _StepSeconds
) -> float:
    """Return what a step of `[train]` costs: it may be several of the joint training, and every pair has its own."""
    widths, seconds = _widths(sites, dims), 0.0
    if "joint" in config.scan.strategies:
        seconds += times_as_long(len(widths), config.scan) * steps_at(widths)
    if "pairs" in config.scan.strategies:
        names = [str(site) for of_model in sites.values() for site in of_model]
        seconds += sum(steps_at([dims[a], dims[b]]) for a, b in pairs_between(names))
    return seconds


def _widths(sites: Mapping[str, Sequence[Site]], dims: Mapping[str, int]) -> list[int]:
    return [dims[str(site)] for of_model in sites.values() for site in of_model]


def _steps_wanted(config: RunConfig, images: int) -> int:
    rows = images * (1 - config.images.holdout) * (1 - config.images.validation)
    epoch = max(1, int(rows // min(config.train.batch_size, max(rows, 1))))
    return config.train.n_steps(epoch)


def _image_seconds(
    config: RunConfig, models: Sequence[HookedModel], source: ImageSource, sites: Mapping[str, Sequence[Site]]
) -> float:
    """Time decoding, preprocessing and the forward passes of a few images, the second time round."""
    n = min(_TRIAL_IMAGES, len(source), config.images.batch_size)
    seconds = 0.0
    for _ in range(2):
        began = time.perf_counter()
        for batch in iter_batches(source, np.arange(n), n, workers=config.images.workers):
            if not batch.pictures:
                raise ImageError(f"none of the first {n} images of {source.location} could be decoded")
            for model in models:
                with torch.no_grad():
                    model.rows(model.preprocess(batch.pictures), sites=sites[model.name])
        seconds = time.perf_counter() - began
    return seconds / n


class _StepSeconds:
    """Seconds of a training step, a straight line in the width of all sites through two that are timed."""

    def __init__(self, config: RunConfig, widths: Sequence[Sequence[int]]) -> None:
        self._points = [
            (float(sum(of)), step_seconds(config.usae, config.train, of, steps=_TRIAL_STEPS)) for of in widths
        ]

    def __call__(self, widths: Sequence[int]) -> float:
        (x0, t0), (x1, t1) = self._points[0], self._points[-1]
        if x0 == x1:
            return t0
        return max(t1 + (t0 - t1) * (sum(widths) - x1) / (x0 - x1), 1e-4)


def _multiplications_per_second() -> float:
    """Time float64 products, which CKA and ridge regression consist of."""
    a = np.random.default_rng(0).standard_normal((512, 512))
    a @ a
    began = time.perf_counter()
    for _ in range(4):
        a @ a
    return 4 * 512**3 / max(time.perf_counter() - began, 1e-6)


def _measure_seconds(config: RunConfig, widths: Sequence[int], images: int, rate: float, step: float) -> float:
    """Estimate similarity, ridge regression and codes from their products, and what a cell costs besides."""
    probes, total = config.probes, sum(widths)
    share = config.images.holdout if config.scan.split == "holdout" else config.images.validation
    n_eval, n_train = max(2.0, images * share), min(images * 0.8, probes.train_rows)
    n, cells = min(n_eval, probes.similarity_images), len(widths) * (len(widths) + 1) / 2
    products = 0.0
    if probes.similarity_images:
        products += sum((1 + probes.nulls) * n * min(a, n) * min(b, n) for a, b in combinations(widths, 2))
        products += sum(n * n * width for width in widths)
    if probes.linear:
        products += sum(
            (n_train + n_eval) * width * total + 6 * (12 * width**3 + 3 * width**2 * total) for width in widths
        )
    entries = cells * (1 + probes.nulls) * (n * probes.neighbours + n_eval * config.usae.k + 20 * config.usae.n_latents)
    rows = len(widths) * n_eval / config.train.batch_size * step
    return products / rate + 2e-7 * entries + 2 * rows
