"""``report.md``: the reports of all experiments whose results are in a folder, one after another."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from superlora_tn.demo.whole_file import whole_file
from superlora_tn_paper import classification_report, converged_report, diffusion_report, geometry_report
from superlora_tn_paper.store import Data


def _classification(result: Data) -> str:
    return converged_report.report(result) if result["scale"] == "converged" else classification_report.report(result)


WORDS = """## Words

The variants are those of SuperLoRA (Chen et al., arXiv 2403.11887). All q and v weights are vectorised one behind another and
cut into **G** groups.

- **LoRTA**: each group is folded to a tensor of **M** equal sides, a Tucker network of rank r. **M** is the number of modes.
- **2D reshape**: each group is folded to a nearly square matrix of rank r. **2D**: the weights are stacked to one matrix.
- **SuperLoRA K=2**: each group is a Kronecker product of **K** such Tucker networks.
- **projected**: the network makes **rho** times as many numbers as the group has, and a fixed random map (fastfood) spreads
  them over it, *tanh* behind it where that is said. **shuffled**: the fixed map only puts the numbers in another order.
- **LoKr**, **LoNKr**: each weight is a Kronecker product of 2 or K low-rank factors. **LoTR**: all weights share outer factors.
- **dense**: full fine-tuning of q and v. **head alone**: nothing but a new last layer is trained.
"""


REPORTS: dict[str, Callable[[Data], str]] = {
    "classification": _classification,
    "geometry": geometry_report.report,
    "diffusion": diffusion_report.report,
}


def text(out: Path) -> str:
    """The reports of the results that are in the folder."""
    found = {name: out / f"{name}.json" for name in REPORTS}
    parts = [REPORTS[name](json.loads(place.read_text())).strip() for name, place in found.items() if place.is_file()]
    return "\n\n".join([*parts, WORDS])


def write(out: Path) -> Path:
    """Write ``report.md`` beside the results."""
    place = out / "report.md"
    with whole_file(place) as partial:
        partial.write_text(text(out))
    return place
