"""Writing: what goes in comes out bit for bit, interrupted or not, and nothing bad gets in."""

import dataclasses
import json
import os
import zlib
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pytest

from usae_probe.buffer import ActivationBuffer, BufferSpec, BufferWriter, Moments, ShardPlan, SiteSpec
from usae_probe.errors import (
    BufferIntegrityError,
    BufferMismatchError,
    NonFiniteError,
    PrecisionError,
    SiteError,
    StageError,
    UsaeProbeError,
    UsageError,
)
from usae_probe.split import Split, draw_split

from .buffers import as_schema_1, content

VIT, RESNET = "vit/blocks.8@mean", "resnet/layer4"
D = {VIT: 6, RESNET: 4}


def make_spec(n: int = 40, *, rows_per_image: int = 1, **changes: object) -> BufferSpec:
    """By default 40 images in seven shards: one of 7 validation images, 7 + 1 of holdout, 7 + 7 + 7 + 4 of training."""
    sites = (
        SiteSpec(VIT, "vit", "blocks.8", "mean", D[VIT], (3, 2), rows_per_image, "abc", {"mean": (0.5, 0.5)}),
        SiteSpec(RESNET, "resnet", "layer4", "pool", D[RESNET], None, rows_per_image, "def"),
    )
    request = {"limit": None, "holdout": 0.2, "validation": 0.22, "seed": 3}
    spec = BufferSpec(
        sites=sites,
        source={"kind": "folder", "location": "/photos", "fingerprint": "f00", "n_images": n},
        split=draw_split(n, holdout=0.2, validation=0.22, seed=3),
        split_request=request,
        shard_images=7,
        batch_size=3,
    )
    return dataclasses.replace(spec, **changes)


def rows_of(images: np.ndarray, site: str, rows_per_image: int = 1) -> np.ndarray:
    """Rows that follow from the image and site alone, as a model's would."""
    seeds = [(int(image), token, len(site)) for image in images for token in range(rows_per_image)]
    values = [np.random.default_rng(seed).normal(size=D[site]) for seed in seeds]
    return np.array(values, dtype=np.float32).reshape(-1, D[site])


def fill(writer: BufferWriter, plan: ShardPlan, skip: tuple[int, ...] = ()) -> None:
    size, per_image = writer.spec.batch_size, writer.spec.sites[0].rows_per_image
    with writer.shard(plan) as shard:
        for start in range(0, len(plan.images), size):
            batch = plan.images[start : start + size]
            for image in batch[np.isin(batch, skip)]:
                shard.skip(int(image), f"{image}.png", "cannot identify image file")
            good = batch[~np.isin(batch, skip)]
            shard.append(good, {site: rows_of(good, site, per_image) for site in D})


def write(path: Path, spec: BufferSpec, skip: tuple[int, ...] = ()) -> ActivationBuffer:
    with BufferWriter(path, spec) as writer:
        for plan in writer.pending():
            fill(writer, plan, skip)
        return writer.close()


def open_shard_of(path: Path, spec: BufferSpec, describe: Callable[[int], str] | None = None):
    writer = BufferWriter(path, spec, describe=describe)
    plan = writer.pending()[0]
    return writer, plan, {site: rows_of(plan.images, site) for site in D}


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("rows_per_image", [1, 3])
def test_round_trip_is_exact(tmp_path: Path, dtype: str, rows_per_image: int) -> None:
    spec = make_spec(rows_per_image=rows_per_image, dtype=dtype)
    buffer = write(tmp_path / "acts", spec)
    for split, images in spec.split:
        rows = buffer.read(split)
        assert rows.n == buffer.n_rows(split) == len(images) * rows_per_image
        assert buffer.n_images(split) == len(images)
        np.testing.assert_array_equal(rows.image_index, np.repeat(images, rows_per_image))
        np.testing.assert_array_equal(rows.token_index, np.tile(np.arange(rows_per_image), len(images)))
        assert (rows.image_index.dtype, rows.token_index.dtype) == (np.int64, np.int32)
        for site in D:
            expected = rows_of(images, site, rows_per_image).astype(dtype).astype(np.float32)
            np.testing.assert_array_equal(rows.values[site], expected)
            assert rows.values[site].dtype == np.float32


