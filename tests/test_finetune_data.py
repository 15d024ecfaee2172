"""What people's files hold: byte-order marks, odd line breaks, other encodings, missing cells; pictures of any kind."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from optional import library
from shown import ROOT

library("transformers")
library("accelerate")
library("yaml")

from superlora_tn.finetune.config import Config  # noqa: E402
from superlora_tn.finetune.data import labelled, opened, read_rows  # noqa: E402
from superlora_tn.finetune.named import ConfigError  # noqa: E402

MARK = "\ufeff".encode()


def read(path: Path, content: bytes, task: str = "text-classification", **more: Any) -> Any:
    path.write_bytes(content)
    return read_rows(Config(model="m", task=task, data=str(path), **{"eval_share": 0, **more}))


@pytest.mark.parametrize("text", ["plain", "two\u2028lines", "a\x85b", "a\x1cb", "café"])
def test_a_row_is_what_its_writer_wrote(text: str, tmp_path: Path) -> None:
    """With the mark in front that spreadsheets write, Windows' line ends, and characters that Python takes for line breaks."""
    expected = [{"text": text, "label": "1"}, {"text": "other", "label": "0"}]
    cells = f'text,label\r\n"{text}",1\r\nother,0\r\n'.encode()
    lines = "\r\n".join(json.dumps(row, ensure_ascii=False) for row in expected).encode()
    for mark in (b"", MARK):
        for name, content in (("rows.csv", cells), ("ROWS.CSV", cells), ("rows.jsonl", lines)):
            assert read(tmp_path / name, mark + content).train == expected
        assert read(tmp_path / "A.TXT", mark + text.encode(), "causal-lm").train == [{"text": text}]


def test_a_long_text_fits_a_cell_and_the_limit_of_others_stays(tmp_path: Path) -> None:
    import csv

    usual = csv.field_size_limit()
    assert len(read(tmp_path / "a.csv", b"text,label\n" + b"a" * 200_000 + b",1\nb,0\n").train[0]["text"]) == 200_000
    assert csv.field_size_limit() == usual


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        (
            "a.csv",
            "text,label\nx,1\ncafé,0\n".encode("latin-1"),
            r"a.csv:3: this is no UTF-8 .* save the file in that encoding",
        ),
        ("a.jsonl", b'{"text": "caf\xe9"}', r"a.jsonl:1: this is no UTF-8"),
        ("a.csv", b"text,label\na\nb,0\n", r"a.csv:2: the column 'label' is empty in this row"),
        ("a.csv", b"text,label\na, \nb,0\n", r"a.csv:2: the column 'label' is empty in this row"),
        ("a.jsonl", b'{"text": "a", "label": null}', r"a.jsonl:1: the column 'label' is empty in this row"),
        ("a.csv", b"text,label\na, b,1\nc,0\n", r"a.csv:2: this row has more cells than the first has names"),
        ("a.jsonl", b"[" * 100_000, r"a.jsonl:1: this line is no JSON"),
    ],
)
def test_a_file_that_is_not_what_it_seems_is_refused(name: str, content: bytes, said: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=said):
        read(tmp_path / name, content)


def test_the_only_row_of_a_class_is_not_held_apart(tmp_path: Path) -> None:
    """Whatever the seed: the evaluation would else have a label that no training row has."""
    rows = b"\n".join(b'{"text": "a", "label": "%s"}' % (b"often" if k else b"rare") for k in range(6))
    for seed in range(6):
        found = read(tmp_path / "a.jsonl", rows, eval_share=0.5, seed=seed)
        assert found.classes == ["often", "rare"]
        assert len(found.train) + len(found.held) == 6
        assert found.held


def test_a_text_without_tokens_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"the text '' \(label 'b'\) has no tokens; leave that row out"):
        labelled([{"text": "", "label": "b"}], ["a", "b"], lambda text, **_: {"input_ids": list(text)}, 4)


def test_the_order_of_classes_is_the_same_in_every_process() -> None:
    """Labels that are the same number: a run that goes on must not swap them."""
    kept: dict[str, Any] = {"capture_output": True, "text": True, "check": True, "cwd": ROOT}
    words = "from superlora_tn.finetune.data import in_order; print(in_order({'1', '01', '001', '2', 'b', 'a'}))"
    found = {
        subprocess.run([sys.executable, "-c", words], env=os.environ | {"PYTHONHASHSEED": seed}, **kept).stdout
        for seed in "123"
    }
    assert found == {"['001', '01', '1', '2', 'a', 'b']\n"}


def test_hidden_files_are_no_pictures_and_hidden_folders_no_classes(tmp_path: Path) -> None:
    image = library("PIL.Image")
    for place in ("a", "b", ".ipynb_checkpoints"):
        (tmp_path / place).mkdir()
        image.new("RGB", (4, 4)).save(tmp_path / place / "1.png")
    (tmp_path / "b" / "._1.png").write_bytes(b"\0\5\x16\7")
    image.new("RGB", (4, 4)).save(tmp_path / "a" / "2.tif")
    found = read_rows(Config(model="m", task="image-classification", data=str(tmp_path), eval_share=0)).train
    assert [str(row["image"].relative_to(tmp_path)) for row in found] == ["a/1.png", "a/2.tif", "b/1.png"]


def test_pictures_are_upright_and_of_8_bits(tmp_path: Path) -> None:
    image = library("PIL.Image")
    exif = image.Exif()
    exif[0x0112] = 6  # held by its side: a quarter turn clockwise shows it upright
    values = np.zeros((8, 16, 3), np.uint8)
    values[:, :8] = 255
    image.fromarray(values).save(tmp_path / "turned.png", exif=exif)
    assert np.array_equal(np.asarray(opened(tmp_path / "turned.png")), np.rot90(values, -1))
    deep = np.linspace(0, 65535, 64).reshape(8, 8).astype(np.uint16)
    image.fromarray(deep).save(tmp_path / "deep.png")
    for mode in ("L", "RGB"):
        found = np.asarray(opened(tmp_path / "deep.png", mode)).reshape(8, 8, -1)
        assert np.array_equal(found, np.broadcast_to((deep >> 8)[..., None], found.shape))


@pytest.mark.parametrize("cut", [0, 4, 40, 100])
def test_a_broken_picture_is_named(cut: int, tmp_path: Path) -> None:
    image = library("PIL.Image")
    noise = np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8)
    image.fromarray(noise).save(tmp_path / "a.png")
    (tmp_path / "a.png").write_bytes((tmp_path / "a.png").read_bytes()[:cut])
    with pytest.raises(ConfigError, match=r"the picture .*a.png cannot be read: .*Replace it, or leave it out"):
        opened(tmp_path / "a.png")
