"""The figures of an evaluation: what is drawn of which report, and what stands in them."""

from __future__ import annotations

import doctest
import re
from collections.abc import Sequence
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import PathCollection
from matplotlib.figure import Figure
from matplotlib.text import Text
from PIL import Image

from usae_probe.probes import UniversalityReport
from usae_probe.probes.ablation import LatentFidelity
from usae_probe.probes.controls import Control, Controls, Length, Spread
from usae_probe.probes.fidelity import Fidelity
from usae_probe.probes.intervals import Interval
from usae_probe.probes.linear import LinearReference
from usae_probe.probes.nulls import NullCounts
from usae_probe.probes.posthoc import PostHoc
from usae_probe.probes.records import LatentRecord, PairRecord
from usae_probe.probes.similarity import Similarity
from usae_probe.probes.universality import CATEGORIES
from usae_probe.report import fidelity_figure, figures, style, universality_figures

NAN = float("nan")
LONG = (
    "vit_small_patch14_dinov2.lvd142m/blocks.10@mean",
    "convnextv2_nano.fcmae_ft_in22k_in1k/stages.3.blocks.1@mean",
    "r50/layer4",
    "swin_tiny_patch4_window7_224.ms_in22k_ft_in1k/layers.3@mean",
    "vit_base_patch16_clip_224.openai/blocks.11@cls",
    "m$odel$/layer$",
)
CLASSES = {"universal": 5, "partial": 3, "chance": 4, "specific": 2, "rare": 1, "dead": 1}
ALL = ["r2", "entropy", "phi_energy", "controls", "tax", "fidelity", "similarity"]

Matrix = dict[str, dict[str, float]]


def sites_of(n: int) -> tuple[str, ...]:
    return tuple(LONG[i % 6] if i < 6 else f"{LONG[i % 6]}.{i}" for i in range(n))


def matrix(sites: Sequence[str], least: float, most: float, diagonal: float | None = None) -> Matrix:
    """Numbers between two, different everywhere."""
    values = iter(np.linspace(least, most, len(sites) ** 2).tolist())
    cells = {a: {b: next(values) for b in sites} for a in sites}
    return cells if diagonal is None else {a: {b: diagonal if a == b else cells[a][b] for b in sites} for a in sites}


def latents(sites: Sequence[str]) -> list[LatentRecord]:
    """Latents of all classes: universal ones at FE = .99 and φ = .4, those of chance at .95 and .05."""
    measures = {"universal": (0.99, 0.4), "partial": (0.7, 0.3), "chance": (0.95, 0.05), "specific": (0.1, 0.0)}
    found = []
    for name in CATEGORIES:
        entropy, phi = measures.get(name, (NAN, 0.0))
        fires_in = tuple(sites) if name in ("universal", "partial", "chance") else tuple(sites[:1])
        pair = PairRecord(9, 0.5, 0.5, 0.3, 2.0, phi, phi, phi, phi, 0.0, NAN, NAN, 0.0)
        for _ in range(CLASSES[name]):
            by_site = dict.fromkeys(sites, 0.05 * (1 + len(found)))
            found.append(
                LatentRecord(
                    latent=len(found),
                    category=name,
                    split=False,
                    positional=False,
                    fires_in=fires_in,
                    entropy=entropy if len(sites) > 1 else NAN,
                    q=0.0,
                    fires=dict.fromkeys(sites, 9),
                    rate=by_site,
                    mean=by_site,
                    maximum=by_site,
                    energy=by_site,
                    decoder_norm=by_site,
                    pairs=dict.fromkeys(combinations(sites, 2), pair),
                )
            )
    return found


def nulls() -> tuple[NullCounts, ...]:
    any_two = {name: [4, 6] for name in CATEGORIES} | {"universal": [0, 1]}
    return NullCounts("", 900, 900, any_two), NullCounts("class", 900, 900, any_two | {"universal": [2, 4]})