def test_what_the_buffer_says_of_itself(tmp_path: Path) -> None:
    spec = make_spec()
    buffer = write(tmp_path / "acts", spec)
    assert buffer.sites == [VIT, RESNET]
    assert buffer.d_in == D
    assert buffer.specs[VIT].grid == (3, 2)
    assert buffer.specs[VIT].preprocessing == {"mean": [0.5, 0.5]}
    assert buffer.specs[RESNET] == spec.sites[1]
    assert buffer.source == spec.source
    assert buffer.split_request == spec.split_request
    assert buffer.identity == spec.identity()
    assert buffer.complete
    assert buffer.nbytes == 40 * (2 * 10 + 8 + 4)
    for part in ("acts", VIT, RESNET, "25 train + 7 validation + 8 holdout rows", "float16", "complete"):
        assert part in repr(buffer)


def test_moments_are_those_of_the_stored_training_rows(tmp_path: Path) -> None:
    buffer = write(tmp_path / "acts", make_spec())
    for site in D:
        stored = buffer.read("train").values[site].astype(np.float64)
        moments = buffer.moments(site)
        assert moments.n == len(stored)
        np.testing.assert_allclose(moments.mean, stored.mean(0), atol=1e-12)
        np.testing.assert_allclose(moments.variance, stored.var(0), atol=1e-12)
        moments.update(stored)
        assert buffer.moments(site).n == len(stored)


def test_shards_hold_images_of_one_split(tmp_path: Path) -> None:
    spec = make_spec()
    write(tmp_path, spec)
    entries = json.loads((tmp_path / "manifest.json").read_text())["shards"]
    assert [entry["split"] for entry in entries] == ["validation"] + ["holdout"] * 2 + ["train"] * 4
    for entry in entries:
        with h5py.File(tmp_path / entry["file"], "r") as file:
            own = {"moments"} if entry["split"] == "train" else set()
            assert set(file) == {"vit__blocks.8@mean", "resnet__layer4", "image_index", "token_index"} | own
            images = spec.split[entry["split"]][entry["start"] : entry["start"] + entry["n_images"]]
            np.testing.assert_array_equal(file["image_index"][:], images)
            assert all(file[name].chunks is None for name in set(file) - own)


def test_every_training_shard_holds_its_own_moments_under_a_checksum(tmp_path: Path) -> None:
    buffer = write(tmp_path, make_spec())
    merged = {site: Moments(d) for site, d in D.items()}
    for entry in buffer.shards:
        assert set(entry.crc) >= {*D, "image_index", "token_index"}
        moments_of = {
            column.removeprefix("moments:"): crc for column, crc in entry.crc.items() if column[:8] == "moments:"
        }
        assert set(moments_of) == (set(D) if entry.split == "train" else set())
        with h5py.File(tmp_path / entry.file, "r") as file:
            for site, crc in moments_of.items():
                name = site.replace("/", "__")
                rows, moments = file[name][:].astype(np.float64), file[f"moments/{name}"]
                assert (moments.shape, moments.dtype, moments.chunks) == ((2, D[site]), np.dtype("<f8"), None)
                np.testing.assert_allclose(moments[0], rows.mean(0), atol=1e-12)
                np.testing.assert_allclose(moments[1], np.square(rows - rows.mean(0)).sum(0), atol=1e-12)
                assert zlib.crc32(moments[:].tobytes()) == crc
                merged[site].merge(Moments.of(entry.rows, *moments[:]))
    assert {site: moments.to_dict() for site, moments in merged.items()} == {
        site: buffer.moments(site).to_dict() for site in D
    }


