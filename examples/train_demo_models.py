"""Train the two networks that the package ships for its demo, and write their weights.

    python examples/train_demo_models.py                 # both, about two hours; --only vit: one of them
    python examples/train_demo_models.py --clean-only --out OTHER
    python examples/train_demo_models.py --plain OTHER   # the second stage alone

A ResNet and a ViT (timm architectures, as `usae_probe/demo/demo.toml` names them) learn to tell all five factors of
drawn pictures at once: the outputs of one linear layer are cut into a head per factor, and their cross-entropies are
added. Pictures of seed 1 are for training, of seed 2 for the accuracy printed here; the demo draws its own (seed 0).
Weights are rounded to float16 before that accuracy is measured, and kept so.

A second stage hardens the networks against small changes of a picture (adversarial training, Madry et al. 2018): what
drives a network that only saw clean pictures is invisible to any other network, and to us; what drives a robust one is
not (Engstrom et al. 2019), so that pictures made by gradient ascent mean something.

One thread and one seed: the same script on the same kind of machine writes the same bytes.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
import timm
import torch
import torch.nn.functional as F
import typer
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import usae_probe.demo
from usae_probe.config import ModelConfig
from usae_probe.demo import FACTOR_NAMES, SIZE, Drawings, demo_config, draw_images
from usae_probe.files import replacing, sha256, write_json
from usae_probe.images import Preprocessing

TRAIN_SEED, HELD_OUT_SEED = 1, 2
HEADS = {name: len(values) for name, values in FACTOR_NAMES.items()}


class Recipe(NamedTuple):
    """What differs between the networks."""

    lr: float
    batch_size: int
    steps: int
    radius: float = 0.0
    """Largest L2 norm of what is added to a picture in [0, 1]; 1.0 is .009 per value in the mean."""
    clean: float = 0.0
    """Share of every batch that nothing is added to."""


RECIPES = {
    "resnet": Recipe(lr=2e-3, batch_size=128, steps=600),
    "vit": Recipe(lr=7e-4, batch_size=32, steps=9000),
}
HARDENING = {
    "resnet": Recipe(lr=1e-3, batch_size=64, steps=1200, radius=3.0, clean=0.5),
    "vit": Recipe(lr=4e-4, batch_size=32, steps=3000, radius=1.0, clean=0.5),
}
ATTACK_STEPS = 2


def build(entry: ModelConfig, seed: int) -> nn.Module:
    """Make a network of the demo's config, untrained."""
    torch.manual_seed(seed)
    model: nn.Module = timm.create_model(entry.name, pretrained=False, **entry.options)
    return model


def preprocessing(model: Any) -> Preprocessing:
    """What the demo does to its pictures before this network sees them."""
    known = model.pretrained_cfg
    return Preprocessing(image_size=(SIZE, SIZE), mean=tuple(known["mean"]), std=tuple(known["std"]))


def pictures(drawings: Drawings, chosen: np.ndarray) -> Tensor:
    """The chosen pictures as uint8 [b, 3, h, w]."""
    return torch.from_numpy(drawings.images[chosen]).permute(0, 3, 1, 2)


def logits_by_factor(model: nn.Module, inputs: Tensor) -> dict[str, Tensor]:
    """Cut the network's outputs into one head per factor."""
    return dict(zip(HEADS, model(inputs).split(list(HEADS.values()), dim=1), strict=True))


def batches(n: int, batch_size: int, steps: int, seed: int) -> Iterator[np.ndarray]:
    """Numbers of pictures for every step: each picture once before any comes again."""
    rng = np.random.default_rng(seed)
    order = np.empty(0, dtype=np.int64)
    for _ in range(steps):
        if len(order) < batch_size:
            order = rng.permutation(n)
        chosen, order = order[:batch_size], order[batch_size:]
        yield chosen


def train(model: nn.Module, drawings: Drawings, recipe: Recipe, *, seed: int) -> Iterator[float]:
    """Train in place; yield the loss of every step.

    With a `radius`, to which it grows over the first third of the steps, on pictures that are changed for the worst.
    """
    lr, batch_size, steps, radius, clean = recipe
    prepare = preprocessing(model)
    targets = {name: torch.from_numpy(values) for name, values in drawings.factors.items()}
    optimiser = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.05)
    warm_up = 20 if radius else max(1, steps // 20)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimiser, lambda t: min((t + 1) / warm_up, 0.5 * (1 + math.cos(math.pi * t / steps)))
    )
    generator = torch.Generator().manual_seed(seed)
    model.train()
    for step, chosen in enumerate(batches(len(drawings.images), batch_size, steps, seed), start=1):

        def loss_of(shown: Tensor, chosen: np.ndarray = chosen) -> Tensor:
            heads = logits_by_factor(model, prepare(shown))
            return torch.stack([F.cross_entropy(heads[name], targets[name][chosen]) for name in HEADS]).sum()

        shown = pictures(drawings, chosen)
        if radius:
            model.eval()
            kept = round(clean * len(chosen))
            loss_of_rest, reach = partial(loss_of, chosen=chosen[kept:]), radius * min(1.0, 3 * step / steps)
            shown = shown.float() / 255
            shown[kept:] = changed_for_the_worst(shown[kept:], loss_of_rest, reach, generator)
            model.train()
        loss = loss_of(shown)
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        schedule.step()
        yield loss.item()


def changed_for_the_worst(
    clean: Tensor, loss_of: Callable[[Tensor], Tensor], radius: float, generator: torch.Generator
) -> Tensor:
    """Change pictures in [0, 1] by what `worst_change` finds; they stay pictures."""
    change = worst_change(clean, lambda shown: loss_of(shown.clamp(0, 1)), radius, generator)
    return (clean + change).clamp(0, 1)


