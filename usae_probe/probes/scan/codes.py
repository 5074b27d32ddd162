"""What one USAE says of many pairs of sites: R² and universal latents, with nulls, and where in depth latents fire."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ...buffer import ActivationBuffer
from ...config import ProbesConfig
from ...images import Annotation
from ...sites import by_model, model_of
from ...split import SplitName
from ...usae import USAE, Matrix, empty_matrix
from ..factors import FactorScores
from ..firing import Fires, FiringCounts
from ..intervals import ImageGroups, Resamples
from ..nulls import KEPT_ROWS, KeptFires
from ..reconstruction import HeldOutSums
from ..rows import rows_per_image, whole_images
from ..universality import Classes, classify
from .cells import Pair


class CodeMatrices(NamedTuple):
    """What codes say of the cells; NaN where two sites are not compared.

    Attributes:
        r2: {source: {target: R²}} of the source's code decoded to the target, for all sites; a site's own on the
            diagonal.
        r2_low, r2_high: the ends of its 95 % interval over images.
        r2_null: its mean over all pairings of the images at random, exactly.
        universal: {a: {b: latents that are universal for these two sites}}; symmetric.
        universal_null: the same with images paired at random, in the mean over `nulls` pairings.
        energy: {a: {b: share of b's energy in latents that are universal for a and b}}.
        closest: {source: {target: universal latents whose firing at the target is most like that at this one of the
            layers of the source's model}}; where several are equal, each has its share.
        phi: {a: {b: φ of a latent's firing in both, mean over latents by √(their energies in a and in b)}}; symmetric.
    """

    r2: Matrix
    r2_low: Matrix
    r2_high: Matrix
    r2_null: Matrix
    universal: Matrix
    universal_null: Matrix
    energy: Matrix
    closest: Matrix
    phi: Matrix

    @classmethod
    def empty(cls, sites: Sequence[str]) -> CodeMatrices:
        """Return matrices of NaN."""
        return cls(*(empty_matrix(sites) for _ in cls._fields))

    def update(self, other: CodeMatrices) -> None:
        """Take in the numbers of another's cells."""
        for mine, given in zip(self, other, strict=True):
            for a, row in given.items():
                mine[a].update({b: value for b, value in row.items() if not np.isnan(value)})


class Followed(NamedTuple):
    """A latent that models share, and where in them it fires.

    Attributes:
        latent: its number.
        cells: pairs of sites for which it is universal.
        best: of those, the pair with the largest φ; `phi` that φ.
        energy: {site: share of the site's energy}; `rate` {site: share of the rows in which it fires}.
        phi_at: {site: φ of its firing there and at its best layer of another model}: where in depth it comes to be.
        follows: the label that its codes at the best pair follow with AUROC ≥ the threshold; empty where none.
        auroc: the smaller AUROC of the two; None where nothing is known of the images.
    """

    latent: int
    cells: int
    best: Pair
    phi: float
    energy: dict[str, float]
    rate: dict[str, float]
    phi_at: dict[str, float]
    follows: str
    auroc: float | None

    @property
    def strength(self) -> float:
        """Its share of a site's energy, summed over models, each at the site where it has most of it."""
        return sum(max(self.energy[site] for site in of_model) for of_model in by_model(self.energy).values())


def scan_codes(
    usae: USAE,
    buffer: ActivationBuffer,
    pairs: Sequence[Pair],
    *,
    split: SplitName,
    config: ProbesConfig,
    annotations: Sequence[Annotation] = (),
    follow: bool = True,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[CodeMatrices, list[Followed]]:
    """Measure a USAE on pairs of its sites, in one pass over the rows of a split.

    R² of images paired at random needs no shuffling: over all pairings π the mean of Σ_r ‖x_r − x̂_π(r)‖² is
    Σ_r ‖x_r − m‖² + Σ_r ‖x̂_r − m‖², m the mean of the rows x, so that

        R²_null = −Σ_r ‖x̂_r − m‖² / Σ_r ‖x_r − m‖²:

    what a code that knows nothing of the image costs; 0 for one that says the mean.

    Args:
        usae: the USAE.
        buffer: row-paired activations of its sites.
        pairs: of its sites.
        split: the rows that are measured.
        config: thresholds of the classes, `nulls`, `bootstrap` and `seed`.
        annotations: what is known about the images; latents that are followed are compared with it.
        follow: say where latents fire that are universal for some pair between each two models, at q / pairs.
        progress: called with (steps done, steps in all).

    Returns:
        the matrices; the followed latents, strongest first.
    """
    measuring = _Measuring(usae, buffer, pairs, split, config, annotations if follow else ())
    n, done = buffer.n_rows(split), 0
    steps = n * (2 if config.nulls else 1)
    for rows in whole_images(buffer, split, usae.sites):
        measuring.add(rows.values, rows.image_index, rows.token_index)
        done += rows.n
        if progress:
            progress(done, steps)

    def paired(share: float) -> None:
        if progress:
            progress(n + round(n * share), steps)

    return measuring.matrices(paired), measuring.followed() if follow else []


class _Sums(HeldOutSums):
    """Sums for R², and for its null."""

    def __init__(self, usae: USAE, groups: int) -> None:
        super().__init__(usae, groups)
        m, total = len(usae.sites), sum(usae.d_in.values())
        self._rows = torch.zeros(0)
        self._decoded = torch.zeros(m, total, dtype=torch.float64)
        self._decoded_squares = torch.zeros(m, m, dtype=torch.float64)

    def null(self) -> Matrix:
        """Return R² with images paired at random; see `scan_codes`."""
        n = max(float(self._n.sum()), 1.0)
        mean = self._sums.sum(0) / n
        found: Matrix = {}
        for i, source in enumerate(self.usae.sites):
            found[source] = {}
            for j, target in enumerate(self.usae.sites):
                of, scale = self.usae.columns[target], float(self.usae.scale[j]) ** 2
                cross = float((self._decoded[i, of] * mean[of]).sum())
                spread = float(self._decoded_squares[i, j]) - 2 * cross + n * float(mean[of].square().sum())
                total = float(self._moments[target].m2.sum())
                found[source][target] = -max(spread, 0.0) * scale / total if total > 0 else float("nan")
        return found

    def _add_stacked(self, stacked: Tensor) -> None:
        super()._add_stacked(stacked)
        self._rows = stacked

    def _add_errors(self, source: int, error: Tensor) -> None:
        super()._add_errors(source, error)
        decoded = (self._rows - error).cpu()
        self._decoded[source] += decoded.sum(0, dtype=torch.float64)
        squares = decoded.square()
        by_site = [squares[:, self.usae.columns[site]].sum(dtype=torch.float64) for site in self.usae.sites]
        self._decoded_squares[source] += torch.stack(by_site)


class _Measuring:
    """What is gathered in one pass."""

    def __init__(
        self,
        usae: USAE,
        buffer: ActivationBuffer,
        pairs: Sequence[Pair],
        split: SplitName,
        config: ProbesConfig,
        annotations: Sequence[Annotation],
    ) -> None:
        self.usae, self.pairs, self.config = usae, list(pairs), config
        self.places = rows_per_image(buffer, usae.sites)
        self.groups = ImageGroups(buffer.n_images(split), config.seed)
        self.sums = _Sums(usae, self.groups.n)
        several = self.places != 1
        self.counts = FiringCounts(
            usae.sites,
            usae.n_latents,
            config.tau,
            np.random.default_rng(config.seed) if several else None,
            pairs=self.pairs,
            places=self.places,
        )
        self.kept = KeptFires(usae.sites, usae.n_latents, max(1, 2 * KEPT_ROWS // len(usae.sites)))
        self.scores = FactorScores(usae.sites, usae.n_latents, annotations)
        self._classes: dict[Pair, Classes] = {}

    def add(self, values: Mapping[str, np.ndarray], image_index: np.ndarray, token_index: np.ndarray) -> None:
        """Measure the rows of whole images."""
        n = len(image_index)
        codes = self.sums.add_rows(values, self.groups.of(image_index))
        fires = {site: Fires.of(codes[site], self.config.tau) for site in self.usae.sites}
        self.counts.add_fires(fires, n, image_index, token_index)
        self.kept.add(fires, n, image_index, token_index)
        if self.scores.annotations:
            self.scores.add(codes, image_index)

    def matrices(self, told: Callable[[float], None]) -> CodeMatrices:
        """Put the numbers of all cells together."""
        sites, config = self.usae.sites, self.config
        found, energy = CodeMatrices.empty(sites), self._energy()
        given: dict[str, Any] = {"r2": self.sums.r2(), "r2_null": self.sums.null()}
        if config.bootstrap:
            ends = self.sums.intervals(Resamples(self.groups.n, config.bootstrap, config.seed))
            for name in ("low", "high"):
                given[f"r2_{name}"] = {a: {b: getattr(end, name) for b, end in row.items()} for a, row in ends.items()}
        found = found._replace(**given)
        for pair in self.pairs:
            classes = classify(self.counts, pair, config)
            self._classes[pair] = classes
            universal = classes.category == "universal"
            weight = np.sqrt(energy[pair[0]] * energy[pair[1]])
            mean = float((weight * self._phis(pair)).sum() / weight.sum()) if weight.sum() > 0 else float("nan")
            for a, b in (pair, pair[::-1]):
                found.universal[a][b], found.phi[a][b] = float(universal.sum()), mean
                found.energy[a][b] = float(energy[b][universal].sum())
        self._add_closest(found.closest)
        nulls: dict[Pair, list[int]] = {pair: [] for pair in self.pairs}
        for number, counts in enumerate(self.kept.pairings(config, self.places, pairs=self.pairs), start=1):
            for pair in self.pairs:
                nulls[pair].append(int((classify(counts, pair, config).category == "universal").sum()))
            told(number / config.nulls)
        for (a, b), numbers in nulls.items():
            if numbers:
                found.universal_null[a][b] = found.universal_null[b][a] = float(np.mean(numbers))
        told(1.0)
        return found

    def _add_closest(self, closest: Matrix) -> None:
        """Count, by target, the latents whose largest φ over the layers of a model is at each source."""
        of_target: dict[Pair, list[tuple[str, Pair]]] = {}
        for pair in self.pairs:
            for source, target in (pair, pair[::-1]):
                of_target.setdefault((target, model_of(source)), []).append((source, pair))
        for (target, _), sources in of_target.items():
            phi = np.stack([self._phis(pair) for _, pair in sources])
            universal = np.stack([self._classes[pair].category == "universal" for _, pair in sources])
            first = phi == phi.max(0)
            shares = np.where(universal, first / first.sum(0), 0.0).sum(1)
            for (source, _), share in zip(sources, shares, strict=True):
                closest[source][target] = float(share)

    def followed(self) -> list[Followed]:
        """Return where the latents fire that models share, once `matrices` has classed them; strongest first.

        Of many pairs of sites the best is looked for, so a latent must be universal for one at q / pairs, and for one
        of each two models.
        """
        config, sites = self.config, self.usae.sites
        energy = self._energy()
        strict = {
            pair: (classes.category == "universal") & (classes.q_all < config.q / len(self.pairs))
            for pair, classes in self._classes.items()
        }
        of_models: dict[tuple[str, str], list[np.ndarray]] = {}
        for (a, b), passes in strict.items():
            of_models.setdefault((model_of(a), model_of(b)), []).append(passes)
        everywhere = np.all([np.any(cells, axis=0) for cells in of_models.values()], axis=0)
        found = []
        for k in np.flatnonzero(everywhere).tolist():
            phi = {pair: self._phi(pair, k) for pair, passes in strict.items() if passes[k]}
            best = max(phi, key=lambda pair: phi[pair])
            follows, score = self._label(best, k)
            found.append(
                Followed(
                    latent=k,
                    cells=sum(int(c.category[k] == "universal") for c in self._classes.values()),
                    best=best,
                    phi=phi[best],
                    energy={site: float(energy[site][k]) for site in sites},
                    rate={site: float(self.counts.fires[site][k] / self.counts.n_rows) for site in sites},
                    phi_at={site: self._phi_at(site, best, k) for site in sites},
                    follows=follows,
                    auroc=score,
                )
            )
        return sorted(found, key=lambda latent: -latent.strength)

    def _phi(self, pair: Pair, latent: int) -> float:
        return float(self._phis(pair)[latent])

    def _phis(self, pair: Pair) -> np.ndarray:
        """Return φ of every latent's firing in two sites, [n]; within places where images have several rows."""
        (co_firing,) = self._classes[pair].pairs.values()
        return np.asarray(np.nan_to_num(np.fmin(co_firing.phi, co_firing.phi_place)))

    def _phi_at(self, site: str, best: Pair, latent: int) -> float:
        """Return φ of a latent's firing at a site and at that of its best two that is compared with it."""
        among = [pair for pair in self._classes for other in best if set(pair) == {site, other}]
        return max((self._phi(pair, latent) for pair in among), default=1.0)

    def _label(self, pair: Pair, latent: int) -> tuple[str, float | None]:
        """Return the label that a latent's codes at two sites follow, and the smaller AUROC."""
        if not self.scores.annotations or not self.scores.n_values:
            return "", None
        scores = np.min([np.nan_to_num(self.scores.auroc(site)[latent], nan=-1.0) for site in pair], axis=0)
        at = int(scores.argmax())
        return (self.scores.names[at] if scores[at] >= self.config.auroc else ""), float(scores[at])

    def _energy(self) -> dict[str, np.ndarray]:
        """Return {site: [n_latents] share of the site's energy E|z_k| ‖W_dec,k‖}."""
        norms = dict(zip(self.usae.sites, self.usae.decoder_norms().detach().cpu().double().numpy(), strict=True))
        energy = {site: self.counts.mean(site) * norms[site] for site in self.usae.sites}
        return {site: values / max(float(values.sum()), 1e-300) for site, values in energy.items()}
