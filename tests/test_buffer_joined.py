"""A view of several buffers behaves as one buffer in which their columns had been harvested together."""

from __future__ import annotations

import json
import os
import pickle
import signal
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from usae_probe.buffer import ActivationBuffer, BufferWriter, JoinedBuffer, OnlineBuffer, Rows, SiteSpec
from usae_probe.errors import (
    BufferIntegrityError,
    BufferMismatchError,
    SiteError,
    StageError,
    UsaeProbeWarning,
    UsageError,
)
from usae_probe.files import json_sha256
from usae_probe.probes import evaluate, find_exemplars, natural_activations
from usae_probe.split import Split
from usae_probe.usae import train, train_independent

from .buffers import SITES, fill, make_spec
from .trainings import same

VIT, RESNET = SITES
SHAPE: dict[str, Any] = {"n_latents": 24, "k": 4}
HOW: dict[str, Any] = {"steps": 12, "batch_size": 40, "validate_every": 6}
SMALL = 2**14  # bytes of memory: fewer shards than the buffer has, at least two


def arrays() -> dict[str, np.ndarray]:
    """400 paired rows of ten common factors in three sites; what lies where decides nothing about the values."""
    rng = np.random.default_rng(0)
    shared = rng.normal(size=(400, 10))
    return {site: shared @ rng.normal(size=(10, d)) for site, d in (("a/x", 12), ("b/y", 9), ("c/z", 7))}


def made(path: Path, *sites: str, **settings: Any) -> ActivationBuffer:
    return ActivationBuffer.from_arrays(
        {site: arrays()[site] for site in sites}, path, **({"dtype": "float32", "shard_images": 25} | settings)
    )


def opened(buffer: ActivationBuffer, memory: int) -> ActivationBuffer:
    return ActivationBuffer(buffer.path, memory_budget=memory)


def own(*buffers: ActivationBuffer) -> JoinedBuffer:
    """All columns under their own names."""
    return JoinedBuffer({site: (buffer, site) for buffer in buffers for site in buffer.sites})


def equal(a: Rows, b: Rows) -> bool:
    return (
        list(a.values) == list(b.values)
        and all(
            x.dtype == y.dtype and np.array_equal(x, y)
            for x, y in zip(a.values.values(), b.values.values(), strict=False)
        )
        and np.array_equal(a.image_index, b.image_index)
        and np.array_equal(a.token_index, b.token_index)
    )


@pytest.fixture(scope="module")
def together(tmp_path_factory: pytest.TempPathFactory) -> ActivationBuffer:
    return made(tmp_path_factory.mktemp("together") / "b", "a/x", "b/y", "c/z")


@pytest.fixture(scope="module")
def apart(tmp_path_factory: pytest.TempPathFactory) -> tuple[ActivationBuffer, ActivationBuffer]:
    """The same columns in two buffers with shards of other sizes."""
    folder = tmp_path_factory.mktemp("apart")
    return made(folder / "ab", "a/x", "b/y"), made(folder / "c", "c/z", shard_images=64)


# --- the same as one buffer ---


@pytest.mark.parametrize("memory", [2**30, SMALL])
def test_every_way_of_reading_gives_what_one_buffer_gives(
    together: ActivationBuffer, apart: tuple[ActivationBuffer, ActivationBuffer], memory: int
) -> None:
    # the pool is that of the first buffer; to compare it, both are given room for as many shards
    view = own(opened(apart[0], memory), opened(apart[1], memory))
    one = opened(together, memory)
    one._memory_budget = memory * one._row_bytes // apart[0]._row_bytes  # type: ignore[misc]
    assert (view.pool() is None) == (memory > SMALL)
    assert view.pool() == one.pool()
    assert (view.sites, view.d_in, view.complete, view.dtype) == (one.sites, one.d_in, True, "float32")
    assert (view.nbytes, view.specs, view.skipped) == (one.nbytes, one.specs, [])
    for split in ("train", "validation", "holdout"):
        assert (view.n_rows(split), view.n_images(split)) == (one.n_rows(split), one.n_images(split))
        assert equal(view.read(split), one.read(split))
        assert equal(view.read(split, ["c/z", "a/x"]), one.read(split, ["c/z", "a/x"]))
        assert all(equal(a, b) for a, b in zip(view.chunks(split, 7), one.chunks(split, 7), strict=True))
        chosen = np.array([5, 0, 5, 3])
        assert equal(view.gather(split, chosen), one.gather(split, chosen))
        assert equal(view.gather(split, chosen, []), one.gather(split, chosen, []))
    assert view.steps_per_epoch("train", 40) == one.steps_per_epoch("train", 40)
    assert view.rows_at_start() == one.rows_at_start()
    order: dict[str, Any] = {"seed": 3, "start_step": 6}  # beyond the first epoch of 324 rows at the third batch
    for workers in (0, 2):
        pairs = zip(
            view.batches("train", 40, workers=workers, **order), one.batches("train", 40, **order), strict=False
        )
        assert all(equal(a, b) for a, b in islice(pairs, 6))
    data = view.dataset("train", 40, seed=3, steps=4)
    assert all(equal(data[t], rows) for t, rows in zip(range(4), one.batches("train", 40, seed=3), strict=False))
    for site in view.sites:  # merged shard by shard: other shards change the last bits
        np.testing.assert_allclose(view.moments(site).m2, one.moments(site).m2, rtol=1e-12)


