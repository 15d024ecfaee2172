"""The pages that scripts beside them write are what these give now."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path
from typing import Any

import pytest
from optional import library

import superlora_tn
import superlora_tn as sl
from superlora_tn.declare.node_maps import NODE_MAPS
from superlora_tn.declare.nodes import BASED
from superlora_tn.network.catalogue import VARIANTS
from superlora_tn.tools import diagram

Text = library("matplotlib.text").Text

DOCS = Path(superlora_tn.__file__).parents[1] / "docs"


def script(name: str) -> Any:
    """A script of docs/ as a module."""
    spec = importlib.util.spec_from_file_location(name, DOCS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_certificate_is_that_of_its_rows_and_tells_of_every_variant() -> None:
    certificate = script("certificate")
    text = certificate.page()
    assert (DOCS / "certificate.md").read_text() == text, "run python docs/certificate.py"
    assert set(re.findall(r"^\| `(\w+)` \|", text, re.M)) == {*VARIANTS, "dora", "sum", "crop"}
    assert "| LoRA_r + LoRA_s | LoRA_{r+s} |" in text
    assert "merge_to scales twice" in text


def test_a_certificate_with_a_failure_is_not_published(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    certificate = script("certificate")
    found = json.loads(certificate.ROWS.read_text())
    found["rows"][3]["status"] = "failed"
    (tmp_path / "rows.json").write_text(json.dumps(found))
    monkeypatch.setattr(certificate, "ROWS", tmp_path / "rows.json")
    with pytest.raises(SystemExit, match="not published"):
        certificate.page()


def test_the_gallery_is_current_and_has_a_picture_of_each_variant() -> None:
    gallery = script("gallery")
    assert (DOCS / "gallery.md").read_text() == gallery.page(), "run python docs/gallery.py"
    assert {picture.stem for picture in (DOCS / gallery.PICTURES).glob("*.png")} == {*VARIANTS, "dora"}


def written(monkeypatch: pytest.MonkeyPatch, spec: sl.AdapterSpec) -> set[str]:
    """All words in the picture of a declaration."""
    figures = list[Any]()

    def kept(figure: Any, path: Path) -> Path:
        figures.append(figure)
        return path

    monkeypatch.setattr(diagram, "save", kept)
    diagram.network(spec, {"layer": (50, 48)}, "none.png", "title")
    return {text.get_text() for text in figures[0].findobj(lambda artist: isinstance(artist, Text))}


def test_each_map_and_each_value_of_the_base_has_words_of_its_own() -> None:
    assert set(diagram.MARKS) == set(NODE_MAPS)
    assert len({name for _, name in diagram.MARKS.values()}) == len(NODE_MAPS)
    assert set(diagram.OF_BASE) == set(BASED)
    assert len({(style.words, style.face, style.shape, style.line) for style in diagram.STYLES}) == len(diagram.STYLES)


def test_pictures_tell_maps_the_base_joins_sums_and_crops(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "w\n\u25a8 circulant, 2" in written(monkeypatch, sl.c3a(2))
    assert "S\n\u2234 scattered, 1,000" in written(monkeypatch, sl.shira(1000))
    assert {"W\nW itself", "of the base W", "W' = W + dW"} <= written(monkeypatch, sl.hira(2))
    assert {"W", "out of W", "W' = W N", "fixed, nothing stored"} <= written(monkeypatch, sl.oft(4))
    assert "W' = s W N, s scales rows, trains, 1 at first" in written(monkeypatch, sl.boft(4, 1, scaled=True))
    assert "W' = (1 + N) W" in written(monkeypatch, sl.AdapterSpec(sl.CP(2), join=sl.Multiply("left")))
    assert any(words.startswith("W' = m (W + dW)") for words in written(monkeypatch, sl.dora(sl.lora(2))))
    assert "out cut to 50 of 56" in written(
        monkeypatch, sl.AdapterSpec(sl.Network("(a b) i", {"a": 8}, crop=True, A="a i", B="b i"))
    )
    twice = sl.AdapterSpec(sl.Sum(sl.CP(2), sl.CP(3), weights=(1.0, -2.0)))
    assert {"\u2212", "t1_factor_out", "t2_factor_out"} <= written(monkeypatch, twice)


def test_pictures_tell_what_fills_a_flat_fold(monkeypatch: pytest.MonkeyPatch) -> None:
    """50 x 48 numbers are one group of order 3 with 14**3, or two of 1,200; half of 2,400 is 35**2 less 25."""
    words = written(monkeypatch, sl.superlora(2, order=3))
    assert "the first 2,400 of 2,744 numbers of the network\nare the dW of the weight" in words
    assert not any("are the dW of" in text for text in written(monkeypatch, sl.lora(2)))
    maps = sl.Compose(sl.Fastfood(0.5, tanh=True), sl.Shuffle(1))
    words = written(monkeypatch, sl.superlora(2, order=2, projection=maps))
    through = "through fixed fastfood of \u03c1 = 0.5 and tanh,\nthen a fixed shuffle"
    assert f"the first 1,200 of 1,225 numbers of the network,\n{through},\nare the dW of the weight" in words
    spec = sl.superlora(2, order=2, groups=2)
    group, _ = spec.lay_out({"one": (5, 5), "two": (5, 5)})[0]
    text = "25 numbers of each of 2 networks\nare the dW of 2 weights, one after another"
    assert diagram.filling_of(group, None) == text
