"""Adapter `transformer-lens`: tiny Hugging Face ViTs and DeiTs under TransformerLens's names, against its own cache."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from usae_probe import HookedModel, attach
from usae_probe.adapter import ModelSpec, load_adapter
from usae_probe.cli import main
from usae_probe.errors import AdapterError, CheckpointError, UnknownLayerError, UsageError
from usae_probe.hooks import Layout

pytestmark = pytest.mark.usefixtures("one_thread")

SIZES: dict[str, Any] = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 32,
    "image_size": 32,
    "patch_size": 8,
}
UNIT: dict[str, Any] = {"image_size": 32, "mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder each of a ViT with its image processor, a DeiT, a ViT without a head or pooler, and a ResNet."""
    import transformers as hf

    hf.utils.logging.disable_progress_bar()
    root = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    models = {
        "vit": hf.ViTForImageClassification(hf.ViTConfig(**SIZES, num_labels=5)),
        "deit": hf.DeiTForImageClassification(hf.DeiTConfig(**SIZES, num_labels=5)),
        "body": hf.ViTModel(hf.ViTConfig(**SIZES), add_pooling_layer=False),
        "teacher": hf.DeiTForImageClassificationWithTeacher(hf.DeiTConfig(**SIZES, num_labels=5)),
        "resnet": hf.ResNetForImageClassification(
            hf.ResNetConfig(embedding_size=4, hidden_sizes=[4, 4], depths=[1, 1], layer_type="basic")
        ),
    }
    for name, model in models.items():
        model.save_pretrained(root / name)
    hf.ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(root / "vit")
    hf.utils.logging.enable_progress_bar()
    return root


def hooked(folder: Path, layers: tuple[str, ...] = (), **given: Any) -> HookedModel:
    return attach(f"transformer-lens:{folder}", layers=layers, device="cpu", **{**UNIT, **given})


def pictures(n: int = 2) -> Tensor:
    return torch.randn(n, 3, 32, 32, generator=torch.Generator().manual_seed(3))


def cached(bridge: Any, batch: Tensor) -> dict[str, Tensor]:
    with torch.no_grad():
        return dict(bridge.run_with_cache(batch)[1].items())


def load(folder: Path | str, **given: Any) -> Any:
    return load_adapter("transformer-lens").load(ModelSpec(str(folder), **given))


# --- names and activations ---


def test_layers_go_by_transformer_lenss_names_and_aliases_are_one_layer(folders: Path) -> None:
    points = load(folders / "vit").points
    assert len(points) == 110
    pairs = {"hook_resid_pre": "hook_in", "hook_resid_mid": "ln2.hook_in", "hook_resid_post": "hook_out"}
    pairs |= {"attn.hook_q": "attn.q.hook_out", "attn.hook_z": "attn.o.hook_in", "mlp.hook_post": "mlp.out.hook_in"}
    for alias, name in pairs.items():
        assert points[f"blocks.1.{alias}"] == points[f"blocks.1.{name}"]
    assert points["blocks.1.hook_out"].module is not points["blocks.1.mlp.hook_out"].module
    with hooked(folders / "vit") as model:
        infos = {name: info for info in model.layers() for name in (info.name, *info.aliases)}
        assert set(infos) == set(points)
        assert infos["blocks.0.attn.hook_z"].output_shape == (17, 4, 4)
        assert infos["blocks.0.attn.hook_result"].order is None  # it is off
        with pytest.raises(UnknownLayerError, match="hook_result' of model 'vit' never runs"):
            model.capture(pictures(), ["blocks.0.attn.hook_result"])
        with pytest.raises(UnknownLayerError, match=r"hook_resid_pots'.*did you mean .*hook_resid_post"):
            model.capture(pictures(), ["blocks.0.hook_resid_pots"])


@pytest.mark.parametrize("name", ["vit", "deit", "body"])
def test_captures_equal_what_run_with_cache_stores_under_every_name(folders: Path, name: str) -> None:
    with hooked(folders / name) as model:
        expected = cached(model.module, pictures())
        assert len(expected) == (
            87 if name == "body" else 90
        )  # no head: neither unembed.hook_in nor .hook_out nor its alias
        for layer, value in expected.items():
            assert torch.equal(model.capture(pictures(), [layer])[layer], value), layer
        together = model.capture(pictures(), expected)
        assert all(torch.equal(together[layer], value) for layer, value in expected.items())


