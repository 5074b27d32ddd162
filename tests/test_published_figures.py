"""Figures of a paper beside a run's own: on the screen, the page and the card, and only where settings are the same."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from usae_probe import RunConfig
from usae_probe.errors import ConfigError
from usae_probe.report.published import published_facts
from usae_probe.world import one_thread

from .command import Command, command
from .tiny_run import CONFIG, put_tiny_run, toml

PUBLISHED = """
[[published]]
source = "the paper <1>"
settings = { "usae.k" = 2, "train.steps" = 8 }
independent_r2 = { "a/2" = 0.818 }
[published.r2."a/2"]
"a/2" = 0.729
"b/2" = 0.360
[[published]]
source = "another k"
settings = { "usae.k" = 3 }
[published.r2."a/2"]
"b/2" = 0.5
[sweep]
seeds = 2
[sweep.settings]
"usae.k" = [2, 3]
"""


@pytest.fixture
def cli(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    put_tiny_run(tmp_path)
    (tmp_path / "c.toml").write_text(toml(CONFIG) + PUBLISHED)
    monkeypatch.chdir(tmp_path)
    return command(monkeypatch, capsys)


def test_a_run_shows_the_figures_of_its_own_settings(cli: Command) -> None:
    with one_thread():
        result = cli("run", "c.toml", "--out", "run")
    assert result.status == 0, result.err
    metrics = json.loads(Path("run/metrics.json").read_text())
    (facts,) = published_facts(RunConfig.load("c.toml").model_dump()["published"][:1], metrics)
    assert facts.rows[1][:2] == ["a/2 → b/2", ".360"]
    assert facts.rows[2][:2] == ["independent SAE, a/2", ".818"]
    shown = result.out
    assert "Published: the paper <1>" in shown
    assert all(" ".join(row) in " ".join(shown.split()) for row in facts.rows)
    assert "another k" not in shown
    page = Path("run/report.html").read_text()
    assert "Published: the paper &lt;1&gt;" in page
    assert cli("export", "run").status == 0
    assert "### Published: the paper" in Path("run/export/README.md").read_text()
    Path("c.toml").write_text(Path("c.toml").read_text().replace("0.360", "0.361"))
    again = cli("run", "c.toml", "--out", "run")
    assert "report: redone, published changed" in again.err
    assert again.err.count("kept, already done") == 3
    assert ".361" in Path("run/report.html").read_text()


def test_a_sweep_goes_through_its_table_and_shows_the_figures_of_each(cli: Command) -> None:
    with one_thread():
        result = cli("sweep", "c.toml", "--out", "sweep", "--json")
    assert [(cell["settings"]["usae.k"], cell["seed"]) for cell in result.document["cells"]] == [
        (2, 0), (2, 1), (3, 0), (3, 1),
    ]  # fmt: skip
    for k, said in ((2, "the paper <1>"), (3, "another k")):
        assert result.err.count(f"k = {k}: Published: {said}") == 1
    with one_thread():
        result = cli("sweep", "c.toml", "--out", "other", "--set", "usae.k=4", "--seeds", "1", "--json")
    assert [cell["published"] for cell in result.document["cells"]] == [[]]


def test_the_published_figures_are_checked(tmp_path: Path) -> None:
    def config(**entry: Any) -> RunConfig:
        return RunConfig.from_dict(CONFIG | {"published": [{"source": "x", **entry}]}, base=tmp_path)

    with pytest.raises(ConfigError, match=r"published.settings names 'usae.n_latent', which is no key.*usae.n_latents"):
        config(settings={"usae.n_latent": 4})
    with pytest.raises(ConfigError, match=r"unknown config key 'published\.0\.r3'"):
        config(r3={})
    assert config(settings={"usae.k": 2}).published_here()[0].source == "x"
    assert config(settings={"usae.k": 5}).published_here() == []


def test_an_empty_checkpoint_is_none(tmp_path: Path) -> None:
    models = {"a": CONFIG["models"]["a"] | {"checkpoint": "${NO_SUCH_WEIGHTS:-}"}}
    assert RunConfig.from_dict(CONFIG | {"models": models}, base=tmp_path).models["a"].checkpoint is None