def controls(sites: Sequence[str], seeds: int) -> Controls:
    def spread(mean: float) -> Spread:
        return Spread(mean, mean - 0.01, mean + 0.01, seeds) if seeds > 1 else Spread(mean, mean, mean, 1)

    def control(name: str, what: str, universal: int) -> Control:
        return Control(name, what, tuple(sites), CLASSES | {"universal": universal}, 14, matrix(sites, 0, 1), 2.0)

    twice = [control(f"{s.partition('/')[0]} twice", f"{s} with itself: as much as can be shared", 13) for s in sites]
    of_site = {"steps": (0.8, 0.02), "encoder": (0.9, 0.12), "parts": (0.75, -0.03)}
    return Controls(
        controls=(control("mispaired", "rows of different images paired in training", 1), *twice),
        seeds=tuple(range(seeds)),
        universal=(5, 7, 9)[:seeds],
        live=(14, 14, 14)[:seeds],
        independent={
            kind: Length({s: spread(r2) for s in sites}, {s: spread(tax) for s in sites})
            for kind, (r2, tax) in of_site.items()
        },
        posthoc=(PostHoc("train", 12, CLASSES | {"universal": 3}, 0.5),),
    )


def fidelity(sites: Sequence[str], *, bare: Sequence[str] = (), refused: Sequence[str] = ()) -> Fidelity:
    """Two latents of four have both correlations; `bare` targets have no logits, `refused` ones no share."""

    def known(cells: Matrix) -> Matrix:
        return {a: {b: NAN if b in bare else v for b, v in row.items()} for a, row in cells.items()}

    def without(cells: Matrix) -> Matrix:
        return {a: {b: NAN if b in refused else v for b, v in row.items()} for a, row in known(cells).items()}

    correlations = [(0.5, 0.1), (0.3, -0.1), (NAN, 0.2), (0.4, NAN)]
    cosine = matrix(sites, 0.61, 0.62)
    return Fidelity(
        n_images=64,
        head={s: "none" if s in bare else "probe" if s in refused else "logits" for s in sites},
        effect=dict.fromkeys(sites, "kl"),
        kl=known(matrix(sites, 0.2, 1.0)),
        share_recovered=without(matrix(sites, -0.1, 0.9)),
        top1=known(matrix(sites, 0.2, 1.0)),
        top1_recovered=without(matrix(sites, 0.25, 0.25)),
        cosine={a: {b: cosine[a][b] if b in bare else NAN for b in sites} for a in sites},
        kl_mean={s: NAN if s in bare else 0.004 if s in refused else 2.5 for s in sites},
        top1_mean={s: NAN if s in bare else 0.2 for s in sites},
        cosine_mean={s: 0.33 if s in bare else NAN for s in sites},
        probe_accuracy=dict.fromkeys(refused, 0.81),
        latents=[LatentFidelity(i, r, null, r, null, r, {}, {}) for i, (r, null) in enumerate(correlations)],
    )


def report(n_sites: int, n_models: int | None = None, *, seeds: int = 3, **changes: Any) -> UniversalityReport:
    """A report of everything there is."""
    sites = sites_of(n_sites)
    class_sites = sites[: n_models or n_sites]
    r2 = matrix(sites, -0.2, 0.9)
    linear = matrix(sites, 0.1, 0.95, NAN)
    values: dict[str, Any] = {
        "sites": sites,
        "class_sites": class_sites,
        "r2": r2,
        "r2_train": matrix(sites, 0.1, 0.95),
        "r2_global_mean": r2,
        "counts": dict(CLASSES),
        "n_split": 0,
        "n_rows_train": 9000,
        "n_rows_eval": 1000,
        "latents": latents(class_sites),
        "thresholds": {"entropy": 0.9, "phi": 0.2, "q": 0.01},
        "r2_interval": {s: {t: Interval(v - 0.011, v + 0.012) for t, v in row.items()} for s, row in r2.items()},
        "linear": LinearReference(linear, linear, 7000, 800),
        "similarity": Similarity(
            512, 10, 20, matrix(sites, 0.1, 0.6, 1.0), matrix(sites, -0.01, 0.01, NAN), r2, matrix(sites, 0, 0.01, NAN)
        ),
        "nulls": nulls(),
        "fidelity": fidelity(class_sites),
        "controls": controls(class_sites, seeds),
    }
    return UniversalityReport(**(values | changes))


