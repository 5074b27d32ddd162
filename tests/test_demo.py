"""What the demo ships: networks that have learned, weights that belong to their record, and a folder that can move."""

from __future__ import annotations

import hashlib
import importlib.util
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import usae_probe as up
from usae_probe import demo
from usae_probe.demo import FACTOR_NAMES, demo_config, draw_images, networks, prepare_demo

ROOT = Path(__file__).resolve().parents[1]
SHIPPED = Path(demo.__file__).parent
NAMES = ["resnet", "vit"]


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("train_demo_models", ROOT / "examples/train_demo_models.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_weights_are_those_of_the_record_and_small() -> None:
    assert list(networks()) == NAMES
    for name, facts in networks().items():
        assert hashlib.sha256((SHIPPED / f"{name}.safetensors").read_bytes()).hexdigest() == facts["sha256"]
    assert sum(file.stat().st_size for file in SHIPPED.glob("*.safetensors")) < 5e6


@pytest.mark.parametrize("name", NAMES)
def test_both_networks_have_learned_every_factor(name: str, script: ModuleType) -> None:
    """On pictures of a seed that nothing else uses, as well as the record says of its own."""
    model = script.build(demo_config(Path()).models[name], seed=0)
    model.load_state_dict({k: v.float() for k, v in load_file(SHIPPED / f"{name}.safetensors").items()})
    found = script.accuracy(model, draw_images(400, size=demo.SIZE, seed=77))
    recorded = networks()[name]["held_out_accuracy"]
    assert list(found) == list(recorded) == list(FACTOR_NAMES)
    for factor, share in found.items():
        assert recorded[factor] >= 0.9
        assert share == pytest.approx(recorded[factor], abs=0.04)  # 400 pictures: .04 is about 3 deviations at .95


def test_the_readme_has_the_figures_of_the_record() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for name, facts in networks().items():
        shares = " | ".join(f"{100 * share:.2f}" for share in facts["held_out_accuracy"].values())
        assert f"| {name} | {facts['parameters']:,} | {shares} | `{facts['sha256'][:12]}` |" in text


def test_same_script_and_seed_make_the_same_weights(script: ModuleType, tmp_path: Path) -> None:
    for out in ("one", "two"):
        script.main(None, tmp_path / out, steps=2, n_train=160, n_held_out=8, seed=3)
    for name in NAMES:
        one, two = ((tmp_path / out / f"{name}.safetensors").read_bytes() for out in ("one", "two"))
        assert one == two
        facts = json.loads((tmp_path / "one/networks.json").read_text())[name]
        assert facts["sha256"] == hashlib.sha256(one).hexdigest()
        assert (facts["steps"], facts["seed"]) == (2, 3)
    script.main("vit", tmp_path / "two", steps=2, n_train=160, n_held_out=8, seed=4)
    assert (tmp_path / "two/vit.safetensors").read_bytes() != (tmp_path / "one/vit.safetensors").read_bytes()
    assert json.loads((tmp_path / "two/networks.json").read_text())["vit"]["seed"] == 4


def test_hardening_starts_from_the_plain_weights_and_changes_pictures_for_the_worst(
    script: ModuleType, tmp_path: Path
) -> None:
    few = {"steps": 2, "n_train": 160, "n_held_out": 8, "seed": 3}
    for out, how in (("both", {}), ("plain", {}), ("after", {"plain": tmp_path / "plain"})):
        script.main("resnet", tmp_path / out, hardened=out != "plain", **how, **few)
    both, plain, after = ((tmp_path / out / "resnet.safetensors").read_bytes() for out in ("both", "plain", "after"))
    assert both == after != plain
    clean = torch.rand(4, 3, 8, 8)
    direction = torch.randn(3, 8, 8)
    change = script.worst_change(clean, lambda p: (p * direction).sum(), 0.5, torch.Generator().manual_seed(0))
    norms = change.flatten(1).norm(dim=1)
    assert (norms > 0.4).all()
    assert (norms <= 0.5 + 1e-6).all()
    assert ((change * direction).sum(dim=(1, 2, 3)) > 0.9 * 0.5 * direction.norm()).all()  # nearly along the gradient


def test_a_share_of_every_batch_stays_clean(script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    changed, shown = [], []

    def blackened(clean: torch.Tensor, *_: Any) -> torch.Tensor:
        changed.append(len(clean))
        return torch.zeros_like(clean)

    class Seen(torch.nn.Linear):
        pretrained_cfg = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}  # noqa: RUF012

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            shown.append(x)
            return super().forward(x.flatten(1))

    monkeypatch.setattr(script, "changed_for_the_worst", blackened)
    recipe = script.Recipe(lr=1e-3, batch_size=8, steps=2, radius=1.0, clean=0.25)
    drawings = draw_images(16, size=demo.SIZE, seed=1)
    list(script.train(Seen(3 * demo.SIZE**2, 30), drawings, recipe, seed=0))
    assert changed == [6, 6]
    assert [(x.flatten(1).amax(dim=1) > 0).tolist() for x in shown] == [[True] * 2 + [False] * 6] * 2


def test_what_the_script_records_is_true_of_the_rounded_weights(script: ModuleType, tmp_path: Path) -> None:
    script.main("resnet", tmp_path, steps=3, n_train=160, n_held_out=50, seed=0)
    model = script.build(demo_config(Path()).models["resnet"], seed=9)
    stored = load_file(tmp_path / "resnet.safetensors")
    assert {v.dtype for v in stored.values()} == {torch.float16, torch.int64}
    model.load_state_dict({k: v.float() if v.is_floating_point() else v for k, v in stored.items()})
    recorded = json.loads((tmp_path / "networks.json").read_text())["resnet"]["held_out_accuracy"]
    assert script.accuracy(model, draw_images(50, size=demo.SIZE, seed=script.HELD_OUT_SEED)) == recorded


def test_accuracy_and_batches_by_hand(script: ModuleType) -> None:
    """A network that always answers red, circle, … is right as often as those were drawn."""

    class Constant(torch.nn.Module):
        pretrained_cfg = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}  # noqa: RUF012

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            answers = torch.zeros(len(x), 30)
            answers[:, [0, 6, 14, 18, 21]] = 1.0  # heads begin after 0, 6, 14, 18 and 21 outputs
            return answers

    drawings = draw_images(60, size=demo.SIZE, seed=1)
    expected = {name: float(np.mean(values == 0)) for name, values in drawings.factors.items()}
    assert script.accuracy(Constant(), drawings) == pytest.approx(expected)
    rounds = np.concatenate(list(script.batches(10, 5, 4, seed=0)))
    assert sorted(rounds[:10]) == sorted(rounds[10:]) == list(range(10))


def test_the_folder_is_prepared_once_and_edits_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "N_IMAGES", 12)
    config = prepare_demo(tmp_path / "d")
    assert {file.name for file in (tmp_path / "d").iterdir()} == {
        "demo.toml", "images.npz", "resnet.safetensors", "vit.safetensors"
    }  # fmt: skip
    assert up.RunConfig.load(tmp_path / "d/demo.toml") == config
    before = (tmp_path / "d/images.npz").stat().st_mtime_ns
    (tmp_path / "d/demo.toml").write_text("# mine")
    (tmp_path / "d/vit.safetensors").write_bytes(b"cut")
    prepare_demo(tmp_path / "d")
    assert (tmp_path / "d/demo.toml").read_text() == "# mine"
    assert (tmp_path / "d/vit.safetensors").read_bytes() == (SHIPPED / "vit.safetensors").read_bytes()
    assert (tmp_path / "d/images.npz").stat().st_mtime_ns == before
