"""Checkpoints: what is saved comes back bit for bit, or an error says why not."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from usae_probe.errors import CheckpointError
from usae_probe.files import sha256
from usae_probe.usae import USAE, checkpoint

# equal widths on purpose: a mix-up of the sites would go unnoticed by the shapes
DIMS = {"vit/blocks.11@cls": 6, "resnet/layer4.1.conv2": 6, "dino/blocks.3": 4}


def made(seed: int = 0) -> USAE:
    g = torch.Generator().manual_seed(seed)
    normalisation = {site: (torch.randn(d, generator=g), math.pi * (i + 1)) for i, (site, d) in enumerate(DIMS.items())}
    usae = USAE(DIMS, 10, 2, normalisation=normalisation, seed=seed)
    with torch.no_grad():
        for parameter in usae.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=g))
    return usae


def rewrite(path: Path, **changes: Any) -> None:
    """Change the JSON beside `path`; None takes a key out."""
    beside = path.with_suffix(".json")
    content = json.loads(beside.read_text()) | changes
    beside.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    path = tmp_path / "usae.safetensors"
    made().save(path)
    return path


def test_round_trip_is_exact(saved: Path) -> None:
    usae, back = made(), USAE.load(saved)
    assert (back.sites, back.d_in, back.n_latents, back.k) == (usae.sites, usae.d_in, usae.n_latents, usae.k)
    before, after = usae.state_dict(), back.state_dict()
    assert before.keys() == after.keys()
    assert all(before[name].equal(after[name]) for name in before)
    x = torch.randn(5, 6)
    codes, again = (model.encode(x, "vit/blocks.11@cls") for model in (usae, back))
    assert codes.values.equal(again.values)
    assert usae.decode(codes, "dino/blocks.3").equal(back.decode(again, "dino/blocks.3"))
    second = saved.with_name("second.safetensors")
    back.save(str(second))  # a string will do
    assert second.read_bytes() == saved.read_bytes()


def test_names_and_shapes_of_the_tensors(saved: Path) -> None:
    tensors = load_file(saved)
    keys = ("W_enc", "b_enc", "W_dec", "b_dec", "mean", "scale")
    assert set(tensors) == {f"{key}.{i}" for key in keys for i in range(3)}
    assert [tuple(tensors[f"W_enc.{i}"].shape) for i in range(3)] == [(10, 6), (10, 6), (10, 4)]
    assert [tuple(tensors[f"W_dec.{i}"].shape) for i in range(3)] == [(10, 6), (10, 6), (10, 4)]
    assert tensors["W_dec.1"].equal(made().decoder("resnet/layer4.1.conv2"))
    assert tensors["scale.2"].tolist() == pytest.approx([3 * math.pi])
    about = json.loads(saved.with_suffix(".json").read_text())
    assert about == {
        "schema": 1,
        "sites": list(DIMS),
        "d_in": DIMS,
        "n_latents": 10,
        "k": 2,
        "sparsity": "topk",
        "sha256": sha256(saved),
    }
    assert sorted(file.name for file in saved.parent.iterdir()) == ["usae.json", "usae.safetensors"]


def test_settings_may_be_overridden(saved: Path) -> None:
    assert USAE.load(saved, kernel="reference").kernel.name == "reference"


def test_a_checkpoint_from_before_there_were_sparsities_is_topk(saved: Path) -> None:
    rewrite(saved, sparsity=None)
    back = USAE.load(saved)
    assert (back.sparsity.name, back.matryoshka, back.training) == ("topk", (), False)
    assert back.W_dec.equal(made().W_dec)


def test_the_list_of_sites_has_the_order(saved: Path) -> None:
    # a tool that sorts keys (`jq -S`) must not exchange sites of equal width
    rewrite(saved, d_in=dict(sorted(DIMS.items())))
    back = USAE.load(saved)
    assert back.sites == tuple(DIMS)
    assert back.state_dict()["W_dec"].equal(made().W_dec)


def test_saving_again_replaces(saved: Path) -> None:
    made(1).save(saved)
    assert USAE.load(saved).W_dec.equal(made(1).W_dec)


@pytest.mark.parametrize("broken", ["save_file", "json_text"])
def test_an_exception_on_the_way_keeps_both_old_files(
    saved: Path, monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    def fail(*args: object) -> None:
        if broken == "save_file":
            Path(str(args[1])).write_bytes(b"half of it")
        raise OSError("disk full")

    before = {file.name: file.read_bytes() for file in saved.parent.iterdir()}
    monkeypatch.setattr(checkpoint, broken, fail)
    with pytest.raises(OSError, match="disk full"):
        made(1).save(saved)
    assert {file.name: file.read_bytes() for file in saved.parent.iterdir()} == before
    assert USAE.load(saved).W_dec.equal(made().W_dec)


def test_a_name_that_is_the_jsons_own_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"usae.json' is the name of the JSON .*\.safetensors"):
        made().save(tmp_path / "usae.json")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("suffix", [".safetensors", ".json"])
def test_missing_file(saved: Path, suffix: str) -> None:
    saved.with_suffix(suffix).unlink()
    with pytest.raises(CheckpointError, match=rf"no USAE checkpoint: '.*usae\{suffix}' does not exist \(train first\)"):
        USAE.load(saved)


def test_damage(saved: Path) -> None:
    content = bytearray(saved.read_bytes())
    content[-3] ^= 1
    saved.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"is not the file that 'usae.json' describes \(SHA-256 differs\)"):
        USAE.load(saved)
    saved.write_bytes(content[:100])
    with pytest.raises(CheckpointError, match=r"usae.safetensors' cannot be read: .*train again"):
        USAE.load(saved)


def test_another_files_json(saved: Path) -> None:
    rewrite(saved, sha256="0" * 64)
    with pytest.raises(CheckpointError, match="SHA-256 differs"):
        USAE.load(saved)


def test_tensors_that_do_not_fit_the_json(saved: Path) -> None:
    rewrite(saved, n_latents=11)
    with pytest.raises(
        CheckpointError, match=r"'W_enc.0' of '.*' is \[10, 6\] on disk, expected \[11, 6\] by the JSON"
    ):
        USAE.load(saved)
    rewrite(saved, n_latents=10)
    tensors = load_file(saved)
    del tensors["b_dec.1"]
    save_file(tensors, saved)
    rewrite(saved, sha256=sha256(saved))
    with pytest.raises(CheckpointError, match=r"'b_dec.1' of '.*' is missing, expected \[6\]"):
        USAE.load(saved)


def test_a_json_that_is_none_of_ours(saved: Path) -> None:
    rewrite(saved, schema=2)
    with pytest.raises(CheckpointError, match=r"has schema 2, this version reads 1 \(update usae-probe\)"):
        USAE.load(saved)
    rewrite(saved, schema=1, sha256=None, k=None)
    with pytest.raises(CheckpointError, match=r"usae.json' lacks k, sha256"):
        USAE.load(saved)
    rewrite(saved, sha256=sha256(saved), k=2, sites=["vit/blocks.11@cls"])
    with pytest.raises(CheckpointError, match=r"sites \['vit/blocks.11@cls'\] are not those of d_in"):
        USAE.load(saved)
    for text in ("[1, 2]", "{}", "no json", ""):
        saved.with_suffix(".json").write_text(text)
        with pytest.raises(CheckpointError, match="does not describe a USAE checkpoint"):
            USAE.load(saved)
