"""Probes: what the sites of a USAE have in common, measured on held-out rows."""

from .evaluate import evaluate, one_site_per_model
from .exemplars import Exemplar, NaturalFires, find_exemplars
from .factors import FactorScores, Follows
from .firing import FiringCounts
from .records import LatentRecord, PairRecord
from .report import UniversalityReport
from .universality import CATEGORIES, co_firing, firing_entropy

__all__ = [
    "CATEGORIES",
    "Exemplar",
    "FactorScores",
    "FiringCounts",
    "Follows",
    "LatentRecord",
    "NaturalFires",
    "PairRecord",
    "UniversalityReport",
    "co_firing",
    "evaluate",
    "find_exemplars",
    "firing_entropy",
    "one_site_per_model",
]