def test_batches_are_those_of_the_first_buffer_column_for_column(
    apart: tuple[ActivationBuffer, ActivationBuffer],
) -> None:
    small = [opened(buffer, SMALL) for buffer in apart]
    for first, second in (small, small[::-1]):
        view = own(first, second)
        assert view.pool() == first.pool() != second.pool()
        for a, b in islice(
            zip(view.batches("train", 32, seed=1), first.batches("train", 32, seed=1), strict=False), 12
        ):
            assert all(np.array_equal(a.values[site], b.values[site]) for site in first.sites)
            assert np.array_equal(a.image_index, b.image_index)


@pytest.mark.parametrize("memory", [2**30, SMALL])
def test_training_on_a_view_of_one_buffer_gives_the_same_bits(
    apart: tuple[ActivationBuffer, ActivationBuffer], memory: int, one_thread: None
) -> None:
    buffer = opened(apart[0], memory)
    there, here = (train(b, **SHAPE, **HOW) for b in (buffer, own(buffer)))
    assert same(there.usae, here.usae)
    assert [record.loss for record in there.history] == [record.loss for record in here.history]
    assert evaluate(there.usae, buffer).to_json() == evaluate(here.usae, own(buffer)).to_json()


def test_one_site_under_two_names_is_the_same_to_a_usae(
    apart: tuple[ActivationBuffer, ActivationBuffer], one_thread: None
) -> None:
    view = JoinedBuffer({"a/x": (apart[0], "a/x"), "again/x": (apart[0], "a/x")})
    rows = view.gather("train", np.arange(9))
    assert np.array_equal(rows.values["a/x"], rows.values["again/x"])
    rows.values["a/x"][:] = 0  # copies, free to be changed
    assert rows.values["again/x"].any()
    whole = view.read("holdout")
    assert not np.shares_memory(whole.values["a/x"], whole.values["again/x"])
    assert (view.specs["again/x"].model, view.specs["again/x"].layer) == ("again", "x")
    # Tied from data, both encoders and decoders begin as one; with every target learning alike they stay so.
    run = train(view, **SHAPE, **HOW, source="all", init="data", latent_dropout=0.0, self_share="equal")
    torch.testing.assert_close(run.usae.decoder("a/x"), run.usae.decoder("again/x"))
    report = evaluate(run.usae, view)
    assert report.r2["a/x"]["again/x"] == pytest.approx(report.r2["again/x"]["a/x"], abs=1e-4)
    assert report.counts["specific"] == report.counts["partial"] == 0


def test_what_works_on_a_buffer_works_on_a_view_of_two(
    together: ActivationBuffer, apart: tuple[ActivationBuffer, ActivationBuffer], tmp_path: Path, one_thread: None
) -> None:
    view = own(*apart)
    run = train(view, **SHAPE, **HOW)
    here, there = evaluate(run.usae, view), evaluate(run.usae, together)
    assert (here.r2, here.counts) == (there.r2, there.counts)
    assert repr(here.latents) == repr(there.latents)  # NaN is not equal to itself
    natural = [natural_activations(run.usae, buffer, latents=[0, 5]) for buffer in (view, together)]
    for latent in (0, 5):
        one, other = (find_exemplars(found, latent) for found in natural)
        assert repr(one) == repr(other)  # NaN, as above
    alone = train_independent(view, like=run, resume=tmp_path / "alone")
    assert list(alone) == view.sites
    again = train_independent(view, like=run, resume=tmp_path / "alone")
    assert same(again["c/z"].usae, alone["c/z"].usae)


