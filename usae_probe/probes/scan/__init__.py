"""Scan: every layer of each model against every layer of the others."""

from .cells import pairs_between
from .choosing import choose_sites, depths_of
from .codes import CodeMatrices, Followed, scan_codes
from .live import scan
from .measure import ScanProgress, ScanSettings, joint_length, scan_buffer, times_as_long
from .report import MEASURES, ScanReport

__all__ = [
    "MEASURES",
    "CodeMatrices",
    "Followed",
    "ScanProgress",
    "ScanReport",
    "ScanSettings",
    "choose_sites",
    "depths_of",
    "joint_length",
    "pairs_between",
    "scan",
    "scan_buffer",
    "scan_codes",
    "times_as_long",
]
