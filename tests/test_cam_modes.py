"""CAM over models: modes, places, layouts, restarts, plateaus, starts, and what is checked of every picture."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import usae_probe as up
from usae_probe.config import CamConfig
from usae_probe.errors import ConfigError, NoLatentsError, SiteError, UsaeProbeError, UsageError
from usae_probe.images import at_size
from usae_probe.probes import natural_activations
from usae_probe.probes.cam import CamPicture, maximize
from usae_probe.probes.cam.canvases import FourierCanvas, MacoCanvas, PixelCanvas
from usae_probe.probes.cam.climbing import Job, Wanted, climb
from usae_probe.probes.cam.objectives import apart_from, likeness
from usae_probe.probes.cam.targets import Target, chosen_targets, row_at
from usae_probe.sites import Site

from .cam_world import MEAN, STD, World, dictionary, network, world

BOTH = {"resnet": "layer4", "vit": "blocks.1"}
QUICK: dict[str, Any] = {"steps": 12, "check_every": 4, "patience": 0}

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    torch.manual_seed(0)
    with world(tmp_path_factory.mktemp("two"), BOTH, vit=32, resnet=40) as made:
        yield made


@pytest.fixture(scope="module")
def patches(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    torch.manual_seed(0)
    with world(tmp_path_factory.mktemp("patches"), {"resnet": "layer3@patch", "vit": "blocks.1@patch"}) as made:
        yield made


def z_pre_of(made: World, site: str, pixels: np.ndarray, latent: int) -> Tensor:
    """z_pre of every row of a picture, through nothing but the public pieces."""
    model = next(model for model in made.models if site.startswith(f"{model.name}/"))
    batch = model.preprocess([torch.from_numpy(pixels).permute(2, 0, 1)])
    rows = model.rows(batch, [up.Site.parse(site)], grid=made.usae.grid)[site]
    with torch.no_grad():
        return made.usae.pre_activation(rows, site, [latent])[:, 0]


# ---- the gradient, everywhere ----------------------------------------------------------------------------------------

SEVERAL = {
    "resnet": ["layer3@patch", "layer3@all"],
    "vit": ["blocks.0@patch", "blocks.1@all"],
    "swin": ["layers.0@patch"],
}
ONE = {"resnet": ["layer4", "layer3@mean"], "vit": ["blocks.1", "blocks.1@cls", "blocks.0@mean"], "swin": ["layers.0"]}
CASES = [(kind, layer, "centre") for kind, layers in ONE.items() for layer in layers]
CASES += [(k, layer, place) for k, layers in SEVERAL.items() for layer in layers for place in ("1,0", "mean", "max")]


@pytest.mark.parametrize(("kind", "layer", "place"), CASES)
def test_gradients_equal_finite_differences_at_every_layout_and_policy(kind: str, layer: str, place: str) -> None:
    module = network(kind)
    with up.attach(module, name=kind, layers=[layer], image_size=32, mean=MEAN, std=STD, crop_pct=1.0) as model:
        module.double()
        site = str(model.sites[0])
        usae = dictionary({site: model.d_in(model.sites[0])})
        assert (model.rows_per_image(model.sites[0]) > 1) == (place != "centre")
        (target,) = chosen_targets(usae, [model], [site], CamConfig(place=place))
        picture = 0.25 + 0.5 * torch.rand(1, 3, 40, 36, dtype=torch.float64)

        def activation(p: Tensor) -> Tensor:
            return target.own_z_pre(target.rows(p, grad=True), [7])[0]

        pixels = picture.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(activation(pixels), pixels)
        for _ in range(2):
            direction, eps = torch.randn_like(picture), 1e-7
            with torch.no_grad():
                difference = activation(picture + eps * direction) - activation(picture - eps * direction)
            expected = difference.item() / (2 * eps)
            # a kink of a ReLU within a step's reach shows in one direction of many
            assert (gradient * direction).sum().item() == pytest.approx(expected, rel=2e-4, abs=1e-7)


def test_a_place_is_the_row_of_the_buffer_that_stands_for_it(patches: World) -> None:
    """The place asked for, the centre, mean and max, against rows of the plain pass."""
    picture = patches.images[3]
    rows, columns = patches.usae.grid or (0, 0)
    for site in patches.usae.sites:
        z_pre = z_pre_of(patches, site, picture, 5).reshape(rows, columns)
        cases = {
            "centre": z_pre[rows // 2, columns // 2],
            "1,0": z_pre[1, 0],
            "mean": z_pre.mean(),
            "max": z_pre.max(),
        }
        for place, expected in cases.items():
            (target,) = chosen_targets(patches.usae, patches.models, [site], CamConfig(place=place))
            levels = torch.from_numpy(picture).permute(2, 0, 1)[None]
            with torch.no_grad():
                assert target.own_z_pre(target.rows(levels), [5]).item() == pytest.approx(expected.item(), rel=1e-5)


def test_the_centre_of_a_grid_that_is_not_square(patches: World) -> None:
    model, site = patches.models[0], Site.parse(patches.usae.sites[0])
    assert row_at(model, site, (2, 5)) == 1 * 5 + 2
    assert row_at(model, site, (5, 2)) == 2 * 2 + 1
    assert row_at(model, site, (2, 5), (0, 4)) == 4


def test_a_place_that_is_not_there(patches: World, two: World) -> None:
    with pytest.raises(SiteError, match=r"no place 9,0 in 'resnet/layer3@patch', which has 2 rows and 2 columns"):
        chosen_targets(patches.usae, patches.models, ["resnet/layer3@patch"], CamConfig(place="9,0"))
    chosen_targets(two.usae, two.models, None, CamConfig(place="9,0"))  # one row per image: there are no places
    with pytest.raises(ConfigError, match=r"cam.place|'place'"):
        maximize(two.usae, two.models, [1], place="middle")


def test_natural_activations_are_reduced_like_the_pictures(patches: World) -> None:
    for place, n in (("centre", 240), ("mean", 60), ("max", 60)):
        (picture,) = maximize(
            patches.usae, patches.models, patches.latents[:1], buffer=patches.buffer, modes=["independent"],
            sites=["vit/blocks.1@patch"], place=place, **QUICK,
        )  # fmt: skip
        assert picture.own.n == n
        z_pre = z_pre_of(patches, "vit/blocks.1@patch", picture.pixels, picture.latent)
        expected = {"centre": z_pre[3], "mean": z_pre.mean(), "max": z_pre.max()}[place]
        assert picture.own.z_pre == pytest.approx(expected.item(), rel=1e-4)


# ---- modes -----------------------------------------------------------------------------------------------------------


def test_every_mode_makes_its_pictures_and_shows_them_to_every_model(two: World) -> None:
    latents = two.latents[:2]
    modes = ["independent", "joint", "contrast"]
    found = maximize(two.usae, two.models, latents, buffer=two.buffer, modes=modes, restarts=2, **QUICK)
    sites = ["resnet/layer4", "vit/blocks.1"]
    expected = [("independent", (site,)) for site in sites] + [("joint", tuple(sites))]
    expected += [("contrast", (site,)) for site in sites]
    assert [(p.mode, p.sites, p.latent, p.restart) for p in found] == [
        (*key, latent, restart) for key in expected for latent in latents for restart in (0, 1)
    ]
    sizes = {"resnet/layer4": 40, "vit/blocks.1": 32}
    for picture in found:
        assert list(picture.scores) == sites
        assert sorted(picture.curves) == sites
        assert all(len(curve) == 12 and np.isfinite(curve).all() for curve in picture.curves.values())
        assert picture.pixels.shape[0] == (40 if picture.mode == "joint" else sizes[picture.sites[0]])
        for site, score in picture.scores.items():  # exactly what is said of it
            z_pre = z_pre_of(two, site, picture.pixels, picture.latent).item()
            assert score.z_pre == pytest.approx(z_pre, rel=1e-4, abs=1e-5)


def test_curves_start_where_the_models_see_the_first_transformed_picture(two: World) -> None:
    """Both models look at the same transformed picture, each behind its own preprocessing; in natural units."""
    (picture,) = maximize(
        two.usae, two.models, two.latents[:1], buffer=two.buffer, modes=["independent"], sites=["vit/blocks.1",
        "resnet/layer4"], steps=1, shift=0.0, scale=0.0, rotation=0.0,
    )[:1]  # fmt: skip
    from usae_probe.probes.cam.fourier import picture_generator

    canvas = FourierCanvas((32, 32))
    start = canvas(canvas.draw(picture_generator(0, picture.latent), torch.float32)[None])
    natural = natural_activations(two.usae, two.buffer, [picture.latent])
    for model in two.models:
        site = str(model.sites[0])
        with torch.no_grad():
            rows = model.rows(model.preprocess(start))[site]  # type: ignore[arg-type]
            z_pre = two.usae.pre_activation(rows, site, [picture.latent]).item()
        expected = natural.sites[site].score(picture.latent, z_pre)
        assert picture.curves[site][0] == pytest.approx(expected, rel=1e-3, abs=1e-4)


def test_joint_pictures_drive_both_models_and_contrasts_hold_one_back(two: World) -> None:
    how: dict[str, Any] = {"buffer": two.buffer, "steps": 40, "check_every": 8}
    made = maximize(two.usae, two.models, two.latents[:2], modes=["independent", "joint", "contrast"], **how)
    least = {mode: [min(s.score for s in p.scores.values()) for p in made if p.mode == mode] for mode in ("joint",)}
    alone = [min(s.score for s in p.scores.values()) for p in made if p.mode == "independent"]
    assert np.mean(least["joint"]) > np.mean(alone) + 0.5
    gap = {
        mode: np.mean([p.own.score - p.scores[other].score for p in made if p.mode == mode for other in p.scores
                       if other not in p.sites])
        for mode in ("independent", "contrast")
    }  # fmt: skip
    assert gap["contrast"] > gap["independent"]


def test_a_joint_picture_by_hand(two: World) -> None:
    """One step of Adam on the written-out soft minimum of both models' standardised activations."""
    latent = two.latents[0]
    (picture,) = maximize(
        two.usae, two.models, [latent], buffer=two.buffer, modes=["joint"], parametrisation="pixels", steps=1, lr=0.1,
        shift=0.0, scale=0.0, rotation=0.0, softmin=0.5,
    )  # fmt: skip
    from usae_probe.probes.cam.fourier import picture_generator

    canvas, natural = PixelCanvas((40, 40)), natural_activations(two.usae, two.buffer, [latent])
    numbers = canvas.draw(picture_generator(0, latent), torch.float32)[None].requires_grad_()
    scores = []
    for model in two.models:
        site = str(model.sites[0])
        rows = model.rows(model.preprocess(canvas(numbers)), grad=True)[site]  # type: ignore[arg-type]
        found = natural.sites[site]
        z_pre = two.usae.pre_activation(rows, site, [latent])[0, 0]
        scores.append((z_pre - found.mean[latent]) / found.sd[latent])
    objective = -0.5 * torch.log((torch.exp(-scores[0] / 0.5) + torch.exp(-scores[1] / 0.5)) / 2)
    (g,) = torch.autograd.grad(objective, numbers)
    stepped = numbers + 0.1 * g / (g.abs() + 1e-8)  # Adam's first step
    candidates = [(255 * canvas(each)).round()[0].permute(1, 2, 0).detach().numpy() for each in (numbers, stepped)]
    assert picture.best_step in (0, 1)
    assert np.abs(picture.pixels.astype(int) - candidates[picture.best_step]).max() <= 1
    assert picture.best_step == 1