def worst_change(
    clean: Tensor, loss_of: Callable[[Tensor], Tensor], radius: float, generator: torch.Generator
) -> Tensor:
    """Climb the loss of pictures from a random change inside a ball: projected gradient steps in the L2 norm."""

    def unit(x: Tensor) -> Tensor:
        return x / x.flatten(1).norm(dim=1).clamp_min(1e-12).view(-1, 1, 1, 1)

    change = unit(torch.randn(clean.shape, generator=generator)) * radius / 2
    for _ in range(ATTACK_STEPS):
        change.requires_grad_()
        (gradient,) = torch.autograd.grad(loss_of(clean + change), change)
        change = change.detach() + 0.75 * radius * unit(gradient)
        norm = change.flatten(1).norm(dim=1).clamp_min(1e-12)
        change = change * (radius / norm).clamp(max=1).view(-1, 1, 1, 1)
    return change


@torch.no_grad()
def accuracy(model: nn.Module, drawings: Drawings) -> dict[str, float]:
    """Share of pictures whose factor is told right, per factor."""
    prepare = preprocessing(model)
    model.eval()
    right = dict.fromkeys(HEADS, 0)
    for chosen in np.array_split(np.arange(len(drawings.images)), max(1, len(drawings.images) // 200)):
        for name, logits in logits_by_factor(model, prepare(pictures(drawings, chosen))).items():
            right[name] += int((logits.argmax(1).numpy() == drawings.factors[name][chosen]).sum())
    return {name: count / len(drawings.images) for name, count in right.items()}


def round_weights(model: nn.Module) -> dict[str, Tensor]:
    """Round all floating weights to float16, in the network too; return them as they are stored."""
    stored = {k: v.half() if v.is_floating_point() else v for k, v in model.state_dict().items()}
    load(model, stored)
    return stored


def load(model: nn.Module, stored: dict[str, Tensor]) -> None:
    """Give a network weights as they are stored."""
    model.load_state_dict({k: v.float() if v.is_floating_point() else v for k, v in stored.items()})


def write(out: Path, name: str, stored: dict[str, Tensor], facts: dict[str, Any]) -> None:
    """Write NAME.safetensors and its entry in networks.json."""
    path = out / f"{name}.safetensors"
    with replacing(path) as temporary:
        save_file({key: value.contiguous() for key, value in stored.items()}, temporary)
    record = out / "networks.json"
    known = json.loads(record.read_text(encoding="utf-8")) if record.exists() else {}
    known[name] = {"sha256": sha256(path), **facts}
    write_json(record, dict(sorted(known.items())))


def follow(console: Console, what: str, steps: int, losses: Iterator[float]) -> None:
    """Go through a training, and say from time to time how far it is."""
    for step, loss in enumerate(losses, start=1):
        if step % 100 == 0 or step == steps:
            console.print(f"{what}: step {step:,} of {steps:,}, loss {loss:.3f}")


def main(
    only: Annotated[str | None, typer.Option(help="One network's name in demo.toml; default: all.")] = None,
    out: Annotated[Path, typer.Option(help="Folder of the weights.")] = Path(usae_probe.demo.__file__).parent,
    hardened: Annotated[bool, typer.Option("--hardened/--clean-only", help="Whether to add the second stage.")] = True,
    plain: Annotated[Path | None, typer.Option(help="Folder with the first stage's weights; default: train.")] = None,
    steps: Annotated[int | None, typer.Option(help="Default: as many as the shipped weights took.")] = None,
    n_train: int = 40_000,
    n_held_out: int = 2000,
    seed: int = 0,
) -> None:
    """Train, print the held-out accuracy per factor, write the weights."""
    torch.set_num_threads(1)
    console = Console(highlight=False)
    models = {name: entry for name, entry in demo_config(Path()).models.items() if only in (None, name)}
    if not models:
        raise typer.BadParameter(f"--only {only}: the demo has {', '.join(demo_config(Path()).models)}")
    out.mkdir(parents=True, exist_ok=True)
    console.print(f"drawing {n_train:,} pictures …")
    drawings = draw_images(n_train, size=SIZE, seed=TRAIN_SEED)
    held_out = draw_images(n_held_out, size=SIZE, seed=HELD_OUT_SEED)
    table = Table("network", "parameters", *HEADS, title=f"Accuracy on {n_held_out:,} held-out pictures")
    for name, entry in models.items():
        model = build(entry, seed)
        recipe, hardening = (
            recipes[name] if steps is None else recipes[name]._replace(steps=steps) for recipes in (RECIPES, HARDENING)
        )
        if plain is None:
            follow(console, f"{name}, plain", recipe.steps, train(model, drawings, recipe, seed=seed))
            round_weights(model)
        else:
            load(model, load_file(plain / f"{name}.safetensors"))
        if hardened:
            follow(console, f"{name}, hardened", hardening.steps, train(model, drawings, hardening, seed=seed))
        stored = round_weights(model)
        found = accuracy(model, held_out)
        parameters = sum(p.numel() for p in model.parameters())
        first = {"lr": recipe.lr, "batch_size": recipe.batch_size, "steps": recipe.steps}
        facts = {"architecture": entry.name, "parameters": parameters, **first}
        if hardened:
            facts |= {"hardening": {**hardening._asdict(), "attack_steps": ATTACK_STEPS}}
        facts |= {"n_train": n_train, "n_held_out": n_held_out, "seed": seed, "held_out_accuracy": found}
        write(out, name, stored, facts)
        table.add_row(name, f"{parameters:,}", *(f"{share:.1%}" for share in found.values()))
    console.print(table)


if __name__ == "__main__":
    typer.run(main)
