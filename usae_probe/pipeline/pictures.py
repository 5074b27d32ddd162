"""The pictures of a run: CAM of chosen latents in every model, beside the images that fire them most.

Pictures are saved as each batch of them is made (`cam/pictures.json` says what is there), so that an interrupted run
goes on with the next, and asking for other latents keeps those that there are.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..buffer import ActivationBuffer
from ..config import RunConfig
from ..files import sha256, write_json
from ..harvesting import demand_same_models
from ..hooks import HookedModel
from ..images import ImageSource, Preprocessing, decode_file
from ..probes import NaturalFires, find_exemplars, one_site_per_model
from ..probes.cam import CamPicture, CamProgress, iter_pictures
from ..report.pictures import SheetCell, SheetColumn, cam_sheet, save_png
from ..sites import file_stem, model_of
from ..usae import USAE
from .latents import choose_latents, followed_labels
from .source import same_source

SCHEMA = 1
SHEET_COLUMNS = 8

Records = dict[tuple[int, str], dict[str, Any]]


class CamStage:
    """Makes the pictures of a run folder whose evaluation is done.

    Args:
        config: the run's config; `[cam]` says which latents, and how.
        folder: the run folder.
    """

    def __init__(self, config: RunConfig, folder: Path) -> None:
        self.config, self.folder = config, folder
        self.result, self._store = folder / "cam/cam.json", folder / "cam/pictures.json"

    def do(
        self,
        usae: USAE,
        buffer: ActivationBuffer,
        models: Sequence[HookedModel],
        progress: Callable[[CamProgress], None],
    ) -> None:
        """Make what is missing, then the sheets and `cam.json`.

        Raises:
            BufferMismatchError: when a model or its preprocessing is not the one that was harvested.
            NoLatentsError, UsageError: when no latent can be chosen, or a number is none of the latents.
        """
        demand_same_models(models, buffer)
        latents = choose_latents(self.config.cam.latents, self.folder)
        sites = one_site_per_model(usae.sites, self.config.probes.sites)
        natural = find_exemplars(usae, buffer, latents, sites=sites, n=self.config.cam.exemplars)
        by_site = {site: next(model for model in models if model.name == model_of(site)) for site in sites}
        self.result.unlink(missing_ok=True)  # from here on it would speak of pictures that are being replaced
        records = self._make(usae, by_site, latents, progress)
        source = same_source(self.config, buffer)
        sheets = self._sheets(latents, by_site, records, natural, source)
        pictures = [_described(records[latent, site], natural[latent][site]) for latent in latents for site in sites]
        write_json(
            self.result,
            {
                "schema": SCHEMA,
                "latents": list(latents),
                "sites": list(sites),
                "n_pictures": len(pictures),
                "n_above": sum(picture["above_held_out"] for picture in pictures),
                "sheets": sheets,
                "pictures": pictures,
            },
        )

    def _make(
        self,
        usae: USAE,
        models: Mapping[str, HookedModel],
        latents: Sequence[int],
        progress: Callable[[CamProgress], None],
    ) -> Records:
        """Make the pictures that are not there yet, site by site; return the records of all that are there."""
        how = self.config.cam
        made_from = {
            "usae": sha256(self.folder / "usae.safetensors"),
            "settings": how.model_dump(exclude={"latents", "batch_size", "exemplars"}),
            "weights": {model.name: model.weights_hash for model in models.values()},
        }
        records = self._kept(made_from)
        missing = {site: [latent for latent in latents if (latent, site) not in records] for site in models}
        batches = {site: -(-len(todo) // how.batch_size) for site, todo in missing.items()}
        total, before = sum(batches.values()) * how.steps, 0
        for site, todo in missing.items():
            if not todo:
                continue

            def follow(now: CamProgress, before: int = before) -> None:
                progress(CamProgress(now.site, before + now.done, total))

            pictures = iter_pictures(usae, [models[site]], todo, sites=[site], config=how, progress=follow)
            for made, picture in enumerate(pictures, start=1):
                records[picture.latent, site] = self._save(picture)
                if made % how.batch_size == 0 or made == len(todo):  # a batch's pictures come all at once
                    write_json(self._store, {"made_from": made_from, "pictures": list(records.values())})
            before += batches[site] * how.steps
        return records

    def _save(self, picture: CamPicture) -> dict[str, Any]:
        name = f"latent-{picture.latent:05d}__{file_stem(picture.site)}.png"
        save_png(picture.pixels, self.folder / "cam" / name)
        return {
            "latent": picture.latent,
            "site": picture.site,
            "file": f"cam/{name}",
            "z_pre": picture.z_pre,
            "z": picture.z,
            "curve": [float(f"{value:.6g}") for value in picture.curve],
        }

    def _kept(self, made_from: Mapping[str, Any]) -> Records:
        """Return the pictures of an earlier call that are still what would be made now."""
        try:
            stored = json.loads(self._store.read_text(encoding="utf-8"))
            if stored["made_from"] != made_from:
                return {}
            there = [entry for entry in stored["pictures"] if (self.folder / entry["file"]).is_file()]
            return {(entry["latent"], entry["site"]): entry for entry in there}
        except (OSError, ValueError, KeyError, TypeError):
            return {}  # none yet, or damaged: pictures can be made again

    def _sheets(
        self,
        latents: Sequence[int],
        models: Mapping[str, HookedModel],
        records: Records,
        natural: Mapping[int, Mapping[str, NaturalFires]],
        source: ImageSource | None,
    ) -> list[str]:
        """Draw sheets of up to eight latents; return their paths from the run folder."""
        titles = followed_labels(self.folder)
        columns = [
            SheetColumn(
                latent,
                titles.get(latent, ""),
                {
                    site: self._cell(records[latent, site], natural[latent][site], models[site], source)
                    for site in models
                },
            )
            for latent in latents
        ]
        for old in (self.folder / "cam").glob("sheet*.png"):
            old.unlink()
        parts = [columns[start : start + SHEET_COLUMNS] for start in range(0, len(columns), SHEET_COLUMNS)]
        names = ["cam/sheet.png"] if len(parts) == 1 else [f"cam/sheet-{i}.png" for i in range(1, len(parts) + 1)]
        for name, part in zip(names, parts, strict=True):
            cam_sheet(part, list(models), self.folder / name)
        return names

    def _cell(
        self, record: Mapping[str, Any], natural: NaturalFires, model: HookedModel, source: ImageSource | None
    ) -> SheetCell:
        shown = [] if source is None else [_seen_by(model, source.load(found.image)) for found in natural.exemplars]
        return SheetCell(
            decode_file(self.folder / record["file"], record["file"]),
            shown,
            record["curve"],
            record["z"],
            natural.held_out_maximum,
        )


def _described(record: Mapping[str, Any], natural: NaturalFires) -> dict[str, Any]:
    return {
        **record,
        "held_out_maximum": natural.held_out_maximum,
        "n_held_out": natural.n_held_out,
        "above_held_out": bool(record["z"] > natural.held_out_maximum),
        "exemplars": [found._asdict() for found in natural.exemplars],
    }


def _seen_by(model: HookedModel, picture: np.ndarray) -> np.ndarray:
    """Return a picture as the model sees it, before normalisation; as it is where the transform is not ours."""
    if not isinstance(model.preprocess, Preprocessing):
        return picture
    pixels = torch.from_numpy(picture).permute(2, 0, 1)
    seen: np.ndarray = (model.preprocess.resize_crop([pixels])[0] * 255).round().byte().permute(1, 2, 0).numpy()
    return seen
