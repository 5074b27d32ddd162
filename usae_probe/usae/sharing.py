"""Encoder and decoder of one site for other tools: a SAE folder as SAELens reads it, or one plain safetensors file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from ..errors import UsageError
from ..files import json_text, replacing, replacing_all
from ..sites import layer_of
from .model import USAE

_SAELENS_FORMAT = "6.0.0"
"""Version of SAELens whose layout of `cfg.json` this is; older layouts have no tables of their own per architecture."""


def site_weights(usae: USAE, site: str) -> dict[str, Tensor]:
    """Return one site's encoder and decoder with the normalisation folded in: they take and give the model's own units.

    With x̃ = (x − μ) / s, and the USAE's W_enc, b_enc, W_dec and b_dec of the site,

        z_pre = (x − b) W + c,   x̂ = z D + b,   b = μ + s b_dec,   W = W_encᵀ / s,   c = b_enc,   D = s W_dec.

    Codes of different sites have the same latents, so one site's encoder and another's decoder go together.

    Args:
        usae: the trained USAE.
        site: one of its sites.

    Returns:
        `W_enc` [d_in, n_latents] (W), `b_enc` [n_latents] (c), `W_dec` [n_latents, d_in] (D), `b_dec` [d_in] (b), and
        `threshold` [n_latents] where a latent is active above one: batchtopk, jumprelu.

    Raises:
        SiteError: for a site that the USAE does not have.
    """
    index, columns = usae.site_index(site), usae.columns[site]
    mean, scale = usae.mean[columns].double(), usae.scale[index].double()
    weights = {
        "W_enc": usae.W_enc[index].double().T / scale,
        "b_enc": usae.b_enc[index],
        "W_dec": usae.W_dec[:, columns].double() * scale,
        "b_dec": mean + scale * usae.b_dec[columns].double(),
    }
    threshold = usae.sparsity.thresholds(index)
    if threshold is not None and bool((threshold > 0).any()):
        weights["threshold"] = threshold
    return {name: weight.detach().float().cpu().contiguous().clone() for name, weight in weights.items()}


def architecture(usae: USAE, site: str) -> str:
    """Return what SAELens calls the way a site's latents are chosen: `topk`, `jumprelu` or `standard` (relu)."""
    threshold = usae.sparsity.thresholds(usae.site_index(site))
    if threshold is None:
        return "topk"
    return "jumprelu" if bool((threshold > 0).any()) else "standard"


def export_sae(
    usae: USAE,
    site: str,
    to: str | Path,
    *,
    format: str = "saelens",
    about: Mapping[str, Any] | None = None,
    force: bool = False,
) -> list[Path]:
    """Write one site's encoder and decoder, as `site_weights` returns them.

    `saelens`: a folder with `cfg.json` and `sae_weights.safetensors`, which SAELens (6 or newer) loads by
    `SAE.load_from_disk(folder)`. `safetensors`: one file of these tensors, with the settings as text in its header.

    Args:
        usae: the trained USAE.
        site: one of its sites.
        to: the folder, or the file.
        format: `saelens` or `safetensors`.
        about: more to say in the settings: what was trained on, say.
        force: replace files that exist.

    Returns:
        The files written.

    Raises:
        SiteError: for a site that the USAE does not have.
        UsageError: when a file is there already, or for an unknown format.

    Example:
        >>> import tempfile
        >>> usae = USAE({"vit/blocks.11": 8, "resnet/layer4": 6}, n_latents=16, k=2)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     [path.name for path in export_sae(usae, "vit/blocks.11", folder)]
        ['sae_weights.safetensors', 'cfg.json']
    """
    if format not in ("saelens", "safetensors"):
        raise UsageError(f"unknown format '{format}'", hint="saelens or safetensors")
    to, weights, settings = Path(to), site_weights(usae, site), _settings(usae, site, about or {})
    files = [to / "sae_weights.safetensors", to / "cfg.json"] if format == "saelens" else [to]
    for path in files:
        if path.exists() and not force:
            raise UsageError(f"'{path}' is there already", hint="give another place, or force = True (--force)")
    if format == "safetensors":
        header = {key: value if isinstance(value, str) else json.dumps(value) for key, value in settings.items()}
        with replacing(to) as stored:
            save_file(weights, stored, metadata=header)
        return files
    metadata = {key: value for key, value in settings.items() if key not in ("d_in", "d_sae", "k", "architecture")}
    config: dict[str, Any] = {"architecture": settings["architecture"], "d_in": settings["d_in"]}
    config |= {"d_sae": settings["d_sae"], "dtype": "float32", "device": "cpu", "apply_b_dec_to_input": True}
    config |= {"normalize_activations": "none", "reshape_activations": "none"}
    if config["architecture"] == "topk":
        config |= {"k": settings["k"], "rescale_acts_by_decoder_norm": False}
    document = config | {"metadata": {"sae_lens_version": _SAELENS_FORMAT, **metadata}}
    with replacing_all(*files) as (stored, described):
        save_file(weights, stored)
        described.write_text(json_text(document), encoding="utf-8")
    return files


def _settings(usae: USAE, site: str, about: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "architecture": architecture(usae, site),
        "d_in": usae.d_in[site],
        "d_sae": usae.n_latents,
        "k": usae.k,
        "hook_name": layer_of(site) or site,
        "site": site,
        "shared_with": [other for other in usae.sites if other != site],
        "sparsity": usae.sparsity.name,
        "made_by": "usae-probe",
        **about,
    }
