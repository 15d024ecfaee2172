"""The gallery is what the declarations give now."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import superlora_tn
from superlora_tn.network.catalogue import VARIANTS

DOCS = Path(superlora_tn.__file__).parents[1] / "docs"


def test_the_gallery_is_current_and_has_a_picture_of_each_variant() -> None:
    spec = importlib.util.spec_from_file_location("gallery", DOCS / "gallery.py")
    assert spec is not None
    assert spec.loader is not None
    gallery = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(gallery)
    assert (DOCS / "gallery.md").read_text() == gallery.page(), "run python docs/gallery.py"
    assert {picture.stem for picture in (DOCS / gallery.PICTURES).glob("*.png")} == {*VARIANTS, "dora"}
