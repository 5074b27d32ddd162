"""What comes out of a live model at its end: logits, where it has a head; else final features, and a probe on them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from ..errors import NonFiniteError
from ..hooks import HookedModel

HeadKind = Literal["logits", "probe", "none"]
Effect = Literal["kl", "cosine"]
Features = Float[Tensor, "b f"]
Logits = Float[Tensor, "b c"]
PerImage = Float[np.ndarray, " b"]

PROBE_L2 = 3e-2
"""Of 1e-3 to .3 the best likelihood on validation images, for two networks and 2,048 images of ten classes."""
_PROBE_STEPS = 500


class LinearProbe(NamedTuple):
    """Multinomial logistic regression on standardised features, float64.

    Attributes:
        mean, std: [f] of the features it was fitted on.
        weight: [c, f]; `bias` [c].
        classes: int64 [c], sorted: what each logit stands for.
    """

    mean: Float[Tensor, " f"]
    std: Float[Tensor, " f"]
    weight: Float[Tensor, "c f"]
    bias: Float[Tensor, " c"]
    classes: np.ndarray

    def logits(self, features: Features) -> Logits:
        """Return ((features − mean) / std) Wᵀ + b."""
        return (features - self.mean) / self.std @ self.weight.T + self.bias


def fit_probe(features: Features, labels: np.ndarray, l2: float = PROBE_L2) -> LinearProbe:
    """Fit a linear probe by L-BFGS from zero: the same rows give the same probe.

    Minimises the mean cross-entropy + l2/2 ‖W‖²; the bias is free. A feature that does not vary is only centred.

    Args:
        features: [n, f] float64.
        labels: int64 [n], of at least two values.
        l2: strength of the penalty.
    """
    classes, places = np.unique(labels, return_inverse=True)
    target = torch.from_numpy(places.astype(np.int64))
    mean, std = features.mean(0), features.std(0, correction=0)
    std = torch.where(std > 1e-9 * (1 + mean.abs()), std, torch.ones_like(std))
    x = (features - mean) / std
    weight = torch.zeros(len(classes), x.shape[1], dtype=x.dtype, requires_grad=True)
    bias = torch.zeros(len(classes), dtype=x.dtype, requires_grad=True)
    optimiser = torch.optim.LBFGS(
        [weight, bias],
        max_iter=_PROBE_STEPS,
        tolerance_grad=1e-8,
        tolerance_change=1e-12,
        line_search_fn="strong_wolfe",
    )

    def loss() -> Tensor:
        optimiser.zero_grad()
        value: Tensor = functional.cross_entropy(x @ weight.T + bias, target) + l2 / 2 * weight.square().sum()
        value.backward()  # type: ignore[no-untyped-call]
        return value

    with torch.enable_grad():
        optimiser.step(loss)  # type: ignore[no-untyped-call]
    return LinearProbe(mean, std, weight.detach(), bias.detach(), classes)


class Reading(NamedTuple):
    """A model's output for some images, float64 on the CPU: logits, final features of models without a head, or both.

    Attributes:
        logits: [b, c]; None where there is neither a head nor a probe.
        features: [b, f]; None where there is a head.
    """

    logits: Logits | None
    features: Features | None

    def compared(self, other: Reading) -> dict[str, PerImage]:
        """Compare with another reading of the same images, image by image.

        Returns:
            `kl`: KL(self ‖ other) of softmaxed logits, in nats, and `top1`: 1 where both have one argmax, where there
            are logits; `cosine` of final features, where there are those.
        """
        found: dict[str, Tensor] = {}
        if self.logits is not None and other.logits is not None:
            log_p, log_q = self.logits.log_softmax(1), other.logits.log_softmax(1)
            found["kl"] = (log_p.exp() * (log_p - log_q)).sum(1)
            found["top1"] = (self.logits.argmax(1) == other.logits.argmax(1)).double()
        if self.features is not None and other.features is not None:
            found["cosine"] = functional.cosine_similarity(self.features, other.features, dim=1)
        return {name: values.numpy() for name, values in found.items()}

    def effect(self, other: Reading) -> PerImage:
        """Return how far off another reading is, image by image: KL in nats, without logits 1 − cosine."""
        found = self.compared(other)
        return found["kl"] if "kl" in found else 1.0 - found["cosine"]

    def at(self, images: Sequence[int]) -> Reading:
        """Return the reading of some of the images."""
        chosen = list(images)
        return Reading(*(None if part is None else part[chosen] for part in self))

    @classmethod
    def joined(cls, parts: Sequence[Reading]) -> Reading:
        """Put readings of batches one after the other."""
        columns = zip(*parts, strict=True)
        return cls(*(None if column[0] is None else torch.cat(column) for column in columns))


@dataclass(frozen=True)
class Head:
    """How a model's output is read.

    Attributes:
        output: which tensor of the output, where it has several.
        own: the output is logits.
        probe: makes logits of final features.
    """

    output: str | None
    own: bool
    probe: LinearProbe | None = None

    @property
    def kind(self) -> HeadKind:
        """The model's own `logits`, those of a `probe`, or `none`."""
        return "logits" if self.own else "probe" if self.probe else "none"

    @property
    def effect(self) -> Effect:
        """What differences between outputs are measured by."""
        return "cosine" if self.kind == "none" else "kl"

    def read(self, output: Tensor, where: str) -> Reading:
        """Read a model's output.

        Raises:
            NonFiniteError: for NaN or infinity, saying `where`.
        """
        values = output.detach().cpu().double()
        if not values.isfinite().all():
            raise NonFiniteError(
                f"the model's output is NaN or infinite: {where}", hint="attach the model with dtype='float32'"
            )
        if self.own:
            return Reading(values, None)
        features = final_features(values)
        return Reading(self.probe.logits(features) if self.probe else None, features)