def test_same_rows_in_other_batches_give_the_same_files(tmp_path: Path) -> None:
    write(tmp_path / "a", make_spec())
    with BufferWriter(tmp_path / "b", make_spec()) as writer:
        for plan in writer.pending():
            with writer.shard(plan) as shard:
                shard.append(plan.images, {site: rows_of(plan.images, site).astype(np.float64) for site in D})
        writer.close()
    assert content(tmp_path / "a") == content(tmp_path / "b")


@pytest.mark.parametrize("stop", [0, 1, 3, 4, 6])
def test_resumed_after_an_exception_equals_uninterrupted(tmp_path: Path, stop: int) -> None:
    skip = tuple(int(image) for image in (*make_spec().split.validation[1:3], *make_spec().split.train[8:11]))
    write(tmp_path / "whole", make_spec(), skip)
    seen = []
    with pytest.raises(KeyboardInterrupt), BufferWriter(tmp_path / "acts", make_spec()) as writer:  # noqa: PT012
        for plan in writer.pending()[:stop]:
            fill(writer, plan, skip)
        plan = writer.pending()[0]
        with writer.shard(plan) as shard:
            shard.append(plan.images[:1], {site: rows_of(plan.images[:1], site) for site in D})
            seen.append(writer.images_done)
            raise KeyboardInterrupt
    assert seen == [sum(len(done.images) for done in make_spec().plans()[:stop]) + 1]
    assert len(content(tmp_path / "acts")) == stop + 1

    partial = ActivationBuffer(tmp_path / "acts")
    assert not partial.complete
    assert partial.verify() == []
    with BufferWriter(tmp_path / "acts", make_spec()) as resumed:
        assert [p.index for p in resumed.pending()] == list(range(stop, 7))
        assert resumed.n_images == 40
        for plan in resumed.pending():
            fill(resumed, plan, skip)
        assert resumed.images_done == 40
        resumed.close()
    assert content(tmp_path / "acts") == content(tmp_path / "whole")


def test_a_finished_buffer_is_opened_as_it_is(tmp_path: Path) -> None:
    write(tmp_path, make_spec())
    before = content(tmp_path)
    with BufferWriter(tmp_path, make_spec()) as writer:
        assert writer.pending() == []
        assert writer.close().complete
    assert content(tmp_path) == before


def test_moved_images_do_not_matter(tmp_path: Path) -> None:
    write(tmp_path, make_spec())
    moved = dict(make_spec().source, location="/elsewhere")
    assert BufferWriter(tmp_path, make_spec(source=moved)).pending() == []


def test_stray_files_of_a_killed_writer_go(tmp_path: Path) -> None:
    with BufferWriter(tmp_path, make_spec()) as writer:
        fill(writer, writer.pending()[0])
    for name in (
        "shard-00001.h5.tmp",
        "manifest.json.tmp",
        ".buffer.h5.tmp-4711",
        ".manifest.part-00001.json.tmp-4711",
    ):
        (tmp_path / name).write_bytes(b"half")
    (tmp_path / "notes.tmp").write_text("mine")
    with BufferWriter(tmp_path, make_spec()):
        assert set(content(tmp_path)) == {"manifest.json", "shard-00000.h5", "notes.tmp"}


def test_skipped_images_are_kept_by_name(tmp_path: Path) -> None:
    spec = make_spec()
    gone = (int(spec.split.holdout[2]), *spec.split.train[:7].tolist())
    buffer = write(tmp_path, spec, gone)  # the first training shard has no row at all
    assert [(image.index, image.name) for image in buffer.skipped] == [(image, f"{image}.png") for image in gone]
    assert buffer.skipped[0].reason == "cannot identify image file"
    assert (buffer.n_images("train"), buffer.n_rows("holdout")) == (18, 7)
    np.testing.assert_array_equal(buffer.read("train").image_index, spec.split.train[7:])
    assert buffer.gather("train", np.array([17, 0])).n == 2
    assert buffer.verify() == []
    stored = buffer.read("train").values[VIT].astype(np.float64)
    np.testing.assert_allclose(buffer.moments(VIT).mean, stored.mean(0), atol=1e-12)


