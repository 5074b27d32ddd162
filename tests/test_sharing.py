"""Export of a site's encoder and decoder: what SAELens makes of the files is what the USAE computes; the model card."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from usae_probe import USAE, ActivationBuffer, Run, RunConfig, export_sae, train
from usae_probe.errors import SiteError, UsageError
from usae_probe.report.facts import Facts
from usae_probe.report.model_card import _table

from .command import Command, command
from .tiny_run import CONFIG, put_tiny_run

SPARSITIES = {
    "topk": "topk",
    "soft-topk": "topk",
    "global-topk": "topk",
    "batchtopk": "jumprelu",
    "jumprelu": "jumprelu",
    "l1": "standard",
}


def rows() -> dict[str, np.ndarray]:
    draw = np.random.default_rng(0)
    shared = draw.normal(size=(300, 6)).astype(np.float32)
    return {"a/x": np.tile(shared, (1, 2)) + 2, "b/y": 3 * shared - 1}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, one_thread_module: None) -> dict[str, USAE]:
    buffer = ActivationBuffer.from_arrays(rows(), tmp_path_factory.mktemp("sharing") / "buffer")
    how: dict[str, Any] = {"n_latents": 24, "k": 3, "steps": 40, "batch_size": 64}
    return {name: train(buffer, sparsity=name, **how).usae for name in SPARSITIES}


class ByFormula:
    """A SAE folder, read by the formulas in SAELens 6.54: topk_sae.py, jumprelu_sae.py and standard_sae.py."""

    def __init__(self, folder: Path) -> None:
        self.config = json.loads((folder / "cfg.json").read_text())
        with safe_open(folder / "sae_weights.safetensors", "pt") as file:
            self.weights = {name: file.get_tensor(name).double() for name in file.keys()}  # noqa: SIM118
        assert self.config["apply_b_dec_to_input"] is True
        assert (self.config["normalize_activations"], self.config["reshape_activations"]) == ("none", "none")

    def encode(self, x: Tensor) -> Tensor:
        w = self.weights
        hidden = (x.double() - w["b_dec"]) @ w["W_enc"] + w["b_enc"]
        if self.config["architecture"] == "topk":
            assert self.config["rescale_acts_by_decoder_norm"] is False
            top = torch.topk(hidden, self.config["k"], dim=-1)
            return torch.zeros_like(hidden).scatter(-1, top.indices, top.values.relu())
        if self.config["architecture"] == "jumprelu":
            return hidden.relu() * (hidden > w["threshold"])
        assert self.config["architecture"] == "standard"
        return hidden.relu()

    def decode(self, z: Tensor) -> Tensor:
        return z @ self.weights["W_dec"] + self.weights["b_dec"]


@pytest.mark.parametrize(("sparsity", "architecture"), SPARSITIES.items())
def test_the_folder_computes_what_the_usae_does(
    sparsity: str, architecture: str, trained: dict[str, USAE], tmp_path: Path
) -> None:
    usae, given = trained[sparsity], {site: torch.from_numpy(x).float() for site, x in rows().items()}
    for site in usae.sites:
        files = export_sae(usae, site, tmp_path / site.replace("/", "__"))
        assert [path.name for path in files] == ["sae_weights.safetensors", "cfg.json"]
    read = {site: ByFormula(tmp_path / site.replace("/", "__")) for site in usae.sites}
    for site, sae in read.items():
        assert sae.config["architecture"] == architecture
        assert (sae.config["d_in"], sae.config["d_sae"]) == (usae.d_in[site], 24)
        codes = usae.encode(given[site], site)
        z = sae.encode(given[site])
        torch.testing.assert_close(usae.to_dense(codes).double(), z, rtol=1e-4, atol=1e-4)
        assert float((z > 0).sum()) > 0
        for target, other in read.items():  # one site's encoder and another's decoder go together
            torch.testing.assert_close(usae.decode(codes, target).double(), other.decode(z), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("sparsity", SPARSITIES)
def test_saelens_itself_reads_the_folder(sparsity: str, trained: dict[str, USAE], tmp_path: Path) -> None:
    sae_lens = pytest.importorskip("sae_lens", reason="SAELens is not installed (it needs transformer-lens < 4)")
    usae, x = trained[sparsity], torch.from_numpy(rows()["a/x"]).float()
    export_sae(usae, "a/x", tmp_path / "sae")
    z = sae_lens.SAE.load_from_disk(tmp_path / "sae").encode(x)
    torch.testing.assert_close(usae.to_dense(usae.encode(x, "a/x")), z, rtol=1e-4, atol=1e-4)


def test_a_case_by_hand(tmp_path: Path) -> None:
    """One latent, two dimensions: x = (6, 2), μ = (2, 0), s = 2, so x̃ = (2, 1)."""
    usae = USAE({"m/l": 2}, 1, 1, normalisation={"m/l": (torch.tensor([2.0, 0.0]), 2.0)})
    with torch.no_grad():
        usae.W_enc[0].copy_(torch.tensor([[1.0, 0.0]]))
        usae.W_dec.copy_(torch.tensor([[0.0, 1.0]]))
        usae.b_enc[0].fill_(0.5)
        usae.b_dec.copy_(torch.tensor([0.0, 1.0]))
    export_sae(usae, "m/l", tmp_path / "sae")
    sae = ByFormula(tmp_path / "sae")
    # z_pre = (x̃ − b_dec) · (1, 0) + .5 = 2.5; x̂ = μ + s (2.5 · (0, 1) + (0, 1)) = (2, 7)
    z = sae.encode(torch.tensor([[6.0, 2.0]]))
    assert (z.tolist(), sae.decode(z).tolist()) == ([[2.5]], [[2.0, 7.0]])
    assert sae.weights["b_dec"].tolist() == [2.0, 2.0]
    assert sae.weights["W_enc"].tolist() == [[0.5], [0.0]]


def test_one_plain_file_with_its_settings(trained: dict[str, USAE], tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    assert export_sae(trained["batchtopk"], "a/x", path, format="safetensors", about={"data": "drawn"}) == [path]
    with safe_open(path, "pt") as file:
        header, names = file.metadata(), set(file.keys())
    assert names == {"W_enc", "b_enc", "W_dec", "b_dec", "threshold"}
    assert (header["architecture"], header["site"], header["data"]) == ("jumprelu", "a/x", "drawn")
    assert json.loads(header["shared_with"]) == ["b/y"]


def test_what_is_there_stays_and_what_cannot_be_is_refused(trained: dict[str, USAE], tmp_path: Path) -> None:
    usae = trained["topk"]
    export_sae(usae, "a/x", tmp_path / "sae")
    with pytest.raises(UsageError, match=r"sae_weights.safetensors' is there already"):
        export_sae(usae, "b/y", tmp_path / "sae")
    export_sae(usae, "b/y", tmp_path / "sae", force=True)
    assert ByFormula(tmp_path / "sae").config["metadata"]["site"] == "b/y"
    with pytest.raises(SiteError, match="no site 'a/z'"):
        export_sae(usae, "a/z", tmp_path / "other")
    with pytest.raises(UsageError, match=r"unknown format 'pickle' \(saelens or safetensors\)"):
        export_sae(usae, "a/x", tmp_path / "other", format="pickle")
    assert not (tmp_path / "other").exists()


# --- a run, by the command ---


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    return command(monkeypatch, capsys)


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory, one_thread_module: None) -> Path:
    base = put_tiny_run(tmp_path_factory.mktemp("private_place"))
    Run(RunConfig.from_dict(CONFIG, base=base), base / "run").run(("harvest", "train"))
    return base / "run"


@pytest.fixture(scope="module")
def one_thread_module() -> Any:
    from usae_probe.world import one_thread

    with one_thread():
        yield


def test_a_run_is_exported_with_its_card(cli: Command, run_dir: Path) -> None:
    before = cli("export", str(run_dir), "--json").document
    assert not before["measured"]
    assert "no figure is known" in (run_dir / "export/README.md").read_text()
    Run(RunConfig.from_dict(CONFIG, base=run_dir.parent), run_dir).run(("evaluate",))
    result = cli("export", str(run_dir), "--force")
    assert result.status == 0
    assert [entry["file"] for entry in before["sites"]] == ["a__0", "a__2", "b__2"]
    card = (run_dir / "export/README.md").read_text()
    metrics = json.loads((run_dir / "metrics.json").read_text())
    for part in (
        'SAE.load_from_disk("a__0")',
        f"| universal | {metrics['counts']['universal']} |",
        "### What is alike",
        "- saelens",
        "## Limits",
        "(shuffled ",
    ):
        assert part in card
    assert str(run_dir.parent) not in card + (run_dir / "export/a__0/cfg.json").read_text()
    assert ByFormula(run_dir / "export/b__2").config["metadata"]["model_name"] == "nets.py:build"


def test_one_site_as_a_plain_file_elsewhere(cli: Command, run_dir: Path, tmp_path: Path) -> None:
    options = ["--site", "a/2", "--format", "safetensors", "--to", str(tmp_path / "out")]
    assert cli("export", str(run_dir), *options).status == 0
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["README.md", "a__2.safetensors"]
    assert 'load_file("a__2.safetensors")' in (tmp_path / "out/README.md").read_text()
    again = cli("export", str(run_dir), *options)
    assert (again.status, "--force" in again.err) == (2, True)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--site", "a/3"], "no site 'a/3'"),
        (["--format", "onnx"], "unknown format 'onnx'"),
        (["--to", "FILE"], "is a file"),
    ],
)
def test_what_cannot_be_exported(cli: Command, run_dir: Path, tmp_path: Path, options: list[str], said: str) -> None:
    (tmp_path / "FILE").write_text("")
    given = [str(tmp_path / option) if option == "FILE" else option for option in options]
    to = [] if "--to" in options else ["--to", str(tmp_path / "new")]
    result = cli("export", str(run_dir), *given, *to)
    assert (result.status, said in result.err) == (2, True), result.err
    assert not (tmp_path / "new").exists()


def test_a_run_without_training(cli: Command, tmp_path: Path) -> None:
    base = put_tiny_run(tmp_path)
    Run(RunConfig.from_dict(CONFIG, base=base), base / "run").run(("harvest",))
    result = cli("export", str(base / "run"))
    assert (result.status, "no USAE to export" in result.err) == (1, True)
    assert cli("export", str(base)).status == 2


def test_what_names_hold_is_no_markdown() -> None:
    assert _table(Facts("", ["a|b"], [["<script>\n| x \\"]], ["note"])).splitlines() == [
        "| a\\|b |",
        "| --- |",
        "| &lt;script> \\| x \\\\ |",
        "",
        "note",
    ]
