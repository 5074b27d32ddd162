"""The pictures of a run: which latents, what is kept, what an interruption costs, and what is true of each picture."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import usae_probe as up
from usae_probe import Run, RunConfig
from usae_probe.demo import draw_images, save_drawings
from usae_probe.errors import BufferMismatchError, ConfigError, NoLatentsError, UsaeProbeWarning, UsageError
from usae_probe.pipeline import RunRecord
from usae_probe.pipeline import pictures as stage
from usae_probe.pipeline.latents import choose_latents, known_of_latents
from usae_probe.pipeline.models import attach_all
from usae_probe.pipeline.pictures import CamStage

from .tiny_run import CONFIG, changed, finished_twice, put_tiny_run, restored

SITES = ["a/2", "b/2"]
CAM = {"latents": "0,3", "steps": 6, "exemplars": 2}

Pictures = Callable[..., dict[str, Any]]
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def _no_drawing(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Cards and sheets have tests of their own; here one test draws them."""
    if request.node.name != "test_every_picture_is_what_its_record_says":
        monkeypatch.setattr(stage, "latent_card", lambda _, path: path.touch())
        monkeypatch.setattr(stage, "cam_sheet", lambda _columns, _rows, path: path.touch())


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return finished_twice(tmp_path_factory, CONFIG)


@pytest.fixture
def folder(finished: tuple[Path, Path]) -> Path:
    return restored(*finished) / "run"


@pytest.fixture
def pictures(folder: Path) -> Pictures:
    """Do the cam stage with some keys of [cam]; return cam.json."""

    def do(progress: Any = None, **keys: Any) -> dict[str, Any]:
        config = RunConfig.from_dict(CONFIG | {"cam": CAM | keys}, base=folder.parent)
        cam = Run(config, folder, progress=progress).run(("cam",)).cam
        assert cam is not None
        return cam

    return do


def stamps(folder: Path) -> dict[str, int]:
    return {file.name: file.stat().st_mtime_ns for file in (folder / "cam").glob("latent-*.npz")}


def made(cam: dict[str, Any]) -> list[tuple[int, dict[str, Any]]]:
    """Every picture of cam.json with its latent."""
    return [(card["latent"], picture) for card in cam["cards"] for picture in card["pictures"]]


def test_every_picture_is_what_its_record_says(pictures: Pictures, folder: Path) -> None:
    cam = pictures(restarts=2)
    assert (cam["latents"], cam["sites"], cam["modes"]) == ([0, 3], SITES, ["independent", "joint"])
    assert cam == json.loads((folder / "cam/cam.json").read_text())
    assert (cam["n_natural"], cam["unit"]) == (60, "images")
    usae, config = up.USAE.load(folder / "usae.safetensors"), RunConfig.from_dict(CONFIG, base=folder.parent)
    for name, entry in config.models.items():
        given = entry.model_dump(exclude={"adapter", "name", "layers"})
        site = f"{name}/2"
        with up.attach(entry.name, adapter="module", name=name, layers=["2"], base=config.base, **given) as model:
            for latent, record in made(cam):
                with np.load(folder / f"cam/latent-{latent:05d}.npz") as arrays:
                    pixels = torch.from_numpy(arrays[record["array"]][record["restart"]]).permute(2, 0, 1)
                rows = model.rows(model.preprocess([pixels]))[site]
                z = usae.to_dense(usae.encode(rows, site))[0, latent].item()
                z_pre = usae.pre_activation(rows, site, [latent]).item()
                score = record["scores"][site]
                assert (score["z"], score["z_pre"]) == (pytest.approx(z, abs=1e-5), pytest.approx(z_pre, abs=1e-5))
                assert score["selected"] == (z > 0)
                assert len(record["curves"][site]) == 6
                if record["sites"] == [site]:
                    assert record["failed"] == (not score["above_all"])
    for latent in (0, 3):  # all restarts are in the file, the best of each on the card
        whole = json.loads((folder / f"cam/latent-{latent:05d}.json").read_text())
        assert len(whole["pictures"]) == 6
        for key in ("independent__a__2", "independent__b__2", "joint"):
            of_key = [picture for picture in whole["pictures"] if picture["array"] == key]
            own = [min(picture["scores"][site]["score"] for site in picture["sites"]) for picture in of_key]
            (shown,) = (p for number, p in made(cam) if (number, p["array"]) == (latent, key))
            assert min(shown["scores"][site]["score"] for site in shown["sites"]) == max(own)
    with Image.open(folder / "cam/sheet.png") as sheet, Image.open(folder / "cam/latent-00003.png") as card:
        assert min(*sheet.size, *card.size) > 200