def test_skips_are_listed_in_the_order_of_the_plan(tmp_path: Path) -> None:
    writer, plan, _ = open_shard_of(tmp_path, make_spec())
    with writer.shard(plan) as shard:
        for image in plan.images[::-1]:
            shard.skip(int(image), "x", "y")
    assert [image.index for image in ActivationBuffer(tmp_path).skipped] == plan.images.tolist()


def test_only_equal_specs_go_on_and_differences_are_named(tmp_path: Path) -> None:
    spec = make_spec()
    with BufferWriter(tmp_path, spec) as writer:
        fill(writer, writer.pending()[0])
    other = make_spec(
        sites=(dataclasses.replace(spec.sites[0], weights_hash="xyz"), spec.sites[1]),
        dtype="float32",
        split=draw_split(40, holdout=0.2, validation=0.22, seed=4),
        split_request=dict(spec.split_request, seed=4),
    )
    with pytest.raises(BufferMismatchError) as caught:
        BufferWriter(tmp_path, other)
    message = str(caught.value)
    assert f'sites.{VIT}.weights_hash: "abc" on disk, "xyz" asked for' in message
    assert 'dtype: "float16" on disk, "float32" asked for' in message
    assert "split_request.seed: 3 on disk, 4 asked for" in message
    assert "shard_images" not in message
    assert "another folder" in message
    with pytest.raises(BufferMismatchError, match=rf"sites\.{RESNET}: .* on disk, absent asked for"):
        BufferWriter(tmp_path, make_spec(sites=spec.sites[:1]))


def test_a_buffer_without_shards_may_become_another(tmp_path: Path) -> None:
    with BufferWriter(tmp_path, make_spec()):
        pass
    assert write(tmp_path, make_spec(dtype="float32")).dtype == "float32"


def test_a_complete_buffer_of_schema_1_is_opened_as_it_is(tmp_path: Path) -> None:
    write(tmp_path, make_spec())
    as_schema_1(tmp_path)
    before = content(tmp_path)
    with BufferWriter(tmp_path, make_spec()) as writer:
        assert writer.pending() == []
        assert writer.close().n_rows("train") == 25
    assert content(tmp_path) == before


def test_an_incomplete_buffer_of_schema_1_is_not_gone_on_with(tmp_path: Path) -> None:
    write(tmp_path, make_spec())
    as_schema_1(tmp_path, shards=2)
    before = content(tmp_path)
    assert ActivationBuffer(tmp_path).read("train").n == 14  # what there is can be read
    with pytest.raises(BufferMismatchError, match=r"schema: 1 on disk, 2 is what .*\(write to another folder"):
        BufferWriter(tmp_path, make_spec())
    assert content(tmp_path) == before
    with pytest.raises(BufferMismatchError) as caught:
        BufferWriter(tmp_path, make_spec(dtype="float32"))
    for part in ("schema: 1 on disk, 2", 'dtype: "float16" on disk, "float32" asked for'):
        assert part in str(caught.value)


def test_one_of_schema_1_without_shards_is_begun_anew(tmp_path: Path) -> None:
    write(tmp_path / "acts", make_spec())
    as_schema_1(tmp_path / "acts", shards=0)
    assert write(tmp_path / "acts", make_spec()).complete
    write(tmp_path / "whole", make_spec())
    assert content(tmp_path / "acts") == content(tmp_path / "whole")


