"""`usae-probe buffer`: what it shows of a buffer, what it finds wrong with it, and what it exports."""

from __future__ import annotations

import io
import json
import os
import shutil
import socket
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from rich.console import Console
from safetensors import safe_open

from usae_probe.buffer import ActivationBuffer, BufferSpec, BufferWriter, SiteSpec, export
from usae_probe.buffer.spec import RingSpec
from usae_probe.errors import BufferIntegrityError, UsaeProbeError, UsageError
from usae_probe.report.buffer import buffer_screen, described, spelled_bytes
from usae_probe.split import SPLITS, draw_split

from .command import Command, command

VIT, RESNET = "vit/blocks.8@mean", "resnet/layer4"
SHARD = "shard-00003.h5"  # the first of training: one of validation and two of holdout come before it
LONG = "convnext_large_mlp/stages.3.blocks.2.conv_dw~1#last_hidden_state@patch"
PATCH = "vit/blocks.11@patch"


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Command:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")
    return command(monkeypatch, capsys)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """50 images in shards of 9: 36 training rows in four shards, 4 validation, 10 holdout in two."""
    rng = np.random.default_rng(0)
    arrays = {VIT: rng.normal(size=(50, 6)), RESNET: rng.normal(3.0, 2.0, size=(50, 4))}
    path = tmp_path_factory.mktemp("made") / "acts"
    ActivationBuffer.from_arrays(arrays, path, holdout=0.2, shard_images=9)
    return path


@pytest.fixture
def run(made: Path, tmp_path: Path) -> Path:
    """A run's folder with that buffer."""
    shutil.copytree(made, tmp_path / "run/buffer")
    return Path("run")


def patch_spec(ring: RingSpec | None = None, *, rows_per_image: int = 4) -> BufferSpec:
    """60 images, of which 43 are for training, in shards of 8: 6 + 1 + 2."""
    places = (2, 2) if rows_per_image else None
    sites = tuple(
        SiteSpec(
            key, *key.removesuffix("@patch").split("/"), "patch", d, places, rows_per_image, weights_hash=code * 32
        )
        for key, d, code in ((LONG, 10, "ab"), (PATCH, 3, "cd"))
    )
    source = {"kind": "folder", "location": "/data/" + 20 * "photos/", "fingerprint": "f0" * 32, "n_images": 60}
    request = {"limit": 60, "holdout": 0.2, "validation": 0.1, "seed": 0}
    split = draw_split(60, holdout=0.2, validation=0.1)
    return BufferSpec(sites, source, split, request, shard_images=8, ring=ring)


def fill(writer: BufferWriter, shards: int | None = None) -> None:
    """Write shards; every sixth image cannot be read."""
    rng = np.random.default_rng(1)
    per_image = writer.spec.sites[0].rows_per_image
    for plan in writer.pending()[:shards]:
        with writer.shard(plan) as shard:
            for image in map(int, plan.images):
                if image % 6 == 0:
                    shard.skip(image, f"photos/{image:05d}.jpg", "cannot identify\nimage file")
                    continue
                n = per_image or 1 + image % 3
                rows = {site.site: rng.normal(size=(n, site.d_in)) for site in writer.spec.sites}
                shard.append(np.full(1 if per_image else n, image), rows)


def patches(folder: Path, spec: BufferSpec | None = None) -> ActivationBuffer:
    with BufferWriter(folder, spec or patch_spec()) as writer:
        fill(writer)
        return writer.close()


def flip(file: Path, dataset: str) -> None:
    with h5py.File(file, "r") as opened:
        place = opened[dataset].id.get_offset() + 5
    content = bytearray(file.read_bytes())
    content[place] ^= 0x10
    file.write_bytes(content)


def row(lines: list[str], begin: str) -> list[str]:
    """Words of the one line that begins so."""
    (found,) = [line.split() for line in lines if line.startswith(begin)]
    return found


# --- info ---