def bare(sites: tuple[str, ...], **changes: Any) -> UniversalityReport:
    """A report of R² alone."""
    n, r2 = len(sites), matrix(sites, 0.3, 0.9)
    nothing = {"linear": None, "similarity": None, "nulls": (), "fidelity": None, "controls": None, "latents": []}
    return report(n, r2=r2, r2_interval=None, **(nothing | changes))


def drawn(figure: Figure | None) -> Figure:
    assert figure is not None
    FigureCanvasAgg(figure)
    figure.draw_without_rendering()
    return figure


def texts(figure: Figure | None) -> str:
    """All that is printed, as it is spelled, with ordinary blanks."""
    assert figure is not None
    found = [text.get_text() for text in figure.findobj(Text)]
    return " | ".join(found).replace("\xa0", " ").replace("\n", " ")


def caption(figure: Figure | None) -> str:
    assert figure is not None
    return figure.get_supxlabel().replace("\xa0", " ").replace("\n", " ")


def cells(figure: Figure | None, panel: int) -> list[str]:
    assert figure is not None
    return [text.get_text() for text in figure.axes[panel].texts]


# --- files ---


def test_everything_is_drawn_as_png_and_svg(tmp_path: Path) -> None:
    paths = universality_figures.universality_figures(report(2), tmp_path)
    assert [path.name for path in paths] == [f"{name}.png" for name in ALL]
    vectors = [path.with_suffix(".svg") for path in paths]
    assert {file.name for file in tmp_path.iterdir()} == {path.name for path in (*paths, *vectors)}
    for vector in vectors:
        text = vector.read_text(encoding="utf-8")
        assert re.search(r"<dc:description>[^<]*\bn = [\d,]+", text)  # the caption goes with it, in words
    for path in paths:
        with Image.open(path) as image:
            assert image.format == "PNG"
            assert 900 <= image.width <= 1350
            assert len(np.unique(np.asarray(image.convert("L")))) > 20


def test_nothing_is_drawn_without_data_and_old_figures_go(tmp_path: Path) -> None:
    names = [*ALL, "training"]
    for name in names:
        (tmp_path / f"{name}.png").write_text("old")
        (tmp_path / f"{name}.svg").write_text("old")
    paths = universality_figures.universality_figures(bare(sites_of(2)), tmp_path)
    assert paths == [tmp_path / "r2.png"]
    assert {file.name for file in tmp_path.iterdir()} == {
        f"{name}{suffix}"
        for name in ("r2", "training")  # which is not of the evaluation
        for suffix in (".png", ".svg")
    }
    assert (tmp_path / "training.png").read_text() == "old"


def test_of_one_site_there_is_r2_alone(tmp_path: Path) -> None:
    one = sites_of(1)
    nothing = {one[0]: {one[0]: NAN}}
    alone = bare(one, latents=latents(one), linear=LinearReference(nothing, nothing, 9, 9))
    alone = replace(alone, similarity=Similarity(512, 10, 20, {one[0]: {one[0]: 1.0}}, nothing, nothing, nothing))
    assert universality_figures.universality_figures(alone, tmp_path) == [tmp_path / "r2.png"]
    assert len(figures.r2_figure(alone).axes) == 2


# --- what can be read ---