def test_a_damaged_folder_is_not_written_to(tmp_path: Path) -> None:
    write(tmp_path / "a", make_spec())
    (tmp_path / "a" / "shard-00002.h5").unlink()
    with pytest.raises(BufferIntegrityError, match=r"shard-00002\.h5 .*missing"):
        BufferWriter(tmp_path / "a", make_spec())
    (tmp_path / "a" / "manifest.json").unlink()
    with pytest.raises(BufferIntegrityError, match="holds shards but no manifest"):
        BufferWriter(tmp_path / "a", make_spec())
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="a file is in the way"):
        BufferWriter(tmp_path / "file", make_spec())


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_non_finite_values_are_named(tmp_path: Path, value: float) -> None:
    writer, plan, rows = open_shard_of(tmp_path, make_spec(), "cats/{}.png".format)
    rows[RESNET][4, 1] = value
    with pytest.raises(NonFiniteError) as caught, writer.shard(plan) as shard:
        shard.append(plan.images, rows)
    expected = f"{RESNET}: layer 'layer4' of model 'resnet' gave {value} for image {plan.images[4]} "
    assert str(caught.value).startswith(expected + f"(cats/{plan.images[4]}.png) (1 of 7 rows")


def test_what_float16_cannot_hold_is_refused_and_nothing_is_lost(tmp_path: Path) -> None:
    writer, plan, rows = open_shard_of(tmp_path, make_spec())
    fill(writer, plan)
    before = content(tmp_path)
    plan = writer.pending()[0]
    rows = {site: rows_of(plan.images, site) for site in D}
    rows[VIT][2, 5] = 1e6
    with pytest.raises(PrecisionError) as caught, writer.shard(plan) as shard:
        shard.append(plan.images, rows)
    for part in (VIT, "1e+06", f"image {plan.images[2]}", "65504", '[buffer] dtype = "float32"'):
        assert part in str(caught.value)
    assert content(tmp_path) == before
    rows[VIT][2, 5] = 65504.0  # the largest float16
    with writer.shard(plan) as shard:
        shard.append(plan.images, rows)
    assert ActivationBuffer(tmp_path).read(plan.split).values[VIT].max() == 65504.0


def test_rows_that_lie_below_what_float16_resolves_are_refused(tmp_path: Path) -> None:
    writer, plan, rows = open_shard_of(tmp_path, make_spec())
    faint = {**rows, VIT: np.full_like(rows[VIT], 1e-5)}  # LayerScale of an untrained ViT, say; zeros alone are fine
    with pytest.raises(KeyboardInterrupt), writer.shard(plan) as shard:  # noqa: PT012
        with pytest.raises(PrecisionError, match=r"no value of these \d+ rows is above 1e-05"):
            shard.append(plan.images, faint)
        shard.append(plan.images, {**rows, VIT: np.zeros_like(rows[VIT])})
        raise KeyboardInterrupt


def test_float32_holds_1e6_but_not_1e39(tmp_path: Path) -> None:
    writer, plan, rows = open_shard_of(tmp_path, make_spec(dtype="float32"))
    rows[VIT][0, 0] = 1e6
    with writer.shard(plan) as shard:
        with pytest.raises(PrecisionError, match="does not fit float32"):
            shard.append(plan.images, {VIT: np.full((7, 6), 1e39), RESNET: rows[RESNET]})
        shard.append(plan.images, rows)  # a refused batch leaves no part of itself
    assert ActivationBuffer(tmp_path).read(plan.split).values[VIT][0, 0] == 1e6