def test_counts_are_those_of_the_pictures(pictures: Pictures) -> None:
    cam = pictures(latents="0,2,3,5,8,13", modes=["independent", "joint", "contrast"])
    for mode, counts in cam["modes_counted"].items():
        of_mode = [picture for _, picture in made(cam) if picture["mode"] == mode]
        findings = [picture for picture in of_mode if not picture["failed"]]
        assert counts["pictures"] == len(of_mode) == (6 if mode == "joint" else 12)
        assert counts["findings"] == len(findings)
    assert sum(cam["verdicts"].values()) == 6
    for card in cam["cards"]:
        for record in (record for record in card["pictures"] if record["mode"] == "independent"):
            own = record["scores"][record["sites"][0]]
            assert own["n"] == 60
            assert own["above_all"] == (own["ratio"] > 1)


def test_sheets_of_eight_latents_and_no_stale_ones(pictures: Pictures, folder: Path) -> None:
    cam = pictures(latents="0,1,2,3,4,5,6,7,8,9", modes=["independent"])
    assert cam["sheets"] == ["cam/sheet-1.png", "cam/sheet-2.png"]
    assert sorted(file.name for file in (folder / "cam").glob("sheet*")) == ["sheet-1.png", "sheet-2.png"]
    assert pictures()["sheets"] == ["cam/sheet.png"]
    assert sorted(file.name for file in (folder / "cam").glob("sheet*")) == ["sheet.png"]


def test_a_second_call_keeps_all_and_other_latents_and_modes_only_add(pictures: Pictures, folder: Path) -> None:
    first = pictures()
    calls: list[Any] = []
    assert pictures(progress=calls.append) == first
    assert not calls
    more = pictures(latents="3,0,5", progress=calls.append)
    assert more["latents"] == [3, 0, 5]
    assert [card for card in more["cards"] if card["latent"] in (0, 3)] == first["cards"][::-1]
    assert (calls[-1].done, calls[-1].total) == (18, 18)  # one latent; two sites and both together; six steps
    contrast = pictures(modes=["contrast"])
    assert [card["verdict"] for card in contrast["cards"]] == [card["verdict"] for card in first["cards"]]
    assert {picture["mode"] for _, picture in made(contrast)} == {"contrast"}
    assert pictures(modes=["joint"])["sheets"] == ["cam/sheet.png"]  # a sheet of one row
    calls.clear()
    assert pictures(progress=calls.append) == first  # they were kept meanwhile
    assert not calls


def test_other_steps_make_other_pictures(pictures: Pictures) -> None:
    first = pictures()
    other = pictures(steps=7)
    for (_, before), (_, after) in zip(made(first), made(other), strict=True):
        assert [len(curve) for curve in after["curves"].values()] == [7, 7]
        assert before["curves"] != after["curves"]


def test_an_interruption_keeps_what_is_done(pictures: Pictures, folder: Path) -> None:
    def interrupt(now: Any) -> None:
        if now.done == 9:  # in the second site
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pictures(progress=interrupt)
    before = stamps(folder)
    assert sorted(before) == ["latent-00000.npz", "latent-00003.npz"]
    assert not (folder / "cam/cam.json").exists()
    calls: list[Any] = []
    whole = pictures(progress=calls.append)
    assert calls[-1].total == 12  # the first site's are there
    for file in (folder / "cam").iterdir():
        file.unlink()
    assert pictures() == whole  # as if never interrupted


def test_of_several_batches_the_finished_latents_are_whole(pictures: Pictures, folder: Path) -> None:
    def interrupt(now: Any) -> None:
        if now.done == 20:  # latent 0 took 18
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pictures(progress=interrupt, max_batch=1)
    assert (folder / "cam/latent-00000.png").exists()
    calls: list[Any] = []
    pictures(progress=calls.append, max_batch=1)
    assert calls[-1].total == 18


@pytest.mark.parametrize("damage", ["json", "npz"])
def test_damage_costs_the_damaged_pictures_only(pictures: Pictures, folder: Path, damage: str) -> None:
    whole = pictures()
    (folder / f"cam/latent-00003.{damage}").write_bytes(b"{")
    (folder / "cam/cam.json").unlink()
    calls: list[Any] = []
    again = pictures(progress=calls.append)
    assert calls[-1].total == 18
    assert again["cards"][0] == whole["cards"][0]
    for (_, before), (_, after) in zip(made(whole), made(again), strict=True):  # alone in its batch: other rounding
        assert before["scores"]["a/2"]["z_pre"] == pytest.approx(after["scores"]["a/2"]["z_pre"], rel=1e-3)