def final_features(output: Tensor) -> Features:
    """Return one vector per image: [b, f] as it is, tokens [b, t, f] their mean, maps [b, f, h, w] their mean."""
    if output.ndim == 3:
        return output.mean(1)
    return output.flatten(2).mean(2) if output.ndim > 3 else output.reshape(len(output), -1)


def has_head(model: HookedModel, name: str | None, output: Tensor) -> bool:
    """Say whether a model's output is logits: [b, c ≥ 2], and one of these says so.

    The output's name, `logits`; `num_classes` of the module, as timm has it (0: there is no head); `num_labels` of a
    Hugging Face config; or the last module that runs and has parameters of its own is a Linear that no activation but
    softmax follows, or a 1×1 convolution, with c outputs.
    """
    if output.ndim != 2 or output.shape[1] < 2:
        return False
    c, module = output.shape[1], model.module
    classes = getattr(module, "num_classes", None)
    if name == "logits" or (isinstance(classes, int) and classes == c):
        return True
    labels = [getattr(getattr(part, "config", None), "num_labels", None) for part in module.modules()]
    if c in labels:
        return True
    # Both libraries say so of a whole model; of a part of a larger one it says nothing about the whole's output.
    return classes != 0 and labels[0] is None and _ends_in(model, c)


def _ends_in(model: HookedModel, c: int) -> bool:
    modules = dict(model.module.named_modules(remove_duplicate=False))
    runs = sorted(
        ((run.order, modules[info.name]) for info in model.layers() for run in info.runs if info.name in modules),
        key=lambda run: -run[0],
    )
    activated = False
    for _, module in runs:
        if any(True for _ in module.parameters(recurse=False)):
            if isinstance(module, nn.Linear):
                return module.out_features == c and not activated
            return isinstance(module, nn.Conv2d) and module.kernel_size == (1, 1) and module.out_channels == c
        is_softmax = isinstance(module, (nn.Softmax, nn.LogSoftmax))
        activated |= type(module).__module__ == nn.ReLU.__module__ and not is_softmax
    return False