def test_info_says_what_a_buffer_holds(cli: Command, run: Path) -> None:
    shown = cli("buffer", "info", "run")
    assert (shown.status, shown.err) == (0, "")
    assert shown.lines[0] == "Buffer  complete"
    assert shown.lines[1] == "2 sites · 50 images · 50 rows (1 per image)"
    assert shown.lines[2].startswith("7 shards of up to 9 images · float16 · ")
    rows = ActivationBuffer(run / "buffer").read("train").values
    pooled = [f"{rows[VIT].mean():#.3g}".replace("-", "−"), f"{rows[VIT].std():#.3g}"]
    assert row(shown.lines, VIT) == [VIT, "mean", "6", "–", *pooled]
    assert row(shown.lines, RESNET)[1:3] == ["pool", "4"]
    assert row(shown.lines, "train")[:4] == ["train", "36", "36", "4"]
    assert row(shown.lines, "holdout")[:4] == ["holdout", "10", "10", "2"]
    assert "holdout 0.2, validation 0.1, seed 0" in shown.out
    assert "run/buffer (schema 2)" in shown.out
    assert "skipped" not in shown.out
    assert cli("buffer", "info", "run/buffer").out == shown.out


def test_info_as_json(cli: Command, run: Path) -> None:
    shown = cli("buffer", "info", "run", "--json")
    data = json.loads(shown.out, parse_constant=pytest.fail)
    assert shown.err.startswith("Buffer  complete")
    buffer = ActivationBuffer(run / "buffer")
    files = [*(run / "buffer").glob("shard-*.h5")]
    assert (data["schema"], data["dtype"], data["mode"], data["complete"]) == (2, "float16", "store", True)
    assert (data["shards"], data["bytes"]) == (7, sum(file.stat().st_size for file in files))
    assert data["missing"] == {"shards": 0, "images": 0, "unlisted": 0}
    assert data["writer"] is data["problem"] is None
    assert data["source"] == buffer.source
    assert data["split_request"] == {"limit": None, "holdout": 0.2, "validation": 0.1, "seed": 0}
    for site in data["sites"]:
        values = buffer.read("train").values[site["site"]].astype(np.float64)
        assert site["mean"] == pytest.approx(values.mean())
        assert site["sd"] == pytest.approx(values.std())  # about one mean of all rows and dimensions
        assert (site["train_rows"], site["rows_per_image"]) == (36, 1)
    assert [site["site"] for site in data["sites"]] == [VIT, RESNET]
    for split in SPLITS:
        of = data["splits"][split]
        assert (of["rows"], of["images"]) == (buffer.n_rows(split), buffer.n_images(split))


def test_info_of_patches_with_skipped_images_fits_80_columns(cli: Command) -> None:
    patches(Path("acts"))
    shown = cli("buffer", "info", "acts")
    assert max(map(len, shown.lines)) <= 80
    assert "50 images · 200 rows (4 per image)" in shown.out
    assert row(shown.lines, PATCH)[1:4] == ["patch", "3", "2×2"]
    assert row(shown.lines, PATCH)[-1] == "cdcdcdcdcdcd"
    assert "".join(line.split()[0] for line in shown.lines[5:8]) == LONG  # folded, not cut
    assert row(shown.lines, "train") == ["train", "35", "140", "6", *row(shown.lines, "train")[4:6], "8"]
    assert "10 images skipped" in shown.out
    assert shown.out.count(".jpg: cannot identify image file") == 5
    assert "  and 5 more; --json lists all" in shown.out
    assert "folder of 60 images, fingerprint f0f0f0f0f0f0\n" in "\n".join(map(str.rstrip, shown.lines)) + "\n"
    data = cli("buffer", "info", "acts", "--json").document
    assert len(data["skipped"]) == 10
    assert data["skipped"][0]["reason"] == "cannot identify\nimage file"
    assert sum(split["skipped"] for split in data["splits"].values()) == 10


def test_info_where_images_have_different_numbers_of_rows(cli: Command) -> None:
    buffer = patches(Path("acts"), patch_spec(rows_per_image=0))
    rows = sum(buffer.n_rows(split) for split in SPLITS)
    assert f"{rows} rows (as many per image as it has)" in cli("buffer", "info", "acts").out