def test_a_dead_latent_is_named_before_any_picture_is_made(pictures: Pictures, folder: Path) -> None:
    usae = up.USAE.load(folder / "usae.safetensors")
    with torch.no_grad():
        for bias in usae.b_enc:
            bias[7] = -1e4
    usae.save(folder / "usae.safetensors")
    lines = (folder / "latents.csv").read_text().splitlines()
    category = lines[0].split(",").index("category")
    cells = lines[8].split(",")
    cells[category] = "dead"
    (folder / "latents.csv").write_text("\n".join([*lines[:8], ",".join(cells), *lines[9:]]) + "\n")
    stage = CamStage(RunConfig.from_dict(CONFIG | {"cam": CAM | {"latents": "0,7"}}, base=folder.parent), folder)
    with ExitStack() as closing, pytest.raises(NoLatentsError, match="latent 7 is dead: none of 60 images fires it"):
        stage.do(usae, up.ActivationBuffer(folder / "buffer"), attach_all(stage.config, closing), lambda _: None)
    assert not list((folder / "cam").glob("*"))


def test_the_folder_alone_says_how_to_go_on(pictures: Pictures, folder: Path) -> None:
    config = RunRecord(folder).config()
    assert config.base == folder.parent
    result = Run(config.model_copy(update={"cam": config.cam.model_copy(update=CAM)}), folder).run(("cam",))
    assert result.cam is not None
    assert result.metrics is not None
    with pytest.raises(UsageError, match="is no run folder: no such folder"):
        RunRecord(folder / "none").config()
    with pytest.raises(UsageError, match=r"is no run folder: no run\.json in it"):
        RunRecord(folder / "buffer").config()


def test_a_run_makes_pictures_when_its_config_has_the_table(folder: Path) -> None:
    config = RunConfig.from_dict(CONFIG | {"cam": CAM}, base=folder.parent)
    result = Run(config, folder).run()
    assert [(stage.stage, stage.kept) for stage in result.stages] == [
        ("harvest", True), ("train", True), ("evaluate", True), ("cam", False), ("report", False)
    ]  # fmt: skip
    assert Run(config, folder).run().stages[-1].kept


def test_a_run_without_a_latent_to_show_warns_and_ends_but_cam_alone_fails(folder: Path) -> None:
    config = RunConfig.from_dict(CONFIG | {"cam": {"latents": "factors:8"}}, base=folder.parent)
    with pytest.warns(UsaeProbeWarning, match="no latent of .* follows a label of the images in every model"):
        result = Run(config, folder).run()
    assert [stage.stage for stage in result.stages] == ["harvest", "train", "evaluate", "report"]
    assert (result.cam, result.metrics is None) == (None, False)
    with pytest.raises(NoLatentsError, match="none to make pictures of"):
        Run(config, folder).run(("cam",))


def test_a_number_that_no_latent_can_have_is_refused_before_any_work() -> None:
    with pytest.raises(ConfigError, match=r"cam.latents names latent 16, but usae.n_latents = 16"):
        RunConfig.from_dict(CONFIG | {"cam": {"latents": "3, 16"}}, base=Path())


# --- which latents ---


def table(folder: Path, rows: list[tuple[str, str, float, str, float]]) -> Path:
    folder.mkdir(exist_ok=True)
    lines = ["latent,category,fires_in,total_energy,follows,auroc[a/x],auroc[b/y]"]
    for i, (category, fires_in, energy, label, score) in enumerate(rows):
        lines.append(f"{i},{category},{fires_in},{energy},{label},{score if label else ''},{0.95 if label else ''}")
    (folder / "latents.csv").write_text("\n".join(lines) + "\n")
    (folder / "metrics.json").write_text('{"class_sites": ["a/x", "b/y"], "factors": {"auroc": 0.9}}')
    return folder