def test_parametrisations_and_starts(two: World) -> None:
    how: dict[str, Any] = {"buffer": two.buffer, "images": two.images, "modes": ["independent"], **QUICK}
    latent, pictures = two.latents[0], {}
    for parametrisation in ("fourier", "maco", "pixels"):
        (picture, _) = maximize(two.usae, two.models, [latent], parametrisation=parametrisation, **how)
        pictures[parametrisation] = picture
        assert picture.own.score >= picture.curves[picture.sites[0]][0] - 0.5
    natural = natural_activations(two.usae, two.buffer, [latent])
    accentuated = maximize(two.usae, two.models, [latent], start="exemplar", **{**how, "steps": 1, "lr": 1e-6})
    for picture in accentuated:  # one tiny step away from the image that drives the latent most
        best = int(natural.images[natural.sites[picture.sites[0]].of(latent).argmax()])
        expected = (255 * at_size(two.images[best], picture.pixels.shape[:2])).round().permute(1, 2, 0).numpy()  # type: ignore[arg-type]
        assert np.abs(picture.pixels.astype(int) - expected).max() <= 2
    # of a joint picture the image that drives the model least that it drives least
    (joint,) = maximize(
        two.usae, two.models, [latent], buffer=two.buffer, images=two.images, modes=["joint"], start="exemplar",
        steps=1, lr=1e-6,
    )  # fmt: skip
    least = np.min([site.standardised(latent, site.of(latent)) for site in natural.sites.values()], axis=0)
    expected = (255 * at_size(two.images[int(natural.images[least.argmax()])], (40, 40))).round().permute(1, 2, 0)
    assert np.abs(joint.pixels.astype(int) - expected.numpy()).max() <= 2


