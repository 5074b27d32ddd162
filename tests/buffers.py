"""Small buffers whose rows follow from site and image alone. As a script, another process that writes one.

`buffers.py write FOLDER RANK SIZE` writes what is that process's to write. `buffers.py hold FOLDER` takes the lock,
says "ready" and waits; so does `buffers.py fork FOLDER`, with a child that waits too.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from usae_probe.buffer import ActivationBuffer, BufferSpec, BufferWriter, ShardPlan, SiteSpec
from usae_probe.buffer.shard import write_shard
from usae_probe.errors import UsaeProbeError
from usae_probe.files import json_sha256
from usae_probe.lock import lock_files
from usae_probe.split import draw_split

SITES = {"vit/blocks.8": 6, "resnet/layer4": 4}


def make_spec(n: int = 40, **changes: Any) -> BufferSpec:
    """By default 40 images in shards of 4: two of 6 validation images, two of 8 holdout, seven of 26 training."""
    spec = BufferSpec(
        sites=tuple(SiteSpec(site, *site.split("/"), "pool", d) for site, d in SITES.items()),
        source={"kind": "folder", "location": "/photos", "fingerprint": "f00", "n_images": n},
        split=draw_split(n, holdout=0.2, validation=0.2, seed=3),
        split_request={"limit": None, "holdout": 0.2, "validation": 0.2, "seed": 3},
        shard_images=4,
    )
    return replace(spec, **changes)


def rows_of(images: np.ndarray) -> dict[str, np.ndarray]:
    return {
        site: np.array([np.random.default_rng((int(image), d)).normal(size=d) for image in images]).reshape(-1, d)
        for site, d in SITES.items()
    }


def fill(writer: BufferWriter, plans: Iterable[ShardPlan]) -> None:
    for plan in plans:
        with writer.shard(plan) as shard:
            shard.append(plan.images, rows_of(plan.images))


def write(path: Path, spec: BufferSpec | None = None) -> ActivationBuffer:
    with BufferWriter(path, spec or make_spec()) as writer:
        fill(writer, writer.pending())
        return writer.close()


def content(path: Path) -> dict[str, bytes]:
    """All files but those of the lock."""
    return {file.name: file.read_bytes() for file in sorted(path.iterdir()) if file not in lock_files(path)}


def as_schema_1(path: Path, shards: int | None = None) -> None:
    """Make a complete buffer what the version before wrote: training shards first, none with moments of its own.

    `shards`: how many of them had been written when that writer was stopped.
    """
    document = json.loads((path / "manifest.json").read_text())
    entries = sorted(document["shards"], key=lambda entry: ("train", "validation", "holdout").index(entry["split"]))
    for number, entry in enumerate(entries):
        (path / entry["file"]).rename(path / f"old-{number}")
    for number, entry in enumerate(entries):
        del entry["dropped"]
        entry["file"] = f"shard-{number:05d}.h5"
        columns = [column for column in entry["crc"] if not column.startswith("moments:")]
        with h5py.File(path / f"old-{number}") as old:
            write_shard(path / entry["file"], [(column, old[column.replace("/", "__")][:]) for column in columns])
        (path / f"old-{number}").unlink()
        entry["crc"] = {column: entry["crc"][column] for column in columns}
        entry["size"] = (path / entry["file"]).stat().st_size
    for entry in entries[shards:] if shards is not None else ():
        (path / entry["file"]).unlink()
    (path / "buffer.h5").unlink()
    document |= {"schema": 1, "shards": entries[:shards], "complete": shards is None}
    del document["sha256"]
    document["sha256"] = json_sha256(document)
    (path / "manifest.json").write_text(json.dumps(document) + "\n")


def process(*arguments: str | Path) -> subprocess.Popen[str]:
    """Start this script in another process, which ends when its standard input does."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, __file__, *map(str, arguments)]
    return subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def _main(what: str, folder: Path, rank: int = 0, size: int = 1) -> None:
    try:
        with BufferWriter(folder, make_spec(), rank=rank, size=size) as writer:
            if what == "write":
                fill(writer, writer.pending())
                return
            if what == "fork" and not os.fork():
                sys.stdin.readline()
                os._exit(0)
            print("ready", flush=True)
            sys.stdin.readline()
    except UsaeProbeError as error:
        print(f"{type(error).__name__}: {error}", flush=True)


if __name__ == "__main__":
    _main(sys.argv[1], Path(sys.argv[2]), *map(int, sys.argv[3:]))
