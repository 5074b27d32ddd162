"""Pictures of a run on disk: of each latent an .npz with the pixels and a JSON with all that is known of them."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np

from ..files import replacing, write_json
from ..probes.cam import CamPicture, PictureKey
from ..sites import file_stem

SCHEMA = 1


class Shelf:
    """The pictures in a folder that are still what would be made now.

    Args:
        folder: `cam/` of a run folder.
        made_from: what pictures depend on; those made from something else are not there.
    """

    def __init__(self, folder: Path, made_from: Mapping[str, Any]) -> None:
        self.folder, self.made_from = folder, dict(made_from)

    def load(self, latent: int) -> list[CamPicture]:
        """Return the pictures of a latent that there are; what is damaged can be made again."""
        return _load(self.json(latent), lambda made_from: bool(made_from == self.made_from))

    def save(self, latent: int, pictures: Sequence[CamPicture]) -> None:
        """Replace all pictures of a latent: pixels first, so that the JSON never speaks of what is not there."""
        arrays: dict[str, list[np.ndarray]] = {}
        for picture in pictures:
            arrays.setdefault(array_name(picture.key), []).append(picture.pixels)
        with replacing(self.npz(latent)) as temporary, temporary.open("wb") as file:
            named: dict[str, Any] = {name: np.stack(parts) for name, parts in arrays.items()}
            np.savez_compressed(file, **named)
        self.describe(latent, pictures)

    def describe(self, latent: int, pictures: Sequence[CamPicture], card: Mapping[str, Any] | None = None) -> None:
        """Replace the JSON of a latent whose pixels are there; `card` is what else is known, in the end."""
        write_json(self.json(latent), self.record(latent, pictures, card))

    def record(
        self, latent: int, pictures: Sequence[CamPicture], card: Mapping[str, Any] | None = None
    ) -> dict[str, Any]:
        """Return what the JSON of a latent says."""
        entries = [{"array": array_name(picture.key), **picture.to_dict()} for picture in pictures]
        return {"schema": SCHEMA, "latent": latent, "made_from": self.made_from, **(card or {}), "pictures": entries}

    def npz(self, latent: int) -> Path:
        """Where a latent's pixels are: an array [restarts, h, w, 3] per mode and site."""
        return self.folder / f"{stem(latent)}.npz"

    def json(self, latent: int) -> Path:
        """Where all that is known of a latent's pictures is."""
        return self.folder / f"{stem(latent)}.json"

    def card(self, latent: int) -> Path:
        """Where a latent's card is."""
        return self.folder / f"{stem(latent)}.png"


def pictures_of(folder: Path, usae: str) -> dict[int, list[CamPicture]]:
    """Return all pictures in a folder that were made with a USAE, by latent: whatever the settings.

    Args:
        folder: `cam/` of a run folder; it need not be there.
        usae: hash of the USAE.
    """
    found = {}
    for path in sorted(folder.glob("latent-*.json")):
        pictures = _load(path, lambda made_from: bool(made_from["usae"] == usae))
        if pictures:
            found[pictures[0].latent] = pictures
    return found


def _load(path: Path, wanted: Callable[[Mapping[str, Any]], bool]) -> list[CamPicture]:
    """Read the pictures of a latent from its JSON and the .npz beside it; none where they are damaged or not wanted."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        if record["schema"] != SCHEMA or not wanted(record["made_from"]):
            return []
        # Given the path, numpy would leave a damaged archive open.
        with path.with_suffix(".npz").open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            pixels = {name: arrays[name] for name in arrays.files}
        return [CamPicture.from_dict(entry, pixels[entry["array"]][entry["restart"]]) for entry in record["pictures"]]
    except (OSError, ValueError, KeyError, TypeError, IndexError, EOFError, BadZipFile):
        return []


def stem(latent: int) -> str:
    """Return how the names of a latent's files begin."""
    return f"latent-{latent:05d}"


def array_name(key: PictureKey) -> str:
    """Return the name of an array of pictures: `independent__vit__blocks.8@mean`."""
    return f"{key.mode}__{file_stem(key.site)}" if key.site else key.mode
