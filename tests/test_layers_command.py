"""`usae-probe layers`: the tree, what it says of each layer, searching it, and its JSON."""

from __future__ import annotations

import io
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from usae_probe.hooks import Call, LayerInfo, Layout, Output
from usae_probe.report.layer_tree import layer_trees
from usae_probe.report.layers import (
    SCREEN,
    ModelLayers,
    Readable,
    Row,
    fitting_depth,
    matching,
    rows_to,
    rows_with,
    tree,
)

from .command import Command, command

pytestmark = pytest.mark.usefixtures("one_thread")

NETS = """
import torch
from torch import nn

class Odd(nn.Module):
    def __init__(self):
        super().__init__()
        self.act = nn.ReLU()
        self.spare = nn.Sequential(nn.Linear(3, 4))
        self.parts = nn.ModuleList([nn.Conv2d(3, 6, 3, 2), nn.Conv2d(6, 8, 3, 2)])
        self.again = self.parts[0]
        self.same = nn.GELU()
        self.rnn = nn.GRU(8, 5, batch_first=True)

    def forward(self, x):
        x = self.act(self.parts[0](x))
        x = self.same(self.same(self.act(self.parts[1](x))))
        return self.rnn(x.flatten(2).transpose(1, 2))[0].mean(1)

def build():
    torch.manual_seed(0)
    return Odd()
"""
CONFIG = """
[models.a]
adapter = "module"
name = "nets.py:build"
layers = ["parts.1@mean", "act~1@patch", "pats.1"]
image_size = 16
mean = [0, 0, 0]
std = [1, 1, 1]
[models.b]
name = "test_resnet"
layers = ["layer4.0.act2"]
image_size = 32
pretrained = false
[images]
source = "images.npy"
"""
ODD = ("layers", "module:nets.py:build", "--image-size", "16")
RESNET = ("layers", "timm:test_resnet", "--image-size", "32")
VIT_OPTIONS = ("img_size=32", "depth=2", "embed_dim=32", "num_heads=2", "reg_tokens=3")
VIT = ("layers", "timm:vit_tiny_patch16_224", "--image-size", "32", *(f"--option={option}" for option in VIT_OPTIONS))


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Command:
    """Call `main()` in a folder with a network and a config, its output in a pipe."""
    (tmp_path / "nets.py").write_text(NETS)
    (tmp_path / "c.toml").write_text(CONFIG)
    np.save(tmp_path / "images.npy", np.zeros((20, 32, 32, 3), np.uint8))
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("COLUMNS", raising=False)

    return command(monkeypatch, capsys)


# --- the tree, by hand ---


def info(name: str, order: int | None, layout: Layout | None = None, kind: str = "Kind", **more: Any) -> LayerInfo:
    shape = None if order is None else (4, 2, 2)
    runs = () if shape is None or order is None else (Call(order, (Output("", (2, *shape), shape, layout),)),)
    return LayerInfo(name, kind, shape, order, len(runs), 0, layout, runs=runs, **more)


BLOCKS = [
    info("stem", 0),
    info("blocks.1.mlp", 1),
    info("blocks.1.attn.q", 2),
    info("blocks.1", 3),
    info("blocks.0.mlp", 4),
    info("head", 5),
    info("blocks", None),
    info("unused.fc", None),
]
"""Blocks run the other way round; `blocks.0`, `blocks.1.attn` and `unused` are only parts of names."""


def drawn(rows: list[Row]) -> list[str]:
    return [f"{row.guide}{row.branch.name}" + (f" +{row.hidden}" if row.hidden else "") for row in rows]


def test_parents_stand_above_their_children_and_siblings_as_they_run() -> None:
    assert drawn(rows_to(tree(BLOCKS), 0)) == [
        "stem",
        "blocks",
        "├─blocks.1",
        "│ ├─blocks.1.mlp",
        "│ └─blocks.1.attn",
        "│   └─blocks.1.attn.q",
        "└─blocks.0",
        "  └─blocks.0.mlp",
        "head",
        "unused",
        "└─unused.fc",
    ]


def test_what_a_depth_hides_is_counted() -> None:
    roots = tree(BLOCKS)
    assert drawn(rows_to(roots, 1)) == ["stem", "blocks +4", "head", "unused +1"]
    assert drawn(rows_to(roots, 2))[1:4] == ["blocks", "├─blocks.1 +2", "└─blocks.0 +1"]
    always = drawn(rows_to(roots, 1, ["blocks.1.attn.q"]))
    assert always == [
        "stem", "blocks +1", "└─blocks.1 +1", "  └─blocks.1.attn", "    └─blocks.1.attn.q", "head", "unused +1",
    ]  # fmt: skip
    assert drawn(rows_with(roots, {"blocks.0.mlp"})) == ["blocks", "└─blocks.0", "  └─blocks.0.mlp"]