def test_a_training_goes_on_with_the_same_columns_only(
    apart: tuple[ActivationBuffer, ActivationBuffer], tmp_path: Path, one_thread: None
) -> None:
    def press(record: Any) -> None:
        if record.step == 7:
            os.kill(os.getpid(), signal.SIGINT)

    view, state = own(*apart), tmp_path / "state.safetensors"
    whole = train(view, **SHAPE, **HOW)
    with pytest.raises(KeyboardInterrupt):
        train(view, **SHAPE, **HOW, resume=state, progress=press)
    swapped = JoinedBuffer({"a/x": (apart[0], "a/x"), "b/y": (apart[0], "b/y"), "c/z": (apart[1], "c/z")})
    assert swapped.identity == view.identity
    resumed = train(own(*apart), **SHAPE, **HOW, resume=state)
    assert resumed.resumed == 7
    assert same(resumed.usae, whole.usae)


# --- identity ---


def test_the_identity_tells_origins_apart_and_is_json(
    together: ActivationBuffer, apart: tuple[ActivationBuffer, ActivationBuffer], tmp_path: Path
) -> None:
    ab, c = apart
    other = made(tmp_path / "scaled", "a/x", "b/y", holdout=0.1)
    scaled = ActivationBuffer.from_arrays(
        {site: 2 * x for site, x in arrays().items()}, tmp_path / "twice", dtype="float32", shard_images=25
    )
    views = [
        {"a/x": (ab, "a/x"), "c/z": (c, "c/z")},
        {"c/z": (c, "c/z"), "a/x": (ab, "a/x")},  # the other order
        {"a/x": (together, "a/x"), "c/z": (c, "c/z")},  # the same values from another buffer
        {"a/x": (scaled, "a/x"), "c/z": (c, "c/z")},  # other values under the same name
        {"a/x": (ab, "a/x"), "d/z": (c, "c/z")},  # another name
        {"a/x": (ab, "a/x")},
        {"a/x": (ab, "a/x"), "b/y": (ab, "a/x")},
        {"a/x": (ab, "a/x"), "b/y": (ab, "b/y")},
    ]
    digests = [json_sha256(JoinedBuffer(view).identity) for view in views]
    assert len(set(digests)) == len(views)
    assert json_sha256(ab.identity) not in digests
    for view in views:
        identity = JoinedBuffer(view).identity
        assert json.loads(json.dumps(identity, allow_nan=False)) == identity
    assert JoinedBuffer(views[0]).identity == JoinedBuffer(views[0]).identity
    moved = {"a/x": (ActivationBuffer(other.path), "a/x")}  # opened anew it is the same
    assert JoinedBuffer(moved).identity == JoinedBuffer({"a/x": (other, "a/x")}).identity


def test_a_view_of_a_view_is_one_of_the_buffers(
    apart: tuple[ActivationBuffer, ActivationBuffer],
) -> None:
    view = own(*apart)
    nested = JoinedBuffer({"p/q": (view, "a/x"), "c/z": (view, "c/z")})
    direct = JoinedBuffer({"p/q": (apart[0], "a/x"), "c/z": (apart[1], "c/z")})
    assert nested.identity == direct.identity
    assert equal(nested.read("train"), direct.read("train"))
    last = JoinedBuffer({"c/z": (own(opened(apart[0], SMALL), apart[1]), "c/z")})  # rows in the order of what is not in
    assert last.pool() == opened(apart[0], SMALL).pool()
    assert np.array_equal(
        last.gather("train", np.array([3, 1])).values["c/z"], view.read("train").values["c/z"][[3, 1]]
    )


def test_dtypes_may_differ(apart: tuple[ActivationBuffer, ActivationBuffer], tmp_path: Path) -> None:
    half = made(tmp_path / "half", "c/z", dtype="float16")
    view = own(half, apart[0])
    assert view.dtype == "float32"
    rows = sum(view.n_rows(split) for split in ("train", "validation", "holdout"))
    assert view.nbytes == rows * (2 * 7 + 4 * (12 + 9) + 12)  # float16 of 7, float32 of 21, int64 and int32
    found = view.read("train").values
    assert np.array_equal(found["c/z"], half.read("train").values["c/z"])
    assert np.array_equal(found["a/x"], apart[0].read("train").values["a/x"])


# --- workers ---


