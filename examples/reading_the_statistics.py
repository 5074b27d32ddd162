"""Reading the statistics: five planted cases in which a naive number is wrong, and the one beside it that says so.

    python examples/reading_the_statistics.py

Every case makes activations of two "models" out of concepts whose truth is known, trains a USAE on them and prints the
naive number beside the honest one. A minute or two on two CPU cores; no network, no data.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import torch

import usae_probe as up
from usae_probe.images import Annotation

N, WIDTHS = 5_000, {"resnet/layer": 48, "vit/layer": 64}
A, B = WIDTHS
SETTINGS = {"n_latents": 96, "k": 6, "batch_size": 256, "steps": 600}


def concepts(n: int, draw: np.random.Generator, *, of: int = 32, active: int = 3) -> np.ndarray:
    """Each image has `active` of so many concepts, with strengths between .5 and 1.5: [n, of]."""
    chosen = draw.random((n, of)).argsort(axis=1)[:, :active]
    strengths = np.zeros((n, of))
    np.put_along_axis(strengths, chosen, draw.uniform(0.5, 1.5, (n, active)), axis=1)
    return strengths


def directions(n: int, width: int, draw: np.random.Generator) -> np.ndarray:
    """Random unit vectors, one per concept: every model writes it in a direction of its own."""
    made = draw.normal(size=(n, width))
    return made / np.linalg.norm(made, axis=1, keepdims=True)


def rows(shared: np.ndarray | None, seed: int, *, own: int = 2) -> dict[str, np.ndarray]:
    """Activations of both models: shared concepts, `own` private ones per image, and a little noise."""
    draw, made = np.random.default_rng(seed), {}
    n = N if shared is None else len(shared)
    for site, width in WIDTHS.items():
        x = 0.02 * draw.normal(size=(n, width))
        if shared is not None:
            x += shared @ directions(shared.shape[1], width, draw)
        if own:
            x += concepts(n, draw, active=own) @ directions(32, width, draw)
        made[site] = x.astype(np.float32)
    return made


def trained(arrays: dict[str, np.ndarray], folder: Path, **settings: object) -> tuple[up.USAE, up.ActivationBuffer]:
    """Put rows into a buffer and train on them."""
    buffer = up.ActivationBuffer.from_arrays(arrays, out=folder, holdout=0.2)
    return up.train(buffer, **{**SETTINGS, **settings}).usae, buffer


def equal_rates(report: up.UniversalityReport) -> int:
    """Latents that firing entropy alone would call universal."""
    return sum(latent.entropy is not None and latent.entropy >= 0.9 for latent in report.latents)


def on_other_images(folder: Path) -> dict[str, float]:
    """1. Firing entropy compares rates only: it does not notice when the models fire on different images."""
    arrays = rows(concepts(N, np.random.default_rng(0)), seed=1)
    usae, buffer = trained(arrays, folder / "paired")
    mixed = {**arrays, B: arrays[B][np.random.default_rng(2).permutation(N)]}
    honest = up.evaluate(usae, buffer)
    exchanged = up.evaluate(usae, up.ActivationBuffer.from_arrays(mixed, out=folder / "mixed", holdout=0.2))
    return {
        "entropy alone, images exchanged": equal_rates(exchanged),
        "universal (rates and co-firing), images exchanged": len(exchanged.universal),
        "entropy alone, images as they are": equal_rates(honest),
        "universal, images as they are": len(honest.universal),
        "concepts that are shared": 32,
    }


def split_latents(folder: Path) -> dict[str, float]:
    """2. R² does not notice when one concept is held by two latents of one model each (both USAEs are made by hand)."""
    strengths = concepts(N, np.random.default_rng(3))
    made = {site: directions(32, width, np.random.default_rng(4)) for site, width in WIDTHS.items()}
    arrays = {site: (strengths @ written).astype(np.float32) for site, written in made.items()}
    buffer = up.ActivationBuffer.from_arrays(arrays, out=folder / "split", holdout=0.2)
    whole, halves = up.USAE(WIDTHS, 32, 3), up.USAE(WIDTHS, 64, 3)
    with torch.no_grad():
        for index, written in enumerate(made.values()):
            reads, writes = (torch.tensor(m, dtype=torch.float32) for m in (np.linalg.pinv(written).T, written))
            whole.W_enc[index].copy_(reads)
            whole.W_dec[:, whole.columns[whole.sites[index]]] = writes
            halves.W_enc[index].copy_(torch.cat([reads, reads]))
            halves.W_dec[:, halves.columns[halves.sites[index]]] = torch.cat([writes, writes])
            halves.b_enc[index][32 * index : 32 * index + 32] = -10.0  # the other half never fires for this model
    shared, split = up.evaluate(whole, buffer), up.evaluate(halves, buffer)
    return {
        "R² resnet → vit, one latent for both": shared.r2[A][B],
        "R² resnet → vit, two latents": split.r2[A][B],
        "universal, one latent for both": len(shared.universal),
        "universal, two latents": len(split.universal),
        "marked as split, one latent for both": shared.n_split,
        "marked as split, two latents": split.n_split,
    }


def one_loud_direction(folder: Path) -> dict[str, float]:
    """3. A high cross-R² can be one nuisance, brightness say: take it out, and see what is left."""
    brightness = np.abs(8 * np.random.default_rng(5).normal(size=(N, 1)))
    loud = up.evaluate(*trained(rows(brightness, seed=6, own=4), folder / "loud"))
    quiet = up.evaluate(*trained(rows(None, seed=6, own=4), folder / "quiet"))
    return {
        "R² resnet → vit": loud.r2[A][B],
        "R² resnet → vit, with brightness taken out": quiet.r2[A][B],
        "universal latents": len(loud.universal),
        "universal latents, with brightness taken out": len(quiet.universal),
        "live latents": len([1 for latent in loud.latents if latent.category not in ("dead", "rare")]),
        "concepts that are shared besides brightness": 0,
    }


def a_common_mean(folder: Path) -> dict[str, float]:
    """4. R² about one scalar mean is won by predicting every dimension's mean: nothing is shared here."""
    draw, arrays = np.random.default_rng(7), rows(None, seed=8)
    arrays = {site: x + draw.normal(size=x.shape[1]).astype(np.float32) for site, x in arrays.items()}
    usae, buffer = trained(arrays, folder / "mean")
    report = up.evaluate(usae, buffer)
    return {
        "R² about one scalar mean, resnet → vit": report.r2_global_mean[A][B],
        "R² about the mean of each dimension": report.r2[A][B],
        "universal latents": len(report.universal),
    }


