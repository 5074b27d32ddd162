"""Shape aliases (jaxtyping): the axes' names are the design's words.

`b` rows or images of a batch, `k` active latents per row, `d` a site's d_in, `n` latents, `h w` places.
Enforced only under test (pytest's `--jaxtyping-packages`).
"""

from __future__ import annotations

from jaxtyping import Float, Int, UInt8
from torch import Tensor

Images = Float[Tensor, "b 3 h w"]
"""Model input, normalised."""
Pixels = UInt8[Tensor, "3 _ _"]
"""One decoded picture, of any size."""
RowMatrix = Float[Tensor, "b d"]
"""Activation rows of one site."""
Values = Float[Tensor, "b k"]
"""Values of the active latents."""
Indices = Int[Tensor, "b k"]
"""Which latents are active, int64."""
Encoder = Float[Tensor, "n d"]
"""W_enc of one site."""
Decoder = Float[Tensor, "n d"]
"""W_dec of one site."""
LatentVector = Float[Tensor, " n"]
"""One number per latent."""
SiteVector = Float[Tensor, " d"]
"""One number per dimension of a site."""