def test_info_while_it_is_being_written_and_after_a_kill(cli: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    with BufferWriter("acts", patch_spec()) as writer:
        fill(writer, 3)
        shown = cli("buffer", "info", "acts")
        assert shown.status == 0
        assert shown.lines[0] == "Buffer  incomplete"
        assert f"being written by process {os.getpid()} on {socket.gethostname()}" in shown.out
        assert "6 of 9 shards missing, with 43 of 60 images" in shown.out
        assert "goes on" not in shown.out
        assert row(shown.lines, "train")[:8] == ["train", "0", "of", "43", "0", "0", "of", "6"]
        assert "no training row yet" in shown.out
        assert row(shown.lines, PATCH)[4:6] == ["–", "–"]
        data = cli("buffer", "info", "acts", "--json").document
        assert data["writer"] == {"pid": os.getpid(), "host": socket.gethostname()}
        assert data["sites"][0]["mean"] is None

        def ended(pid: int, signal: int) -> None:
            raise ProcessLookupError

        monkeypatch.setattr(os, "kill", ended)  # the holder's note outlives a kill -9
        shown = cli("buffer", "info", "acts")
        assert "being written" not in shown.out
        assert "give the command that harvests again" in shown.out
    assert cli("buffer", "info", "acts", "--json").document["writer"] is None


def test_info_of_an_empty_buffer(cli: Command) -> None:
    with BufferWriter("acts", patch_spec()):
        pass
    shown = cli("buffer", "info", "acts")
    assert "9 of 9 shards missing, with 60 of 60 images" in shown.out
    exported = cli("buffer", "export", "acts", "--site", PATCH, "--to", "x.npy")
    assert (exported.status, exported.out) == (2, "")
    assert "has no rows (train: 0, validation: 0, holdout: 0)" in exported.err


def test_info_of_shards_that_several_processes_wrote(cli: Command) -> None:
    with BufferWriter("acts", patch_spec(), size=2):
        helper = BufferWriter("acts", patch_spec(), rank=1, size=2)
        fill(helper, 2)
        shown = cli("buffer", "info", "acts").out
        assert "9 of 9 shards missing, with 60 of 60 images (2 of them" in " ".join(shown.split())


def test_a_ring_that_is_done_is_whole(cli: Command) -> None:
    with BufferWriter("ring", patch_spec(RingSpec(2, 1, 1, "of a training"))) as writer:
        fill(writer, 8)
        dropped = [entry for entry in writer.manifest.shards if entry.split == "train"][:3]
        writer.drop([entry.file for entry in dropped])
        writer.close(early=True)
    shown = cli("buffer", "info", "ring")
    assert shown.lines[0] == "Buffer  ring, complete"
    n_rows = sum(entry.rows for entry in dropped)
    assert f"dropped once used: 3 shards, {n_rows} training rows" in shown.out
    assert "closed early: 1 shard (3 images) not wanted any more" in shown.out
    assert row(shown.lines, "train")[-1] == f"{n_rows}"
    assert cli("buffer", "info", "ring", "--json").document["dropped"] == {"shards": 3, "rows": n_rows}
    verified = cli("buffer", "verify", "ring")
    assert (verified.status, verified.lines[0].startswith("5 shards, ")) == (0, True)
    exported = cli("buffer", "export", "ring", "--site", PATCH, "--to", "x.npy")
    assert f"without {n_rows} training rows, which the ring has dropped" in exported.out


def test_info_says_when_a_shard_is_not_there(cli: Command, run: Path) -> None:
    (run / "buffer" / SHARD).unlink()
    shown = cli("buffer", "info", "run")
    assert shown.status == 0
    assert shown.lines[0] == "Buffer  damaged"
    assert f"{SHARD} is damaged: the file is missing" in shown.out
    assert "verify lists all that is wrong" in " ".join(shown.out.split())


@pytest.mark.parametrize("width", [80, 100, 200])
def test_the_screen_of_many_sites(made: Path, width: int) -> None:
    data = described(ActivationBuffer(made))
    site = data["sites"][0] | {"d_in": 16_384, "grid": [100, 100], "mean": -123_456.7, "sd": 9.9e-12}
    many = [site | {"site": f"model{at}/encoder.layers.{at}.attention.output.dense", "weights_hash": "0123456789abcdef"}
            for at in range(30)]  # fmt: skip
    data |= {"sites": many, "folder": "x" * 200, "bytes": 10**15}
    console = Console(file=io.StringIO(), width=width)
    console.print(buffer_screen(data))
    lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert max(map(len, lines)) <= 80
    text = "\n".join(lines)
    for part in ("16,384", "100×100", "−123,457", "9.90e−12", "0123456789ab", "1,000,000 GB"):
        assert part in text
    assert "…" not in text


# --- verify ---


def test_verify_reads_all_and_says_so(cli: Command, run: Path) -> None:
    size = sum(file.stat().st_size for file in (run / "buffer").glob("shard-*.h5"))
    shown = cli("buffer", "verify", "run")
    assert (shown.status, shown.out) == (0, f"7 shards, {spelled_bytes(size)}: all intact\n")
    shown = cli("buffer", "verify", "run", "--json")
    assert shown.status == 0
    assert shown.document == {"folder": "run/buffer", "ok": True, "shards": 7, "bytes": size, "problems": []}
    assert "all intact" in shown.err


def test_verify_lists_all_that_is_wrong(cli: Command, run: Path) -> None:
    folder = run / "buffer"
    flip(folder / SHARD, "resnet__layer4")
    (folder / "shard-00000.h5").unlink()
    os.truncate(folder / "shard-00005.h5", 100)
    shown = cli("buffer", "verify", "run")
    assert shown.status == 1
    text = " ".join(shown.out.split())
    assert text.startswith("3 problems in run/buffer (7 shards, ")
    assert f"• {SHARD} is damaged ({RESNET}): its CRC32 is " in text
    assert "• shard-00000.h5 is damaged: the file is missing" in text
    assert "• shard-00005.h5 is damaged: the file has 100 bytes where the manifest says" in text
    assert text.count("restore the file from a copy, or delete the buffer and harvest again") == 1
    assert max(map(len, shown.lines)) <= 80
    as_json = cli("buffer", "verify", "run", "--json")
    assert as_json.status == 1
    data = as_json.document
    assert (data["ok"], data["shards"], len(data["problems"])) == (False, 7, 3)
    assert f"shard run/buffer/{SHARD} is damaged ({RESNET}): its CRC32 is" in data["problems"][1]["message"]
    assert all(problem["hint"].startswith("restore the file") for problem in data["problems"])


def test_a_flipped_bit_of_the_moments_is_found(cli: Command, run: Path) -> None:
    flip(run / "buffer" / SHARD, "moments/resnet__layer4")
    shown = cli("buffer", "verify", "run", "--json")
    assert shown.status == 1
    assert f"moments:{RESNET}" in shown.document["problems"][0]["message"]


def test_an_incomplete_buffer_is_a_problem(cli: Command) -> None:
    with BufferWriter("acts", patch_spec()) as writer:
        fill(writer, 3)
        (problem,) = cli("buffer", "verify", "acts", "--json").document["problems"]
        assert problem["hint"] == "wait until it is written"
    shown = cli("buffer", "verify", "acts")
    assert shown.status == 1
    assert "1 problem in acts (3 shards, " in shown.out
    assert "not complete: 6 of 9 shards missing, with 43 of 60 images" in shown.out
    assert "give the command that harvests again" in shown.out


def test_all_shards_but_not_closed(cli: Command) -> None:
    with BufferWriter("acts", patch_spec()) as writer:
        fill(writer)
    shown = cli("buffer", "verify", "acts")
    assert shown.status == 1
    assert "all shards are sealed, but the buffer was not closed" in " ".join(shown.out.split())


def test_what_a_ring_drops_meanwhile_is_not_damaged(cli: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    with BufferWriter("ring", patch_spec(RingSpec(2, 1, 1, "of a training"))) as writer:
        fill(writer, 6)
        verify = ActivationBuffer.verify

        def late(buffer: ActivationBuffer, progress: Any = None) -> list[str]:
            writer.drop(["shard-00003.h5"])
            return verify(buffer, progress)

        monkeypatch.setattr(ActivationBuffer, "verify", late)
        (problem,) = cli("buffer", "verify", "ring", "--json").document["problems"]
        assert "not complete" in problem["message"]


def test_a_damaged_manifest_is_a_problem(cli: Command, run: Path) -> None:
    (run / "buffer/manifest.json").write_text("{")
    data = cli("buffer", "verify", "run", "--json")
    assert (data.status, data.document["ok"], data.document["shards"]) == (1, False, 0)
    assert "manifest.json is damaged" in data.document["problems"][0]["message"]
    assert cli("buffer", "verify", "run").status == 1
    info = cli("buffer", "info", "run", "--json")
    assert (info.status, info.document["error"]["type"]) == (1, "BufferIntegrityError")


# --- export ---


def together(buffer: ActivationBuffer, site: str, splits: tuple[str, ...] = SPLITS) -> dict[str, np.ndarray]:
    """What the exported rows have to be."""
    parts = [buffer.read(split) for split in splits]
    return {
        "values": np.concatenate([part.values[site] for part in parts]),
        "image_index": np.concatenate([part.image_index for part in parts]),
        "token_index": np.concatenate([part.token_index for part in parts]),
        "split": np.concatenate([[split] * part.n for split, part in zip(splits, parts, strict=True)]),
    }


def read_safetensors(path: str) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    with safe_open(path, "np") as file:
        return {key: file.get_tensor(key) for key in file.keys()}, file.metadata()  # noqa: SIM118


def test_export_as_npy(cli: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export, "_PIECE", 16 * 4 * 7)  # rows at a time: pieces end within shards
    buffer = patches(Path("acts"))
    shown = cli("buffer", "export", "acts", "--site", PATCH, "--to", "out/rows.v1.npy")
    assert shown.status == 0, shown.err
    assert f"{PATCH}  200 rows of 3 · float16 · " in shown.lines[0]
    assert shown.lines[1] == "140 train, 16 validation, 44 holdout"
    expected = together(buffer, PATCH)
    values = np.load("out/rows.v1.npy", mmap_mode="r")
    assert values.dtype == np.float16
    np.testing.assert_array_equal(values, expected["values"])
    with np.load("out/rows.v1.index.npz") as index:
        assert set(index.files) == {"image_index", "token_index", "split"}
        for column in index.files:
            np.testing.assert_array_equal(index[column], expected[column])
        assert (index["image_index"].dtype, index["token_index"].dtype) == (np.int64, np.int32)
        assert index["split"].dtype.kind == "U"
    assert sorted(os.listdir("out")) == ["rows.v1.index.npz", "rows.v1.npy"]
    before = {name: Path("out", name).read_bytes() for name in os.listdir("out")}
    assert cli("buffer", "export", "acts", "--site", PATCH, "--to", "out/rows.v1.npy", "--force").status == 0
    assert {name: Path("out", name).read_bytes() for name in os.listdir("out")} == before


def test_export_of_rows_in_varying_numbers(cli: Command) -> None:
    buffer = patches(Path("acts"), patch_spec(rows_per_image=0))
    assert cli("buffer", "export", "acts", "--site", LONG, "--to", "x.npy").status == 0
    with np.load("x.index.npz") as index:
        np.testing.assert_array_equal(index["token_index"], together(buffer, LONG)["token_index"])


def test_export_as_safetensors(cli: Command, run: Path) -> None:
    buffer = ActivationBuffer(run / "buffer")
    shown = cli("buffer", "export", "run", "--site", VIT, "--to", "x.safetensors", "--json")
    data = shown.document
    assert data["splits"] == {"train": 36, "validation": 4, "holdout": 10}
    assert (data["rows"], data["d_in"], data["dtype"], data["index"]) == (50, 6, "float16", None)
    assert data["bytes"] == Path("x.safetensors").stat().st_size
    tensors, metadata = read_safetensors("x.safetensors")
    expected = together(buffer, VIT)
    codes = json.loads(metadata["split_codes"])
    assert codes == {"train": 0, "validation": 1, "holdout": 2}
    assert (metadata["site"], metadata["source_fingerprint"]) == (VIT, buffer.source["fingerprint"])
    assert (tensors["split"].dtype, tensors["values"].dtype) == (np.int8, np.float16)
    np.testing.assert_array_equal(tensors["split"], [codes[split] for split in expected["split"]])
    for key in ("values", "image_index", "token_index"):
        np.testing.assert_array_equal(tensors[key], expected[key])


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("suffix", [".npy", ".safetensors"])
def test_one_split_in_another_dtype(cli: Command, run: Path, split: str, suffix: str) -> None:
    asked = ("--site", RESNET, "--split", split, "--dtype", "float32", "--to", f"x{suffix}")
    assert cli("buffer", "export", "run", *asked).status == 0
    values = np.load("x.npy") if suffix == ".npy" else read_safetensors("x.safetensors")[0]["values"]
    expected = together(ActivationBuffer(run / "buffer"), RESNET, (split,))["values"]
    assert values.dtype == np.float32
    np.testing.assert_array_equal(values, expected)


def test_float32_rows_are_rounded_or_refused(cli: Command) -> None:
    rows = np.random.default_rng(0).normal(size=(20, 3)).astype(np.float32)
    buffer = ActivationBuffer.from_arrays({"a/x": rows, "a/y": rows * 1e6}, "acts", dtype="float32")
    assert cli("buffer", "export", "acts", "--site", "a/x", "--dtype", "float16", "--to", "x.npy").status == 0
    np.testing.assert_array_equal(np.load("x.npy"), together(buffer, "a/x")["values"].astype(np.float16))
    refused = cli("buffer", "export", "acts", "--site", "a/y", "--dtype", "float16", "--to", "y.npy", "--json")
    error = refused.document["error"]
    assert (refused.status, error["type"]) == (1, "PrecisionError")
    assert "does not fit float16" in error["message"]
    assert error["hint"] == "export it as float32, as it is stored"
    assert sorted(os.listdir()) == ["acts", "x.index.npz", "x.npy"]


def test_an_incomplete_buffer_exports_what_it_has(cli: Command) -> None:
    with BufferWriter("acts", patch_spec()) as writer:
        fill(writer, 3)
    shown = cli("buffer", "export", "acts", "--site", PATCH, "--to", "x.npy")
    assert "not complete: these are the rows that it has by now" in shown.out
    assert len(np.load("x.npy")) == 60
    assert cli("buffer", "export", "acts", "--site", PATCH, "--to", "y.npy", "--json").document["complete"] is False


@pytest.mark.parametrize("name", ["x.npy", "x.safetensors"])
def test_damage_leaves_what_was_there(cli: Command, run: Path, name: str) -> None:
    asked = ("buffer", "export", "run", "--site", RESNET, "--to", f"out/{name}")
    assert cli(*asked).status == 0
    before = {file: Path("out", file).read_bytes() for file in os.listdir("out")}
    flip(run / "buffer" / SHARD, "resnet__layer4")
    failed = cli(*asked, "--force")
    assert (failed.status, failed.out) == (1, "")
    assert f"{SHARD} is damaged" in failed.err
    assert {file: Path("out", file).read_bytes() for file in os.listdir("out")} == before
    shutil.rmtree("out")
    assert cli(*asked).status == 1
    assert not any(Path().glob("out/*"))


def test_a_disk_that_does_not_take_it(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(export, "_write_array", full)
    with pytest.raises(UsaeProbeError, match=r"x\.npy' could not be written: No space left .*no part of it"):
        export.export(ActivationBuffer(made), VIT, tmp_path / "x.npy")
    assert os.listdir(tmp_path) == []


def test_a_safetensors_file_is_bounded(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    per_row = 6 * 2 + 8 + 4 + 1
    monkeypatch.setattr(export, "AT_ONCE", 50 * per_row)
    export.export(ActivationBuffer(made), VIT, tmp_path / "x.safetensors")
    monkeypatch.setattr(export, "AT_ONCE", 50 * per_row - 1)
    with pytest.raises(UsageError, match=r"made in memory, up to .*give a \.npy file"):
        export.export(ActivationBuffer(made), VIT, tmp_path / "y.safetensors")
    assert os.listdir(tmp_path) == ["x.safetensors"]


def test_progress_counts_the_rows(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export, "_PIECE", 16 * 4 * 10)
    seen: list[tuple[int, int]] = []
    written = export.export(ActivationBuffer(made), VIT, tmp_path / "x.npy", progress=lambda *now: seen.append(now))
    assert seen == [(10, 50), (20, 50), (30, 50), (36, 50), (40, 50), (50, 50)]
    assert (written.n_rows, written.index_path) == (50, tmp_path / "x.index.npz")


def test_checksums_are_compared_unless_told_otherwise(made: Path, tmp_path: Path) -> None:
    shutil.copytree(made, tmp_path / "acts")
    flip(tmp_path / "acts" / SHARD, "image_index")
    with pytest.raises(BufferIntegrityError, match="image_index"):
        export.export(ActivationBuffer(tmp_path / "acts"), VIT, tmp_path / "x.npy")
    export.export(ActivationBuffer(tmp_path / "acts", verify="never"), VIT, tmp_path / "x.npy")


# --- what is refused ---

EXPORT = ["buffer", "export", "run", "--site", VIT, "--to"]
REFUSED: dict[str, tuple[list[str], str, str, str]] = {
    "no folder": (["buffer", "info", "rum"], "UsageError", "'rum' does not exist", "did you mean 'run'?"),
    "a file": (["buffer", "verify", "there.npy"], "UsageError", "'there.npy' is a file", "give a run's folder"),
    "no buffer": (
        ["buffer", "info", "."], "UsageError", "neither manifest.json nor buffer/manifest.json", "such as run",
    ),
    "no harvest": (["buffer", "info", "begun"], "UsageError", "neither begun/manifest.json nor", "usae-probe harvest"),
    "unknown site": (
        ["buffer", "export", "run", "--site", "vit/blocks.8", "--to", "x.npy"],
        "SiteError", "no site 'vit/blocks.8'", f"did you mean '{VIT}'?",
    ),
    "far site": (
        ["buffer", "export", "run", "--site", "q", "--to", "x.npy"], "SiteError", "no site 'q'", f"{VIT}, {RESNET}",
    ),
    "unknown split": ([*EXPORT, "x.npy", "--split", "hold-out"], "UsageError", "'hold-out' is no split", "'holdout'"),
    "far split": (
        [*EXPORT, "x.npy", "--split", "q"], "UsageError", "'q' is no split", "train, validation, holdout, all",
    ),
    "unknown dtype": ([*EXPORT, "x.npy", "--dtype", "float64"], "UsageError", "'float64' is no dtype", "'float16'"),
    "unknown suffix": ([*EXPORT, "x.npz"], "UsageError", ".npy or .safetensors, not as 'x.npz'", "'.npy'"),
    "no suffix": ([*EXPORT, "rows"], "UsageError", ".npy or .safetensors, not as 'rows'", "e.g. rows.npy"),
    "existing": ([*EXPORT, "there.npy"], "UsageError", "'there.npy' exists", "--force"),
    "existing index": ([*EXPORT, "half.npy"], "UsageError", "'half.index.npz' exists", "--force"),
    "folder": ([*EXPORT, "folder.npy", "--force"], "UsageError", "'folder.npy' is a folder", "another name"),
}  # fmt: skip


@pytest.mark.parametrize("which", REFUSED)
def test_what_is_refused_says_what_there_is(cli: Command, run: Path, which: str) -> None:
    for file in ("there.npy", "half.index.npz", "begun/run.json", "folder.npy/x"):
        Path(file).parent.mkdir(exist_ok=True)
        Path(file).write_text("mine")
    arguments, kind, message, hint = REFUSED[which]
    plain = cli(*arguments)
    assert (plain.status, plain.out) == (2, "")
    assert message in plain.err
    as_json = cli(*arguments, "--json")
    assert as_json.status == 2
    error = as_json.document["error"]
    assert error["type"] == kind
    assert message in error["message"]
    assert hint in error["hint"]
    assert Path("there.npy").read_text() == "mine"
    assert not Path("x.npy").exists()


def test_an_empty_split_says_what_there_is(cli: Command) -> None:
    ActivationBuffer.from_arrays({"a/x": np.ones((20, 3))}, "acts", validation=0.0)
    refused = cli("buffer", "export", "acts", "--site", "a/x", "--split", "validation", "--to", "x.npy", "--json")
    assert refused.status == 2
    assert "no rows of validation (train: 18, validation: 0, holdout: 2)" in refused.document["error"]["message"]


def test_the_parser_and_the_help(cli: Command) -> None:
    bare = cli("buffer")
    assert "verify" in bare.out + bare.err
    shown = cli("buffer", "--help")
    assert shown.status == 0
    for name in ("info", "verify", "export"):
        assert name in shown.out
    missing = cli("buffer", "export", "run", "--json")
    assert (missing.status, missing.document["error"]["type"]) == (2, "UsageError")