@pytest.mark.parametrize(("n_sites", "n_models", "seeds"), [(2, 2, 1), (3, 2, 3), (6, 6, 3), (12, 4, 3)])
def test_no_text_is_cut_or_on_top_of_another(n_sites: int, n_models: int, seeds: int) -> None:
    whole = report(n_sites, n_models, seeds=seeds)
    last = whole.class_sites[-1:]
    whole = replace(whole, fidelity=fidelity(whole.class_sites, bare=whole.class_sites[:1], refused=last))
    for name, draw in {"r2": figures.r2_figure, **universality_figures.FIGURES}.items():
        figure = drawn(draw(whole))
        assert figure.get_figwidth() <= style.WIDE + 1e-9, name
        texts = set(figure.findobj(Text)) - _beyond(figure)
        found = [text for text in texts if text.get_text() and text.get_visible()]
        boxes = np.array([text.get_window_extent().extents for text in found])
        low, high = boxes[:, :2], boxes[:, 2:]
        inside = (low >= -1).all(1) & (high <= np.array(figure.canvas.get_width_height()) + 1).all(1)
        assert [text.get_text() for text, fits in zip(found, inside, strict=True) if not fits] == [], name
        sides = np.minimum(high[:, None], high) - np.maximum(low[:, None], low)
        pairs = np.argwhere(np.triu(sides.min(-1) > 2, k=1))
        assert [(found[a].get_text(), found[b].get_text()) for a, b in pairs] == [], name
        assert len(found) > 5


def _beyond(figure: Figure) -> set[Text]:
    """Return the texts of ticks outside the limits of their axis, which are not drawn."""
    found = set()
    for axes in figure.axes:
        for axis, (low, high), along in (
            (axes.xaxis, sorted(axes.get_xlim()), 0),
            (axes.yaxis, sorted(axes.get_ylim()), 1),
        ):
            labels = axis.get_ticklabels(which="both")
            found |= {label for label in labels if not low <= label.get_position()[along] <= high}
    return found


def test_the_smallest_print_is_readable_with_twelve_sites() -> None:
    sizes = [text.get_fontsize() for text in figures.r2_figure(report(12)).axes[0].texts]
    assert min(sizes) >= 5.5


def test_names_are_no_formulas_and_are_broken() -> None:
    assert doctest.testmod(style).failed == 0
    assert doctest.testmod(style).attempted >= 7
    assert style.folded("x" * 80) == "\n".join(["x" * 36, "x" * 36, "x" * 8])
    assert style.folded("") == ""


# --- R² ---


def test_r2_has_intervals_and_the_share_of_the_linear_reference() -> None:
    sites = ("a/x", "b/y")
    r2 = {"a/x": {"a/x": 0.8, "b/y": 0.3}, "b/y": {"a/x": -0.05, "b/y": 0.7}}
    ridge = {"a/x": {"a/x": NAN, "b/y": 0.4}, "b/y": {"a/x": 0.5, "b/y": NAN}}
    ends = {s: {t: Interval(v - 0.02, v + 0.01) for t, v in row.items()} for s, row in r2.items()}
    changes = {"sites": sites, "class_sites": sites, "r2": r2, "r2_train": r2, "r2_interval": ends}
    figure = figures.r2_figure(replace(bare(sites_of(2)), linear=LinearReference(ridge, ridge, 7000, 800), **changes))
    assert cells(figure, 0) == [
        "0.800", "[.780, .810]", "0.300", "[.280, .310]", "−0.050", "[−.070, −.040]", "0.700", "[.680, .710]"
    ]  # fmt: skip
    assert cells(figure, 1) == ["0.800", "0.300", "−0.050", "0.700"]
    # .3 / .4 = 75 %, −.05 / .5 = −10 %
    assert cells(figure, 2) == ["–", "0.400", "(75 %)", "0.500", "(−10 %)", "–"]
    assert [axis.get_title() for axis in figure.axes] == [
        "USAE, held-out rows\n(n = 1,000)", "USAE, training rows\n(n = 9,000)",
        "ridge regression, held-out rows\n(n = 800)",
    ]  # fmt: skip
    assert "95 % interval" in caption(figure)
    assert "fitted on 7,000 training rows" in caption(figure)


def test_r2_without_intervals_says_nothing_of_them() -> None:
    sites = sites_of(2)
    none = {s: dict.fromkeys(sites, Interval(NAN, NAN)) for s in sites}  # of a single image
    for missing in (None, none):
        figure = figures.r2_figure(replace(bare(sites), r2_interval=missing, measured_on="validation"))
        assert len(figure.axes) == 2
        assert len(cells(figure, 0)) == 4
        assert "interval" not in caption(figure)
        assert "validation rows" in figure.axes[0].get_title()


