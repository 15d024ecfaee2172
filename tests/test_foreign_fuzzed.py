"""Damaged files of every format on a real model: they load, or a `CheckpointError` says why not; the model keeps every bit."""

from __future__ import annotations

import json
import os
import shutil
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from foreign import Net, shapes
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from models import assert_untouched, snapshot
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from test_foreign_writes import filled_in
from torch import Tensor

import superlora_tn as sl
from superlora_tn.files.record import Entry
from superlora_tn.files.writes import save_as

THOROUGH = os.environ.get("HYPOTHESIS_PROFILE") == "thorough"
fuzz = settings(max_examples=20_000 if THOROUGH else 150, suppress_health_check=list(HealthCheck))

LAYERS = ["attn_1.to_q", "attn_1.to_k", "attn_1.to_v", "ff.0", "down_blocks.1"]
SPECS = {"lora": sl.lora(2, alpha=3), "loha": sl.loha(2, alpha=3), "lokr": sl.lokr(2, alpha=3), "lotr": sl.lotr(2)}
DTYPES = [torch.float64, torch.float16, torch.bfloat16, torch.int32, torch.uint8, torch.bool, torch.float8_e4m3fn]
ENDINGS = [
    *("lora_A.weight", "lora_B.weight", "lora_up.weight", "lora_down.weight", "lora_mid.weight", "alpha", "dora_scale", "diff"),
    *("hada_w1_a", "hada_t1", "lokr_w1", "lokr_w2_a", "lokr_t2", "lora_E", "vera_lambda_b", "bias", "oft_blocks", "x"),
]

# PEFT's methods that are not written: tensors of one weight of 24 x 24.
STRUCTURED: dict[str, dict[str, tuple[int, ...]]] = {
    "VERA": {"vera_lambda_b": (24,), "vera_lambda_d": (3,)},
    "ADALORA": {"lora_A": (3, 24), "lora_B": (24, 3), "lora_E": (3, 1)},
    "MISS": {"miss_block": (4, 24)},
    "GRALORA": {"gralora_A": (2, 12, 4), "gralora_B": (2, 4, 12)},
    "C3A": {"c3a_kernel": (3, 3, 8)},
    "RANDLORA": {"randlora_lambda": (2, 3), "randlora_gamma": (3, 24)},
    "FOURIERFT": {"fourierft_spectrum": (9,)},
    "DELORA": {"delora_A": (3, 24), "delora_B": (24, 3), "delora_lambda": (1,), "delora_w_norm": (24,)},
    "VBLORA": {"vblora_logits_A": (3, 6, 5), "vblora_logits_B": (6, 3, 5)},
    "HIRA": {"hira_A": (3, 24), "hira_B": (24, 3)},
}