def test_latents_are_chosen_by_energy_or_number(tmp_path: Path) -> None:
    rows = [
        ("universal", "a/x b/y", 1.0, "colour=red", 0.99),
        ("specific", "a/x", 9.0, "colour=red", 0.99),
        ("universal", "a/x b/y", 3.0, "a=b", 0.89),
        ("universal", "a/x b/y", 2.0, "shape=star", 0.9),
        ("dead", "", 0.0, "", 0.0),
        ("chance", "a/x b/y", 4.0, "shape=ring", 0.95),
    ]
    folder = table(tmp_path / "t", rows)
    assert choose_latents("top:8", folder) == [2, 3, 0]
    assert choose_latents("top:2", folder) == [2, 3]
    assert choose_latents("factors:8", folder) == [5, 3, 0]
    assert choose_latents("4, 1,4", folder) == [4, 1]
    assert choose_latents("specific:4", folder) == [1]
    labels = {latent: known.label for latent, known in enumerate(known_of_latents(folder)) if known.label}
    assert labels == {0: "colour = red", 3: "shape = star", 5: "shape = ring"}
    assert [known.category for known in known_of_latents(folder)] == [row[0] for row in rows]
    with pytest.raises(UsageError, match="there is no latent 6") as caught:
        choose_latents("1,6", folder)
    assert "0 to 5" in caught.value.hint
    with pytest.raises(UsageError, match=r"no latent of .* is universal: none"):
        choose_latents("top:8", table(tmp_path / "u", [("specific", "a/x", 1.0, "", 0.5)]))
    with pytest.raises(UsageError, match=r"no latent of .* is specific: none"):
        choose_latents("specific:8", table(tmp_path / "u", [("universal", "a/x b/y", 1.0, "", 0.5)]))
    with pytest.raises(UsageError, match="follows a label"):
        choose_latents("factors:8", table(tmp_path / "u", [("universal", "a/x b/y", 1.0, "a=b", 0.5)]))


def test_following_is_what_the_report_says(tmp_path: Path) -> None:
    """The files of a real evaluation and the report agree; the threshold is low enough to let something through."""
    base, folder = put_tiny_run(tmp_path), tmp_path / "run"
    save_drawings(base / "images.npz", draw_images(200, size=32))
    config = RunConfig.from_dict(CONFIG | {"probes": {"min_fires": 2, "auroc": 0.5}}, base=base)
    report = Run(config, folder).run().report
    assert report is not None
    assert 0 < len(report.following) < 16
    assert choose_latents("factors:99", folder) == [record.latent for record in report.following]


@pytest.mark.parametrize("text", ["top", "top:0", "best:8", "1,,2", "-3", ""])
def test_a_mistyped_choice_is_refused_with_the_spelling(text: str) -> None:
    with pytest.raises(UsageError, match=r"cam.latents") as caught:
        RunConfig.from_dict(CONFIG | {"cam": {"latents": text}}, base=Path())
    assert "top:8" in caught.value.hint


# --- what is not there any more ---


def test_other_weights_are_refused(pictures: Pictures, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTHER_WEIGHTS", "1")
    refused = r"model 'a' is not the one that .* weights_hash: \w+ on disk, \w+ now"
    with pytest.raises(BufferMismatchError, match=refused):
        pictures()
    assert not (folder / "cam").exists()


def test_without_the_images_there_are_pictures_but_no_exemplars(pictures: Pictures, folder: Path) -> None:
    (folder.parent / "images.npz").unlink()
    with pytest.warns(UsaeProbeWarning, match="are left out: image source .* does not exist"):
        cam = pictures()
    assert len(made(cam)) == 6
    assert cam["cards"][0]["exemplars"]["top"]  # their numbers are known
    save_drawings(folder.parent / "images.npz", draw_images(60, size=32, seed=5))
    with pytest.raises(BufferMismatchError, match=r"source\.fingerprint: \w+… on disk, \w+… now"):
        pictures(latents="1")


def test_other_weights_under_the_same_name_redo_the_harvest(tmp_path: Path) -> None:
    base = put_tiny_run(tmp_path)
    build: dict[str, Any] = {}
    exec((base / "nets.py").read_text(), build)
    from safetensors.torch import save_file

    save_file(build["build"](seed=0).state_dict(), base / "w.safetensors")
    models = {"a": {**CONFIG["models"]["a"], "checkpoint": "w.safetensors"}, "b": CONFIG["models"]["b"]}
    config = RunConfig.from_dict(changed() | {"models": models}, base=base)
    Run(config, base / "run").run()
    assert all(stage.kept for stage in Run(config, base / "run").run().stages)
    save_file(build["build"](seed=7).state_dict(), base / "w.safetensors")
    result = Run(config, base / "run").run()
    assert result.stages[0].why == "models.a.checkpoint's content changed"
