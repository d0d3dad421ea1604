"""What shearing found and did, for people (tables, pictures) and programs (JSON)."""

import dataclasses
import importlib.util
import json
from pathlib import Path

from ..files import atomic_file
from .base import Sheared

REPORT_FILE, RANKS_FILE, PHI_FILE = "shear_report.json", "ranks.png", "phi.png"


@dataclasses.dataclass
class ShearReport:
    """config: the method's configuration.   modules: one `Sheared` each, in the adapter's order."""

    config: object
    modules: list[Sheared]

    @property
    def method(self) -> str:
        return type(self.config).__name__.removesuffix("Config")

    def ranks(self) -> dict[str, int]:
        """{module name: rank now}; 0 where the update is gone."""
        return {sheared.module.name: sheared.rank for sheared in self.modules}

    def ranks_before(self) -> dict[str, int]:
        return {sheared.module.name: sheared.rank_before for sheared in self.modules}

    def parameters(self) -> tuple[int, int]:
        """Numbers in all factors before and now."""
        sizes = [sum(m.lora_A.shape[1:]) + m.lora_B.shape[0] for m in (sheared.module for sheared in self.modules)]
        before = sum(size * sheared.rank_before for size, sheared in zip(sizes, self.modules, strict=True))
        return before, sum(size * sheared.rank for size, sheared in zip(sizes, self.modules, strict=True))

    def as_dict(self) -> dict:
        before, after = self.parameters()
        return {
            "method": self.method,
            "config": dataclasses.asdict(self.config),
            "parameters": {"before": before, "after": after},
            "modules": {
                sheared.module.name: {
                    "rank_before": sheared.rank_before,
                    "rank": sheared.rank,
                    "scaling": sheared.module.scaling,
                    **sheared.facts,
                }
                for sheared in self.modules
            },
        }

    def write(self, folder: str | Path) -> None:
        """
        shear_report.json; where matplotlib is installed also ranks.png (layers × modules) and, where the method searched, phi.png (φ
        against c). Pictures that an earlier report left are removed.
        """
        folder = Path(folder)
        with atomic_file(folder / REPORT_FILE) as file:
            file.write_text(json.dumps(self.as_dict(), indent=1) + "\n", encoding="utf-8")
        for picture in (RANKS_FILE, PHI_FILE):
            (folder / picture).unlink(missing_ok=True)
        if importlib.util.find_spec("matplotlib") is not None:
            self._draw(folder)

    def _draw(self, folder: Path) -> None:
        from ..plots import describe_ranks, overlap_curves, rank_heatmap

        ranks = self.ranks()
        top = max(sheared.rank_before for sheared in self.modules)
        rank_heatmap(ranks, folder / RANKS_FILE, max_rank=top, title=f"{self.method}: {describe_ranks(ranks)}")
        curves = {s.module.name: (s.facts["phi"], s.facts["c"]) for s in self.modules if "phi" in s.facts}
        if curves:
            overlap_curves(curves, folder / PHI_FILE, metric=self.config.metric)