def only_the_class(folder: Path) -> dict[str, float]:
    """5. Labels are shared by construction: exchange images within a label, and see whether anything is left."""
    draw = np.random.default_rng(9)
    labels = draw.integers(0, 8, N)
    usae, buffer = trained(rows(np.eye(8)[labels] * draw.uniform(0.5, 1.5, (N, 1)), seed=10), folder / "class")
    known = Annotation("class", labels.astype(np.int64), [f"class {i}" for i in range(8)])
    report = up.evaluate(usae, buffer, annotations=[known])
    any_images, same_class = report.nulls
    return {
        "universal latents": len(report.universal),
        "of those that follow a class": len([1 for latent in report.universal if latent in report.following]),
        "universal, images exchanged": float(np.mean(any_images.universal)),
        "universal, images exchanged within their class": float(np.mean(same_class.universal)),
    }


CASES = (on_other_images, split_latents, one_loud_direction, a_common_mean, only_the_class)


def main() -> None:
    """Do all cases, one after the other."""
    with tempfile.TemporaryDirectory() as folder:
        for case in CASES:
            print(f"\n{case.__doc__}")
            for what, value in case(Path(folder)).items():
                print(f"   {value:7.2f}  {what}" if isinstance(value, float) else f"   {value:7d}  {what}")


if __name__ == "__main__":
    main()