def test_heads_are_slices_of_the_projections_input(folders: Path) -> None:
    with hooked(folders / "vit", ("blocks.1.attn.hook_z:3", "blocks.1.attn.hook_q:0@all")) as model:
        expected = cached(model.module, pictures())
        z, q = model.rows(pictures()).values()
        assert torch.equal(z, expected["blocks.1.attn.hook_z"][:, 0, 3])  # pool is the class token
        assert torch.equal(q, expected["blocks.1.attn.hook_q"][:, :, 0].reshape(2 * 17, 4))
        # by hand: head 3 of 4 is columns 12 to 15 of the 16 that the output projection is given
        seen: list[Tensor] = []
        handle = model.module.blocks[1].attn.o.original_component.register_forward_pre_hook(
            lambda module, given: seen.append(given[0])
        )
        model.module(pictures())
        handle.remove()
        assert torch.equal(z, seen[0][:, 0, 12:16])


def test_the_residual_stream_adds_up(folders: Path) -> None:
    with hooked(folders / "deit") as model:
        got = model.capture(pictures(), [f"blocks.0.hook_{part}" for part in ("resid_mid", "mlp_out", "resid_post")])
        middle, added, after = got.values()
        assert middle.shape == (2, 18, 16)
        assert torch.equal(after, middle + added)


@pytest.mark.parametrize(("name", "length", "prefix"), [("vit", 17, 1), ("deit", 18, 2), ("body", 17, 1)])
def test_layouts_have_the_prefix_tokens_and_the_grid(folders: Path, name: str, length: int, prefix: int) -> None:
    tokens = Layout("tokens", prefix=prefix, has_cls=True, grid=(4, 4))  # 32 pixels in patches of 8
    loaded = load(folders / name)
    shapes = {
        "blocks.0.hook_resid_mid": (length, 16),
        "blocks.0.ln1.hook_scale": (length, 1),
        "blocks.0.attn.hook_z": (length, 4, 4),
        "blocks.0.attn.hook_pattern": (4, length, length),
        "blocks.0.attn.hook_attn_scores": (4, length, length),
        "blocks.1.hook_out": (length + 3, 16),
        "embed.hook_in": (3, 32, 32),
        "no.name.of.a.bridge": (5,),
    }
    assert loaded.layout_rule(loaded.module, shapes) == {
        "blocks.0.hook_resid_mid": tokens,
        "blocks.0.ln1.hook_scale": tokens,
        "blocks.0.attn.hook_z": Layout("tokens", prefix=prefix, has_cls=True, grid=(4, 4), heads="last"),
        "blocks.0.attn.hook_pattern": None,
        "blocks.0.attn.hook_attn_scores": None,
        "blocks.1.hook_out": Layout("tokens", prefix=prefix, has_cls=True),  # no grid that we know of
        "embed.hook_in": Layout("nchw", prefix=0, grid=(32, 32)),
    }
    with hooked(folders / name, ("blocks.0.hook_out@cls", "blocks.0.hook_out@patch")) as model:
        cls, patches = model.rows(pictures()).values()
        whole = model.capture(pictures(), ["blocks.0.hook_out"])["blocks.0.hook_out"]
        assert torch.equal(patches, whole[:, prefix:].reshape(32, 16))
        assert torch.equal(cls, whole[:, 0])


@pytest.mark.parametrize("layer", ["blocks.1.hook_resid_post", "blocks.1.attn.hook_z", "ln_final.hook_normalized"])
def test_gradients_reach_the_pixels(folders: Path, layer: str) -> None:
    with hooked(folders / "vit") as model:
        batch = pictures().requires_grad_()
        value = model.capture(batch, [layer], grad=True)[layer]
        (gradient,) = torch.autograd.grad(value[0, 0].pow(3).sum(), batch)
        assert float(gradient[0].abs().sum()) > 1e-6
        assert float(gradient[1].abs().sum()) == 0.0


