"""Adam under the decoder's constraint: every latent's concatenated decoder row keeps norm √M."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch.optim.adam import adam

from .model import USAE

BETAS, EPSILON = (0.9, 0.999), 1e-8
CHUNK = {"cpu": 1 << 22, "cuda": 1 << 24}
"""Numbers of the decoder that are worked on at once: no large temporaries, and caches help.

Smaller pieces are faster on one free core, and much slower where threads share the cores with other processes: they
wait for each other at the end of each operation.
"""
_OF_SITE = re.compile(r"\.(\d+)(\.|$)")  # an entry of a list with one per site: W_enc.0


class ConstrainedAdam:
    """Adam on all parameters of a USAE, with the gradient's norm bounded and the decoder's rows kept at norm √M.

    A step scales all gradients so that their norm is at most `grad_clip`, does Adam's update and renormalises the
    decoder's rows:

        c = min(1, grad_clip / ‖g‖),   Adam(c g),   w_k ← √M w_k / ‖w_k‖,

    the last two piece by piece in one pass over the decoder. What of a gradient points along its row is not taken out
    before: renormalising undoes what it does to the norm. Parameters without a gradient stay as they are, their moments
    and step counts too. Adam as in torch.optim (arXiv 1412.6980), weight decay decoupled from it (arXiv 1711.05101).

    Args:
        usae: the model; moved to its device before.
        grad_clip: bound of the norm of all gradients together.
        weight_decay: W_enc ← (1 − lr · weight_decay) W_enc before each update of it, for all sites or by site.
    """

    def __init__(self, usae: USAE, grad_clip: float, *, weight_decay: float | Mapping[str, float] = 0.0) -> None:
        by_site = weight_decay if isinstance(weight_decay, Mapping) else dict.fromkeys(usae.sites, weight_decay)
        self.usae, self.grad_clip = usae, grad_clip
        self._decay = {f"W_enc.{i}": by_site.get(site, 0.0) for i, site in enumerate(usae.sites)}
        self._slots: dict[str, _Slot] = {}

    def zero_grad(self) -> None:
        """Forget the gradients."""
        self.usae.zero_grad(set_to_none=True)

    @torch.no_grad()
    def step(self, lr: float, sites: Sequence[str] | None = None) -> Float[Tensor, ""]:
        """Update the parameters from their gradients; with a gradient that is not finite none of them changes.

        Args:
            lr: learning rate.
            sites: those whose encoder, decoder columns and decoder bias are updated; all others, their moments and step
                counts too, stay as they are. Each site's part of a decoder row then keeps a norm of its own. Default:
                all sites, under the norm of the whole row.

        Returns:
            the gradients' norm before it is bounded.
        """
        usae = self.usae
        chosen = range(len(usae.sites)) if sites is None else [usae.site_index(site) for site in sites]
        slots = {name: self._slot(name) for name, p in usae.named_parameters() if _learns(name, p, chosen)}
        decoder = slots.pop("W_dec", None)
        rows = [] if decoder is None else decoder.pieces(chosen)
        pieces = {name: slot.pieces(chosen) for name, slot in slots.items()}
        learning = [*rows, *(piece for some in pieces.values() for piece in some)]
        squares = [_norms(piece.grad).square().sum() for piece in learning]
        if not squares:
            return usae.W_dec.new_zeros(())
        norm = torch.stack(squares).sum().sqrt()
        rule = _Rule(lr, norm, self.grad_clip)
        if rule.in_vain:
            return norm
        for decay in sorted({self._decay.get(name, 0.0) for name in pieces}):
            some = [piece for name in pieces if self._decay.get(name, 0.0) == decay for piece in pieces[name]]
            rule.update(some, decay)
        if decoder is not None:
            self._update_decoder(rows, sites, rule)
            decoder.advance(chosen)
        for slot in slots.values():
            slot.advance(chosen)
        return norm

    def tensors(self) -> dict[str, Tensor]:
        """Return moments and step counts, by name."""
        found: dict[str, Tensor] = {}
        for name, slot in self._slots.items():
            found |= {f"m.{name}": slot.m, f"v.{name}": slot.v, f"steps.{name}": torch.tensor(slot.steps)}
        return found

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Take over what `tensors` gave."""
        for name, _ in self.usae.named_parameters():
            if f"m.{name}" in tensors:
                slot = self._slot(name)
                slot.m.copy_(tensors[f"m.{name}"])
                slot.v.copy_(tensors[f"v.{name}"])
                slot.steps = tensors[f"steps.{name}"].tolist()

    def _slot(self, name: str) -> _Slot:
        if name not in self._slots:
            sites = list(self.usae.columns.values()) if name in ("W_dec", "b_dec") else []
            self._slots[name] = _Slot(self.usae.get_parameter(name), sites)
        return self._slots[name]

    def _update_decoder(self, pieces: list[_Piece], sites: Sequence[str] | None, rule: _Rule) -> None:
        w_dec = self.usae.W_dec.detach()
        parts = [w_dec] if sites is None else [w_dec[:, self.usae.columns[site]] for site in sites]
        whole = math.sqrt(len(self.usae.sites))
        for chunk in chunks(w_dec):
            norms: list[float | Tensor] = [whole] if sites is None else [_norms(part[chunk]) for part in parts]
            rule.update([piece.rows(chunk) for piece in pieces])
            for part, norm in zip(parts, norms, strict=True):
                part[chunk].mul_(norm / _norms(part[chunk]).clamp_min(1e-12))


