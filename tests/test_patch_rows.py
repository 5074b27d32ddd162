"""Several rows per image, end to end: rows of one place stay together through harvest, buffer, training and CAM."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from usae_probe import ActivationBuffer, HookedModel, Run, RunConfig, attach, harvest, train
from usae_probe.errors import ImageError, SiteError, UsaeProbeWarning
from usae_probe.harvesting import HarvestProgress, common_grid
from usae_probe.probes import find_exemplars, natural_activations
from usae_probe.probes.cam import maximize
from usae_probe.usae import USAE

from .tiny_run import CONFIG, MODEL, put_tiny_run

pytestmark = pytest.mark.usefixtures("one_thread")

GRID, SIZE, N_IMAGES = (4, 4), 64, 30
UNIT: dict[str, Any] = {"image_size": SIZE, "mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}


def averaging(stride: int) -> nn.Conv2d:
    """A convolution whose places are the mean colours of squares of `stride` pixels."""
    convolution = nn.Conv2d(3, 3, stride, stride, bias=False)
    nn.init.zeros_(convolution.weight)
    for channel in range(3):
        nn.init.constant_(convolution.weight[channel, channel], 1 / stride**2)
    return convolution


class Map(nn.Module):
    """Squares and their mean colours: a map [b, 3, h, w]."""

    def __init__(self, stride: int) -> None:
        super().__init__()
        self.squares = averaging(stride)
        self.head = nn.Linear(3, 2, bias=False)
        nn.init.ones_(self.head.weight)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.squares(x).mean(dim=(2, 3)))
        return out


class Tokens(nn.Module):
    """The same colours as tokens [b, prefix + h · w, 3] behind prefix tokens of −1."""

    def __init__(self, stride: int, prefix: int = 1) -> None:
        super().__init__()
        self.squares = averaging(stride)
        self.cls = nn.Parameter(torch.full((1, prefix, 3), -1.0))
        self.tokens = nn.Identity()
        self.head = nn.Linear(3, 2, bias=False)
        nn.init.ones_(self.head.weight)

    def forward(self, x: Tensor) -> Tensor:
        places = self.squares(x).flatten(2).transpose(1, 2)
        tokens = self.tokens(torch.cat([self.cls.expand(len(x), -1, -1), places], dim=1))
        out: Tensor = self.head(tokens[:, 0])
        return out


def hooked(name: str, module: nn.Module, *layers: str, **preprocessing: Any) -> HookedModel:
    return attach(module.eval(), name=name, layers=layers, **(UNIT | preprocessing))


def coarse(**preprocessing: Any) -> HookedModel:
    return hooked("coarse", Map(16), "squares@patch", **preprocessing)


def tokens(**preprocessing: Any) -> HookedModel:
    return hooked("tokens", Tokens(8), "tokens@patch", **preprocessing)


def colours(n: int = N_IMAGES) -> np.ndarray:
    """Levels of the 4 × 4 places of n pictures, [n, 4, 4, 3]."""
    return np.random.default_rng(0).integers(0, 256, (n, *GRID, 3), dtype=np.uint8)


def checkers(n: int = N_IMAGES) -> np.ndarray:
    """The pictures: every place a square of 16 pixels."""
    return colours(n).repeat(SIZE // GRID[0], axis=1).repeat(SIZE // GRID[1], axis=2)


def halved(places: np.ndarray) -> np.ndarray:
    """Halve both axes of [n, 8, 8, 3] by a triangle filter: weights 1 3 3 1 (of 8), at an edge 3 3 1 (of 7)."""
    weights = np.zeros((4, 8))
    for i in range(4):
        for j, weight in zip(range(2 * i - 1, 2 * i + 3), (1, 3, 3, 1), strict=True):
            if 0 <= j < 8:
                weights[i, j] = weight
    weights /= weights.sum(1, keepdims=True)
    return np.asarray(np.einsum("ri,cj,nijd->nrcd", weights, weights, places))


def content(path: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(path.iterdir())}


# --- what a row holds ---


def test_every_row_holds_the_colour_of_its_place(tmp_path: Path) -> None:
    models = [coarse(), hooked("fine", Map(8), "squares@patch"), tokens()]
    buffer = harvest(models, checkers(), tmp_path / "acts", dtype="float32", holdout=0.3, batch_size=7, shard_images=8)
    assert {site: (spec.grid, spec.rows_per_image) for site, spec in buffer.specs.items()} == {
        "coarse/squares@patch": (GRID, 16),
        "fine/squares@patch": (GRID, 16),
        "tokens/tokens@patch": (GRID, 16),
    }
    true = colours() / 255
    resampled = halved(true.repeat(2, axis=1).repeat(2, axis=2))
    for split, n_images in (("train", 19), ("validation", 2), ("holdout", 9)):
        rows = buffer.read(split)
        assert (rows.n, buffer.n_images(split)) == (16 * n_images, n_images)
        assert rows.token_index.tolist() == list(range(16)) * n_images
        place = (rows.image_index, rows.token_index // 4, rows.token_index % 4)  # raster order
        np.testing.assert_allclose(rows.values["coarse/squares@patch"], true[place], atol=1e-5)
        for site in ("fine/squares@patch", "tokens/tokens@patch"):
            np.testing.assert_allclose(rows.values[site], resampled[place], atol=1e-5)


def test_resampled_rows_hold_the_colour_of_their_place_within_tolerance(tmp_path: Path) -> None:
    # red rises from column to column and green from row to row by .2, blue tells the picture: a row of another place
    # or picture is off by .1 or more, what the filter lets in of neighbours is .2 / 7 at an edge and nothing inside
    true = np.zeros((9, *GRID, 3))
    true[..., 0], true[..., 1] = 0.2 * np.arange(4) + 0.2, 0.2 * np.arange(4)[:, None] + 0.2
    true[..., 2] = 0.1 * np.arange(9)[:, None, None]
    pictures = (255 * true).round().astype(np.uint8).repeat(16, axis=1).repeat(16, axis=2)
    buffer = harvest([coarse(), tokens()], pictures, tmp_path / "acts", validation=0.2, holdout=0.2)
    for split in ("train", "validation", "holdout"):
        rows = buffer.read(split)
        assert rows.n > 0
        place = (rows.image_index, rows.token_index // 4, rows.token_index % 4)
        for values in rows.values.values():
            np.testing.assert_allclose(values, true[place], atol=0.2 / 7 + 0.004)


def test_batches_keep_places_together(tmp_path: Path) -> None:
    buffer = harvest([coarse(), tokens()], checkers(), tmp_path / "acts")
    true = colours() / 255
    batch = next(buffer.batches("train", 50, seed=1))
    place = (batch.image_index, batch.token_index // 4, batch.token_index % 4)
    assert len(set(zip(*(part.tolist() for part in place), strict=True))) == 50
    np.testing.assert_allclose(batch.values["coarse/squares@patch"], true[place], atol=1e-3)


def test_a_wide_grid_and_a_high_one_meet_in_the_fewest_rows_and_columns(tmp_path: Path) -> None:
    # 64 × 32 pixels in squares of 16: 4 × 2; in 32 × 64, 2 × 4: the coarsest of both is 2 × 2
    high = hooked("high", Map(16), "squares@patch", image_size=(64, 32))
    wide = hooked("wide", Map(16), "squares@patch", image_size=(32, 64))
    assert common_grid((m, s) for m in (high, wide) for s in m.sites) == (2, 2)
    assert common_grid([]) is None
    with pytest.warns(UsaeProbeWarning, match=r"height / width of image_size is 2 for 'high', 0.5 for 'wide'"):
        buffer = harvest([high, wide], checkers(9), tmp_path / "acts")
    assert buffer.specs["high/squares@patch"].grid == buffer.specs["wide/squares@patch"].grid == (2, 2)


def test_all_tokens_come_as_the_layer_has_them(tmp_path: Path) -> None:
    buffer = harvest([hooked("a", Tokens(16), "tokens@all")], checkers(9), tmp_path / "acts", dtype="float32")
    rows = buffer.read("train")
    assert buffer.specs["a/tokens@all"].rows_per_image == 17
    assert rows.token_index.tolist() == list(range(17)) * buffer.n_images("train")
    assert (rows.values["a/tokens@all"][::17] == -1).all()
    true = (colours() / 255)[rows.image_index[0]]
    np.testing.assert_allclose(rows.values["a/tokens@all"][1:17], true.reshape(16, 3), atol=1e-5)


def test_rows_beside_each_other_of_pooled_and_single_place_sites(tmp_path: Path) -> None:
    # a grid of one place is one row per image, like a pooled site's
    one = hooked("one", Map(64), "squares@patch")
    buffer = harvest([one, hooked("pool", Map(16), "squares")], checkers(9), tmp_path / "acts", dtype="float32")
    rows = buffer.read("train").values
    np.testing.assert_allclose(rows["one/squares@patch"], rows["pool/squares"], atol=1e-4)


# --- what does not pair up ---


def test_pooled_and_patch_sites_are_refused_before_any_pass(tmp_path: Path) -> None:
    with pytest.raises(SiteError, match=r"not coarse/squares@patch: 16, b/tokens: 1 .*@patch pairs up with @patch"):
        harvest([coarse(), hooked("b", Tokens(8), "tokens")], checkers(9), tmp_path / "acts")
    assert not (tmp_path / "acts").exists()


def all_tokens(name: str, stride: int = 16, prefix: int = 1, **more: Any) -> HookedModel:
    return hooked(name, Tokens(stride, prefix), "tokens@all", **more)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (lambda: all_tokens("b", 8), r"1 prefix tokens \(cls first\) and 4x4 places, and 1 .* and 8x8 places"),
        (lambda: hooked("b", Map(16), "squares@all"), r"and 4x4 places, and 4x4 places \(use @patch for both"),
        (
            lambda: all_tokens("b", layout={"tokens": "1+4x4"}),
            r"1 prefix tokens \(cls first\) and 4x4 places, and 1 prefix tokens and 4x4",
        ),
        (
            lambda: hooked("b", Tokens(16), "tokens@patch"),
            r"rows of 'a/tokens@all' and 'b/tokens@patch' are not of the same tokens: .*\(use @patch for both",
        ),
        (
            lambda: all_tokens("b", layout={"tokens": "tokens"}),
            r"17 tokens whose places are not known .*layout=\{'…': 'cls\+14x14'\} says",
        ),
    ],
    ids=["grid", "prefix", "stated prefix", "patch", "unknown"],
)
def test_all_tokens_pair_up_with_the_same_tokens_only(tmp_path: Path, other: Any, message: str) -> None:
    with pytest.raises(SiteError, match=message):
        harvest([all_tokens("a"), other()], checkers(9), tmp_path / "acts")
    assert not (tmp_path / "acts").exists()


def test_all_tokens_pair_up_with_the_same_tokens(tmp_path: Path) -> None:
    buffer = harvest([all_tokens("a"), all_tokens("b")], checkers(9), tmp_path / "acts")
    rows = buffer.read("train").values
    np.testing.assert_array_equal(rows["a/tokens@all"], rows["b/tokens@all"])
    # maps have no prefix tokens: their @all is their @patch
    models = [hooked("a", Map(16), "squares@all"), hooked("b", Map(16), "squares@patch")]
    rows = harvest(models, checkers(9), tmp_path / "maps").read("train").values
    np.testing.assert_array_equal(rows["a/squares@all"], rows["b/squares@patch"])


def test_models_that_see_different_parts_are_named_once(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    harvest([coarse(crop_pct=0.8), tokens(crop_pct=0.5)], checkers(9), tmp_path / "a")
    (warning,) = [entry for entry in recwarn.list if entry.category is UsaeProbeWarning]
    text = str(warning.message)
    assert "crop_pct is 0.8 for 'coarse', 0.5 for 'tokens'" in text
    assert "crop_mode" not in text
    assert "one crop_pct" in text
    harvest([coarse(crop_pct=0.8), tokens(crop_pct=0.8)], checkers(9), tmp_path / "b")
    pooled = [hooked("p", Map(16), "squares", crop_pct=0.8), hooked("q", Map(8), "squares")]
    harvest(pooled, checkers(9), tmp_path / "c")  # whole pictures: a matter of taste
    assert len([entry for entry in recwarn.list if entry.category is UsaeProbeWarning]) == 1


def test_a_transform_of_ones_own_cannot_be_compared(tmp_path: Path) -> None:
    def transform(picture: Any) -> Tensor:
        return torch.from_numpy(np.array(picture)).permute(2, 0, 1) / 255

    own = attach(Map(16).eval(), name="own", layers=["squares@patch"], transform=transform)
    with pytest.warns(UsaeProbeWarning, match="what the transform of 'own' keeps is not known; give all models one"):
        harvest([own, tokens()], checkers(9), tmp_path / "acts")


# --- limit, skipping, interruption ---


def test_limit_skipping_and_interruption(tmp_path: Path) -> None:
    class Source(torch.utils.data.Dataset[Any]):
        def __len__(self) -> int:
            return N_IMAGES

        def __getitem__(self, index: int) -> Any:
            if index % 7 == 3:
                raise ImageError("cannot be read")
            return checkers()[index]

    def made(path: Path, progress: Any = None) -> ActivationBuffer:
        how: dict[str, Any] = {"limit": 20, "batch_size": 3, "shard_images": 5, "dtype": "float32"}
        return harvest([coarse(), tokens()], Source(), path, progress=progress, **how)

    whole = made(tmp_path / "whole")
    n_skipped, n_images = len(whole.skipped), sum(whole.n_images(s) for s in ("train", "validation", "holdout"))
    assert n_skipped > 0
    assert n_skipped + n_images == 20
    for split in ("train", "validation", "holdout"):
        rows = whole.read(split)
        assert rows.n == 16 * whole.n_images(split)
        place = (rows.image_index, rows.token_index // 4, rows.token_index % 4)
        np.testing.assert_allclose(rows.values["coarse/squares@patch"], (colours() / 255)[place], atol=1e-5)

    calls: list[int] = []

    def interrupt(progress: HarvestProgress) -> None:
        calls.append(progress.done)
        if len(calls) in (1, 5, 6):
            raise KeyboardInterrupt

    for _ in range(3):
        with pytest.raises(KeyboardInterrupt):
            made(tmp_path / "acts", interrupt)
    assert not ActivationBuffer(tmp_path / "acts").complete
    assert made(tmp_path / "acts", interrupt).complete
    assert content(tmp_path / "acts") == content(whole.path)


# --- USAE, exemplars, CAM ---


def test_the_usae_knows_the_grid_of_its_rows(tmp_path: Path) -> None:
    buffer = harvest([coarse(), tokens()], checkers(), tmp_path / "acts")
    usae = train(buffer, n_latents=6, k=2, steps=2, batch_size=64).usae
    assert usae.grid == GRID
    usae.save(tmp_path / "usae.safetensors")
    assert USAE.load(tmp_path / "usae.safetensors").grid == GRID
    pooled = harvest([hooked("a", Map(16), "squares")], checkers(), tmp_path / "pooled")
    assert train(pooled, n_latents=6, k=2, steps=2).usae.grid is None  # that of one row per image is of no account


def redness(site: str, other: str, grid: tuple[int, int] | None = None) -> USAE:
    """Latent 0 is the red of a place above that of .5, latent 1 its green."""
    usae = USAE(
        {site: 3, other: 3}, 2, 1, normalisation={s: (torch.full((3,), 0.5), 1.0) for s in (site, other)}, grid=grid
    )
    with torch.no_grad():
        for encoder in usae.W_enc:
            encoder.copy_(torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]]))
    return usae


def test_an_exemplar_is_an_image_with_its_best_place(tmp_path: Path) -> None:
    buffer = harvest([coarse(), tokens()], checkers(), tmp_path / "acts", dtype="float32")
    natural = natural_activations(redness("coarse/squares@patch", "tokens/tokens@patch"), buffer, [0])
    levels = colours() / 255 - 0.5
    selected = np.where(levels[..., 0] > levels[..., 1], levels[..., 0], 0)  # k = 1: the larger of red and green
    best = selected.reshape(N_IMAGES, 16).max(1)
    exemplars = find_exemplars(natural, 0, n=3).top["coarse/squares@patch"]
    assert [e.value for e in exemplars] == pytest.approx(sorted(best, reverse=True)[:3], abs=1e-5)
    assert len({e.image for e in exemplars}) == 3


def test_the_centre_is_climbed_and_measured() -> None:
    site, other = "coarse/squares@patch", "tokens/tokens@patch"
    usae = redness(site, other, GRID)
    for model in (coarse(), tokens()):
        (picture,) = maximize(usae, [model], [0], steps=40, lr=0.2, shift=0.0, scale=0.0, rotation=0.0)
        red = picture.pixels[..., 0].reshape(4, 16, 4, 16).mean(axis=(1, 3)) / 255
        assert np.unravel_index(red.argmax(), red.shape) == (2, 2)  # of four rows the lower of the middle ones
        assert red[2, 2] > red.min() + 0.2
        rows = model.rows(model.preprocess([torch.from_numpy(picture.pixels).permute(2, 0, 1)]), grid=GRID)
        centre = rows[picture.sites[0]][2 * 4 + 2]
        assert picture.own.z_pre == pytest.approx(float(centre[0]) - 0.5, abs=1e-5)
    assert picture.own.z == pytest.approx(picture.own.z_pre)


def test_the_grid_of_cam_where_the_usae_does_not_know_it() -> None:
    usae = redness("coarse/squares@patch", "tokens/tokens@patch")
    both = [coarse(), tokens()]

    def measured(models: list[HookedModel], grid: tuple[int, int], row: int) -> None:
        picture = maximize(usae, models, [0], steps=1)[-1]
        pixels = torch.from_numpy(picture.pixels).permute(2, 0, 1)
        rows = models[-1].rows(models[-1].preprocess([pixels]), grid=grid)[picture.sites[0]]
        assert picture.own.z_pre == pytest.approx(float(rows[row][0]) - 0.5, abs=1e-5)

    measured(both, (4, 4), 10)  # the coarsest of the models given
    measured(both[1:], (8, 8), 36)  # alone: its own


def test_the_centre_of_all_tokens_is_behind_the_prefix_tokens() -> None:
    model = all_tokens("a")
    usae = redness("a/tokens@all", "b/x")
    (picture,) = maximize(usae, [model], [0], steps=2, lr=0.2)
    rows = model.rows(model.preprocess([torch.from_numpy(picture.pixels).permute(2, 0, 1)]))["a/tokens@all"]
    assert picture.own.z_pre == pytest.approx(float(rows[1 + 10][0]) - 0.5, abs=1e-5)


# --- a run ---

FACTORY = """
import timm, torch
from torch import nn