class World:
    """A model, and an adapter for it in every format that is written, PEFT's structured methods among them."""

    def __init__(self, folder: Path) -> None:
        self.model, self.folder = Net(), folder
        self.before = snapshot(self.model)
        sizes = {n: s for n, s in shapes(self.model).items() if n in LAYERS}
        self.sources: list[Path] = []
        for name, spec in SPECS.items():
            adapter = filled_in(Entry(spec, sizes))
            for format in ("peft", "lycoris", "kohya", "diffusers", "gguf"):
                kernels = {} if format == "gguf" else {"down_blocks.1": (3, 3)}
                own = {n: s for n, s in sizes.items() if format != "gguf" or n != "down_blocks.1"}
                made = adapter if len(own) == len(sizes) else filled_in(Entry(spec, own))
                save_as(made.entries, made.tensors, folder / f"{name}_{format}", format, kernels=kernels)  # type: ignore[arg-type]
                self.sources.append(folder / f"{name}_{format}")
        self.sources += [self.structured(name) for name in STRUCTURED]
        old = Path(shutil.copytree(folder / "lora_peft", folder / "old_bin"))
        torch.save(load_file(old / "adapter_model.safetensors"), old / "adapter_model.bin")
        (old / "adapter_model.safetensors").unlink()
        self.sources.append(old)

    def structured(self, method: str) -> Path:
        """A folder of a method of PEFT's that is read and not written."""
        q = STRUCTURED[method]
        tensors = {f"base_model.model.attn_1.to_q.{key}": torch.ones(shape) for key, shape in q.items()}
        if method == "RANDLORA":
            tensors |= {"base_model.randlora_A": torch.ones(2, 1, 24), "base_model.randlora_B": torch.ones(24, 3, 2)}
        if method == "VBLORA":
            tensors["base_model.vblora_vector_bank"] = torch.ones(5, 4)
        place = self.folder / method
        place.mkdir()
        save_file(tensors, place / "adapter_model.safetensors")
        (place / "adapter_config.json").write_text(
            json.dumps({"peft_type": method, "r": 3, "init_r": 3, "lora_alpha": 4, "topk": 2})
        )
        return place

    def damaged(self, source: Path, draw: st.DrawFn, place: Path) -> Path:
        """A copy of an adapter with a few things wrong."""
        shutil.rmtree(place, ignore_errors=True)
        shutil.copytree(source, place)
        for _ in range(draw(st.integers(1, 3))):
            file = draw(st.sampled_from(sorted(p for p in place.iterdir())))
            keys = file.suffix == ".safetensors" and draw(st.integers(0, 3))
            if keys:
                with suppress(SafetensorError):  # bytes that an earlier turn damaged are no tensors any more
                    rekeyed(file, draw)
                    continue
            data = bytearray(file.read_bytes())
            kind = draw(st.sampled_from(["cut", "set", "swap", "drop"]))
            if kind == "cut":
                data = data[: draw(st.integers(0, len(data)))]
            elif kind == "set" and data:
                data[draw(st.integers(0, len(data) - 1))] = draw(st.integers(0, 255))
            elif kind == "swap":  # another format's bytes under this name
                other = draw(st.sampled_from(self.sources))
                data = bytearray(draw(st.sampled_from(sorted(other.iterdir()))).read_bytes())
            if kind == "drop" and len(list(place.iterdir())) > 1:
                file.unlink()
            else:
                file.write_bytes(data)
        return place


def rekeyed(file: Path, draw: st.DrawFn) -> None:
    """Other keys, shapes and dtypes in a file of tensors."""
    tensors: dict[str, Tensor] = load_file(file)
    if not tensors:
        return
    key = draw(st.sampled_from(sorted(tensors)))
    kind = draw(st.sampled_from(["drop", "both", "ending", "name", "dtype", "shape", "values", "extra"]))
    value = tensors[key]
    if kind == "drop" and len(tensors) > 1:
        del tensors[key]
    elif kind == "both":  # the same weight a second time with the other separator
        tensors[key.replace("_", ".") if draw(st.booleans()) else key.replace(".", "_", 1)] = value.clone()
    elif kind == "ending":
        tensors[f"{key.partition('.lora')[0]}.{draw(st.sampled_from(ENDINGS))}"] = tensors.pop(key)
    elif kind == "name":
        tensors[draw(st.text(max_size=12)) + draw(st.sampled_from(["", ".", "_"])) + key] = tensors.pop(key)
    elif kind == "dtype":
        tensors[key] = value.to(draw(st.sampled_from(DTYPES)))
    elif kind == "shape":
        shape = draw(st.lists(st.sampled_from([0, 1, 2, 3, 24]), max_size=5))
        tensors[key] = value.flip(0).T.contiguous() if value.ndim == 2 and draw(st.booleans()) else torch.ones(shape)
    elif kind == "values":
        tensors[key] = torch.full(value.shape, draw(st.sampled_from([float("nan"), float("inf"), 1e38, 0.0])))
    else:
        tensors[f"attn_1.to_q.{draw(st.sampled_from(ENDINGS))}"] = torch.ones(draw(st.lists(st.integers(0, 24), max_size=3)))
    save_file(tensors, file)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    pytest.importorskip("gguf")
    return World(tmp_path_factory.mktemp("formats"))


def test_all_of_them_load_as_they_are(world: World) -> None:
    for source in world.sources:
        sl.load(world.model, source).detach()
        assert_untouched(world.model, world.before)


@fuzz
@given(st.data())
def test_a_damaged_file_loads_or_says_why_not(
    world: World, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    place = world.damaged(data.draw(st.sampled_from(world.sources)), data.draw, world.folder / "damaged")
    try:
        sl.load(world.model, place).detach()
    except sl.CheckpointError as error:
        assert 20 < len(str(error)) < 4000
    assert_untouched(world.model, world.before)
