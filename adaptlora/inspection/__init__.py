"""
Looking at adapters without a model.

`inspect_adapter(path)` reads one; `spectra(found)` are the singular values of its ΔW, `compare(first, second)` sets two side by side.
`save_pictures` draws them, `save_page` writes one HTML page that needs nothing else.
"""

from .adapter import InspectedModule, Inspection, inspect_adapter
from .page import page_data, save_page
from .pictures import save_pictures
from .updates import Comparison, ModuleComparison, Spectrum, compare, spectra

__all__ = [
    "Comparison",
    "InspectedModule",
    "Inspection",
    "ModuleComparison",
    "Spectrum",
    "compare",
    "inspect_adapter",
    "page_data",
    "save_page",
    "save_pictures",
    "spectra",
]