@pytest.mark.parametrize("memory", [2**30, SMALL])
def test_it_goes_to_workers(apart: tuple[ActivationBuffer, ActivationBuffer], memory: int) -> None:
    view = JoinedBuffer({"a/x": (opened(apart[0], memory), "a/x"), "c/z": (apart[1], "c/z")})
    view.gather("train", np.arange(3))  # what is open or loaded by now must not go along
    back = pickle.loads(pickle.dumps(view))
    assert equal(back.read("train"), view.read("train"))
    assert len(pickle.dumps(view)) < 100_000
    data = view.dataset("train", 40, seed=0, steps=6)
    for context in ("fork", "spawn") if memory > SMALL else ("fork",):
        loader = DataLoader(data, batch_size=None, num_workers=2, multiprocessing_context=context, collate_fn=_arrays)
        expected = view.batches("train", 40, seed=0)
        assert all(equal(rows, next(expected)) for rows in loader)


def _arrays(rows: Rows) -> Rows:
    return rows


# --- what does not pair up ---


def test_other_images_are_refused(apart: tuple[ActivationBuffer, ActivationBuffer], tmp_path: Path) -> None:
    ab = apart[0]
    # 400 images: 40 held out, 36 of 360 for validation; 0.2 holds out 80, which leaves 32 and 288
    fewer = made(tmp_path / "fewer", "c/z", holdout=0.2)
    with pytest.raises(BufferMismatchError, match=r"324 rows of 'train' here, 288 rows there") as caught:
        own(ab, fewer)
    assert str(ab.path) in caught.value.message
    assert str(fewer.path) in caught.value.message
    assert "seed" in caught.value.hint
    other = made(tmp_path / "other", "c/z", seed=1)
    with pytest.raises(BufferMismatchError, match=r"row \d+ of 'train' is image \d+, token 0 here, image \d+, token 0"):
        own(ab, other)


def test_the_first_row_that_differs_is_named(tmp_path: Path) -> None:
    """Images 0 … 11 in both; the second has rows 4 and 5 of the training split in each other's place."""
    x, index = np.random.default_rng(0).normal(size=(12, 3)), np.arange(12)
    one = ActivationBuffer.from_arrays({"a/x": x}, tmp_path / "1", image_index=index, holdout=0.0, validation=0.0)
    order = one.read("train").image_index
    order[[4, 5]] = order[[5, 4]]
    nothing = np.empty(0, np.int64)
    with BufferWriter(tmp_path / "2", make_spec(12, split=Split(order, nothing, nothing))) as writer:
        fill(writer, writer.pending())
        two = writer.close()
    with pytest.raises(
        BufferMismatchError, match=f"row 4 of 'train' is image {order[5]}, token 0 here, image {order[4]},"
    ):
        own(one, two)


def test_tokens_must_be_the_same_too(tmp_path: Path) -> None:
    """Two rows per image on average: image 0 has one row and image 1 three, or both have two."""
    x = {"a/x": np.random.default_rng(0).normal(size=(4, 3))}
    settings: dict[str, Any] = {"holdout": 0.0, "validation": 0.0}
    buffers = [
        ActivationBuffer.from_arrays(x, tmp_path / str(i), image_index=np.array(index), **settings)
        for i, index in enumerate(([0, 1, 1, 1], [0, 0, 0, 1]))
    ]
    assert [buffer.specs["a/x"].rows_per_image for buffer in buffers] == [0, 0]
    with pytest.raises(BufferMismatchError, match="token"):
        JoinedBuffer({"a/x": (buffers[0], "a/x"), "b/x": (buffers[1], "a/x")})


def test_rows_per_image_and_grids_must_be_the_same(tmp_path: Path) -> None:
    def several(path: Path, rows: int, **changes: Any) -> ActivationBuffer:
        site = SiteSpec("m/patches@patch", "m", "patches", "patch", 3, rows_per_image=rows, **changes)
        with BufferWriter(path, make_spec(20, sites=(site,))) as writer:
            for plan in writer.pending():
                with writer.shard(plan) as shard:
                    shard.append(plan.images, {site.site: np.ones((len(plan.images) * rows, 3), np.float32)})
            return writer.close()

    square, wide = several(tmp_path / "4", 4, grid=(2, 2)), several(tmp_path / "4w", 4, grid=(1, 4))
    nine = several(tmp_path / "9", 9, grid=(3, 3))
    with pytest.raises(SiteError, match="same number of rows per image, not a/p: 4, b/p: 9"):
        JoinedBuffer({"a/p": (square, "m/patches@patch"), "b/p": (nine, "m/patches@patch")})
    with pytest.raises(SiteError, match=r"'a/p' are on a grid of \(2, 2\), those of 'b/p' on one of \(1, 4\)"):
        JoinedBuffer({"a/p": (square, "m/patches@patch"), "b/p": (wide, "m/patches@patch")})
    both = JoinedBuffer({"a/p": (square, "m/patches@patch"), "b/p": (square, "m/patches@patch")})
    assert both.read("train").n == 4 * both.n_images("train")


