"""Adam under the decoder's constraint: every latent's concatenated decoder row keeps norm √M."""

from __future__ import annotations

import torch

from .model import USAE


class ConstrainedAdam:
    """Adam on all parameters of a USAE, with the gradient's norm bounded and the decoder's rows kept at norm √M.

    A step projects the decoder's gradient (what would only change a row's norm is taken out), scales all gradients so
    that their norm is at most `grad_clip`, does Adam's update, and renormalises the decoder's rows.

    Args:
        usae: the model; moved to its device before.
        grad_clip: bound of the norm of all gradients together.
    """

    def __init__(self, usae: USAE, grad_clip: float) -> None:
        self.usae, self.grad_clip = usae, grad_clip
        self.adam = torch.optim.Adam(usae.parameters(), lr=0.0, fused=True)

    def zero_grad(self) -> None:
        """Forget the gradients."""
        self.adam.zero_grad(set_to_none=True)

    def step(self, lr: float) -> float:
        """Update the parameters from their gradients; returns the gradients' norm before it is bounded."""
        self.usae.project_decoder_gradient()
        norm = torch.nn.utils.clip_grad_norm_(self.usae.parameters(), self.grad_clip)
        for group in self.adam.param_groups:
            group["lr"] = lr
        self.adam.step()
        self.usae.renormalise_decoder()
        return float(norm)