def test_splicing_a_head_equals_a_hook_of_transformer_lens(folders: Path) -> None:
    def without_head_2(z: Tensor, hook: Any) -> Tensor:
        z = z.clone()
        z[:, :, 2] = 0
        return z

    with hooked(folders / "vit") as model:
        spliced = model.splice(pictures(), "blocks.0.attn.hook_z:2@all", torch.zeros_like)
        with torch.no_grad():
            expected = model.module.run_with_hooks(pictures(), fwd_hooks=[("blocks.0.attn.hook_z", without_head_2)])
            untouched = model.module(pictures())
        assert torch.equal(spliced, expected)
        assert not torch.allclose(spliced, untouched)


def test_the_bridge_computes_what_hugging_face_does_and_keeps_doing_so(folders: Path) -> None:
    import transformers as hf

    own = hf.DeiTForImageClassification.from_pretrained(folders / "deit", attn_implementation="eager").eval()
    model = hooked(folders / "deit")
    bridge: Any = model.module
    with torch.no_grad():
        logits = own(pictures()).logits
        assert torch.equal(bridge(pictures()), logits)
        before = cached(bridge, pictures())
        attributes = [set(part.__dict__) for part in bridge.modules()]
        states = bridge.blocks[0].attn.hook_in.hook_conversion._conversion_state
        states.clear()
        model.capture(pictures(), ["blocks.0.attn.hook_in", "blocks.1.hook_out"])
        assert not states  # TransformerLens's conversion would note every tensor
        model.close()
        after = cached(bridge, pictures())
        assert torch.equal(bridge(pictures()), logits)
    assert list(before) == list(after)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert [set(part.__dict__) for part in bridge.modules()] == attributes


# --- live bridges ---


def test_live_bridges_are_recognised(folders: Path) -> None:
    from transformer_lens.model_bridge import TransformerBridge

    bridge = TransformerBridge.boot_transformers(str(folders / "vit"), device="cpu")
    with attach(bridge, layers=["blocks.*.hook_resid_post"]) as model:  # the bridge has its image processor
        assert model.module is bridge
        assert model.preprocess.mean == (0.5, 0.5, 0.5)
        expected = cached(bridge, pictures())
        got = list(model.rows(pictures()).values())
        assert torch.equal(got[0], expected["blocks.0.hook_resid_post"][:, 0])
        assert torch.equal(got[1], expected["blocks.1.hook_resid_post"][:, 0])
    assert load_adapter("transformer-lens").adopt(nn.Linear(2, 2)) is None


