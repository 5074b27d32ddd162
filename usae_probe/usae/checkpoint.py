"""USAE checkpoints: safetensors, with the site order and all settings in the JSON beside; nothing is unpickled.

Tensors are `W_enc.0`, `b_enc.0`, `W_dec.0`, `b_dec.0`, `mean.0`, `scale.0`, `W_enc.1`, … in the order of `sites`, and
`sparsity.theta` and the like where the sparsity has learnt something.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors.torch import load_file, save_file

from ..errors import CheckpointError, ConfigError
from ..files import json_text, replacing_all, sha256
from .model import USAE

SCHEMA = 1
T = TypeVar("T", bound=USAE)


def save_usae(usae: USAE, path: Path) -> None:
    """Write `path` and `path` with the ending .json; the JSON holds the other's hash.

    Both are written whole under temporary names before either is renamed: a failure on the way keeps both old files.

    Raises:
        CheckpointError: when `path` itself ends in .json.
    """
    beside = path.with_suffix(".json")
    if beside == path:
        raise CheckpointError(
            f"'{path}' is the name of the JSON beside a checkpoint", hint="give a name that ends in .safetensors"
        )
    tensors: dict[str, torch.Tensor] = {}
    for index, site in enumerate(usae.sites):
        columns = usae.columns[site]
        parts = {"W_enc": usae.W_enc[index], "b_enc": usae.b_enc[index], "W_dec": usae.W_dec[:, columns]}
        parts |= {"b_dec": usae.b_dec[columns], "mean": usae.mean[columns], "scale": usae.scale[index : index + 1]}
        tensors |= {f"{key}.{index}": value.detach().cpu().contiguous().clone() for key, value in parts.items()}
    learnt = usae.sparsity.state_dict()
    tensors |= {f"sparsity.{name}": value.cpu().contiguous().clone() for name, value in learnt.items()}
    with replacing_all(path, beside) as (weights, about):
        save_file(tensors, weights)
        content: dict[str, Any] = {
            "schema": SCHEMA,
            "sites": list(usae.sites),
            "d_in": usae.d_in,
            "n_latents": usae.n_latents,
            "k": usae.k,
            "sparsity": usae.sparsity.name,
            "sha256": sha256(weights),
        }
        content |= {"sparsity_settings": usae.sparsity.settings} if usae.sparsity.settings else {}
        content |= {"matryoshka": list(usae.matryoshka)} if usae.matryoshka else {}
        content |= {"grid": list(usae.grid)} if usae.grid else {}
        about.write_text(json_text(content), encoding="utf-8")


def load_usae(cls: type[T], path: Path, **overrides: Any) -> T:
    """Read a checkpoint that `save_usae` wrote.

    Raises:
        CheckpointError: when a file is missing, damaged, of another schema, or tensors have unexpected shapes.
    """
    about = _read_about(path)
    try:
        tensors = load_file(path)
    except Exception as error:
        raise CheckpointError(f"USAE checkpoint '{path}' cannot be read: {error}", hint="train again") from error
    if sha256(path) != about["sha256"]:
        raise CheckpointError(
            f"'{path}' is not the file that '{path.with_suffix('.json').name}' describes (SHA-256 differs)",
            hint="copy both files together, or train again",
        )
    usae = _untrained(cls, about, path, overrides)
    with torch.no_grad():
        for name, value in usae.sparsity.state_dict().items():
            _fill(value, tensors, f"sparsity.{name}", path)
        for index, site in enumerate(usae.sites):
            columns = usae.columns[site]
            _fill(usae.W_enc[index], tensors, f"W_enc.{index}", path)
            _fill(usae.b_enc[index], tensors, f"b_enc.{index}", path)
            _fill(usae.W_dec[:, columns], tensors, f"W_dec.{index}", path)
            _fill(usae.b_dec[columns], tensors, f"b_dec.{index}", path)
            _fill(usae.mean[columns], tensors, f"mean.{index}", path)
            _fill(usae.scale[index : index + 1], tensors, f"scale.{index}", path)
    return usae


def _untrained(cls: type[T], about: dict[str, Any], path: Path, overrides: dict[str, Any]) -> T:
    d_in = {site: about["d_in"][site] for site in about["sites"]}  # `sites` has the order, whoever rewrote the JSON
    grid = about.get("grid")
    made: dict[str, Any] = {
        "grid": (grid[0], grid[1]) if grid else None,
        "sparsity": about.get("sparsity", "topk"),
        "sparsity_settings": about.get("sparsity_settings"),
        "matryoshka": about.get("matryoshka", ()),
    }
    try:
        return cls(d_in, about["n_latents"], about["k"], **(made | overrides))
    except ConfigError as error:
        raise CheckpointError(f"'{path.with_suffix('.json')}' describes no USAE: {error}", hint=error.hint) from error


def _read_about(path: Path) -> dict[str, Any]:
    beside = path.with_suffix(".json")
    for file in (path, beside):
        if not file.is_file():
            raise CheckpointError(f"no USAE checkpoint: '{file}' does not exist", hint="train first")
    try:
        about = json.loads(beside.read_text(encoding="utf-8"))
        schema = about["schema"]
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"'{beside}' does not describe a USAE checkpoint: {error}") from error
    if schema != SCHEMA:
        raise CheckpointError(f"'{beside}' has schema {schema}, this version reads {SCHEMA}", hint="update usae-probe")
    missing = [key for key in ("sites", "d_in", "n_latents", "k", "sha256") if key not in about]
    if missing:
        raise CheckpointError(f"'{beside}' lacks {', '.join(missing)}", hint="copy both files again, or train again")
    if sorted(about["sites"]) != sorted(about["d_in"]):
        raise CheckpointError(f"'{beside}': sites {about['sites']} are not those of d_in, {list(about['d_in'])}")
    return dict(about)


def _fill(target: torch.Tensor, tensors: dict[str, torch.Tensor], key: str, path: Path) -> None:
    given = tensors.get(key)
    if given is None or given.shape != target.shape:
        found = "missing" if given is None else f"{list(given.shape)} on disk"
        raise CheckpointError(
            f"tensor '{key}' of '{path}' is {found}, expected {list(target.shape)} by the JSON beside it"
        )
    target.copy_(given)
