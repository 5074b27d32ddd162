"""One function shows how far every call that takes `progress=` has come."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import usae_probe as up
from usae_probe.config import ProbesConfig
from usae_probe.report import bars as module
from usae_probe.report.terminal import StageProgress

from .tiny_run import CONFIG, put_tiny_run

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to work in, and a line for every call that is not the last."""
    monkeypatch.setattr(module, "StageProgress", lambda console: StageProgress(console, every=0.0))
    monkeypatch.chdir(tmp_path)
    return put_tiny_run(tmp_path)


def hooked() -> list[up.HookedModel]:
    given = {"image_size": 16, "mean": (0.5, 0.5, 0.5), "std": (0.25, 0.25, 0.25)}
    widths = {"a": {}, "b": {"width": 6, "seed": 1}}
    return [up.attach("module:nets.py:build", name=n, layers=["2"], options=o, **given) for n, o in widths.items()]


def test_every_function_that_takes_progress(base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    models = hooked()
    with up.bars() as show:
        buffer = up.harvest(models, "images.npz", "acts", batch_size=16, progress=show)
        run = up.train(buffer, n_latents=16, k=2, steps=4, progress=show)
        up.train_independent(buffer, like=run, progress=show)
        up.evaluate(run.usae, buffer, config=ProbesConfig(min_fires=1), progress=show)
        up.maximize(run.usae, models, latents=[0], buffer=buffer, steps=4, progress=show)
        report = up.scan(models, "images.npz", depth=0, n_latents=16, k=2, steps=4, progress=show)
        up.Run(up.RunConfig.from_dict(CONFIG, base=base), "run", progress=show).run()
    assert report.joint
    out, err = capsys.readouterr()
    assert out == ""
    said = re.sub(r"[\d,.]+/s, |[\d.]+ s left, ", "", err)
    for line in (
        "harvest: 27 of 60 images",
        "train: 1 of 4 steps, loss",
        "train a/2: 1 of 4 steps, loss",
        "train b/2: 3 of 4 steps, loss",
        "cam: 11 of 12 steps, joint",
        "similarity: 1 of 3 cells",
        "codes: 5 of 10 rows",
        "measure: ",
        "harvest: 38 of 60 images",
        "evaluate: ",
    ):
        assert line in said, said
    assert "train: 7 of 8 steps" in said  # of the run's own


def test_skipped_images_are_counted(capsys: pytest.CaptureFixture[str], base: Path) -> None:
    with up.bars() as show:
        show(module.HarvestProgress(10, 20, 3))
        show(module.HarvestProgress(20, 20, 3))
    assert capsys.readouterr().err.strip() == "harvest: 10 of 20 images, 3 skipped"
