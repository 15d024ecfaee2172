"""Writes gallery.md and its pictures from the declarations: ``python docs/gallery.py``."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from pathlib import Path

from superlora_tn.declare.fold import Shape
from superlora_tn.declare.maps import Fastfood
from superlora_tn.network.catalogue import VARIANTS
from superlora_tn.network.joined import dora
from superlora_tn.network.spec import AdapterSpec
from superlora_tn.network.variants import superlora
from superlora_tn.tools import diagram

HERE = Path(__file__).parent
PICTURES = Path("images") / "gallery"
RANK = 4
SHAPES: dict[str, Shape] = {f"layers.{k}.{name}": (768, 768) for k in range(12) for name in ("q_proj", "v_proj")}
HEAD = f"""# Gallery

Every variant as its network, written by `python docs/gallery.py` from the declarations. Counts are for the q and v of 12
layers, {len(SHAPES)} weights of 768 x 768, at rank {RANK}, or as it is by default where it has no rank. Below each
picture stands what its nodes' looks mean, below its title how dW joins the weight W and, of a flat fold, how the network's
numbers become dW. A node that is a function of what is stored bears that function's mark and name. Red legs are of modes that
are cut to the weight's size.
"""


def declared(name: str) -> AdapterSpec:
    """A variant at the gallery's rank; SuperLoRA with all of its formula."""
    if name == "superlora":
        return superlora(RANK, order=3, splits=2, projection=Fastfood(0.5))
    maker = VARIANTS[name]
    spec = maker(rank=RANK) if "rank" in inspect.signature(maker).parameters else maker()
    assert isinstance(spec, AdapterSpec)
    return spec


def page() -> str:
    """The text of gallery.md."""
    return "\n".join([HEAD, *(part for name in VARIANTS for part in section(name)), *joined()])


def joined() -> Iterator[str]:
    """DoRA, which is a way to join any of them."""
    words = (inspect.getdoc(dora) or "").split("\n\nArgs:")[0].replace("``", "`")
    yield "## dora\n"
    yield f"{words}\n"
    yield f"Network: that of the declaration. Parameters, of `lora({RANK})`: {dora(declared('lora')).count(SHAPES):,}.\n"
    yield f"![The network of dora]({(PICTURES / 'dora').as_posix()}.png)\n"


def section(name: str) -> Iterator[str]:
    """One variant: what its docstring says, the network, the count, the picture."""
    spec = declared(name)
    graph = spec.lay_out(SHAPES)[0][1]
    words = (inspect.getdoc(VARIANTS[name]) or "").split("\n\nArgs:")[0].replace("``", "`")
    yield f"## {name}\n"
    yield f"{words}\n"
    drawn = "Drawn with M = 3, G = 1, K = 2 and F the fastfood map of \u03c1 = 0.5. " if name == "superlora" else ""
    yield f"{drawn}Network: `{graph.equation()}`. Parameters: {spec.count(SHAPES):,}.\n"
    yield f"![The network of {name}]({(PICTURES / name).as_posix()}.png)\n"


def main() -> None:
    """Write all of it."""
    from PIL import Image

    (HERE / "gallery.md").write_text(page())
    specs = {name: declared(name) for name in VARIANTS} | {"dora": dora(declared("lora"))}
    for name, spec in specs.items():
        title = "dora(lora)" if name == "dora" else name
        place = diagram.network(spec, SHAPES, HERE / PICTURES / f"{name}.png", title)
        with Image.open(place) as picture:
            small = picture.convert("RGB").quantize(32)
        small.save(place, optimize=True)


if __name__ == "__main__":
    main()