class _Piece(NamedTuple):
    """A parameter, or some columns or rows of it, with its gradient, moments and the steps that it has seen."""

    value: Tensor
    grad: Tensor
    m: Tensor
    v: Tensor
    steps: int

    def rows(self, chunk: slice) -> _Piece:
        """Return some rows of all four."""
        return _Piece(self.value[chunk], self.grad[chunk], self.m[chunk], self.v[chunk], self.steps)

    def columns(self, part: slice, steps: int) -> _Piece:
        """Return some columns of all four, which have seen so many steps."""
        return _Piece(self.value[..., part], self.grad[..., part], self.m[..., part], self.v[..., part], steps)

    def adjacent(self) -> _Piece:
        """Return all four in contiguous memory."""
        four = (self.value, self.grad, self.m, self.v)
        value, grad, m, v = (tensor.contiguous() for tensor in four)
        return _Piece(value, grad, m, v, self.steps)


class _Slot:
    """Moments and step counts of one parameter; one count per site where each site has columns of its own."""

    def __init__(self, parameter: Tensor, sites: Sequence[slice]) -> None:
        self.parameter, self.sites = parameter, sites
        self.m, self.v = torch.zeros_like(parameter), torch.zeros_like(parameter)
        self.steps = [0] * max(1, len(sites))

    def whole(self) -> _Piece:
        """Return the whole parameter."""
        grad = self.parameter.grad
        value = self.parameter.detach()
        return _Piece(value, torch.zeros_like(value) if grad is None else grad, self.m, self.v, self.steps[0])

    def pieces(self, chosen: Sequence[int]) -> list[_Piece]:
        """Return the chosen sites' parts; all in one where they have seen the same steps."""
        whole = self.whole()
        if not self.sites or (len(chosen) == len(self.sites) and len(set(self.steps)) == 1):
            return [whole]
        return [whole.columns(self.sites[i], self.steps[i]) for i in chosen]

    def advance(self, chosen: Sequence[int]) -> None:
        """Count a step."""
        for i in chosen if self.sites else (0,):
            self.steps[i] += 1


class _Rule:
    """Adam's update of one step, with gradients scaled so that their norm is at most `clip`.

    On a CPU the norm can be looked at; on a GPU that would wait for all that was begun, so the update itself is told.
    """

    def __init__(self, lr: float, norm: Tensor, clip: float) -> None:
        self.lr = lr
        self._divisor: Tensor | None = ((norm + 1e-6) / clip).clamp_min(1.0).float()
        self._vain: Tensor | None = (~torch.isfinite(norm)).float()
        self.in_vain = False
        if norm.device.type == "cpu":
            self.in_vain, self._vain = bool(self._vain), None
            self._divisor = self._divisor if self._divisor > 1.0 else None

    def update(self, pieces: Sequence[_Piece], weight_decay: float = 0.0) -> None:
        """Update values and moments; columns of a matrix in a copy, because the fused update wants them adjacent."""
        given = [piece if piece.value.is_contiguous() else piece.adjacent() for piece in pieces]
        if not given:
            return
        adam(
            [piece.value for piece in given],
            [piece.grad for piece in given],
            [piece.m for piece in given],
            [piece.v for piece in given],
            [],
            [piece.value.new_tensor(float(piece.steps), dtype=torch.float32) for piece in given],
            fused=True,
            grad_scale=self._divisor,
            found_inf=self._vain,
            decoupled_weight_decay=weight_decay > 0,
            amsgrad=False,
            beta1=BETAS[0],
            beta2=BETAS[1],
            lr=self.lr,
            weight_decay=weight_decay,
            eps=EPSILON,
            maximize=False,
        )
        for piece, made in zip(pieces, given, strict=True):
            if made is not piece:
                for view, tensor in ((piece.value, made.value), (piece.m, made.m), (piece.v, made.v)):
                    view.copy_(tensor)


def chunks(matrix: Tensor) -> Iterator[slice]:
    """Give rows of a matrix in pieces of about `CHUNK` numbers."""
    size = max(1, CHUNK.get(matrix.device.type, CHUNK["cpu"]) // max(1, matrix.shape[1]))
    for start in range(0, len(matrix), size):
        yield slice(start, min(start + size, len(matrix)))


def _norms(rows: Tensor) -> Tensor:
    """Return ‖w‖ of each row; ‖g‖² by these takes half the time of one norm, whose float32 sum is off by a percent."""
    norms: Tensor = torch.linalg.vector_norm(rows, dim=-1, keepdim=True)
    return norms


def _learns(name: str, parameter: Tensor, chosen: Sequence[int]) -> bool:
    """Say whether a parameter has a gradient and is one of the chosen sites', or of no site in particular."""
    of_site = _OF_SITE.search(name)
    return parameter.grad is not None and (of_site is None or int(of_site[1]) in chosen)
