"""
Looking at adapters without a model.

`inspect_adapter(path)` reads one; `spectra(found)` are the singular values of its ΔW, `compare(first, second)` sets two side by side.
`save_pictures` draws them, `save_page` writes one HTML page that needs nothing else.
"""

from .adapter import InspectedModule, Inspection, inspect_adapter

__all__ = ["InspectedModule", "Inspection", "inspect_adapter"]
