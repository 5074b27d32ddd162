"""Activation maximisation: gradients through the whole chain, what is climbed and measured, and what is left alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torchvision import transforms

from usae_probe.attaching import attach
from usae_probe.config import CamConfig
from usae_probe.errors import (
    ConfigError,
    NonFiniteError,
    SiteError,
    UnknownLayerError,
    UsaeProbeError,
    UsaeProbeWarning,
    UsageError,
)
from usae_probe.hooks import HookedModel
from usae_probe.probes import LatentRecord
from usae_probe.probes.cam import CamPicture, CamProgress, iter_pictures, maximize
from usae_probe.probes.cam.fourier import picture_generator, start_spectrum, to_pictures
from usae_probe.probes.cam.pixels import InputSpace, PreprocessedSpace, picture_space
from usae_probe.probes.cam.transforms import Jitter
from usae_probe.usae import USAE

from .cam_world import DIMS, MEAN, SITES, STD, dictionary, network

pytestmark = pytest.mark.usefixtures("one_thread")

TINY: dict[str, Any] = {"steps": 6, "check_every": 3}


def hook(kind: str, *, double: bool = True, module: nn.Module | None = None, **preprocessing: Any) -> HookedModel:
    given = {"image_size": 32, "mean": MEAN, "std": STD, "interpolation": "bicubic", "crop_pct": 1.0} | preprocessing
    module = module or network(kind)
    model = attach(module, name=kind, layers=[SITES[kind].partition("/")[2]], **given)
    if double:
        module.double()
    return model


@pytest.fixture
def resnet() -> Iterator[HookedModel]:
    with hook("resnet") as model:
        yield model


@pytest.fixture
def vit() -> Iterator[HookedModel]:
    with hook("vit") as model:
        yield model


def drawn_pictures(n: int, size: int = 32) -> Tensor:
    """uint8 pictures with smooth colours in full contrast, as natural ones have them."""
    coarse = torch.rand(n, 3, 5, 5)
    smooth = nn.functional.interpolate(coarse, size=(size, size), mode="bicubic").clamp(0, 1)
    return (255 * smooth).round().to(torch.uint8)


def z_pre_of(usae: USAE, model: HookedModel, pictures: Tensor, latent: int) -> Tensor:
    site = SITES[model.name]
    with torch.no_grad():
        rows = model.rows(model.preprocess(pictures), grad=False)[site]  # type: ignore[arg-type]
        return usae.pre_activation(rows, site, [latent])[:, 0]


def curve(picture: CamPicture) -> list[float]:
    """The activation in the model that was climbed."""
    found: list[float] = picture.curves[picture.sites[0]].tolist()
    return found


def as_batch(picture: CamPicture) -> Tensor:
    return torch.from_numpy(picture.pixels).permute(2, 0, 1)[None].contiguous()


# ---- the gradient ----------------------------------------------------------------------------------------------------


def directional(function: Callable[[Tensor], Tensor], at: Tensor, direction: Tensor) -> float:
    eps = 1e-7  # a ReLU's kink lies within 1e-6 for one direction in twenty; rounding costs 1e-8
    with torch.no_grad():
        return (function(at + eps * direction) - function(at - eps * direction)).item() / (2 * eps)


@pytest.mark.parametrize("kind", ["resnet", "vit"])
@pytest.mark.parametrize(("interpolation", "crop_pct"), [("bicubic", 0.9), ("bilinear", 1.0)])
def test_gradient_from_latent_to_pixel_equals_finite_differences(
    kind: str, interpolation: str, crop_pct: float
) -> None:
    usae, site = dictionary(), SITES[kind]
    with hook(kind, interpolation=interpolation, crop_pct=crop_pct) as model:
        # 45 × 52 pixels: resized, cropped and normalised on the way in; no colour near 0 or 1, where clipping begins
        picture = 0.25 + 0.5 * torch.rand(1, 3, 45, 52, dtype=torch.float64)

        def z_pre(p: Tensor) -> Tensor:
            rows = model.rows(model.preprocess(p), grad=True)[site]  # type: ignore[arg-type]
            return usae.pre_activation(rows, site, [7])[0, 0]

        pixels = picture.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(z_pre(pixels), pixels)
        for _ in range(4):
            direction = torch.randn_like(picture)
            expected = directional(z_pre, picture, direction)
            assert (gradient * direction).sum().item() == pytest.approx(expected, rel=1e-5, abs=0)


@pytest.mark.parametrize("kind", ["resnet", "vit"])
def test_gradient_from_latent_to_fourier_coefficient_equals_finite_differences(kind: str) -> None:
    usae, site, size = dictionary(), SITES[kind], (35, 35)  # floor(32/.9)
    with hook(kind, crop_pct=0.9) as model:
        space = picture_space(model)
        assert space.size == size

        def z_pre(coefficients: Tensor) -> Tensor:
            pictures = Jitter(0.1, 0.1, 10.0, 0.1)(to_pictures(coefficients, size), [picture_generator(0, 3)])
            return usae.pre_activation(model.rows(space(pictures), grad=True)[site], site, [7])[0, 0]

        start = 20 * start_spectrum(size, [picture_generator(1, 7)], torch.float64)  # more colourful than a start
        coefficients = start.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(z_pre(coefficients), coefficients)
        for _ in range(3):
            direction = torch.randn_like(start)
            expected = directional(z_pre, start, direction)
            assert (gradient * direction).sum().item() == pytest.approx(expected, rel=1e-5, abs=0)


# ---- the ascent ------------------------------------------------------------------------------------------------------


def test_pictures_beat_their_start_and_every_drawn_picture(resnet: HookedModel, vit: HookedModel) -> None:
    usae, latents = dictionary(), [3, 17]
    pictures = maximize(usae, [resnet, vit], latents, steps=60)
    assert [(*p.sites, p.latent) for p in pictures] == [(site, latent) for site in SITES.values() for latent in latents]
    others = drawn_pictures(200)
    for picture in pictures:
        model = resnet if picture.sites == (SITES["resnet"],) else vit
        natural = z_pre_of(usae, model, others, picture.latent)
        assert len(curve(picture)) == 60
        assert picture.own.z_pre > natural.max().item()
        assert picture.own.z_pre > curve(picture)[0] + 3 * natural.std().item()
        assert np.mean(curve(picture)[-10:]) > np.mean(curve(picture)[:10])


@pytest.mark.shared
def test_pictures_beat_natural_pictures(vit: HookedModel, shared: Path) -> None:
    usae = dictionary()
    files = sorted((shared / "data" / "cifar10").rglob("*.jpg"))[::50][:200]
    levels = np.stack([np.asarray(Image.open(file).convert("RGB").resize((32, 32))) for file in files])
    natural = torch.from_numpy(levels).permute(0, 3, 1, 2).contiguous()
    for picture in maximize(usae, [vit], [3, 17], steps=60):
        assert picture.own.z_pre > z_pre_of(usae, vit, natural, picture.latent).max().item()


@pytest.mark.parametrize("crop_pct", [1.0, 0.875])
def test_the_saved_picture_gives_what_is_said_of_it(crop_pct: float, tmp_path: Path) -> None:
    usae = dictionary({"vit/blocks.1": 24}, k=20)
    with hook("vit", crop_pct=crop_pct) as model:
        pictures = maximize(usae, [model], [3, 17], **TINY)
        for picture in pictures:
            side = int(32 / crop_pct)
            assert picture.pixels.shape == (side, side, 3)
            assert picture.pixels.dtype == np.uint8
            Image.fromarray(picture.pixels).save(tmp_path / "picture.png")
            levels = torch.from_numpy(np.array(Image.open(tmp_path / "picture.png"))).permute(2, 0, 1)
            with torch.no_grad():
                rows = model.rows(model.preprocess([levels.contiguous()]))["vit/blocks.1"]
                z_pre = usae.pre_activation(rows, "vit/blocks.1", [picture.latent]).item()
                z = usae.to_dense(usae.encode(rows, "vit/blocks.1"))[0, picture.latent].item()
            assert picture.own.z_pre == pytest.approx(z_pre, rel=1e-9)
            assert picture.own.z == pytest.approx(z, rel=1e-9)
    assert all(picture.own.z > 0 for picture in pictures)


def test_z_is_zero_where_the_latent_is_not_selected(vit: HookedModel) -> None:
    usae = dictionary(k=1)
    with torch.no_grad():
        usae.b_enc[1][30] = 1e3  # always the one selected
    not_selected, selected = maximize(usae, [vit], [3, 30], **TINY)
    assert not_selected.own.z == 0
    assert selected.own.z == pytest.approx(selected.own.z_pre)
    assert selected.own.z_pre > 900


def test_curve_by_hand(vit: HookedModel) -> None:
    usae, site, latent, size = dictionary(), "vit/blocks.1", 11, (32, 32)
    (picture,) = maximize(usae, [vit], [latent], seed=5, steps=3, lr=0.1, shift=0.1, scale=0.1, rotation=0.0)
    rng = picture_generator(5, latent)
    spectrum = start_spectrum(size, [rng], torch.float64).requires_grad_()
    mean, square, by_hand = torch.zeros_like(spectrum), torch.zeros_like(spectrum), []
    for t in range(1, 4):  # Adam, written out
        model_input = vit.preprocess(Jitter(0.1, 0.1)(to_pictures(spectrum, size), [rng]))  # type: ignore[arg-type]
        z_pre = usae.pre_activation(vit.rows(model_input, grad=True)[site], site, [latent])[0, 0]
        (g,) = torch.autograd.grad(-z_pre, spectrum)
        mean, square = 0.9 * mean + 0.1 * g, 0.999 * square + 0.001 * g.square()
        step = 0.1 * (mean / (1 - 0.9**t)) / ((square / (1 - 0.999**t)).sqrt() + 1e-8)
        spectrum = (spectrum.detach() - step).requires_grad_()
        by_hand.append(z_pre.item())
    assert curve(picture) == pytest.approx(by_hand, rel=1e-9)
    levels = (255 * to_pictures(spectrum, size)).round()[0].permute(1, 2, 0).detach().numpy()
    assert np.array_equal(picture.pixels, levels)


@pytest.mark.parametrize("kernel", ["csr", "reference"])
def test_every_kernel_in_float32(kernel: str) -> None:
    with hook("vit", double=False) as model:
        (picture,) = maximize(dictionary(double=False, kernel=kernel), [model], [3], steps=30)
        assert picture.own.z_pre > curve(picture)[0] + 0.4
        assert picture.own.z_pre == pytest.approx(z_pre_of(dictionary(), model, as_batch(picture), 3).item(), rel=1e-4)


def test_a_usae_and_a_model_of_different_dtypes() -> None:
    with hook("vit") as double, hook("vit", double=False, module=network("vit").bfloat16()) as half:
        for model in (double, half):
            (picture,) = maximize(dictionary(double=False), [model], [3], steps=30)
            assert picture.own.z_pre > curve(picture)[0] + 0.4


def test_repeatable_exactly(vit: HookedModel) -> None:
    usae = dictionary()
    first, again, other = (maximize(usae, [vit], [3, 8], seed=seed, **TINY) for seed in (0, 0, 1))
    for a, b, c in zip(first, again, other, strict=True):
        assert np.array_equal(a.pixels, b.pixels)
        assert (curve(a), a.own) == (curve(b), b.own)
        assert curve(a) != curve(c)


def test_a_picture_does_not_depend_on_its_batch(resnet: HookedModel) -> None:
    usae = dictionary()
    together = maximize(usae, [resnet], [3, 8, 5, 30], max_batch=3, **TINY)
    alone = maximize(usae, [resnet], [8, 30], max_batch=1, **TINY)
    for a, b in [(together[1], alone[0]), (together[3], alone[1])]:
        assert a.latent == b.latent
        assert curve(a) == pytest.approx(curve(b), rel=1e-6)
        assert a.own.z_pre == pytest.approx(b.own.z_pre, rel=1e-6)
        assert np.abs(a.pixels.astype(int) - b.pixels).max() <= 1


def test_all_latents_of_a_batch_in_one_forward_pass(vit: HookedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes, rows = [], HookedModel.rows

    def counted(self: HookedModel, batch: Tensor, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        sizes.append(len(batch))
        return rows(self, batch, *args, **kwargs)

    monkeypatch.setattr(HookedModel, "rows", counted)
    maximize(dictionary(), [vit], [1, 2, 3, 4, 5], max_batch=3, steps=2)
    assert sizes == [3] * 5 + [2] * 5  # two steps, a look before and after them, and the measurement


def test_pictures_come_batch_by_batch_with_progress(resnet: HookedModel, vit: HookedModel) -> None:
    seen: list[CamProgress] = []
    pictures = iter_pictures(dictionary(), [vit, resnet], [1, 2, 3], steps=2, max_batch=2, progress=seen.append)
    assert seen == []
    assert next(pictures).latent == 1
    first = "independent resnet/layer4"
    assert seen == [CamProgress(first, 1, 8), CamProgress(first, 2, 8)]
    assert torch.is_grad_enabled()
    assert len(list(pictures)) == 5
    assert seen[-1] == CamProgress("independent vit/blocks.1", 8, 8)
    assert [entry.done for entry in seen] == list(range(1, 9))


def test_sites_in_the_order_asked_for_and_latents_once(resnet: HookedModel, vit: HookedModel) -> None:
    with attach(resnet.module, name="resnet", layers=["layer3"], image_size=32, mean=MEAN, std=STD) as other:
        usae = dictionary({"resnet/layer3": 16, "vit/blocks.0@mean": 24, **DIMS})
        found = maximize(usae, [other, vit], [8, 2, 8], sites=["vit/blocks.0@mean", "resnet/layer3"], steps=1)
        assert [(*p.sites, p.latent) for p in found] == [
            ("vit/blocks.0@mean", 8),
            ("vit/blocks.0@mean", 2),
            ("resnet/layer3", 8),
            ("resnet/layer3", 2),
        ]
        assert [p.sites[0] for p in maximize(usae, [other], [8], steps=1)] == ["resnet/layer4"]  # the last listed


def test_records_config_and_settings(vit: HookedModel) -> None:
    by_site: dict[str, Any] = {key: {} for key in ("fires", "rate", "mean", "maximum", "energy", "decoder_norm")}
    record = LatentRecord(
        latent=9,
        category="universal",
        split=False,
        positional=False,
        fires_in=(),
        entropy=1.0,
        q=0.0,
        pairs={},
        **by_site,
    )
    pictures = maximize(dictionary(), [vit], [record, 4], config=CamConfig(steps=5, lr=0.1), steps=3)
    assert [(p.latent, len(curve(p))) for p in pictures] == [(9, 3), (4, 3)]
    with pytest.raises(ConfigError, match=r"unknown setting 'step' \(did you mean 'steps'"):
        maximize(dictionary(), [vit], [1], step=3)


# ---- what is left alone ----------------------------------------------------------------------------------------------


@contextmanager
def left_alone(*modules: nn.Module) -> Iterator[None]:
    def state() -> list[Any]:
        named = [pair for module in modules for pair in module.named_parameters()]
        flags = [(name, p.requires_grad, p.grad is None, p._version) for name, p in named]
        return [flags, [part.training for module in modules for part in module.modules()]]

    before, weights = state(), [p.detach().clone() for module in modules for p in module.parameters()]
    buffers = [b.clone() for module in modules for b in module.buffers()]
    yield
    assert state() == before
    assert all(torch.equal(a, b) for a, b in zip(weights, (p for m in modules for p in m.parameters()), strict=True))
    assert all(torch.equal(a, b) for a, b in zip(buffers, (b for m in modules for b in m.buffers()), strict=True))


def test_model_and_usae_are_left_alone_also_by_exception(resnet: HookedModel) -> None:
    usae = dictionary()
    resnet.module.train()  # every flag back as it was, mixed ones too
    next(iter(resnet.module.children())).eval()
    next(resnet.module.parameters()).requires_grad_(False)

    def stop(_progress: CamProgress) -> None:
        raise KeyboardInterrupt

    with left_alone(resnet.module, usae):
        maximize(usae, [resnet], [1, 2], **TINY)
        with pytest.raises(KeyboardInterrupt):
            maximize(usae, [resnet], [1, 2], progress=stop)


def test_frozen_weights_and_callers_without_gradients(vit: HookedModel) -> None:
    usae = dictionary()
    expected = curve(maximize(usae, [vit], [1], **TINY)[0])
    vit.module.requires_grad_(False)
    usae.requires_grad_(False)
    with torch.no_grad():
        assert curve(maximize(usae, [vit], [1], **TINY)[0]) == expected
        assert not torch.is_grad_enabled()
    with torch.inference_mode():
        assert curve(maximize(usae, [vit], [1], **TINY)[0]) == expected


# ---- a transform of the user's own -----------------------------------------------------------------------------------


def with_transform(*steps: Any) -> HookedModel:
    module = network("vit")
    return attach(module, name="vit", layers=["blocks.1"], transform=transforms.Compose(list(steps)))


def test_an_opaque_transform_works_in_the_input_space() -> None:
    usae = dictionary(double=False)
    steps = [transforms.Resize(36), transforms.CenterCrop(32), transforms.ToTensor(), transforms.Normalize(MEAN, STD)]
    with with_transform(*steps) as model:
        with pytest.warns(UsaeProbeWarning, match=r"model 'vit' .* own transform.*its input space, 32 x 32") as caught:
            (picture,) = maximize(usae, [model], [3], steps=30)
        assert len(caught) == 1
        assert picture.pixels.shape == (32, 32, 3)
        assert picture.own.z_pre > curve(picture)[0] + 0.4
        # what the picture's levels are behind the resize and the crop
        with torch.no_grad():
            model_input = transforms.Compose(steps[2:])(Image.fromarray(picture.pixels))[None]
            z_pre = usae.pre_activation(model.rows(model_input)["vit/blocks.1"], "vit/blocks.1", [3]).item()
        assert picture.own.z_pre == pytest.approx(z_pre, rel=1e-4)


def test_input_space_by_hand() -> None:
    # ToTensor and Normalize with mean .25 and std .5: black is −.5, white 1.5, and 51/255 = .2 is −.1
    steps = [transforms.Resize((32, 32)), transforms.ToTensor(), transforms.Normalize([0.25] * 3, [0.5] * 3)]
    with with_transform(*steps) as model, pytest.warns(UsaeProbeWarning):
        space = picture_space(model)
    assert isinstance(space, InputSpace)
    assert space.lo.flatten().tolist() == pytest.approx([-0.5] * 3)
    assert space.hi.flatten().tolist() == pytest.approx([1.5] * 3)
    level = torch.full((1, 3, 32, 32), 51, dtype=torch.uint8)
    torch.testing.assert_close(space(level), torch.full((1, 3, 32, 32), -0.1))
    torch.testing.assert_close(space(level.double() / 255), torch.full((1, 3, 32, 32), -0.1).double())


def test_the_shared_preprocessing_does_not_warn(vit: HookedModel) -> None:
    space = picture_space(vit)
    assert isinstance(space, PreprocessedSpace)
    assert space.size == (32, 32)


@pytest.mark.parametrize(
    ("step", "reason"),
    [
        (transforms.Lambda(lambda x: 1 - x), "white is not brighter than black"),
        (transforms.Lambda(lambda x: 0 * x), "white is not brighter than black"),
        (transforms.Lambda(lambda x: (x - x.mean()) / x.std()), "white is not brighter than black"),  # NaN
        (transforms.Lambda(lambda x: nn.functional.pad(x[:, 4:-4, 4:-4], (4, 4, 4, 4))), "a picture all white becomes"),
        (transforms.Lambda(lambda x: x**2.2), r"all \(64, 128, 192\) becomes"),
        (transforms.Lambda(lambda x: x.flip(0)), r"all \(64, 128, 192\) becomes 0.7529, 0.502, 0.251, expected 0.251,"),
        (transforms.Grayscale(3), r"all \(64, 128, 192\) becomes"),
    ],
    ids=["inverted", "constant", "by its own mean", "padded", "gamma", "BGR", "grey"],
)
def test_transforms_that_the_input_space_cannot_stand_for(step: Any, reason: str) -> None:
    with (
        with_transform(transforms.Resize((32, 32)), transforms.ToTensor(), step) as model,
        pytest.raises(UsageError, match=f"transform of model 'vit'.*{reason}.*image_size, mean and std instead"),
    ):
        maximize(dictionary(double=False), [model], [3])


# ---- errors ----------------------------------------------------------------------------------------------------------


def test_arguments_that_do_not_fit_are_refused_before_any_work(resnet: HookedModel, vit: HookedModel) -> None:
    usae, both = dictionary(), [resnet, vit]
    cases: list[tuple[type[UsageError], str, dict[str, Any]]] = [
        (UsageError, r"the list is empty \(give numbers", {"latents": []}),
        (UsageError, "latent 40 is out of range: the USAE has latents 0 to 39", {"latents": [3, 40]}),
        (UsageError, "latent -1 is out of range", {"latents": [-1]}),
        (UsageError, "no models to maximise in", {"models": []}),
        (UsageError, "2 of the models given have the name 'vit'", {"models": [vit, resnet, vit]}),
        (SiteError, "no site 'vit/blocks.0'.*did you mean 'vit/blocks.1'", {"sites": ["vit/blocks.0"]}),
        (SiteError, r"model 'resnet' is not among those given: vit", {"models": [vit], "sites": ["resnet/layer4"]}),
        (SiteError, "sites is empty.*resnet/layer4, vit/blocks.1", {"sites": []}),
        (SiteError, "has no model", {"sites": ["layer4"]}),
    ]
    for kind, message, change in cases:
        arguments = {"models": both, "latents": [1]} | change
        with pytest.raises(kind, match=message):
            iter_pictures(usae, **arguments)


def test_models_that_do_not_fit_the_usae(vit: HookedModel) -> None:
    with pytest.raises(UsageError, match=r"no site of model 'vit' \(did you mean 'vit2'\? the USAE's models: vit2, r;"):
        iter_pictures(dictionary({"vit2/blocks.1": 24, "r/layer4": 16}), [vit], [1])
    with pytest.raises(SiteError, match=r"'vit/blocks.1' has d_in = 20 in the USAE, but 24 in the model given"):
        iter_pictures(dictionary({"vit/blocks.1": 20}), [vit], [1])
    with pytest.raises(UnknownLayerError, match=r"'vit' has no layer 'blocks.7'"):
        iter_pictures(dictionary({"vit/blocks.7": 24}), [vit], [1])


class Between(nn.Module):
    """A ViT with something between its first and second block."""

    def __init__(self, between: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.net = network("vit")
        self.blocks = self.net.blocks
        self.between = between

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.net._pos_embed(self.net.patch_embed(x))
        result: Tensor = self.blocks[1](self.between(self.blocks[0](tokens)))
        return result


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("between", [torch.Tensor.detach, torch.round], ids=["detached", "rounded"])
def test_no_gradient_is_an_error_and_no_grey_picture(between: Callable[[Tensor], Tensor], frozen: bool) -> None:
    usae, module = dictionary(double=False), Between(between)
    module.requires_grad_(not frozen)
    usae.requires_grad_(not frozen)
    with (
        attach(module, name="vit", layers=["blocks.1"], image_size=32, mean=MEAN, std=STD) as model,
        pytest.raises(UsaeProbeError, match=r"gradient of latent 3 at site 'vit/blocks.1' .* exactly zero \(does a"),
    ):
        maximize(usae, [model], [3, 4], steps=2)


def test_a_latent_without_encoder_row_is_named(vit: HookedModel) -> None:
    usae = dictionary()
    with torch.no_grad():
        usae.W_enc[1][8] = 0
    with pytest.raises(UsaeProbeError, match="gradient of latent 8 at site"):
        maximize(usae, [vit], [3, 8], steps=2)


def test_numbers_that_are_not_finite(vit: HookedModel) -> None:
    usae = dictionary()
    with torch.no_grad():
        usae.W_enc[1][8] = float("inf")
    with pytest.raises(NonFiniteError, match=r"gradient of latent 8 at site 'vit/blocks.1' to the pixels is (nan|inf)"):
        maximize(usae, [vit], [8], steps=2)


@pytest.mark.parametrize("call", [3, 5])  # after one look and one step; in the last of four steps
def test_numbers_that_stop_being_finite(call: int) -> None:
    calls = 0

    def breaks(x: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return x * float("nan") if calls == call + 1 else x  # the first call is the dry run's

    module = Between(breaks)
    with (
        attach(module, name="vit", layers=["blocks.1"], image_size=32, mean=MEAN, std=STD) as model,
        pytest.raises(NonFiniteError, match=r"ascent of latent 3 at site .* left the finite numbers \(lower cam.lr"),
    ):
        maximize(dictionary(double=False), [model], [3], steps=4)