def test_batches_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    writer, plan, rows = open_shard_of(tmp_path, make_spec())
    with pytest.raises(KeyboardInterrupt), writer.shard(plan) as shard:  # noqa: PT012
        with pytest.raises(SiteError, match=rf"{VIT} was not given"):
            shard.append(plan.images, {RESNET: rows[RESNET]})
        with pytest.raises(SiteError, match=r"resnet/layer3 is not a site .*did you mean 'resnet/layer4'"):
            shard.append(plan.images, rows | {"resnet/layer3": rows[RESNET]})
        with pytest.raises(UsageError, match=r"vit/.*shape \[6, 6\] were given where \[7, 6\]"):
            shard.append(plan.images, rows | {VIT: rows[VIT][:6]})
        with pytest.raises(UsageError, match=r"shape \[7, 5\] were given where \[7, 6\]"):
            shard.append(plan.images, rows | {VIT: rows[VIT][:, :5]})
        with pytest.raises(UsageError, match="2 token indices were given for 7 rows"):
            shard.append(plan.images, rows, np.array([0, 0]))
        two = {site: values[:2] for site, values in rows.items()}
        foreign = int(make_spec().split.holdout[0])
        with pytest.raises(UsageError, match=f"image {foreign} is not in its plan"):
            shard.append(np.array([plan.images[0], foreign]), two)
        with pytest.raises(UsageError, match=f"image {plan.images[0]} came after a later image"):
            shard.append(plan.images[[1, 0]], two)
        with pytest.raises(UsageError, match=f"image {plan.images[1]} came after a later image"):
            shard.append(plan.images[[1, 1]], two)
        shard.append(plan.images[2:4], two)
        with pytest.raises(UsageError, match="was given before"):
            shard.append(plan.images[2:4], two)
        with pytest.raises(UsageError, match="was given before"):
            shard.skip(int(plan.images[2]), "a", "b")
        with pytest.raises(UsageError, match="came after a later image"):
            shard.append(plan.images[:2], two)
        raise KeyboardInterrupt


def test_a_reused_batch_array_does_not_reach_into_the_buffer(tmp_path: Path) -> None:
    writer, plan, rows = open_shard_of(tmp_path, make_spec(dtype="float32"))
    images, tokens, expected = plan.images.copy(), np.arange(7), rows[VIT].copy()
    with writer.shard(plan) as shard:
        shard.append(images, rows, tokens)
        for array in (images, tokens, rows[VIT]):
            array[:] = 0
    back = ActivationBuffer(tmp_path).read(plan.split)
    np.testing.assert_array_equal(back.values[VIT], expected)
    np.testing.assert_array_equal(back.image_index, plan.images)
    np.testing.assert_array_equal(back.token_index, np.arange(7))


def test_shards_are_written_in_order_and_whole(tmp_path: Path) -> None:
    writer, plan, rows = open_shard_of(tmp_path, make_spec())
    with pytest.raises(StageError, match=r"shard 1 of .* was started where shard 0 is due"):
        fill(writer, writer.pending()[1])
    with (
        pytest.raises(BufferIntegrityError, match=r"ended with 6 of its 7 images neither"),
        writer.shard(plan) as shard,
    ):
        shard.append(plan.images[:1], {site: values[:1] for site, values in rows.items()})
    with (
        pytest.raises(StageError, match="where shard 0 is open"),
        writer.shard(plan),
        writer.shard(plan),
    ):
        pass
    assert writer.images_done == 0
    with pytest.raises(StageError, match="still lacks 7 of 7 shards"):
        writer.close()
    assert list(content(tmp_path)) == ["manifest.json"]
    for pending in writer.pending():
        fill(writer, pending)
    with pytest.raises(StageError, match="where shard 7 does not exist"):
        fill(writer, dataclasses.replace(plan, index=7))


