"""The page of a run: it holds what the files hold, what was made once is kept, what is missing costs images only."""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from usae_probe import Run, RunConfig
from usae_probe.errors import ConfigError, StageError, UsaeProbeWarning, UsageError
from usae_probe.pipeline import RunResult, explorer

from .command import Command, command
from .test_explorer import embedded
from .tiny_run import CONFIG, finished_twice, restored

SITES = ["a/2", "b/2"]
pytestmark = pytest.mark.usefixtures("one_thread")
TABLES = {"probes": {"min_fires": 2, "fidelity_images": 0, "bootstrap": 20, "nulls": 2}, "report": {}}
Do = Callable[..., RunResult]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return finished_twice(tmp_path_factory, CONFIG | TABLES)


@pytest.fixture
def base(finished: tuple[Path, Path]) -> Path:
    return restored(*finished)


@pytest.fixture
def do(base: Path) -> Do:
    """Do stages of the run with some tables changed."""

    def stages(*names: Any, progress: Any = None, **tables: Any) -> RunResult:
        config = RunConfig.from_dict(CONFIG | TABLES | tables, base=base)
        return Run(config, base / "run", progress=progress).run(names or None)

    return stages


def page(base: Path) -> str:
    return (base / "run/report.html").read_text(encoding="utf-8")


def held(base: Path) -> list[int]:
    cards: list[int] = embedded(page(base), "page-settings")["cards"]
    return cards


def made(base: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in (base / "run/cards").iterdir()}