# ---- one batch -------------------------------------------------------------------------------------------------------


def a_job(made: World, kind: str = "vit", latents: tuple[int, ...] = (3, 8), restarts: int = 1) -> Job:
    targets = chosen_targets(made.usae, made.models, None)
    own = [target for target in targets if target.site.model == kind]
    wanted = tuple(Wanted(latent, restart) for latent in latents for restart in range(restarts))
    return Job("independent", tuple(own), (), wanted)


def test_the_best_look_is_kept_and_the_curve_ends_on_a_plateau(two: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """z_pre of the looks is made up: latent 3 rises until step 8 and stays; latent 8 rises to the end."""
    looks = {3: [0.0, 1, 2, 2, 2, 2, 2], 8: [0.0, 1, 2, 3, 4, 5, 6]}
    seen = {3: 0, 8: 0}
    real = Target.own_z_pre

    def own_z_pre(self: Target, rows: Any, latents: list[int]) -> Tensor:
        value = real(self, rows, latents)
        if value.requires_grad:
            return value
        numbers = [looks[latent][seen[latent]] for latent in latents]
        for latent in latents:
            seen[latent] += 1
        return torch.tensor(numbers, dtype=torch.float32)

    monkeypatch.setattr(Target, "own_z_pre", own_z_pre)
    config = CamConfig(steps=24, check_every=4, patience=2)
    first, second = climb(a_job(two), FourierCanvas((32, 32)), config, None)
    assert (first.best_step, len(first.curves["vit/blocks.1"])) == (8, 16)
    assert (second.best_step, len(second.curves["vit/blocks.1"])) == (24, 24)
    assert seen == {3: 5, 8: 7}  # a picture at rest is not looked at again


def test_a_picture_at_rest_leaves_the_others_as_they_would_be(two: World) -> None:
    how: dict[str, Any] = {"buffer": two.buffer, "modes": ["independent"], "sites": ["vit/blocks.1"], "steps": 40}
    together = maximize(two.usae, two.models, two.latents[:4], check_every=1, patience=1, **how)
    lengths = [len(p.curves["vit/blocks.1"]) for p in together]
    assert len(set(lengths)) > 1  # some did rest earlier
    for picture in together:
        (alone,) = maximize(two.usae, two.models, [picture.latent], check_every=1, patience=1, **how)
        n = min(len(alone.curves["vit/blocks.1"]), len(picture.curves["vit/blocks.1"]))
        np.testing.assert_allclose(alone.curves["vit/blocks.1"][:n], picture.curves["vit/blocks.1"][:n], atol=2e-2)


def test_enough_is_enough(two: World) -> None:
    how: dict[str, Any] = {"buffer": two.buffer, "modes": ["independent"], "steps": 40, "check_every": 2}
    for picture in maximize(two.usae, two.models, two.latents[:2], enough=0.5, **how):
        if len(picture.curves[picture.sites[0]]) < 40:
            assert picture.own.ratio > 0.45  # of the picture as it is saved
    lengths = [
        sum(len(p.curves[p.sites[0]]) for p in maximize(two.usae, two.models, two.latents[:2], enough=enough, **how))
        for enough in (0.0, 0.5)
    ]
    assert lengths[1] < lengths[0]


def test_a_contrast_picture_is_done_only_when_the_other_model_does_not_see_it(two: World) -> None:
    enough, weight = 0.3, 4.0
    how: dict[str, Any] = {"buffer": two.buffer, "modes": ["contrast"], "contrast": weight, "check_every": 2}
    natural = natural_activations(two.usae, two.buffer, two.latents[:6])
    early = 0
    for picture in maximize(two.usae, two.models, two.latents[:6], enough=enough, steps=40, patience=0, **how):
        (own,) = picture.sites
        (other,) = set(picture.scores) - {own}
        if len(picture.curves[own]) < 40:
            early += 1
            found = natural.sites[other]
            median = found.score(picture.latent, float(np.median(found.of(picture.latent))))
            value = picture.own.score - weight * max(0.0, picture.scores[other].score - median)
            assert value / natural.sites[own].strongest(picture.latent) > enough - 0.05
    assert early


def test_restarts_differ_and_more_of_them_keep_the_earlier_ones(two: World) -> None:
    how: dict[str, Any] = {"buffer": two.buffer, "modes": ["independent"], "sites": ["vit/blocks.1"], **QUICK}
    one = maximize(two.usae, two.models, [3], **how)
    three = maximize(two.usae, two.models, [3], restarts=3, **how)
    assert np.abs(one[0].pixels.astype(int) - three[0].pixels).max() <= 1
    assert not np.array_equal(three[0].pixels, three[1].pixels)
    with pytest.raises(ConfigError, match=r"restarts = 20 do not fit in max_batch = 16"):
        maximize(two.usae, two.models, [3], restarts=20)
    with pytest.raises(ConfigError, match=r"diversity = 1.0 is over restarts, and restarts = 1"):
        maximize(two.usae, two.models, [3], diversity=1.0)


def test_diversity_makes_restarts_less_alike_to_the_model(two: World) -> None:
    def alike(diversity: float) -> float:
        found = maximize(
            two.usae, two.models, two.latents[:1], modes=["independent"], sites=["vit/blocks.1"], restarts=3, steps=40,
            diversity=diversity, buffer=two.buffer, patience=0,
        )  # fmt: skip
        (target,) = chosen_targets(two.usae, two.models, ["vit/blocks.1"])
        levels = torch.stack([torch.from_numpy(p.pixels).permute(2, 0, 1) for p in found])
        numbers = [p.latent for p in found]
        with torch.no_grad():
            return likeness(apart_from(target, target.rows(levels), numbers), numbers).mean().item()

    assert alike(20.0) < alike(0.0) - 0.05


def test_what_rows_say_apart_from_the_latent_by_hand(two: World) -> None:
    (target,) = chosen_targets(two.usae, two.models, ["vit/blocks.1"])
    rows = torch.randn(2, 1, 24)
    found = apart_from(target, rows, [3, 8])
    torch.testing.assert_close(found.norm(dim=1), torch.ones(2))
    encoder = two.usae.W_enc[two.usae.site_index("vit/blocks.1")][[3, 8]]
    torch.testing.assert_close((found * encoder).sum(dim=1), torch.zeros(2), atol=1e-5, rtol=0)


def test_the_forward_pass_ends_after_an_early_layer(two: World) -> None:
    module = network("vit")
    ran: list[str] = []
    handle = module.blocks[1].register_forward_hook(lambda *_: ran.append("blocks.1"))  # type: ignore[index,union-attr]
    with up.attach(module, name="vit", layers=["blocks.0"], image_size=32, mean=MEAN, std=STD) as model:
        ran.clear()  # of the dry run
        maximize(dictionary({"vit/blocks.0": 24}, double=False), [model], [3], steps=3)
    handle.remove()
    assert ran == []


def test_other_models_look_on_as_often_as_asked(two: World) -> None:
    (picture, _) = maximize(
        two.usae, two.models, [3], buffer=two.buffer, modes=["independent"], record_every=5, **QUICK
    )  # fmt: skip
    other = next(curve for site, curve in picture.curves.items() if site not in picture.sites)
    assert np.flatnonzero(np.isfinite(other)).tolist() == [0, 5, 10]
    assert np.isfinite(picture.curves[picture.sites[0]]).all()


# ---- what cannot be done ---------------------------------------------------------------------------------------------


def test_modes_that_need_more_than_is_given(two: World) -> None:
    cases: list[tuple[dict[str, Any], str]] = [
        ({"modes": ["joint"]}, r"joint pictures weigh models .* natural activations.*buffer="),
        ({"modes": ["contrast"], "models": two.models[:1], "buffer": two.buffer}, "contrast pictures compare models"),
        ({"start": "exemplar", "buffer": two.buffer}, r"start = 'exemplar' needs .* images"),
        ({"modes": ["sideways"]}, r"modes.*independent"),
    ]
    for change, message in cases:
        with pytest.raises(UsageError, match=message):
            maximize(two.usae, **({"models": two.models, "latents": [1]} | change))
    alone = maximize(two.usae, two.models[:1], [1], buffer=two.buffer, steps=1)
    assert [picture.mode for picture in alone] == ["independent"]  # what is left of the default


def test_a_dead_latent_is_refused(two: World) -> None:
    with torch.no_grad():
        before = [bias[39].item() for bias in two.usae.b_enc]
        for bias in two.usae.b_enc:
            bias[39] = -1e4
    with pytest.raises(NoLatentsError, match=r"latent 39 is dead: none of 60 images fires it in resnet/layer4, vit"):
        maximize(two.usae, two.models, [39], buffer=two.buffer, steps=1)
    with torch.no_grad():
        for bias, value in zip(two.usae.b_enc, before, strict=True):
            bias[39] = value


class Words(nn.Module):
    """A model of text: whole numbers in."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(50, 8)
        self.layer = nn.Linear(8, 8)

    def forward(self, tokens: Tensor) -> Tensor:
        result: Tensor = self.layer(self.table(tokens).mean(dim=1))
        return result


def test_a_model_of_text_is_refused_when_attached_or_when_there_is_nothing_to_climb() -> None:
    given: dict[str, Any] = {"name": "m", "layers": ["layer"], "image_size": 32, "mean": MEAN, "std": STD}
    with pytest.raises(UsageError, match=r"Words cannot take .*'table' looks whole numbers up, as models of text do"):
        up.attach(Words(), **given)

    def as_tokens(images: Tensor) -> Tensor:
        return (images.flatten(1)[:, :20].abs() * 10).long().clamp(0, 49)

    with (
        up.attach(Words(), forward_args=as_tokens, **given) as model,
        pytest.raises(UsaeProbeError, match=r"latent 3 at site 'm/layer' to the pixels is exactly zero.*look num"),
    ):
        maximize(dictionary({"m/layer": 8}, double=False), [model], [3], steps=2)


def test_a_joint_picture_names_the_model_without_a_gradient(two: World) -> None:
    module = network("vit")
    blocks: Any = module.blocks
    inner: Callable[..., Tensor] = blocks[0].forward
    blocks[0].forward = lambda x, **more: inner(x.detach(), **more)
    with (
        up.attach(module, name="vit", layers=["blocks.1"], image_size=32, mean=MEAN, std=STD) as cut,
        pytest.raises(UsaeProbeError, match=r"at site 'vit/blocks.1' to the pixels is exactly zero"),
    ):
        maximize(two.usae, [two.models[0], cut], two.latents[:1], buffer=two.buffer, modes=["joint"], steps=2)


def test_pictures_as_json_and_back(two: World) -> None:
    for picture in maximize(two.usae, two.models, [3], buffer=two.buffer, record_every=5, **QUICK):
        again = CamPicture.from_dict(picture.to_dict(), picture.pixels)
        assert again.scores == picture.scores
        assert (again.key, again.failed, again.best_step) == (picture.key, picture.failed, picture.best_step)
        for site, curve in picture.curves.items():
            np.testing.assert_allclose(again.curves[site], curve, rtol=1e-5)


def test_maco_keeps_the_magnitudes_of_the_users_images(two: World) -> None:
    canvas = MacoCanvas((32, 32), torch.rand(3, 32, 17))
    config = CamConfig(steps=3, patience=0)
    (first, _) = climb(a_job(two), canvas, config, None)
    assert first.levels.shape == (3, 32, 32)