def fail_at(call: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the `call`-th fsync or replace from now on fail."""
    left = [call]

    def failing(real: Callable[..., None]) -> Callable[..., None]:
        def run(*args: object) -> None:
            left[0] -= 1
            if left[0] == 0:
                raise OSError("no space left on device")
            real(*args)

        return run

    for name in ("fsync", "replace"):
        monkeypatch.setattr(os, name, failing(getattr(os, name)))


@pytest.mark.parametrize("call", range(1, 7))
def test_a_disk_that_fails_while_sealing_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: int
) -> None:
    """A seal makes six calls (fsync, replace, fsync of the folder; for shard and manifest): fail in each."""
    write(tmp_path / "whole", make_spec())
    writer = BufferWriter(tmp_path / "acts", make_spec())
    fill(writer, writer.pending()[0])
    fail_at(call, monkeypatch)
    with pytest.raises(UsaeProbeError, match=r"shard-00001\.h5 .*no space left"):
        fill(writer, writer.pending()[0])
    assert not list((tmp_path / "acts").glob("*.tmp"))
    assert ActivationBuffer(tmp_path / "acts").verify() == []
    for _ in range(2):  # by the same writer, or by a new one
        if writer.pending():
            fill(writer, writer.pending()[0])
        writer.release()
        writer = BufferWriter(tmp_path / "acts", make_spec())
    for plan in writer.pending():
        fill(writer, plan)
    writer.close()
    assert content(tmp_path / "acts") == content(tmp_path / "whole")


@pytest.mark.parametrize("call", range(1, 7))
def test_a_disk_that_fails_while_closing_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: int
) -> None:
    """Closing makes six calls as well: for `buffer.h5` and manifest."""
    write(tmp_path / "whole", make_spec())
    with BufferWriter(tmp_path / "acts", make_spec()) as writer:
        for plan in writer.pending():
            fill(writer, plan)
        fail_at(call, monkeypatch)
        with pytest.raises(UsaeProbeError, match="no space left"):
            writer.close()
    assert ActivationBuffer(tmp_path / "acts").complete == (call == 6)
    assert ActivationBuffer(tmp_path / "acts").read("train").n == 25
    assert write(tmp_path / "acts", make_spec()).complete
    assert content(tmp_path / "acts") == content(tmp_path / "whole")


def test_rows_per_image_may_vary(tmp_path: Path) -> None:
    sites = tuple(dataclasses.replace(site, rows_per_image=0) for site in make_spec().sites)
    writer, plan, _ = open_shard_of(tmp_path, make_spec(sites=sites))
    images = np.repeat(plan.images, [1, 3, 2, 1, 1, 4, 2])
    with writer.shard(plan) as shard:
        shard.append(images, {site: rows_of(images, site) for site in D})
    rows = ActivationBuffer(tmp_path).read(plan.split)
    np.testing.assert_array_equal(rows.image_index, images)
    assert rows.token_index.tolist() == [0, 0, 1, 2, 0, 1, 0, 0, 0, 1, 2, 3, 0, 1]


def test_specs_that_cannot_be_stored_are_refused() -> None:
    site = SiteSpec("a/b", "a", "b", "pool", 3)
    for change, message in (
        ({"sites": ()}, "at least one site"),
        ({"sites": (site, site)}, "dataset 'a__b'"),
        (
            {"sites": (SiteSpec("a__b/c", "a__b", "c", "pool", 3), SiteSpec("a/b__c", "a", "b__c", "pool", 3))},
            "a__b__c",
        ),
        ({"sites": (site, SiteSpec("a/c@patch", "a", "c", "patch", 3, rows_per_image=9))}, "a/b: 1, a/c@patch: 9"),
    ):
        with pytest.raises(SiteError, match=message):
            make_spec(**change)
    with pytest.raises(SiteError, match="'layer4' is no site key"):
        SiteSpec("layer4", "m", "layer4", "pool", 3)
    with pytest.raises(SiteError, match="d_in=0"):
        SiteSpec("m/layer4", "m", "layer4", "pool", 0)
    with pytest.raises(UsageError, match="shard_images=0"):
        make_spec(shard_images=0)
    twice = Split(np.array([0, 1]), np.array([1]), np.array([2]))
    with pytest.raises(UsageError, match="an image more than once"):
        make_spec(split=twice)
    with pytest.raises(UsageError, match="cannot be written as JSON"):
        make_spec(source={"kind": object()}).identity()


def test_moments_survive_the_manifest(tmp_path: Path) -> None:
    spec = make_spec()
    buffer = write(tmp_path, spec)
    expected = Moments(D[VIT])
    for start in range(0, len(spec.split.train), spec.shard_images):
        images = spec.split.train[start : start + spec.shard_images]
        expected.update(rows_of(images, VIT).astype(np.float16))
    assert buffer.moments(VIT).to_dict() == expected.to_dict()