def test_the_tree_is_cut_where_a_screen_is_full() -> None:
    def of(n: int) -> list[LayerInfo]:
        return [info(f"blocks.{i}.{part}", 2 * i + at) for i in range(n) for at, part in enumerate("ab")]

    assert fitting_depth(tree(of(13))) == 0  # 1 + 13 · 3 = 40 rows: all of it
    assert SCREEN == 40
    assert fitting_depth(tree(of(14))) == 2  # 43 rows with depth 3
    assert fitting_depth(tree(of(60))) == 2  # never less


def test_searching() -> None:
    def model(*layers: LayerInfo) -> ModelLayers:
        return ModelLayers("m", "m", list(layers), {}, {}, 0.0, 0, (3, 8, 8))

    found = model(*BLOCKS, info("x", 6, kind="LayerNorm"), info("y", 7, aliases=("other.name",)))
    assert matching([found], "BLOCKS.1$") == [{"blocks.1"}]
    assert matching([found], r"^blocks\.\d\.mlp$") == [{"blocks.0.mlp", "blocks.1.mlp"}]
    assert matching([found], "norm") == [{"x"}]
    assert matching([found, model(info("z", 0))], "r.nam") == [{"y"}, set()]
    odd = model(info("f(x", 0), info("fxx", 1))
    assert matching([odd], "f(x") == [{"f(x"}]  # no regular expression: taken as it is


# --- what is said of a layer ---


def listed(layers: dict[LayerInfo, list[tuple[Readable, ...]]], **more: Any) -> ModelLayers:
    runs = {layer.name: outputs for layer, outputs in layers.items()}
    given: dict[str, Any] = {"time_shares": {}, "seconds": 0.25, "parameters": 12345678, "input_shape": (3, 8, 9)}
    return ModelLayers("[green]", "m", list(layers), runs, **(given | more))


def printed(*found: ModelLayers, width: int = 200, terminal: bool = True) -> list[str]:
    environ = {"COLUMNS": str(width)} if terminal else {}
    console = Console(file=io.StringIO(), width=width, force_terminal=terminal, color_system=None, _environ=environ)
    console.print(layer_trees(found), crop=False)
    return console.file.getvalue().splitlines()  # type: ignore[attr-defined]


def test_a_row_says_all_there_is() -> None:
    layout = Layout("tokens", prefix=5, has_cls=True, grid=(3, 4))
    layer = LayerInfo("[red]", "[bold]Kind", (17, 8), 0, 1, 2500, layout, ("[blue]",))
    readable = Readable("", Output("", (2, 17, 8), (17, 8), layout), {"pool": 8, "cls": 8, "patch": 8})
    lines = printed(listed({layer: [(readable,)]}, time_shares={"[red]": 0.4375}))
    assert lines[0] == "[green]  1 layers · 12.3M parameters · input 3×8×9 · forward pass 250 ms"
    assert lines[1].split() == [
        "layer", "kind", "output", "layout", "grid", "d_in", "policies", "time", "parameters", "also", "called",
    ]  # fmt: skip
    assert lines[2].split() == [
        "[red]", "[bold]Kind", "17×8", "cls+4+3x4", "3×4", "8", "pool", "cls", "patch", "44%", "███▌", "2.5k", "=",
        "[blue]",
    ]  # fmt: skip
    assert lines[-1] == "site: model/layer[@policy], e.g. m/[red]"


