"""The concept explorer: all that a run found, as one HTML page that needs no network and no server."""

from .cards import card_data, image_side
from .layers import scan_section
from .overview import overview
from .page import MOST_BYTES, Explorer, write_explorer

__all__ = ["MOST_BYTES", "Explorer", "card_data", "image_side", "overview", "scan_section", "write_explorer"]
