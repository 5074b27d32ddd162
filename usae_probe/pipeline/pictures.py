"""The pictures of a run: CAM of chosen latents, beside the images that fire them most, as sheets and cards.

Pictures are saved as each batch of them is made, so that an interrupted run goes on with the next, and asking for other
latents or modes keeps those that there are.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..buffer import ActivationBuffer
from ..config import RunConfig
from ..files import sha256, write_json
from ..harvesting import demand_same_models
from ..hooks import HookedModel
from ..probes import NaturalActivations
from ..probes.cam import (
    JUDGEMENTS,
    CamPicture,
    CamProgress,
    StepCount,
    Studio,
    Verdict,
    latent_batches,
    transfers,
)
from ..report.card import Card, latent_card
from ..report.sheet import cam_sheet
from ..usae import USAE
from .cards import CardMaker, live_targets, sheet_column
from .latents import choose_latents, known_of_latents
from .shelf import SCHEMA, Shelf
from .source import same_source

SHEET_COLUMNS = 8
_WITHOUT_EFFECT = {"latents", "modes", "max_batch", "exemplars"}
"""Keys of `[cam]` that change no picture, or say which there are."""


class CamStage:
    """Makes the pictures of a run folder whose evaluation is done.

    Args:
        config: the run's config; `[cam]` says which latents, and how.
        folder: the run folder.
    """

    def __init__(self, config: RunConfig, folder: Path) -> None:
        self.config, self.folder = config, folder
        self.result = folder / "cam/cam.json"

    def do(
        self,
        usae: USAE,
        buffer: ActivationBuffer,
        models: Sequence[HookedModel],
        progress: Callable[[CamProgress], None],
    ) -> None:
        """Make what is missing, then cards, sheets and `cam.json`.

        Raises:
            BufferMismatchError: when a model or its preprocessing is not the one that was harvested.
            NoLatentsError, UsageError: when no latent can be chosen, one is dead, or a number is none of the latents.
        """
        demand_same_models(models, buffer)
        latents = choose_latents(self.config.cam.latents, self.folder)
        source = same_source(self.config, buffer)
        targets = live_targets(usae, models, self.config)
        studio = Studio(targets, self.config.cam, source)
        shelf = Shelf(self.folder / "cam", self._made_from([target.model for target in targets]))
        kept = {latent: shelf.load(latent) for latent in latents}
        steps = StepCount(progress, self._missing_steps(studio, kept))
        known = known_of_latents(self.folder)
        if suspects := [latent for latent in latents if known[latent].category == "dead"]:
            studio.natural(suspects, buffer)  # dead on held-out images: on all others, too?
        maker = CardMaker(studio.targets, studio.config, source, known)
        self.result.unlink(missing_ok=True)  # from here on it would speak of pictures that are being replaced
        cards: list[Card] = []
        for batch in latent_batches(latents, self.config.cam):
            natural = studio.natural(batch, buffer)
            self._make(studio, shelf, kept, batch, natural, steps)
            for latent in batch:
                card = maker.card(latent, kept[latent], natural, studio.keys)
                latent_card(card, shelf.card(latent))
                shelf.describe(latent, kept[latent], card.to_dict())
                cards.append(card)
        sheets = self._sheets(maker, cards)
        write_json(self.result, self._result(studio, shelf, cards, sheets))

    def _sheets(self, maker: CardMaker, cards: Sequence[Card]) -> list[str]:
        """Draw sheets of up to eight latents; return their paths from the run folder."""
        columns = [sheet_column(card) for card in cards]
        rows = [row for row in (*maker.sites, "joint") if any(row in column.cells for column in columns)]
        parts = [columns[start : start + SHEET_COLUMNS] for start in range(0, len(columns), SHEET_COLUMNS)]
        names = ["cam/sheet.png"] if len(parts) == 1 else [f"cam/sheet-{i}.png" for i in range(1, len(parts) + 1)]
        for old in (self.folder / "cam").glob("sheet*.png"):
            old.unlink()
        for name, part in zip(names, parts, strict=True):
            cam_sheet(part, rows, self.folder / name)
        return names

    def _made_from(self, models: Sequence[HookedModel]) -> dict[str, Any]:
        return {
            "usae": sha256(self.folder / "usae.safetensors"),
            # Those that are not the default: a key that a later version brings then leaves the pictures there are.
            "settings": self.config.cam.model_dump(exclude=_WITHOUT_EFFECT, exclude_defaults=True),
            "sites": list(self.config.probes.sites or []),
            "weights": {model.name: model.weights_hash for model in models},
        }

    def _missing_steps(self, studio: Studio, kept: Mapping[int, Sequence[CamPicture]]) -> int:
        batches = 0
        for batch in latent_batches(list(kept), self.config.cam):
            there = {latent: {picture.key for picture in kept[latent]} for latent in batch}
            batches += sum(any(key not in there[latent] for latent in batch) for key in studio.keys)
        return batches * self.config.cam.steps

    def _make(
        self,
        studio: Studio,
        shelf: Shelf,
        kept: dict[int, list[CamPicture]],
        batch: Sequence[int],
        natural: NaturalActivations,
        steps: StepCount,
    ) -> None:
        """Make the pictures of a batch of latents that are not there yet, and save them mode by mode, site by site."""
        for key in studio.keys:
            missing = [latent for latent in batch if key not in {picture.key for picture in kept[latent]}]
            if not missing:
                continue
            made = list(studio.make(key, missing, natural, steps))
            for latent in missing:
                kept[latent] += [picture for picture in made if picture.latent == latent]
                shelf.save(latent, kept[latent])

    def _result(self, studio: Studio, shelf: Shelf, cards: Sequence[Card], sheets: Sequence[str]) -> dict[str, Any]:
        shown = [picture for card in cards for picture in card.pictures]
        records = [shelf.record(card.latent, card.pictures, card.to_dict()) for card in cards]
        return {
            "schema": SCHEMA,
            "latents": [card.latent for card in cards],
            "sites": [target.name for target in studio.targets],
            "modes": list(studio.config.modes),
            "n_natural": cards[0].n_natural,
            "unit": cards[0].unit,
            **counted(shown, [card.verdict for card in cards]),
            "sheets": list(sheets),
            "cards": [
                {key: value for key, value in record.items() if key not in ("schema", "made_from")}
                for record in records
            ],
        }


def counted(shown: Sequence[CamPicture], verdicts: Sequence[Verdict | None]) -> dict[str, Any]:
    """Count, of the best restart of every mode and site, the pictures, the findings among them, and the verdicts.

    A finding is a picture that did not fail; it transfers when every model it was not climbed in agrees.
    """
    modes: dict[str, dict[str, int]] = {}
    for picture in shown:
        counts = modes.setdefault(picture.mode, {"pictures": 0, "findings": 0, "transferring": 0})
        counts["pictures"] += 1
        counts["findings"] += picture.failed is False
        counts["transferring"] += picture.failed is False and transfers(picture)
    found = Counter(verdict.judgement for verdict in verdicts if verdict)
    return {"modes_counted": modes, "verdicts": {judgement: found[judgement] for judgement in JUDGEMENTS if found}}
