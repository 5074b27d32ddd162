"""What a notebook shows of the nouns: their facts, as text; and the quickstart runs as it is."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import usae_probe as up
from usae_probe.notebook import html_facts, html_table

QUICKSTART = Path(__file__).parents[1] / "examples/quickstart.ipynb"


def text_of(html: str) -> str:
    return " ".join(re.sub(r"<[^>]+>", " ", html).split())


def test_everything_is_text() -> None:
    html = html_facts("<b>", {"<i>": "&"}, html_table(["<u>"], [("<script>",), (3,)]))
    assert "&lt;script&gt;" in html
    assert set(re.findall(r"<(\w+)", html)) == {"div", "strong", "table", "tr", "th", "td", "thead", "tbody"}


def test_the_nouns(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 5))
    with up.attach(net, name="net", layers=["0"], image_size=8, mean=(0.5,) * 3, std=(0.5,) * 3) as model:
        shown = text_of(model._repr_html_())
        assert f"parameters {4 * 27 + 4 + 5 * 144 + 5} " in f"{shown} "
        assert "net/0 4 1" in shown
        assert "float32 on cpu" in shown
        assert "sites: net/0" in repr(model)


def test_a_buffer_a_usae_and_a_report(tmp_path: Path) -> None:
    draw = np.random.default_rng(0)
    shared = draw.random((300, 6)) * (draw.random((300, 6)) < 0.3)
    arrays = {site: (shared @ draw.normal(size=(6, 8))).astype(np.float32) for site in ("a/x", "b/y")}
    buffer = up.ActivationBuffer.from_arrays(arrays, out=tmp_path / "acts")
    shown = text_of(buffer._repr_html_())
    assert f"ActivationBuffer folder {tmp_path / 'acts'}" in shown
    assert all(f"{split} {buffer.n_rows(split)} {buffer.n_images(split)}" in shown for split in ("train", "holdout"))
    assert "a/x 8 b/y 8" in shown
    run = up.train(buffer, n_latents=12, k=2, steps=5, batch_size=32)
    shown = text_of(run.usae._repr_html_())
    assert f"latents 12, 2 active sparsity topk parameters {sum(p.numel() for p in run.usae.parameters())}" in shown
    report = up.evaluate(run.usae, buffer, nulls=2)
    shown = text_of(report._repr_html_())
    for name, n in report.counts.items():
        assert f"{name} {n} " in shown
    assert f"a/x {report.r2['a/x']['a/x']:.3f} {report.r2['a/x']['b/y']:.3f}" in shown
    assert f"universal, shuffled {report.nulls[0].universal:.1f}" in shown


def test_the_quickstart_runs(tmp_path: Path) -> None:
    nbformat = pytest.importorskip("nbformat", reason="notebooks need the dev extra")
    nbclient = pytest.importorskip("nbclient", reason="notebooks need the dev extra")
    notebook = nbformat.read(QUICKSTART, as_version=4)
    shipped = [output_kinds(cell) for cell in notebook.cells]
    client = nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}})
    client.execute()  # raises when a cell does
    assert [output_kinds(cell) for cell in notebook.cells] == shipped  # what it shows is what readers see
    assert (tmp_path / "runs/quickstart/acts/manifest.json").is_file()


def output_kinds(cell: Any) -> list[list[str]]:
    """The kinds of a cell's results; what goes to stderr depends on the machine."""
    outputs = cell.get("outputs", [])
    return [sorted(output["data"]) for output in outputs if output["output_type"] == "execute_result"]


def test_the_quickstart_names_no_machine() -> None:
    text = QUICKSTART.read_text(encoding="utf-8")
    assert "/home/" not in text
    assert "/root/" not in text
    assert len(text) < 1_500_000
