"""Probes: what the sites of a USAE have in common, measured on held-out rows."""

from .evaluate import evaluate, one_site_per_model
from .firing import FiringCounts
from .report import LatentRecord, PairRecord, UniversalityReport
from .universality import CATEGORIES, co_firing, firing_entropy

__all__ = [
    "CATEGORIES",
    "FiringCounts",
    "LatentRecord",
    "PairRecord",
    "UniversalityReport",
    "co_firing",
    "evaluate",
    "firing_entropy",
    "one_site_per_model",
]
