"""A site that is no model: low-level statistics of a picture, as a floor for what two models have in common."""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from ..attaching import attach
from ..errors import ImageError, UsageError
from ..hooks import HookedModel
from ..images import ImageSource, Preprocessing, iter_batches
from ..world import one_thread

SIZE = 64
"""Side of the pictures that are looked at, in pixels."""
THUMBNAIL = 16
FREQUENCIES = (1 / 4, 1 / 8, 1 / 16)
"""Of the Gabor filters, in cycles per pixel."""
ORIENTATIONS = 4
"""Directions in which the filters' gratings vary: 0° (vertical stripes), 45°, 90° (horizontal stripes), 135°."""
CELLS = 4
"""Rows and columns of the grid that energies are averaged on."""

_BANDWIDTH = 0.56  # standard deviation of the envelope in wavelengths: one octave
_FLOOR = 1e-6  # energy of a grating of half a grey level of 255
_LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601
_RANK = 1e-6  # singular values below this share of the first are rounding errors
_UNCHANGED = {"image_size": SIZE, "mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0), "crop_pct": 1.0}


class PixelStatistics(nn.Module):
    """Standardised low-level statistics of pictures: colours in their places, and energies of stripes.

    s = [(P (t − t̄)) / a | (log(e + 10⁻⁶) − m) / b], where

    - t [768] is the colour thumbnail: means over 4×4 pixels, 16×16 per channel; P [p, 768] its first p ≤ 128 principal
      axes (rows of norm 1, the largest entry of each positive).
    - e [3·4·16] are Gabor energies of the luminance L: e_{f,θ} = |g_{f,θ} ∗ L|², the quadrature pair's squares added,
      averaged over the 4×4 cells of 16×16 pixels; in the order frequency, orientation, cell row by row. The filter is a
      product of two one-dimensional ones, g(x, y) = h(x; f cos θ) h(y; f sin θ), h(x; u) = n(x) (e^{2πiux} − κ_u) with
      n a normal density of σ = 0.56 / f pixels, and κ_u such that h sums to 0 where u ≠ 0: uniform light gives nothing.
      Pictures are reflected at their edges.
    - a and b are one scalar each: over the fitted pictures a block's variances add up to its number of dimensions.

    Energies of quadrature pairs: Adelson and Bergen (1985); means of filter energies as texture statistics: Portilla
    and Simoncelli (2000). Parameters that a training could change there are none: all tensors are buffers.

    Args:
        axes: P, [p, 768], over channel, row, column.
        centre: t̄, [768].
        energy_mean: m, [192].
        scales: a and b.
    """

    axes: Tensor
    centre: Tensor
    energy_mean: Tensor
    scales: Tensor
    horizontal: Tensor
    vertical: Tensor

    def __init__(
        self,
        axes: Float[Tensor, "p 768"],
        centre: Float[Tensor, "768"],
        energy_mean: Float[Tensor, "192"],
        scales: tuple[float, float],
    ) -> None:
        super().__init__()
        filters = _filters()
        for name, tensor in {
            "axes": axes,
            "centre": centre,
            "energy_mean": energy_mean,
            "scales": torch.tensor(scales, dtype=torch.float64),
            "horizontal": filters[0],
            "vertical": filters[1],
        }.items():
            self.register_buffer(name, tensor.to(torch.float32).contiguous())

    @property
    def n_components(self) -> int:
        """Dimensions of the first block, p."""
        return len(self.axes)

    def forward(self, images: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b d"]:
        """Return the statistics of pictures [b, 3, 64, 64] in [0, 1], d = p + 192.

        Raises:
            UsageError: for pictures of another size.
        """
        if images.shape[-2:] != (SIZE, SIZE):
            given = "×".join(map(str, images.shape[-2:]))
            raise UsageError(f"pixel statistics were given pictures of {given} pixels, expected {SIZE}×{SIZE}")
        scores = (thumbnails(images) - self.centre) @ self.axes.T
        energies = log_energies(images, self.horizontal, self.vertical) - self.energy_mean
        return torch.cat([scores / self.scales[0], energies / self.scales[1]], dim=1)


def fit_pixel_statistics(
    source: ImageSource,
    images: np.ndarray,
    *,
    n_components: int = 128,
    n_images: int = 2000,
    batch_size: int = 64,
    seed: int = 0,
) -> PixelStatistics:
    """Find the principal axes, means and scales of pictures; the same pictures give the same bits.

    Args:
        source: of the pictures.
        images: [n] places in it; give training images only, `buffer.read("train", []).image_index` say.
        n_components: principal components of the thumbnails, at most; there are fewer than pictures.
        n_images: pictures that are looked at, drawn by `seed`; at most.
        batch_size: pictures at a time.
        seed: of the draw.

    Raises:
        UsageError: for a number out of range.
        ImageError: when fewer than two pictures can be decoded, or all of them look the same at this size.
    """
    if min(n_components, batch_size) < 1 or n_images < 2:
        given = f"n_components={n_components}, batch_size={batch_size} and n_images={n_images}"
        raise UsageError(f"{given} must be at least 1, 1 and 2")
    known = np.unique(images)
    chosen = np.sort(np.random.default_rng(seed).permutation(known)[:n_images])
    with one_thread():
        light, energy = _measured(source, chosen, batch_size)
        if len(light) < 2:
            raise ImageError(f"{len(light)} of {len(chosen)} pictures could be decoded; statistics need at least 2")
        centre = light.mean(dim=0)
        singular, axes = torch.linalg.svd(light - centre, full_matrices=False)[1:]
        rank = int((singular > _RANK * singular[0]).sum()) if singular[0] > _RANK else 0
        if not rank:
            raise ImageError(f"all of the {len(light)} pictures look the same at {THUMBNAIL}×{THUMBNAIL} pixels")
        kept = min(n_components, rank)
        spread = singular[:kept].square().sum() / len(light)
        variance = energy.var(dim=0, unbiased=False).sum()
    axes = axes[:kept]
    largest = axes.gather(1, axes.abs().argmax(dim=1, keepdim=True))
    scales = (math.sqrt(spread / kept), math.sqrt(variance / energy.shape[1]) or 1.0)
    return PixelStatistics(axes * largest.sign(), centre, energy.mean(dim=0), scales)


def attach_pixel_statistics(module: PixelStatistics, name: str = "pixels") -> HookedModel:
    """Attach to pixel statistics as to a model: the site is `NAME/statistics`, one row per image."""
    whole = nn.Sequential()
    whole.add_module("statistics", module)
    return attach(whole, name=name, layers=["statistics"], **_UNCHANGED)  # type: ignore[arg-type]


def thumbnails(images: Float[Tensor, "b 3 64 64"]) -> Float[Tensor, "b 768"]:
    """Return colour thumbnails: the mean of every 4×4 pixels, channel by channel, row by row."""
    return F.avg_pool2d(images, SIZE // THUMBNAIL).flatten(1)


def log_energies(
    images: Float[Tensor, "b 3 64 64"], horizontal: Float[Tensor, "f 2 64 64"], vertical: Float[Tensor, "f 2 64 64"]
) -> Float[Tensor, "b 192"]:
    """Return log(e + 10⁻⁶) of the luminance's Gabor energies, see `PixelStatistics`.

    Args:
        images: in [0, 1].
        horizontal: of every filter its factor along a row, real and imaginary part, as a matrix: [place, pixel].
        vertical: the same along a column.
    """
    luma = torch.einsum("c,bcyx->byx", torch.tensor(_LUMA, dtype=images.dtype, device=images.device), images)
    along = torch.einsum("fpix,byx->bfpyi", horizontal, luma)
    both = torch.einsum("fqjy,bfpyi->bfpqji", vertical, along)
    real, imaginary = both[:, :, 0, 0] - both[:, :, 1, 1], both[:, :, 0, 1] + both[:, :, 1, 0]
    energy = F.avg_pool2d(real.square() + imaginary.square(), SIZE // CELLS)
    return (energy + _FLOOR).log().flatten(1)


def _filters() -> tuple[Float[Tensor, "f 2 64 64"], Float[Tensor, "f 2 64 64"]]:
    """Return the factors of all filters along rows and along columns as matrices, in float64."""
    horizontal, vertical = [], []
    for frequency in FREQUENCIES:
        for orientation in range(ORIENTATIONS):
            angle = math.pi * orientation / ORIENTATIONS
            horizontal.append(_factor(frequency, frequency * math.cos(angle)))
            vertical.append(_factor(frequency, frequency * math.sin(angle)))
    return torch.stack(horizontal), torch.stack(vertical)


def _factor(frequency: float, u: float) -> Float[Tensor, "2 64 64"]:
    """Return h(·; u) as the matrices that convolve a reflected row with its real and imaginary part."""
    sigma = _BANDWIDTH / frequency
    radius = min(math.ceil(3 * sigma), SIZE - 1)
    x = torch.arange(-radius, radius + 1, dtype=torch.float64)
    envelope = torch.exp(-x.square() / (2 * sigma**2))
    envelope = envelope / envelope.sum()
    wave = torch.stack([torch.cos(2 * math.pi * u * x), torch.sin(2 * math.pi * u * x)])
    if abs(u) > 1e-9:  # the cosine of 90° is not quite 0
        wave[0] -= (envelope * wave[0]).sum()
    pixels = F.pad(torch.eye(SIZE, dtype=torch.float64), (radius, radius), mode="reflect")
    windows = pixels.unfold(1, 2 * radius + 1, 1)  # [pixel, place, 2 radius + 1]
    return torch.einsum("xit,pt->pix", windows, envelope * wave)


def _measured(source: ImageSource, chosen: np.ndarray, batch_size: int) -> tuple[Tensor, Tensor]:
    """Return thumbnails and log energies of pictures in float64."""
    see = Preprocessing((SIZE, SIZE), (0.0, 0.0, 0.0), (1.0, 1.0, 1.0), crop_pct=1.0)
    horizontal, vertical = _filters()
    light = [torch.empty(0, 3 * THUMBNAIL**2, dtype=torch.float64)]
    energy = [torch.empty(0, len(horizontal) * CELLS**2, dtype=torch.float64)]
    for batch in iter_batches(source, chosen, batch_size):
        if batch.pictures:
            pictures = see(batch.pictures).double()
            light.append(thumbnails(pictures))
            energy.append(log_energies(pictures, horizontal, vertical))
    return torch.cat(light), torch.cat(energy)