# --- latents ---


def test_the_histogram_counts_every_live_latent_in_its_class() -> None:
    figure = universality_figures.entropy(report(2))
    assert figure is not None
    heights: dict[str, list[float]] = {}
    for container in figure.axes[0].containers:
        bars: Any = container
        heights[bars[0].get_label()] = [round(bar.get_height()) for bar in bars]
    assert {label: sum(bars) for label, bars in heights.items()} == {
        "universal (5)": 5, "partial (3)": 3, "chance (4)": 4, "specific (2)": 2
    }  # fmt: skip
    assert {len(bars) for bars in heights.values()} == {20}
    assert heights["universal (5)"][19] == 5
    said = caption(figure)
    assert "n = 14 live latents" in said
    assert "FE ≥ 0.9 by itself would call 9 of them universal" in said  # five universal, four of chance
    assert "5 are universal" in said
    assert "With images paired at random, 0.5 are universal (mean of 2 pairings, at most 1)" in said


def test_an_entropy_above_one_by_rounding_is_counted() -> None:
    whole = report(2)
    whole = replace(whole, latents=[replace(record, entropy=1.0 + 1e-12) for record in whole.latents[:5]])
    figure = universality_figures.entropy(whole)
    assert figure is not None
    bars: Any = figure.axes[0].containers[0]
    assert bars[19].get_height() == 5


def test_phi_against_energy_shows_latents_that_fire_in_two_sites() -> None:
    figure = universality_figures.phi_energy(report(3))
    assert figure is not None
    points = {
        str(found.get_label()): np.asarray(found.get_offsets())
        for found in figure.axes[0].collections
        if isinstance(found, PathCollection)
    }
    assert {label: len(of) for label, of in points.items()} == {"universal (5)": 5, "partial (3)": 3, "chance (4)": 4}
    # Energy of latent 0 is .05 in each of three sites.
    np.testing.assert_allclose(points["universal (5)"][0], [0.15, 0.4])
    assert figure.axes[0].get_xscale() == "log"
    said = caption(figure)
    assert "n = 12 latents" in said
    assert "smallest over the 3 pairs of 3 models" in said
    assert "at random, 0.5 are" in said


def test_without_a_null_captions_say_nothing_of_chance() -> None:
    for draw in (universality_figures.entropy, universality_figures.phi_energy):
        assert "at random" not in caption(draw(report(2, nulls=())))


# --- controls ---


def test_controls_stand_below_the_run_with_their_share_of_live_latents() -> None:
    figure = universality_figures.controls(report(2))
    assert figure is not None
    axis = figure.axes[0]
    ends = [text.get_text() for text in axis.texts]
    assert ends[0] == "7  (50 %)"  # mean of 5, 7 and 9, of 14
    assert ends[1] == "0.5  (3.2 %)"  # of .5 + 3 · 5 live ones
    assert ends[2] == "3  (17 %)"  # of 3 + 3 · 5
    assert ends[3] == "1  (7.1 %)"
    assert ends[-1] == "3  (25 % of pairs; shuffled: 0.5)"
    names = [label.get_text().replace("\n", " ") for label in axis.get_yticklabels()]
    assert names[0] == "this run"
    assert names[2] == "this run, pairing shuffled within class at evaluation"
    assert names[3].startswith("mispaired: rows of different images")
    assert len(names) == len(ends) == 7
    whiskers = [sorted(float(x) for x in np.asarray(line.get_xdata())) for line in axis.lines]
    assert whiskers == [[5, 9], [0.5, 1], [3, 4]]  # seeds; means of nulls to their largest
    said = caption(figure)
    assert "n = 1,000 held-out rows" in said
    assert "mean of n = 3 seeds" in said
    assert "n = 2 random pairings" in said


def test_controls_are_drawn_with_nulls_or_controls() -> None:
    assert "this run" in texts(universality_figures.controls(report(2, controls=None)))
    figure = universality_figures.controls(report(2, nulls=(), seeds=1))
    assert "mispaired" in texts(figure)
    assert "seeds" not in caption(figure)
    assert "pairings" not in caption(figure)
    assert universality_figures.controls(report(2, nulls=(), controls=Controls(seeds=(0, 1)))) is None