def test_columns_and_names_that_are_none(apart: tuple[ActivationBuffer, ActivationBuffer]) -> None:
    ab = apart[0]
    with pytest.raises(SiteError, match=r"'v/x' is to be 'a/xx' of the buffer .*, which has no such site") as caught:
        JoinedBuffer({"v/x": (ab, "a/xx")})
    assert caught.value.hint == "did you mean 'a/x'?"
    with pytest.raises(SiteError, match="'pixels' is no site key"):
        JoinedBuffer({"pixels": (ab, "a/x")})
    with pytest.raises(SiteError, match="at least one column and was given none"):
        JoinedBuffer({})
    view = own(ab)
    with pytest.raises(SiteError, match="has no site 'c/z'"):
        view.read("train", ["c/z"])
    with pytest.raises(UsageError, match="'test' is no split"):
        view.n_rows("test")
    with pytest.raises(UsageError, match=r"do not lie in 0 … 323 of 'train'"):
        view.gather("train", np.array([324]))
    growing = OnlineBuffer.__new__(OnlineBuffer)  # all that is looked at is what it is
    growing.path, growing.specs = ab.path, ab.specs
    with pytest.raises(UsageError, match="is still being filled by a harvest"):
        JoinedBuffer({"a/x": (growing, "a/x")})


def test_other_pictures_under_the_same_numbers_are_warned_of(tmp_path: Path) -> None:
    buffers = []
    for name in ("f00", "f01"):
        source = make_spec().source | {"fingerprint": name}
        with BufferWriter(tmp_path / name, make_spec(source=source)) as writer:
            fill(writer, writer.pending())
            buffers.append(writer.close())
    with pytest.warns(UsaeProbeWarning, match="are joined by image number, but their images have other fingerprints"):
        JoinedBuffer({"a/x": (buffers[0], VIT), "b/x": (buffers[1], RESNET)})


# --- damage ---


def test_damage_in_any_of_the_buffers_is_found(tmp_path: Path) -> None:
    buffers = [made(tmp_path / "1", "a/x"), made(tmp_path / "2", "c/z")]
    view = own(*buffers)
    view.demand_all_rows()
    view.demand_present()
    files: list[str] = []
    assert view.verify(files.append) == []
    assert len(files) == sum(len(buffer.shards) for buffer in buffers)
    victim = min(buffers[1].path.glob("shard-*.h5"))  # of held-out images: it holds no moments
    data = bytearray(victim.read_bytes())
    data[-1] ^= 1
    victim.write_bytes(bytes(data))
    assert [str(victim) in what for what in view.verify()] == [True]
    with pytest.raises(BufferIntegrityError, match=victim.name):
        own(ActivationBuffer(buffers[0].path), ActivationBuffer(buffers[1].path)).read("validation")
    victim.unlink()
    with pytest.raises(BufferIntegrityError, match="missing"):
        view.demand_present()


def test_rows_that_a_ring_dropped_are_missed_in_any_of_the_buffers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    buffers = [made(tmp_path / "1", "a/x"), made(tmp_path / "2", "c/z")]
    view = own(*buffers)

    def dropped() -> None:
        raise StageError("was a ring")

    monkeypatch.setattr(buffers[1], "demand_all_rows", dropped)
    with pytest.raises(StageError, match="was a ring"):
        view.demand_all_rows()


def test_skipped_images_are_named_once(tmp_path: Path) -> None:
    buffers = []
    for name in "12":
        with BufferWriter(tmp_path / name, make_spec()) as writer:
            for plan in writer.pending():
                with writer.shard(plan) as shard:
                    for image in plan.images:
                        if image % 10 == 3:
                            shard.skip(int(image), f"{image}.png", "broken")
                    fine = plan.images[plan.images % 10 != 3]
                    shard.append(fine, {site: np.ones((len(fine), d), np.float32) for site, d in SITES.items()})
            buffers.append(writer.close())
    view = JoinedBuffer({"a/x": (buffers[0], VIT), "b/x": (buffers[1], VIT)})
    assert sorted(image.index for image in view.skipped) == [3, 13, 23, 33]
    assert sum(view.n_images(split) for split in ("train", "validation", "holdout")) == 36


def test_it_prints_where_columns_come_from(apart: tuple[ActivationBuffer, ActivationBuffer]) -> None:
    view = JoinedBuffer({"v/x": (apart[0], "a/x")})
    assert (
        repr(view) == f"JoinedBuffer(v/x: {apart[0].path} a/x; 324 train + 36 validation + 40 holdout rows; complete)"
    )