def test_columns_give_way_and_names_never(cli: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = cli(*VIT, "--depth", "0")
    names = [line.split()[0] for line in whole.lines[2:-2]]
    assert "│ ├─blocks.0.attn" in whole.out
    assert len(max(whole.lines, key=len)) > 100  # in a pipe: not cut to 80
    for width in (140, 80, 50):
        monkeypatch.setenv("COLUMNS", str(width))
        narrow = cli(*VIT, "--depth", "0")
        assert max(map(len, narrow.lines)) <= width
        for name in names:
            assert re.search(re.escape(name) + r"\s", narrow.out)
    policies = {80: ["pool", "cls", "mean", "patch", "all"], 72: ["cls", "mean", "patch"]}
    for width, spelled in policies.items():
        monkeypatch.setenv("COLUMNS", str(width))
        narrow = cli(*VIT, "--depth", "2")
        (row,) = [line for line in narrow.lines if line.startswith("├─blocks.0 ")]
        assert row.split()[:-1] == ["├─blocks.0", "+21", "Block", "8×32", "cls+3+2x2", "32", *spelled]
        assert ("pool,all +" in narrow.out) == (width == 72)  # then said once, above
    monkeypatch.setenv("COLUMNS", "12")  # nothing fits: names are folded, nothing is lost
    assert "".join(cli(*VIT, "--depth", "0").lines).count("blocks") >= 2


def test_calls_elements_and_layers_that_never_run(cli: Command) -> None:
    found = cli(*ODD)
    assert "\x1b" not in found.out
    assert not any(line.endswith(" ") for line in found.lines)
    rows = {tuple(line.split()[:2]): line.split() for line in found.lines}
    assert ("parts", "ModuleList") in rows  # a branch only: it has no output of its own
    assert "never" not in rows["parts", "ModuleList"]
    assert rows["├─parts.0", "Conv2d"][2:9] == ["6×7×7", "nchw", "7×7", "6", "pool", "mean", "patch"]
    assert rows["├─parts.0", "Conv2d"][-2:] == ["=", "again"]
    assert rows["act", "ReLU"][2:4] == ["2", "outputs"]  # runs twice, with different shapes: a row for each
    assert rows["act~0", "6×7×7"][2:5] == ["nchw", "7×7", "6"]
    assert rows["act~1", "8×3×3"][2:5] == ["nchw", "3×3", "8"]
    assert rows["same", "×2"][2:4] == ["GELU", "8×3×3"]  # runs twice alike: one row
    assert rows["rnn#0", "9×5"][2:] == ["tokens", "5", "pool", "mean", "all"]
    assert ("rnn#1", "1×5") in rows
    assert rows["spare", "Sequential"][2:4] == ["never", "runs"]
    assert rows["└─spare.0", "Linear"][2:4] == ["never", "runs"]
    order = [line.split()[0] for line in found.lines if line]
    assert order.index("parts") < order.index("act") < order.index("same") < order.index("rnn") < order.index("spare")


def test_many_outputs_are_folded() -> None:
    outputs = tuple(
        Readable(f"#{i}", Output(str(i), (2, i + 1), (i + 1,), Layout("vector")), {"pool": i + 1, "all": i + 1})
        for i in range(9)
    )
    lines = printed(listed({info("enc", 0): [outputs]}))
    assert [line.split()[0] for line in lines if line.startswith("  enc#")] == [f"enc#{i}" for i in range(6)]
    assert "… 3 more, to #8 (--json)" in "\n".join(lines)


def test_what_no_site_can_read_has_no_d_in() -> None:
    windows = Readable("", Output("", (8, 49, 96), None, None), {})
    unknown = Readable("", Output("", (2, 3, 49, 49), (3, 49, 49), None), {})
    lines = printed(listed({info("windows", 0): [(windows,)], info("attn", 1): [(unknown,)]}))
    rows = {line.split()[0]: line.split()[1:] for line in lines if line}
    assert rows["windows"][1:] == ["8×49×96", "no", "batch", "axis", "–"]
    assert rows["attn"][1:] == ["3×49×49", "?", "–"]
    assert lines[-1] == "site: model/layer[@policy]"


# --- the command ---


def test_the_default_depth_and_more(cli: Command) -> None:
    found = cli(*VIT, "--depth", "2")  # 13 of 55 layers
    assert "└─blocks.1 +21" in found.out
    assert "blocks.1.attn" not in found.out
    assert "… 42 in all (--depth 3; --depth 0: everything)" in found.out
    deeper = cli(*VIT)  # so small that a screen holds three levels
    assert re.search(r"  ├─blocks.1.attn \+\d", deeper.out)
    assert "blocks.1.attn.qkv" not in deeper.out
    assert "(--depth 4; --depth 0: everything)" in deeper.out
    everything = cli(*VIT, "--depth", "0")
    assert "blocks.1.attn.qkv" in everything.out
    assert "--depth" not in everything.out
    assert cli(*VIT, "--depth", "-1").status == 2


def test_json_holds_every_layer(cli: Command) -> None:
    layers = cli(*RESNET, "--depth", "1", "--json").document["models"]["timm:test_resnet"]
    assert layers[0]["name"] == "conv1.0"
    shares = [layer["time_share"] for layer in layers]
    assert shares == sorted(shares)
    assert 0 < shares[0] < shares[-1] <= 1
    del layers[-1]["time_share"]
    order = len(layers) - 1
    vector = {"layout": "vector", "grid": None, "prefix_tokens": None, "d_in": {"pool": 1000, "all": 1000}}
    assert layers[-1] == {
        "name": "fc", "kind": "Linear", "output_shape": [1000], **vector, "order": order, "calls": 1,
        "runs": [{"order": order, "outputs": [{"suffix": "", "element": "", "shape": [1000], **vector}]}],
        "parameters": 97000, "aliases": [], "sites": [],
    }  # fmt: skip


def test_json_of_tokens_calls_and_elements(cli: Command) -> None:
    (block,) = cli(*VIT, "--json", "--grep", r"^blocks\.1$").document["models"]["timm:vit_tiny_patch16_224"]
    assert block["output_shape"] == [8, 32]
    assert (block["layout"], block["grid"], block["prefix_tokens"]) == ("cls+3+tokens", [2, 2], 4)
    assert block["d_in"] == dict.fromkeys(["pool", "cls", "mean", "patch", "all"], 32)
    odd = {layer["name"]: layer for layer in cli(*ODD, "--json").document["models"]["module:nets.py:build"]}
    assert odd["parts.0"]["aliases"] == ["again"]
    assert [run["outputs"][0]["d_in"].get("pool") for run in odd["act"]["runs"]] == [6, 8]
    assert [run["outputs"][0]["suffix"] for run in odd["act"]["runs"]] == ["~0", "~1"]
    assert odd["act"]["d_in"] == {}  # a site has to choose
    (run,) = odd["rnn"]["runs"]
    assert [(one["suffix"], one["shape"]) for one in run["outputs"]] == [("#0", [9, 5]), ("#1", [1, 5])]
    spare = odd["spare"]
    assert (spare["order"], spare["calls"], spare["runs"], spare["time_share"]) == (None, 0, [], None)


def test_grep(cli: Command) -> None:
    found = cli(*VIT, "--grep", "1.ATTN.qkv")
    assert [line.split()[0] for line in found.lines[2:5]] == ["blocks", "└─blocks.1", "└─blocks.1.attn"]
    assert found.lines[2] == "blocks"  # on the way only: nothing is said of it
    assert found.lines[5].split()[:3] == ["└─blocks.1.attn.qkv", "Linear", "8×96"]
    assert found.lines[6].startswith("1 of ")
    nothing = cli(*VIT, "--grep", "blocks.1.atn", "--json")
    assert nothing.status == 2
    error = nothing.document["error"]
    assert error["type"] == "UnknownLayerError"
    assert error["message"] == "no layer of 'timm:vit_tiny_patch16_224' matches 'blocks.1.atn'"
    assert "'blocks.1.attn'" in error["hint"]


def test_a_config_shows_its_sites_and_what_is_wrong_with_them(cli: Command) -> None:
    found = cli("layers", "c.toml", "--depth", "1")
    assert found.status == 0
    assert "● sites: a/parts.1@mean, a/act~1@patch" in found.lines
    (problem,) = [line for line in found.lines if line.startswith("! ")]
    assert problem == "! model 'a' has no layer 'pats.1'; did you mean 'parts.1', 'parts.0' or 'parts'?"
    assert [line.split()[1] for line in found.lines if line.startswith("● ")] == [
        "sites:", "└─parts.1", "act", "sites:", "└─layer4.0.act2",
    ]  # fmt: skip
    assert "layer4.0.act1" not in found.out  # below the depth, and no site
    models = cli("layers", "c.toml", "--json").document["models"]
    assert list(models) == ["a", "b"]
    assert {layer["name"]: layer["sites"] for layer in models["a"] if layer["sites"]} == {
        "parts.1": ["a/parts.1@mean"],
        "act": ["a/act~1@patch"],
    }
    only = cli("layers", "c.toml", "--grep", "gru")
    assert "b " not in [line[:2] for line in only.lines]  # no match in that model: nothing is shown of it


def test_a_site_under_another_name_of_its_layer_is_marked_too(cli: Command) -> None:
    text = Path("c.toml").read_text()
    Path("d.toml").write_text(text.replace('["parts.1@mean", "act~1@patch", "pats.1"]', '["again@mean"]'))
    found = cli("layers", "d.toml")
    assert "● sites: a/again@mean" in found.lines
    assert [line.split()[1] for line in found.lines if line.startswith("● ")][1] == "├─parts.0"
    layers = cli("layers", "d.toml", "--json").document["models"]["a"]
    assert {layer["name"]: layer["sites"] for layer in layers if layer["sites"]} == {"parts.0": ["a/again@mean"]}


def test_a_mistyped_layer_of_a_config_names_the_command(cli: Command) -> None:
    text = Path("c.toml").read_text()
    text = text[text.index("[models.b]") :].replace("layer4.0.act2", "layer4.0.atc2")
    Path("d.toml").write_text(text)
    failed = cli("harvest", "d.toml")
    assert failed.status == 2
    assert "model 'b' has no layer 'layer4.0.atc2'" in failed.err
    assert "did you mean 'layer4.0.act2'" in failed.err
    assert "`usae-probe layers" in failed.err


def test_json_goes_alone_to_stdout(cli: Command) -> None:
    found = cli(*ODD, "--json")
    assert set(found.document) == {"models"}
    assert "parts.0" in found.err
    assert os.environ.get("COLUMNS") is None
