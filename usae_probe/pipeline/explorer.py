"""The report stage: `report.html` of an evaluated run, with images of the latents worth a look.

A card is kept in `cards/` as soon as it is made: an interrupted report goes on with the next, and new pictures of a
latent make only its own card anew.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from ..buffer import ActivationBuffer
from ..config import RunConfig
from ..errors import CheckpointError, UsaeProbeError, UsaeProbeWarning
from ..files import json_sha256, read_json, sha256, write_text
from ..harvesting import demand_same_models
from ..probes import natural_activations, one_site_per_model
from ..probes.cam import CamPicture
from ..report.explorer import Explorer, card_data, image_side, overview, scan_section, write_explorer
from ..report.facts import Facts
from ..split import SPLITS
from ..usae import USAE
from .about import about_run
from .cards import CardMaker, live_targets
from .latents import known_of_latents, latent_rows
from .measuring import Attached
from .outcomes import Progress
from .shelf import pictures_of, stem
from .source import same_source
from .stages import scan_folder

PAGE = "report.html"
_WORTH = ("universal", "partial", "specific", "chance")
"""Classes whose latents get a card, in this order."""
_MOST_MEMORY = 2**30  # of natural activations at a time
_CARD_SCHEMA = 1


class ReportStage:
    """Writes the page of a run folder whose evaluation is done.

    Args:
        config: the run's config; `[report]` says how many latents have images.
        folder: the run folder.
    """

    def __init__(self, config: RunConfig, folder: Path) -> None:
        self.config, self.folder = config, folder
        self.metrics: dict[str, Any] = read_json(folder / "metrics.json")
        self.usae_hash = sha256(folder / "usae.safetensors")

    def do(
        self,
        usae: USAE,
        buffer: ActivationBuffer,
        about: Mapping[str, Any],
        record: Mapping[str, Any],
        *,
        attached: Attached,
        progress: Callable[[Progress], None],
    ) -> str:
        """Make the cards that are missing, write the page, and say how many cards it holds.

        Args:
            usae: the trained USAE.
            buffer: the activations.
            about: what was compared, as of `run_summary`.
            record: the content of `run.json`.
            attached: attaches to the run's models, to be closed with the stack.
            progress: called as it goes on.
        """
        scan = self._scan()
        columns = _columns(latent_rows(self.folder))
        pictures = pictures_of(self.folder / "cam", self.usae_hash)
        latents = worth_a_card(columns, pictures, self.config.report.cards)
        try:
            cards = self._cards(usae, buffer, latents, pictures, attached, progress)
        except UsaeProbeError as error:
            warnings.warn(f"the page has no images: {error}", UsaeProbeWarning, stacklevel=2)
            cards = []
        page = Explorer(
            title=self.folder.resolve().name,
            overview=overview(about, self.metrics),
            metrics=self.metrics,
            latents=columns,
            cards=cards,
            figures=_figures(self.folder / "figures"),
            scan=scan,
            about=list(about_run(record, about, self.metrics)),
        )
        held = write_explorer(page, self.folder / PAGE)
        left = f" of {len(cards):,}: more would not fit into a page of 30 MB" if held < len(cards) else ""
        size = (self.folder / PAGE).stat().st_size / 1e6
        return f"{PAGE}: {held:,} latents with images{left}, {size:.1f} MB"

    def _cards(
        self,
        usae: USAE,
        buffer: ActivationBuffer,
        latents: Sequence[int],
        pictures: Mapping[int, list[CamPicture]],
        attached: Attached,
        progress: Callable[[Progress], None],
    ) -> list[dict[str, Any]]:
        """Return the cards of some latents: those in `cards/` that would be the same, and the others made anew."""
        sites = one_site_per_model(usae.sites, self.config.probes.sites)
        side = image_side(len(latents) * len(sites) * 3 * self.config.cam.exemplars)
        source = same_source(self.config, buffer) if latents else None
        made_from = self._made_from(sites) | {"images": source is not None}
        shelf = _CardShelf(self.folder / "cards", self.usae_hash, made_from, side)
        known = known_of_latents(self.folder)
        keys = {
            latent: [*known[latent], *(picture.to_dict() for picture in pictures.get(latent, ()))] for latent in latents
        }
        loaded = {latent: shelf.load(latent, keys[latent]) for latent in latents}
        there = {latent: data for latent, data in loaded.items() if data is not None}
        missing = [latent for latent in latents if latent not in there]
        if missing:
            with ExitStack() as closing:
                models = attached(closing)
                demand_same_models(models, buffer)
                maker = CardMaker(live_targets(usae, models, self.config), self.config.cam, source, known)
                for batch in self._batches(missing, buffer, len(sites)):
                    natural = natural_activations(
                        usae,
                        buffer,
                        batch,
                        sites=sites,
                        per_image=self.config.cam.per_image,
                        progress=lambda done, total: progress(Progress("report", done, total, "rows")),
                    )
                    for latent in batch:
                        progress(Progress("report", len(there), len(latents), "cards"))
                        card = maker.card(latent, pictures.get(latent, []), natural)
                        there[latent] = card_data(card, natural, side)
                        shelf.save(latent, keys[latent], there[latent])
        progress(Progress("report", len(latents), len(latents), "cards"))
        shelf.tidy(latents)
        return [there[latent] for latent in latents]

    def _made_from(self, sites: Sequence[str]) -> dict[str, Any]:
        cam = self.config.cam
        return {
            "schema": _CARD_SCHEMA,
            "usae": self.usae_hash,
            "buffer": sha256(self.folder / "buffer/manifest.json"),
            "sites": list(sites),
            "settings": [cam.exemplars, cam.seed, cam.place],
        }

    def _batches(self, latents: Sequence[int], buffer: ActivationBuffer, n_sites: int) -> Iterator[Sequence[int]]:
        """Cut latents into parts whose natural activations fit into memory; each part is a pass over the rows."""
        rows = sum(buffer.n_rows(split) for split in SPLITS)
        size = max(1, _MOST_MEMORY // max(8 * rows * n_sites, 1))
        for start in range(0, len(latents), size):
            yield latents[start : start + size]

    def _scan(self) -> tuple[list[str], list[Facts], list[Path]] | None:
        """Read the scan that belongs to the run; None without one."""
        folder = scan_folder(self.config, self.folder)
        if folder is None:
            return None
        said, facts = scan_section(read_json(folder / "scan.json"))
        last = ("scan-profile", "scan-latents")  # the heat maps come first
        figures = sorted((folder / "figures").glob("scan-*.png"), key=lambda path: (path.stem in last, path.name))
        return said, facts, figures


def worth_a_card(columns: Mapping[str, Sequence[str]], pictured: Iterable[int], n: int) -> list[int]:
    """Choose up to n latents: those with pictures, then universal, partial, specific and chance ones, by energy."""
    of_class, energy = columns["category"], np.array([float(cell or 0) for cell in columns["total_energy"]])
    first = set(pictured)
    worth = [i for i, name in enumerate(of_class) if i in first or name in _WORTH]
    order = {name: place for place, name in enumerate(_WORTH)}
    worth.sort(key=lambda i: (i not in first, order.get(of_class[i], len(order)), -energy[i]))
    return worth[:n]


class _CardShelf:
    """Cards on disk, each with what it was made from; also those that the page of another number of cards shows.

    Args:
        folder: of the cards.
        usae: hash of the USAE: cards of another are of no use any more.
        made_from: what all cards are made from.
        side: of exemplars, in pixels; it goes by the number of cards, and what is half or twice as large serves too.
    """

    def __init__(self, folder: Path, usae: str, made_from: Mapping[str, Any], side: int) -> None:
        self.folder, self.usae, self.made_from, self.side = folder, usae, dict(made_from), side

    def load(self, latent: int, key: object) -> dict[str, Any] | None:
        try:
            content = read_json(self._path(latent))
            found: dict[str, Any] = content["card"]
            serves = self.side / 2 <= content["side"] <= self.side * 2
            return found if serves and content["made_from"] == self._hash(key) else None
        except (CheckpointError, KeyError, TypeError):
            return None

    def save(self, latent: int, key: object, card: Mapping[str, Any]) -> None:
        content = {"usae": self.usae, "side": self.side, "made_from": self._hash(key), "card": card}
        write_text(self._path(latent), json.dumps(content, separators=(",", ":"), allow_nan=False) + "\n")

    def tidy(self, shown: Sequence[int]) -> None:
        """Remove the cards of another USAE, and those that cannot be read; those that are shown have just been read."""
        for path in {*self.folder.glob("latent-*.json")} - {self._path(latent) for latent in shown}:
            try:
                stale = read_json(path).get("usae") != self.usae
            except CheckpointError:
                stale = True
            if stale and path.is_file():
                path.unlink()

    def _path(self, latent: int) -> Path:
        return self.folder / f"{stem(latent)}.json"

    def _hash(self, key: object) -> str:
        return json_sha256([self.made_from, key])


def _figures(folder: Path) -> list[Path]:
    """Return the figures of an evaluation, the R² matrix first."""
    first = ("r2", "controls", "tax", "entropy", "phi_energy", "similarity", "fidelity", "training")
    return [path for name in first if (path := folder / f"{name}.png").is_file()]


def _columns(rows: Sequence[Mapping[str, str]]) -> dict[str, list[str]]:
    return {name: [row[name] for row in rows] for name in rows[0]}