def conv():
    torch.manual_seed(1)
    return nn.Sequential(nn.Conv2d(3, 8, 4, stride=4), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3))

def vit():
    torch.manual_seed(2)
    how = {"img_size": 16, "patch_size": 2, "embed_dim": 12, "depth": 1, "num_heads": 2, "num_classes": 3}
    return timm.create_model("vit_tiny_patch16_224", **how)
"""


def test_a_whole_run_of_two_grids(tmp_path: Path) -> None:
    (put_tiny_run(tmp_path) / "nets.py").write_text(FACTORY)
    models = {
        "conv": {**MODEL, "name": "nets.py:conv", "layers": ["0@patch"]},
        "vit": {**MODEL, "name": "nets.py:vit", "layers": ["blocks.0@patch"]},
    }
    cam = {"latents": "0,3", "steps": 3, "exemplars": 2}
    config = RunConfig.from_dict(CONFIG | {"models": models, "cam": cam}, base=tmp_path)
    result = Run(config, tmp_path / "run").run()
    buffer = ActivationBuffer(tmp_path / "run/buffer")
    sites = ["conv/0@patch", "vit/blocks.0@patch"]
    assert buffer.sites == sites
    assert {spec.grid for spec in buffer.specs.values()} == {(4, 4)}
    assert result.metrics is not None
    assert (result.metrics["sites"], result.metrics["n_rows_eval"]) == (sites, 18 * 16)
    assert sum(result.metrics["counts"].values()) == 16
    with (tmp_path / "run/latents.csv").open(newline="") as file:
        records = list(csv.DictReader(file))
    assert max(int(record["fires[vit/blocks.0@patch]"]) for record in records) > 18  # rows, not images
    assert result.cam is not None
    pictures = [picture for card in result.cam["cards"] for picture in card["pictures"]]
    assert [picture["sites"] for picture in pictures] == 2 * [sites[:1], sites[1:], sites]
    assert (result.cam["n_natural"], result.cam["unit"]) == (60 * 16, "rows")  # of all places
    assert json.loads((tmp_path / "run/usae.json").read_text())["grid"] == [4, 4]
    assert all(stage.kept for stage in Run(config, tmp_path / "run").run().stages)


def test_a_run_of_pooled_and_patch_sites_is_refused_with_nothing_written(tmp_path: Path) -> None:
    (put_tiny_run(tmp_path) / "nets.py").write_text(FACTORY)
    models = {
        "conv": {**MODEL, "name": "nets.py:conv", "layers": ["0@patch"]},
        "vit": {**MODEL, "name": "nets.py:vit", "layers": ["blocks.0"]},
    }
    with pytest.raises(SiteError, match=r"conv/0@patch: 16, vit/blocks.0: 1"):
        Run(RunConfig.from_dict(CONFIG | {"models": models}, base=tmp_path), tmp_path / "run").run()
    assert not (tmp_path / "run/buffer").exists()