def test_the_page_says_what_the_files_say(base: Path) -> None:
    html = page(base)
    metrics = json.loads((base / "run/metrics.json").read_text())
    assert embedded(html, "page-metrics") == metrics
    with (base / "run/latents.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    columns = embedded(html, "page-latents")
    assert list(columns) == list(rows[0])
    for i, row in enumerate(rows):
        for name, cell in row.items():
            value = columns[name][i]
            assert value == (None if cell == "" else type(value)(cell)), (name, i)
    worth = [i for i, row in enumerate(rows) if row["category"] not in ("rare", "dead")]
    assert sorted(held(base)) == worth
    card = embedded(html, f"data-{worth[0]}")
    assert (list(card["sites"]), card["unit"], card["n_natural"]) == (SITES, "images", 60)
    assert len(card["sites"]["a/2"]["across"]) == 4
    assert json.loads((base / "run/run.json").read_text())["stages"]["report"]["seconds"] > 0


def test_nothing_changed_nothing_done(base: Path, do: Do) -> None:
    before = made(base), (base / "run/report.html").stat().st_mtime_ns
    assert all(stage.kept for stage in do().stages)
    assert (made(base), (base / "run/report.html").stat().st_mtime_ns) == before
    (base / "run/report.html").unlink()
    (done,) = do("report").stages
    assert not done.kept
    assert made(base) == before[0]  # the cards were there


def test_new_pictures_make_their_own_card_anew(base: Path, do: Do) -> None:
    before, others = made(base), held(base)
    latent = others[-1]
    cam = {"latents": str(latent), "steps": 2}
    do("cam", cam=cam)
    done = do("report", cam=cam).stages[-1]
    assert done.why == "the cam's result changed"
    after = made(base)
    assert {name for name in after if before.get(name) != after[name]} == {f"latent-{latent:05d}.json"}
    assert held(base)[0] == latent
    pictures = embedded(page(base), f"data-{latent}")["pictures"]
    assert [picture["mode"] for picture in pictures] == ["independent", "independent", "joint"]
    do("train", "evaluate", "report", train=CONFIG["train"] | {"steps": 6})
    assert all(not embedded(page(base), f"data-{card}")["pictures"] for card in held(base))  # of the old USAE
    assert set(made(base)) == {f"latent-{card:05d}.json" for card in held(base)}


def test_fewer_cards(base: Path, do: Do) -> None:
    assert len(held(base)) > 2
    before, all_of_them = made(base), held(base)
    do("report", report={"cards": 2})
    assert held(base) == all_of_them[:2]
    do("report", report={"cards": 0})
    assert held(base) == []
    do("report", report={"cards": 200})
    assert held(base) == all_of_them
    assert made(base) == before  # none was made again


@pytest.mark.parametrize(("times", "again"), [(0.5, False), (2, False), (0.4, True), (2.1, True)])
def test_cards_serve_at_half_and_twice_the_size(
    base: Path, do: Do, monkeypatch: pytest.MonkeyPatch, times: float, again: bool
) -> None:
    """The size goes by the number of cards, which may not cost making them anew."""
    before, real = made(base), explorer.image_side
    monkeypatch.setattr(explorer, "image_side", lambda n: int(times * real(n)))
    (base / "run/report.html").unlink()
    do("report")
    assert (made(base) != before) == again


def test_cards_follow_the_config_of_exemplars(base: Path, do: Do) -> None:
    do("report", cam={"exemplars": 2, "start": "exemplar", "modes": ["contrast"]})  # how pictures are made is no matter
    card = embedded(page(base), f"data-{held(base)[0]}")
    assert len(card["sites"]["a/2"]["across"]) == 2


def test_an_interrupted_report_goes_on(base: Path, do: Do) -> None:
    shutil.rmtree(base / "run/cards")
    whole = held(base)
    (base / "run/report.html").unlink()

    def stop(now: Any) -> None:
        if now.done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        do("report", progress=stop)
    assert not (base / "run/report.html").exists()
    first = made(base)
    assert len(first) == 3
    do("report")
    assert held(base) == whole
    assert first.items() <= made(base).items()


def test_a_damaged_card_is_made_again(base: Path, do: Do) -> None:
    before = page(base)
    name = sorted(made(base))[0]
    (base / "run/cards" / name).write_text("{")
    (base / "run/report.html").unlink()
    do("report")
    assert embedded(page(base), f"data-{int(name[7:12])}") == embedded(before, f"data-{int(name[7:12])}")


def test_without_images_or_models_the_numbers_are_there(base: Path, do: Do) -> None:
    shutil.rmtree(base / "run/cards")
    (base / "run/report.html").unlink()
    (base / "images.npz").rename(base / "gone.npz")
    with pytest.warns(UsaeProbeWarning, match="labels and images of .* are left out"):
        do("report")
    card = embedded(page(base), f"data-{held(base)[0]}")
    assert card["sites"]["a/2"]["top"] == []
    assert sum(card["sites"]["a/2"]["histogram"]["all"]) == 60
    (base / "gone.npz").rename(base / "images.npz")
    (base / "run/report.html").unlink()
    do("report")  # the cards were made without; now they are not
    assert len(embedded(page(base), f"data-{held(base)[0]}")["sites"]["a/2"]["across"]) == 4
    shutil.rmtree(base / "run/cards")
    (base / "run/report.html").unlink()
    (base / "nets.py").unlink()
    with pytest.warns(UsaeProbeWarning, match="the page has no images: "):
        do("report")
    assert held(base) == []
    assert embedded(page(base), "page-metrics") == json.loads((base / "run/metrics.json").read_text())


def test_images_in_parts_that_fit_into_memory(base: Path, do: Do, monkeypatch: pytest.MonkeyPatch) -> None:
    before = {latent: embedded(page(base), f"data-{latent}") for latent in held(base)}
    shutil.rmtree(base / "run/cards")
    (base / "run/report.html").unlink()
    monkeypatch.setattr(explorer, "_MOST_MEMORY", 2 * 8 * 60 * 2)  # two latents at a time
    do("report")
    assert {latent: embedded(page(base), f"data-{latent}") for latent in held(base)} == before


SCAN = {
    "models": {"a": ["a/0", "a/2"], "b": ["b/2"]}, "depths": {"a/0": 0.5, "a/2": 1.0, "b/2": 1.0}, "order": {},
    "sites": ["a/0", "a/2", "b/2"], "similarity": None, "n_rows_train": 40, "n_rows": 10, "measured_on": "validation",
    "trained": {"n_latents": 16, "k": 2, "steps": {"joint": 12}},
    "best_matches": [{"target": "b/2", "source": "a/2", "model": "a", "r2": 0.51, "r2_low": 0.5, "r2_high": 0.52,
                      "linear": 0.6, "cka": None, "universal": 4.0, "universal_null": 0.5, "as_good": ["a/0"]}],
}  # fmt: skip


def test_a_scan_beside_the_run_is_shown(base: Path, do: Do) -> None:
    assert 'id="scan"' not in page(base)
    folder = base / "run-scan"
    (folder / "figures").mkdir(parents=True)
    (folder / "scan.json").write_text(json.dumps(SCAN))
    for name in ("r2", "training"):
        shutil.copy(base / f"run/figures/{name}.png", folder / f"figures/scan-{name}.png")
    (done,) = do("report").stages
    assert done.why == "the scan changed"
    html = page(base)
    assert "b/2 is the layer best explained from another model: by a/2&#39;s code R² .51 (a linear map .60)." in html
    assert "<td>a/2 ~</td><td>.51</td><td>[.50, .52]</td><td>.60</td><td>–</td><td>4 (0.5)</td>" in html
    assert html.count('<figure id="figure-scan-') == 2
    (folder / "scan.json").rename(base / "scan.json")
    do("report")
    assert 'id="scan"' not in page(base)
    do("report", report={"scan": "."})
    assert 'id="scan"' in page(base)
    with pytest.raises(UsageError, match="holds no scan"):
        do("report", report={"scan": "nowhere"})


def test_it_needs_an_evaluation(base: Path, do: Do) -> None:
    (base / "run/metrics.json").unlink()
    with pytest.raises(StageError, match=r"has no finished evaluate: metrics\.json not there"):
        do("report")


@pytest.fixture
def cli(base: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    monkeypatch.chdir(base)
    return command(monkeypatch, capsys)


def test_the_command(cli: Command, base: Path) -> None:
    (base / "run/report.html").unlink()
    result = cli("report", "run")
    assert result.status == 0, result.err
    assert "latents with images" in result.err
    assert result.lines[0].split() == ["page", "run/report.html"]
    document = cli("report", "run", "--cards", "1", "--json").document
    assert document["files"]["page"] == "run/report.html"
    assert document["stages"]["report"]["why"] == "report.cards changed"
    assert len(held(base)) == 1
    latent = str(held(base)[0])
    renewed = cli("cam", "run", "--latents", latent, "--steps", "2", "--json").document  # a page that is there follows
    assert renewed["stages"]["report"]["kept"] is False
    assert embedded(page(base), f"data-{latent}")["pictures"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("report", "nowhere"), "'nowhere' is no run folder: no such folder"),
        (("report", "run/metrics.json"), "is no run folder: it is a file"),
        (("report", "run", "--cards", "-1"), "--cards"),
        (("report", "run", "--scan", "figures"), "holds no scan"),
        (("reprot", "run"), "reprot"),
        (("report", "scanned"), "'scanned' is a scan's folder, and a page is of a run"),
    ],
)
def test_what_is_mistyped(arguments: tuple[str, ...], said: str, cli: Command, base: Path) -> None:
    (base / "scanned").mkdir()
    (base / "scanned/scan.json").write_text("{}")
    result = cli(*arguments)
    assert result.status == 2
    assert said in result.err


def test_the_key_is_checked() -> None:
    with pytest.raises(ConfigError, match=r"report\.cards"):
        RunConfig.from_dict(CONFIG | {"report": {"cards": -1}}, base=Path())