def test_the_tax_stands_at_the_end_of_every_bar() -> None:
    figure = universality_figures.tax(report(2, seeds=1))
    assert figure is not None
    ends = [text.get_text() for text in figure.axes[0].texts]
    # The USAE's R² is what the independent SAE has less the tax: .8 − .02.
    assert ends == ["0.780"] * 2 + ["0.800   tax +0.020"] * 2 + ["0.900   tax +0.120"] * 2 + ["0.750   tax −0.030"] * 2
    assert "n = 1 seed." in caption(figure)
    assert not figure.axes[0].lines
    several = universality_figures.tax(report(2, seeds=3))
    assert several is not None
    assert several.axes[0].texts[2].get_text() == "0.800   tax +0.020  [+0.010, +0.030]"
    assert len(several.axes[0].lines) == 6  # independent SAEs of two sites, of three kinds
    assert "n = 3 seeds" in caption(several)


def test_a_self_r2_below_zero_or_unknown_is_drawn() -> None:
    whole = report(2, seeds=1)
    a, b = whole.class_sites
    nan = Spread(NAN, NAN, NAN, 1)
    length = Length({a: Spread(-0.3, -0.3, -0.3, 1), b: nan}, {a: Spread(0.1, 0.1, 0.1, 1), b: nan})
    figure = drawn(universality_figures.tax(replace(whole, controls=Controls(independent={"steps": length}))))
    assert [text.get_text() for text in figure.axes[0].texts] == ["−0.400", "–", "−0.300   tax +0.100", "–"]
    assert figure.axes[0].get_xlim()[0] < -0.4


# --- live models ---


def test_fidelity_prints_shares_or_cosines_and_hatches_what_is_refused() -> None:
    sites = sites_of(3)
    found = fidelity(sites, bare=sites[1:2], refused=sites[2:])
    figure = fidelity_figure.fidelity(report(3, fidelity=found))
    assert figure is not None
    # nine shares from −.1 to .9 in steps of .125, cosines from .61 to .62
    assert cells(figure, 0)[:6] == ["−0.100", "top-1 25 %", "0.611", "cosine", "–", "top-1 –"]
    assert len(figure.axes[0].patches) == 3
    said = caption(figure)
    assert "n = 64 held-out images" in said
    assert "1: KL_mean 2.50 nats, 1 − a_mean .80" in said
    assert "2: none, cosine with the mean row .33" in said
    assert "3: KL_mean 0.00 nats" in said
    assert "Logits of a linear probe: 3 (it finds the label of 81 %)" in said
    assert "Hatched" in said
    assert "n = 2 universal latents" in said
    assert "medians (.40 against .00" in said  # of .5 and .3, of .1 and −.1
    assert "in which both fire .40)" in said
    assert "Hatched" not in caption(fidelity_figure.fidelity(report(3)))


def test_fidelity_without_latents_is_the_matrix_alone() -> None:
    found = replace(fidelity(sites_of(2)), latents=[])
    figure = fidelity_figure.fidelity(report(2, fidelity=found))
    assert figure is not None
    assert len(figure.axes) == 1
    assert "latents" not in caption(figure)


# --- similarity ---


def test_similarity_has_its_nulls_in_small_print() -> None:
    figure = universality_figures.similarity(report(2))
    # Four values from .1 to .6, from −.01 to .01.
    assert cells(figure, 0) == ["1.000", "0.267", "null −.003", "0.433", "null .003", "1.000"]
    said = caption(figure)
    assert "n = 512 held-out images" in said
    assert "greatest of 20 shuffles" in said
    assert "chance is 0.020" in said  # 10 / 511


def test_similarity_that_is_not_known_is_not_drawn() -> None:
    sites = sites_of(2)
    nothing = matrix(sites, NAN, NAN)
    assert universality_figures.similarity(report(2, similarity=Similarity(3, 2, 20, *[nothing] * 4))) is None
