"""The Universal Sparse Autoencoder: one encoder and one decoder per site, one shared sparse code."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ..errors import SiteError, UsageError, nearest
from ..notebook import html_facts, html_table
from ..shapes import Decoder, RowMatrix
from .bottleneck import check_shape
from .kernels import Codes, Kernel, PreActivations, SiteEncoder, Support, choose_kernel, to_dense
from .kernels.base import Entries
from .kernels.workspace import Workspace
from .sparsity import make_sparsity


class Coded(NamedTuple):
    """A code as training works with it.

    Attributes:
        values: z at the support, with its graph.
        support: which latents are active in which row.
        penalty: what the sparsity adds to the loss for this code; 0 outside training.
    """

    values: Entries
    support: Support
    penalty: Float[Tensor, ""]


class USAE(nn.Module):
    """A Universal Sparse Autoencoder (arXiv 2502.03714), by default with TopK codes (arXiv 2406.04093).

    For site i with rows x, mean μ_i and scale s_i of the training rows, x̃ = (x − μ_i) / s_i and

        z_pre = (x̃ − b_dec,i) W_enc,iᵀ + b_enc,i
        z     = sparsity(z_pre); topk: relu(z_pre) on its k largest entries, 0 elsewhere
        x̂_j   = μ_j + s_j (z W_dec,j + b_dec,j)        for every site j.

    For every latent the concatenated decoder row over all M sites has norm √M. One site makes an ordinary
    (independent) sparse autoencoder. It is made in evaluation mode; `train()` is for the steps of training.

    Args:
        d_in: {site: dimensions}, in the order of the sites.
        n_latents: latents of the shared code.
        k: active latents per row; well under the smallest d_in, or there is no bottleneck (warns).
        normalisation: {site: (mean [d_in], scale)} of the training rows; default 0 and 1.
        kernel: `auto`, `reference`, `csr` or `triton`.
        precision: `fp32`, or `bf16` for the factors of the encoder product (sparse kernels only).
        seed: seed of the tied initialisation.
        grid: (rows, columns) of the places that rows of `@patch` sites stand for, after resampling.
        sparsity: how z_pre becomes z: `topk`, `batchtopk`, `jumprelu`, `l1`, `soft-topk` or `global-topk`.
        sparsity_settings: values of the `[train]` keys that the sparsity uses; default: the config's defaults.
        matryoshka: sizes of nested dictionaries, the last n_latents: training has the first 256, 512, … latents
            reconstruct by themselves too (arXiv 2503.17547), and `truncated` takes one of them.

    Raises:
        ConfigError: when k > n_latents, there is no site, or the sparsity cannot be had like this.

    Example:
        >>> usae = USAE({"a/x": 8, "b/y": 6}, n_latents=16, k=2)
        >>> codes = usae.encode(torch.randn(4, 8), "a/x")
        >>> codes.values.shape, usae.decode(codes, "b/y").shape
        (torch.Size([4, 2]), torch.Size([4, 6]))
    """

    mean: Tensor
    scale: Tensor

    def __init__(
        self,
        d_in: Mapping[str, int],
        n_latents: int,
        k: int,
        *,
        normalisation: Mapping[str, tuple[Tensor, float]] | None = None,
        kernel: str = "auto",
        precision: str = "fp32",
        seed: int = 0,
        grid: tuple[int, int] | None = None,
        sparsity: str = "topk",
        sparsity_settings: Mapping[str, float] | None = None,
        matryoshka: Sequence[int] = (),
    ) -> None:
        super().__init__()
        check_shape(d_in, n_latents, k, sparsity, matryoshka)
        self.grid = grid
        self.d_in = dict(d_in)
        self.sites = tuple(d_in)
        self.n_latents, self.k = n_latents, k
        self.kernel_name, self.precision = kernel, precision
        self.workspace = Workspace()
        self._kernel: tuple[tuple[object, ...], Kernel] | None = None
        self.sparsity = make_sparsity(sparsity, k, n_latents, len(d_in), sparsity_settings)
        self.matryoshka = tuple(matryoshka)
        starts = torch.tensor([0, *d_in.values()]).cumsum(0).tolist()
        self.columns = {site: slice(a, b) for site, a, b in zip(self.sites, starts, starts[1:], strict=False)}
        total, generator = starts[-1], torch.Generator().manual_seed(seed)
        rows = {
            site: nn.functional.normalize(torch.randn(n_latents, d, generator=generator)) for site, d in d_in.items()
        }
        self.W_enc = nn.ParameterList([nn.Parameter(rows[site].clone()) for site in self.sites])
        self.b_enc = nn.ParameterList([nn.Parameter(torch.zeros(n_latents)) for _ in self.sites])
        self.W_dec = nn.Parameter(torch.cat([rows[site] for site in self.sites], dim=1))
        self.b_dec = nn.Parameter(torch.zeros(total))
        self.register_buffer("mean", torch.zeros(total))
        self.register_buffer("scale", torch.ones(len(self.sites)))
        for site, (mean, scale) in (normalisation or {}).items():
            index = self.site_index(site)
            self._check_width(mean.shape, site, "a mean")
            self.mean[self.columns[site]] = mean.to(self.mean)
            self.scale[index] = scale
        self.eval()

    @property
    def kernel(self) -> Kernel:
        """The kernel in use on the present device; its `name` and `reason` say which it is and why."""
        wanted = (self.kernel_name, self.W_dec.device, self.W_dec.dtype, self.precision)
        if self._kernel is None or self._kernel[0] != wanted:
            self._kernel = (wanted, choose_kernel(*wanted))
        return self._kernel[1]

    def site_index(self, site: str) -> int:
        """Return a site's position.

        Raises:
            SiteError: naming the sites there are.
        """
        if site not in self.columns:
            raise SiteError(
                f"the USAE has no site '{site}'",
                hint=f"{nearest(site, self.sites)} sites: {', '.join(self.sites)}".strip(),
            )
        return self.sites.index(site)

    def check_latents(self, latents: Iterable[int]) -> None:
        """Check that numbers are those of latents.

        Raises:
            UsageError: for the first that is not.
        """
        for latent in latents:
            if not 0 <= latent < self.n_latents:
                raise UsageError(f"latent {latent} is out of range: the USAE has latents 0 to {self.n_latents - 1}")

    def normalise(self, x: RowMatrix, site: str) -> RowMatrix:
        """Return x̃ = (x − μ) / s.

        Raises:
            SiteError: for an unknown site, or rows of another width than the site's.
        """
        index = self.site_index(site)
        self._check_width(x.shape, site, "rows")
        return (x.to(self.mean) - self.mean[self.columns[site]]) / self.scale[index]

    def encoder(self, site: str) -> SiteEncoder:
        """Return the parameters that make z_pre of one site's rows.

        Raises:
            SiteError: for an unknown site.
        """
        index = self.site_index(site)
        return SiteEncoder(self.W_enc[index], self.b_enc[index], self.b_dec[self.columns[site]])

    def z_pre(self, x_normalised: RowMatrix, site: str) -> PreActivations:
        """Return the encoder product of normalised rows, [b, n_latents]."""
        return self.kernel.pre(x_normalised, self.encoder(site))

    def pre_activation(self, x: RowMatrix, site: str, latents: Tensor | Sequence[int]) -> Float[Tensor, "b l"]:
        """Return z_pre of a few latents, for rows in the model's own units, with its graph on any kernel.

            z_pre[:, latents] = (x̃ − b_dec) W_enc[latents]ᵀ + b_enc[latents],   x̃ = (x − μ) / s

        What activation maximisation climbs: unlike z, it has a gradient also where the latent is not selected.

        Args:
            x: [b, d_in[site]], on any device.
            site: the site the rows come from.
            latents: [l] numbers of latents.

        Returns:
            [b, l], differentiable in x.

        Raises:
            SiteError: for an unknown site, or rows of another width than the site's.
            UsageError: for a latent out of range.
        """
        index = self.site_index(site)
        chosen = torch.as_tensor(latents, dtype=torch.long)
        self.check_latents(chosen.tolist())
        chosen = chosen.to(self.W_dec.device)
        centred = self.normalise(x, site) - self.b_dec[self.columns[site]]
        z_pre: Tensor = centred @ self.W_enc[index][chosen].T + self.b_enc[index][chosen]
        return z_pre

    def code(self, x_normalised: RowMatrix, site: str, z_pre: PreActivations | None = None) -> Coded:
        """Encode normalised rows, for training and measuring: values with their graph, and their support.

        Args:
            x_normalised: [b, d_in[site]].
            site: the site the rows come from.
            z_pre: what `z_pre` gave for them, where it is needed for something else too.
        """
        index = self.site_index(site)
        if z_pre is None:
            z_pre = self.z_pre(x_normalised, site)
        support = self.sparsity.select(z_pre.detach(), index)
        at = self.kernel.at(z_pre, support, x_normalised, self.encoder(site))
        values = self.sparsity.activate(at, support, index)
        return Coded(values, support, self._penalty(at, values, support, index))

    def code_shared(self, x_normalised: Mapping[str, RowMatrix]) -> dict[str, Coded]:
        """Encode paired normalised rows of several sites with one support, chosen by Σ_i z_pre,i; see the sparsity.

        Every site has its own values there, computed anew: of encoder products, [b, n], there would be one for each.
        """
        support = self._shared_support(x_normalised)
        at = torch.stack([self.kernel.at(None, support, x, self.encoder(s)) for s, x in x_normalised.items()])
        codes = {}
        for pre, site, values in zip(at, x_normalised, self.sparsity.activate_shared(at, support), strict=True):
            codes[site] = Coded(values, support, self._penalty(pre, values, support, self.site_index(site)))
        return codes

    @torch.no_grad()
    def _shared_support(self, x_normalised: Mapping[str, RowMatrix]) -> Support:
        first, *others = x_normalised
        summed = self.z_pre(x_normalised[first], first)
        for site in others:
            summed += self.z_pre(x_normalised[site], site)
        return self.sparsity.select_shared(summed)

    def code_at(self, x_normalised: RowMatrix, site: str, z_pre: PreActivations, support: Support) -> Entries:
        """Return relu(z_pre) at a support that somebody else chose, whatever the sparsity."""
        return torch.relu(self.kernel.at(z_pre, support, x_normalised, self.encoder(site)))

    def encode(self, x: RowMatrix, site: str) -> Codes:
        """Encode rows in the model's own units.

        Args:
            x: [b, d_in[site]].
            site: the site the rows come from.

        Returns:
            values and indices, [b, k] each; where rows have different numbers of active latents, as wide as the longest
            row, and padded with values of 0.

        Raises:
            SiteError: for an unknown site, or rows of another width than the site's.
        """
        coded = self.code(self.normalise(x, site), site)
        return coded.support.codes(coded.values)

    def decode_all(self, values: Entries, support: Support) -> RowMatrix:
        """Decode one code to every site at once, normalised: [b, Σ d_in], columns in the order of the sites."""
        return self.kernel.decode(values, support, self.W_dec) + self.b_dec

    def truncated(self, n_latents: int, k: int | None = None) -> USAE:
        """Return the smaller USAE of the first `n_latents` latents: a copy of one of the nested dictionaries.

        `batchtopk` keeps its thresholds, so that its codes are those of the whole USAE without the other latents. With
        `topk` the k largest of the remaining latents are active.

        Args:
            n_latents: one of the sizes of `matryoshka`.
            k: active latents per row; default: as before, at most n_latents.

        Raises:
            ConfigError: for another size, or a k that does not fit.
        """
        from .truncation import truncated

        return truncated(self, n_latents, k)

    def decode(self, codes: Codes, site: str) -> RowMatrix:
        """Decode a code (from any site) to rows of `site`, in the model's own units.

        Raises:
            SiteError: for an unknown site.
        """
        index, columns = self.site_index(site), self.columns[site]
        support = Support.of(codes.indices, self.n_latents)
        x_hat = (
            self.kernel.decode(codes.values.reshape(-1), support, self.W_dec[:, columns].contiguous())
            + self.b_dec[columns]
        )
        return x_hat * self.scale[index] + self.mean[columns]

    def to_dense(self, codes: Codes) -> Float[Tensor, "b n"]:
        """Spread codes into a dense [b, n_latents] matrix; for looking at a few rows."""
        return to_dense(codes, self.n_latents)

    def decoder(self, site: str) -> Decoder:
        """Return W_dec of one site, [n_latents, d_in] (a view)."""
        self.site_index(site)
        return self.W_dec[:, self.columns[site]]

    def decoder_norms(self) -> Float[Tensor, "m n"]:
        """Return ‖W_dec,k‖ per site and latent."""
        return torch.stack([self.decoder(site).norm(dim=1) for site in self.sites])

    @torch.no_grad()
    def renormalise_decoder(self) -> None:
        """Scale every latent's concatenated decoder row back to norm √M."""
        norms = self.W_dec.norm(dim=1, keepdim=True).clamp_min(1e-12)
        self.W_dec.mul_(math.sqrt(len(self.sites)) / norms)

    def save(self, path: str | Path) -> None:
        """Write `path` (safetensors) and the JSON beside it; see `usae_probe.usae.checkpoint`."""
        from .checkpoint import save_usae

        save_usae(self, Path(path))

    @classmethod
    def load(cls, path: str | Path, **overrides: Any) -> USAE:
        """Read what `save` wrote.

        Raises:
            CheckpointError: when a file is missing, damaged or does not fit.
        """
        from .checkpoint import load_usae

        return load_usae(cls, Path(path), **overrides)

    def __repr__(self) -> str:
        sites = ", ".join(f"{site} [{d}]" for site, d in self.d_in.items())
        return f"USAE(n_latents={self.n_latents}, k={self.k}, sites: {sites})"

    def _repr_html_(self) -> str:
        facts = {"latents": f"{self.n_latents:,}, {self.k:,} active", "sparsity": self.sparsity.name}
        facts["parameters"] = f"{sum(p.numel() for p in self.parameters()):,}"
        return html_facts("USAE", facts, html_table(["site", "d_in"], list(self.d_in.items())))

    def _penalty(self, at: Entries, values: Entries, support: Support, index: int) -> Tensor:
        if not self.training:
            return values.new_zeros(())
        return self.sparsity.penalty(at, values, support, index, self.W_dec)

    def _check_width(self, shape: torch.Size, site: str, what: str) -> None:
        if shape[-1] != self.d_in[site]:  # a width of 1 would broadcast and go unnoticed
            raise SiteError(
                f"site '{site}' has d_in = {self.d_in[site]}, given {what} of shape {list(shape)}",
                hint="is it the activation of another layer?",
            )