def test_neither_library_is_imported_to_look_at_a_live_model() -> None:
    code = (
        "import sys; from torch import nn\n"
        "from usae_adapters.transformer_lens_models import TransformerLensAdapter\n"
        "adopted = TransformerLensAdapter().adopt(nn.Linear(2, 2))\n"
        "heavy = ('transformer_lens', 'transformers.modeling_utils')  # nnsight imports the shell of transformers\n"
        "print(adopted, [name for name in heavy if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout == "None []\n"


# --- weights ---


def test_untrained_models_need_the_configuration_alone(folders: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((folders / "vit" / "config.json").read_bytes())
    given = {"pretrained": False, "options": {"num_labels": 3, "num_hidden_layers": 1}}
    with hooked(tmp_path, **given) as first, hooked(tmp_path, **given) as second:
        logits = first.module(pictures())
        assert logits.shape == (2, 3)
        assert torch.equal(logits, second.module(pictures()))
        assert not any(part.training for part in first.module.modules())
        assert "blocks.1.hook_out" not in {info.name for info in first.layers()}
    with pytest.raises(AdapterError, match=r"the weights of .* could not be loaded"):
        hooked(tmp_path)


def test_checkpoints_are_read_in_both_spellings(folders: Path, tmp_path: Path) -> None:
    on_the_hub = folders / "vit" / "model.safetensors"
    assert "vit.encoder.layer.0.output.dense.bias" in load_file(on_the_hub)
    import transformers as hf

    module = hf.ViTForImageClassification.from_pretrained(folders / "vit")
    assert "vit.layers.0.mlp.fc2.bias" in module.state_dict()
    torch.save({"state_dict": module.state_dict()}, tmp_path / "own.pt")
    (tmp_path / "config.json").write_bytes((folders / "vit" / "config.json").read_bytes())
    with hooked(folders / "vit") as model, torch.no_grad():
        expected = model.module(pictures())
    for path in (on_the_hub, tmp_path / "own.pt"):
        with hooked(tmp_path, checkpoint=path) as model, torch.no_grad():
            assert torch.equal(model.module(pictures()), expected)


def test_weights_that_do_not_fit_are_named(folders: Path, tmp_path: Path) -> None:
    state = load_file(folders / "vit" / "model.safetensors")
    state["classifier.bias"] = torch.zeros(7)
    state["another.weight"] = state.pop("vit.embeddings.cls_token")
    save_file(state, tmp_path / "wrong.safetensors")
    with pytest.raises(CheckpointError) as caught:
        hooked(folders / "vit", checkpoint=tmp_path / "wrong.safetensors")
    text = str(caught.value)
    assert "classifier.bias is [7] in the weights, [5] in the model" in text
    assert "1 missing: vit.embeddings.cls_token" in text
    assert "1 not in the model: another.weight" in text
    with pytest.raises(CheckpointError, match=r"classifier.weight is \[5, 16\] in the weights, \[9, 16\] in the model"):
        hooked(folders / "vit", options={"num_labels": 9})
    with pytest.raises(CheckpointError, match=r"2 missing: classifier.bias, classifier.weight"):
        hooked(folders / "body", options={"architectures": ["ViTForImageClassification"]})
    with pytest.raises(CheckpointError, match="does not exist"):
        hooked(folders / "vit", checkpoint=tmp_path / "none.safetensors")


def test_options_are_fields_of_the_configuration(folders: Path) -> None:
    with pytest.raises(UsageError, match=r"has no option 'num_label'.*did you mean.*num_labels"):
        hooked(folders / "vit", options={"num_label": 5})
    with pytest.raises(UsageError, match="has no option 'return_dict'"):
        hooked(folders / "vit", options={"return_dict": False})
    with pytest.raises(UsageError, match=r"does not take hidden_size = 'wide': .*expected int, got str"):
        hooked(folders / "vit", pretrained=False, options={"hidden_size": "wide"})
    with pytest.raises(UsageError, match="cannot be built with options"):
        hooked(folders / "vit", pretrained=False, options={"hidden_act": "none such"})
    with hooked(folders / "teacher", options={"architectures": ["DeiTModel"]}) as model, torch.no_grad():
        assert model.module(pictures()).shape == (2, 18, 16)


# --- what cannot be loaded ---


def test_what_cannot_be_loaded_is_said_in_a_line(folders: Path, tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match="the configuration of 'google/none-such' could not be loaded") as caught:
        attach("transformer-lens:google/none-such")
    assert "\n" not in str(caught.value)
    assert "local folder" in caught.value.hint
    with pytest.raises(UsageError, match=r"folder '.*not/there/at/all' does not exist"):
        attach("transformer-lens:not/there/at/all", base=tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(AdapterError, match="the configuration of 'empty' could not be loaded"):
        attach("transformer-lens:empty", base=tmp_path)
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "config.json").write_bytes((folders / "vit" / "config.json").read_bytes())
    (tmp_path / "broken" / "model.safetensors").write_bytes(b"no weights")
    with pytest.raises(AdapterError, match="the weights of 'broken' could not be loaded: SafetensorError"):
        attach("transformer-lens:broken", base=tmp_path)


def test_unsupported_architectures_name_the_supported(folders: Path) -> None:
    with pytest.raises(UsageError, match="is a ResNetForImageClassification, which TransformerLens cannot") as caught:
        hooked(folders / "resnet")
    assert caught.value.hint == (
        "it supports DeiTForImageClassification, DeiTModel, ViTForImageClassification, ViTModel"
    )
    with pytest.raises(UsageError, match="DeiTForImageClassificationWithTeacher") as caught:
        hooked(folders / "teacher")
    assert "options = { architectures = ['DeiTModel'] }" in caught.value.hint


# --- pictures ---


def processor(folder: Path, name: str, **given: Any) -> Any:
    """Put an image processor beside a model, and return it."""
    import transformers as hf

    made = getattr(hf, name)(**given)
    made.save_pretrained(folder)
    return made


@pytest.mark.parametrize(
    ("name", "given", "expected"),
    [
        # resized to 40 x 40, cropped to 32 x 32: 32 / 40 = .8
        (
            "DeiTImageProcessor",
            {"size": {"height": 40, "width": 40}, "crop_size": {"height": 32, "width": 32}},
            (0.8, "squash", "bicubic", (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
        ),
        # (level / 127.5 - 1) / 1 = (level / 255 - .5) / .5
        (
            "ViTImageProcessor",
            {"size": {"height": 32, "width": 32}, "rescale_factor": 1 / 127.5, "image_mean": [1] * 3}
            | {"image_std": [1] * 3, "resample": 0},
            (1.0, "squash", "nearest", (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
        ),
        # the shorter edge to 36, and no normalisation
        (
            "CLIPImageProcessor",
            {"size": {"shortest_edge": 36}, "crop_size": {"height": 32, "width": 32}, "do_normalize": False},
            (32 / 36, "center", "bicubic", (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)),
        ),
    ],
)
def test_pictures_are_prepared_as_the_image_processor_does(
    folders: Path, tmp_path: Path, name: str, given: dict[str, Any], expected: tuple[Any, ...]
) -> None:
    for file in (folders / "vit").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    theirs = processor(tmp_path, name, **given)
    ours = load(tmp_path).preprocessing
    assert ours.image_size == (32, 32)
    assert ours.crop_pct == pytest.approx(expected[0])
    assert (ours.crop_mode, ours.interpolation, ours.mean, ours.std) == expected[1:]
    picture = torch.randint(0, 256, (3, 48, 72), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    made = theirs(picture, return_tensors="pt")["pixel_values"]
    level = 1 / (255 * ours.std[0])
    assert float((ours([picture]) - made).abs().max()) <= 2.1 * level  # they round in between, we at the end


@pytest.mark.parametrize(
    "given",
    [
        {"size": {"shortest_edge": 32}},  # no picture of one size
        {"do_resize": False},
        {"size": {"height": 40, "width": 40}, "do_center_crop": True, "crop_size": {"height": 32, "width": 16}},
        {"size": {"height": 32, "width": 32}, "do_center_crop": True, "crop_size": {"height": 64, "width": 64}},
    ],
)
def test_processors_that_we_cannot_follow_are_left_to_the_user(
    folders: Path, tmp_path: Path, given: dict[str, Any]
) -> None:
    for file in (folders / "vit").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    processor(tmp_path, "ViTImageProcessor", **given)
    assert load(tmp_path).preprocessing is None
    with pytest.raises(UsageError, match=r"preprocessing of model .* image_size, mean, std missing"):
        attach(f"transformer-lens:{tmp_path}", device="cpu")


def test_the_models_size_counts(folders: Path) -> None:
    assert load(folders / "deit").preprocessing is None
    known = load(folders / "vit", pretrained=False, options={"image_size": 48}).preprocessing
    assert known.image_size == (48, 48)


# --- what reaches the terminal ---


def test_layers_prints_one_json_document(
    folders: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["usae-probe", "layers", f"transformer-lens:{folders / 'vit'}", "--json"])
    with pytest.raises(SystemExit) as caught:
        main()
    out, err = capfd.readouterr()
    assert caught.value.code in (0, None), out + err
    (layers,) = json.loads(out)["models"].values()
    named = {name: layer for layer in layers for name in (layer["name"], *layer["aliases"])}
    assert named["blocks.1.attn.hook_z"]["output_shape"] == [17, 4, 4]
    assert "Loading weights" not in err


def test_loading_says_nothing_and_leaves_the_switches_of_the_libraries(
    folders: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity_info()
    logging.enable_progress_bar()
    try:
        hooked(folders / "vit", dtype="bfloat16")
        assert logging.get_verbosity() == logging.INFO
        assert logging.is_progress_bar_enabled()
    finally:
        logging.set_verbosity(verbosity)
    assert capfd.readouterr() == ("", "")
