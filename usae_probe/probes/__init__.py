"""Probes: what the sites of a USAE have in common, measured on held-out rows."""

from .controls import Controls
from .evaluate import evaluate, label_within
from .exemplars import Exemplar, NaturalFires, find_exemplars
from .factors import FactorScores, Follows
from .fidelity import Fidelity, fidelity
from .firing import FiringCounts
from .records import LatentRecord, PairRecord
from .report import UniversalityReport
from .rows import one_site_per_model
from .universality import CATEGORIES, co_firing, firing_entropy

__all__ = [
    "CATEGORIES",
    "Controls",
    "Exemplar",
    "FactorScores",
    "Fidelity",
    "FiringCounts",
    "Follows",
    "LatentRecord",
    "NaturalFires",
    "PairRecord",
    "UniversalityReport",
    "co_firing",
    "evaluate",
    "fidelity",
    "find_exemplars",
    "firing_entropy",
    "label_within",
    "one_site_per_model",
]
