"""Coordinated Activation Maximization (CAM): pictures that maximise a latent in every model."""

from .ascent import iter_pictures, maximize
from .heat import heat_maps
from .picture import CamPicture, PictureKey
from .studio import CamProgress, StepCount, Studio, latent_batches
from .targets import chosen_targets
from .verdict import JUDGEMENTS, RULE, Verdict, best_restarts, judge, transfers
from .verify import CrossScore

__all__ = [
    "JUDGEMENTS",
    "RULE",
    "CamPicture",
    "CamProgress",
    "CrossScore",
    "PictureKey",
    "StepCount",
    "Studio",
    "Verdict",
    "best_restarts",
    "chosen_targets",
    "heat_maps",
    "iter_pictures",
    "judge",
    "latent_batches",
    "maximize",
    "transfers",
]
