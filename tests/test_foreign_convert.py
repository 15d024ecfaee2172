"""`convert` between all formats, and `show` on all of them."""

from __future__ import annotations

import copy
import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from foreign import Net, close, deltas, fit, inputs, parsed, shapes, shuffle, write
from safetensors.torch import save_file
from test_foreign_writes import LAYERS, OUTPUTS, filled_in, made, save
from torch import nn

import superlora_tn as sl
from superlora_tn.cli import main
from superlora_tn.files import own
from superlora_tn.files.base_model import base_model
from superlora_tn.files.convert import convert
from superlora_tn.files.errors import CheckpointError
from superlora_tn.files.foreign import Fitted
from superlora_tn.files.record import Entry
from superlora_tn.files.show import layer_of, show
from superlora_tn.files.writes import FORMATS, Beside, save_as
from superlora_tn.network.catalogue import VARIANTS as CATALOGUE
from superlora_tn.network.catalogue import size_setting

# One product rounded to float32 on each way; two ways at most.
WAYS = 2e-6

SPECS = {
    "lora": sl.lora(3, alpha=5),
    "loha": sl.loha(2, alpha=3),
    "lokr": sl.lokr(2, alpha=3),
    "lotr": sl.lotr(2),
    "dense": sl.dense(),
}


def base(model: nn.Module, folder: Path) -> Path:
    """A checkpoint of a model, in two files."""
    folder.mkdir(exist_ok=True)
    state = {k: v.clone() for k, v in model.state_dict().items()}
    names = sorted(state)
    save_file({n: state[n] for n in names[::2]}, folder / "model-00001-of-00002.safetensors")
    save_file({n: state[n] for n in names[1::2]}, folder / "model-00002-of-00002.safetensors")
    return folder


def found(path: Path) -> dict[str, np.ndarray]:
    """dW of whatever was written."""
    if (path / "adapter.json").exists():
        saved = own.read(path)
        return deltas(Fitted(saved.entries, saved.tensors))
    return deltas(fit(path, Net()))


@pytest.mark.parametrize("target", FORMATS)
@pytest.mark.parametrize("source", FORMATS)
@pytest.mark.parametrize("case", SPECS)
def test_from_any_format_to_any_other(case: str, source: str, target: str, tmp_path: Path) -> None:
    adapter = made(SPECS[case], LAYERS)
    save(adapter, tmp_path / "a", source)
    place = base(Net(), tmp_path / "base")
    report = convert(tmp_path / "a", tmp_path / "b", target, base=base_model(place))  # type: ignore[arg-type]
    assert max(report.errors.values()) < WAYS
    close(found(tmp_path / "b"), deltas(adapter), WAYS)


@pytest.mark.parametrize("source", ["peft", "lycoris", "kohya"])
def test_convolutions_need_their_kernels(source: str, tmp_path: Path) -> None:
    """From the file where it shows them, else from the base."""
    adapter = made(sl.lora(3, alpha=5), ["conv_in", "down_blocks.0", "down_blocks.1"])
    save(adapter, tmp_path / "a", source)
    place = base(Net(), tmp_path / "base")
    convert(tmp_path / "a", tmp_path / "b", "peft", base=base_model(place))
    close(found(tmp_path / "b"), deltas(adapter), WAYS)
    kernels = {w.name: w.kernel for w in parsed(tmp_path / "b").weights}
    assert sorted(kernels.values()) == [(1, 1), (3, 3), (3, 3)]


NO_MODEL = [
    *((s, t) for s in ("peft", "diffusers", "gguf") for t in FORMATS),
    *((s, t) for s in ("lycoris", "kohya") for t in ("lycoris", "kohya")),
]


@pytest.mark.parametrize(("source", "target"), NO_MODEL)
def test_without_a_model_where_none_is_needed(source: str, target: str, tmp_path: Path) -> None:
    adapter = made(sl.lokr(2, alpha=3), LAYERS)
    save(adapter, tmp_path / "a", source)
    convert(tmp_path / "a", tmp_path / "b", target)  # type: ignore[arg-type]
    close(found(tmp_path / "b"), deltas(adapter), WAYS)


@pytest.mark.parametrize("target", ["superlora", "peft", "diffusers", "gguf"])
def test_names_that_only_a_model_tells(target: str, tmp_path: Path) -> None:
    save(made(sl.lora(2), LAYERS), tmp_path / "a", "kohya")
    with pytest.raises(CheckpointError, match=r"have '_' for '\.', so the modules are known only with the base"):
        convert(tmp_path / "a", tmp_path / "b", target)  # type: ignore[arg-type]
    assert not (tmp_path / "b").exists()


def test_lycoris_files_keep_every_number(tmp_path: Path) -> None:
    """Also such sizes as its loader would not make today: w1 the larger factor, as in old files."""
    tensors = {"lora_unet_a.lokr_w1_a": torch.randn(20, 4), "lora_unet_a.lokr_w1_b": torch.randn(4, 60)}
    tensors |= {"lora_unet_a.lokr_w2_a": torch.randn(16, 4), "lora_unet_a.lokr_w2_b": torch.randn(4, 48)}
    tensors["lora_unet_a.alpha"] = torch.tensor(2.0)
    write(tmp_path / "a.safetensors", tensors)
    convert(tmp_path / "a.safetensors", tmp_path / "b.safetensors", "lycoris")
    first, second = parsed(tmp_path / "a.safetensors").weights[0], parsed(tmp_path / "b.safetensors").weights[0]
    assert second.scale == first.scale == 0.5
    assert all(torch.equal(t, second.tensors()[n]) for n, t in first.tensors().items())
    report = convert(tmp_path / "a.safetensors", tmp_path / "c.safetensors", "kohya")
    assert report.rows[0].ranks == (16,)
    close({"a": parsed(tmp_path / "c.safetensors").weights[0].dense().numpy()}, {"a": first.dense().numpy()}, WAYS)


def test_parts_of_a_pipeline(tmp_path: Path) -> None:
    tensors = {}
    for name in ("unet.attn_1.to_q", "text_encoder.attn_1.to_q"):
        tensors |= {f"{name}.lora_A.weight": torch.randn(2, 24), f"{name}.lora_B.weight": torch.randn(24, 2)}
    write(tmp_path / "a.safetensors", tensors)
    with pytest.raises(CheckpointError, match="adapts the parts 'text_encoder', 'unet'; choose one"):
        convert(tmp_path / "a.safetensors", tmp_path / "b", "peft")
    convert(tmp_path / "a.safetensors", tmp_path / "b", "peft", part="unet")
    (weight,) = parsed(tmp_path / "b").weights
    assert weight.name == "base_model.model.attn_1.to_q"
    convert(tmp_path / "a.safetensors", tmp_path / "k", "kohya")
    assert {w.name for w in parsed(tmp_path / "k").weights} == {"lora_unet_attn_1_to_q", "lora_te1_attn_1_to_q"}


def peft_folder(setting: Any, model: nn.Module, folder: Path) -> dict[str, np.ndarray]:
    """What PEFT saves of a model, and its dW."""
    peft = pytest.importorskip("peft")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tuned = peft.get_peft_model(copy.deepcopy(model), setting)
        shuffle([p for n, p in tuned.named_parameters() if p.requires_grad and "magnitude" not in n])
        tuned.save_pretrained(str(folder))
        merged = dict(tuned.double().merge_and_unload().named_modules())
    layers = {n: m for n, m in model.named_modules() if n in shapes(model)}
    changed = {n: (merged[n].weight - m.weight.double()).detach().flatten(1).numpy() for n, m in layers.items()}
    return {n: d for n, d in changed.items() if np.abs(d).max() > 0}


@pytest.mark.parametrize("case", ["dora", "vera"])
def test_what_follows_from_the_base_needs_it(case: str, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model = Net()
    setting = {
        "dora": peft.LoraConfig(target_modules=["to_q", "ff.0"], r=3, lora_alpha=6, use_dora=True),
        "vera": peft.VeraConfig(target_modules=["to_q", "ff.0"], r=4),
    }[case]
    wanted = peft_folder(setting, model, tmp_path / "a")
    with pytest.raises(CheckpointError, match="follows from the base"):
        convert(tmp_path / "a", tmp_path / "b", "kohya")
    convert(tmp_path / "a", tmp_path / "b", "kohya", base=base_model(base(model, tmp_path / "base")))
    # A DoRA's dW is the difference of two weights, so it has the rounding of W and not of dW.
    close(found(tmp_path / "b"), wanted, 2e-5)
    if case == "vera":
        convert(tmp_path / "a", tmp_path / "v", "peft", base=base_model(tmp_path / "base"))
        close(found(tmp_path / "v"), wanted, WAYS)
        assert json.loads((tmp_path / "v" / "adapter_config.json").read_text())["peft_type"] == "VERA"


def test_adalora_stays_adalora(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    setting = peft.AdaLoraConfig(target_modules=["to_q", "ff.0"], init_r=4, target_r=2, lora_alpha=6, total_step=10)
    wanted = peft_folder(setting, Net(), tmp_path / "a")
    convert(tmp_path / "a", tmp_path / "b", "peft")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tuned = peft.PeftModel.from_pretrained(Net(), str(tmp_path / "b"))
    assert type(tuned.base_model).__name__ == "AdaLoraModel"
    close(found(tmp_path / "b"), wanted, WAYS)


class Words(nn.Module):
    """An embedding, a classifier, a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(50, 16)
        self.body = nn.Linear(16, 16)
        self.norm = nn.LayerNorm(16)
        self.classifier = nn.Linear(16, 3)


@pytest.mark.parametrize("with_base", [False, True])
def test_embeddings_and_whole_modules_stay(with_base: bool, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model = Words()
    setting = peft.LoraConfig(target_modules=["words", "body"], modules_to_save=["classifier"], r=4, lora_alpha=8)
    wanted = peft_folder(setting, model, tmp_path / "a")
    place = base_model(base(model, tmp_path / "base")) if with_base else None
    convert(tmp_path / "a", tmp_path / "b", "peft", base=place)
    tuned = peft.PeftModel.from_pretrained(copy.deepcopy(model), str(tmp_path / "b")).double().merge_and_unload()
    for name, delta in wanted.items():
        after = tuned.get_submodule(name).weight.detach().numpy()
        before = model.get_submodule(name).weight.detach().double().numpy()
        assert np.abs(after - before - delta).max() < WAYS * np.abs(delta).max()
    with pytest.raises(CheckpointError, match="kohya files hold no such values"):
        convert(tmp_path / "a", tmp_path / "c", "kohya")


class Lookup(nn.Module):
    """Tables, a square one among them and one that is adapted where it is read, and a layer on them."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.square = nn.Embedding(50, 16), nn.Embedding(16, 16)
        self.capped = nn.Embedding(20, 16, max_norm=4.0)
        self.body = nn.Linear(16, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.body(torch.tanh(self.words(x) + self.square(x % 16)) + self.capped(x % 20))
        return y


TABLES = {"words", "square", "capped"}


def looked_up(folder: Path) -> tuple[nn.Module, dict[str, np.ndarray]]:
    """A base, and a folder of ours of an adapter on all of its layers; the weights that they come to."""
    torch.manual_seed(0)
    model = Lookup()
    tuned = sl.attach(copy.deepcopy(model), sl.lora(3, alpha=5), [*TABLES, "body"], seed=0)
    shuffle(tuned.parameters())
    tuned.save(folder)
    tuned.save(folder.parent / "direct", format="peft")
    return model, {n: p.detach().double().numpy() for n, p in tuned.bake().named_parameters()}


def merged(folder: Path, model: nn.Module) -> dict[str, np.ndarray]:
    """The weights that PEFT makes of a folder of its own, each key of which it has to know."""
    peft = pytest.importorskip("peft")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        theirs = peft.PeftModel.from_pretrained(copy.deepcopy(model), str(folder))
    return {n: p.detach().double().numpy() for n, p in theirs.merge_and_unload().named_parameters()}


@pytest.mark.parametrize("with_base", [False, True])
def test_tables_of_ours_are_pefts_embeddings(with_base: bool, tmp_path: Path) -> None:
    """Of what was saved, of another declaration and a sum made of it, and back from PEFT."""
    model, wanted = looked_up(tmp_path / "own")
    place = base_model(base(model, tmp_path / "base")) if with_base else None
    facts = json.loads((tmp_path / "own" / "adapter.json").read_text())["entries"]
    assert [sorted(entry["tables"]) for entry in facts] == [sorted(TABLES)]
    sl.convert(tmp_path / "own", sl.lora(4)).write(tmp_path / "converted")
    sl.combine({tmp_path / "own": 1.0}).write(tmp_path / "combined")  # type: ignore[dict-item]
    convert(tmp_path / "own", tmp_path / "first", "peft", base=place)
    convert(tmp_path / "first", tmp_path / "back", "superlora", base=place)
    close(merged(tmp_path / "direct", model), wanted, WAYS)
    for source in ("own", "converted", "combined", "back"):
        convert(tmp_path / source, tmp_path / f"{source} in PEFT", "peft", base=place)
        found = merged(tmp_path / f"{source} in PEFT", model)
        close(found, wanted, WAYS)
        again = sl.load(copy.deepcopy(model), tmp_path / source).bake()
        close({n: p.detach().double().numpy() for n, p in again.named_parameters()}, wanted, WAYS)


@pytest.mark.parametrize("name", ["words", "square"])
def test_dora_of_a_table_meets_its_base_as_it_is_kept(name: str, tmp_path: Path) -> None:
    """A checkpoint has (num, dim), dW is (dim, num), and which is which no size of a square one tells."""
    peft = pytest.importorskip("peft")
    model = Lookup()
    wanted = peft_folder(peft.LoraConfig(target_modules=[name], use_dora=True, r=3), model, tmp_path / "a")
    convert(tmp_path / "a", tmp_path / "b", "superlora", base=base_model(base(model, tmp_path / "base")))
    saved = own.read(tmp_path / "b")
    assert saved.tables == {name}
    close({name: deltas(Fitted(saved.entries, saved.tensors))[name].T}, wanted, WAYS)
    loaded = sl.load(copy.deepcopy(model), tmp_path / "a")
    close({name: loaded.delta(name).detach().numpy().T}, wanted, WAYS)


def test_tables_of_an_older_release_are_told_by_the_base(tmp_path: Path) -> None:
    """Which has (num, dim) where the adapter has (dim, num), and no bias; of a square table nothing tells."""
    model, wanted = looked_up(tmp_path / "own")
    saved = own.read(tmp_path / "own")
    del wanted["square.weight"]
    entries = [Entry(e.spec, {n: s for n, s in e.targets.items() if n != "square"}) for e in saved.entries]
    assert "tables" not in json.loads(_json(tmp_path / "old", entries, saved.tensors))["entries"][0]
    convert(tmp_path / "old", tmp_path / "b", "peft", base=base_model(base(model, tmp_path / "base")))
    found = merged(tmp_path / "b", model)
    close({n: found[n] for n in wanted}, wanted, WAYS)


def _json(folder: Path, entries: list[Entry], tensors: Any) -> str:
    """Save the groups of some targets, in the order of the entries."""
    names = {n for e in entries for g, _ in e.spec.lay_out(e.targets) for n in g.members}
    whole = [g for e in own.read(folder.parent / "own").entries for g, _ in e.spec.lay_out(e.targets)]
    kept = [k for k, group in enumerate(whole) if set(group.members) <= names]
    moved = {f"group{new}.": f"group{old}." for new, old in enumerate(kept)}
    nodes = {new + n.removeprefix(old): t for new, old in moved.items() for n, t in tensors.items() if n.startswith(old)}
    own.write(folder, entries, nodes)
    return (folder / "adapter.json").read_text()


def test_norms_and_biases_stay_in_lycoris_files(tmp_path: Path) -> None:
    tensors = {"lora_unet_body.lora_up.weight": torch.ones(16, 2), "lora_unet_body.lora_down.weight": torch.ones(2, 16)}
    tensors |= {f"lora_unet_{n}": torch.ones(16) for n in ("body.diff_b", "norm.w_norm", "norm.b_norm")}
    write(tmp_path / "a.safetensors", tensors)
    convert(tmp_path / "a.safetensors", tmp_path / "b.safetensors", "lycoris")
    first, second = fit(tmp_path / "a.safetensors", Words()), fit(tmp_path / "b.safetensors", Words())
    assert first.added.keys() == second.added.keys() == {"body.bias", "norm.weight", "norm.bias"}
    with pytest.raises(CheckpointError, match="peft files hold no such values"):
        convert(tmp_path / "a.safetensors", tmp_path / "c", "peft", base=base_model(base(Words(), tmp_path / "base")))


# --- show -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("format", FORMATS)
def test_show_tells_norms_of_dense_dw(format: str, tmp_path: Path) -> None:
    adapter = made(sl.lokr(2, alpha=3), LAYERS)
    save(adapter, tmp_path, format)
    contents = show(tmp_path)
    wanted = deltas(adapter)
    assert len(contents.weights) == len(wanted)
    norms = sorted(float(np.linalg.norm(d)) for d in wanted.values())
    largest = sorted(float(np.linalg.norm(d, 2)) for d in wanted.values())
    assert np.allclose(sorted(w.norm or 0.0 for w in contents.weights), norms, rtol=1e-5)
    assert np.allclose(sorted(w.largest or 0.0 for w in contents.weights), largest, rtol=1e-5)
    assert sum(v**2 for v in contents.layers().values()) == pytest.approx(sum(n**2 for n in norms), rel=1e-5)
    assert "norm of dW, layer by layer:" in str(contents)


def saved_anew(spec: sl.AdapterSpec, folder: Path) -> sl.Tuned:
    """An adapter of this library with random values, saved."""
    torch.manual_seed(4)
    tuned = sl.attach(nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16)).double(), spec, ["0", "1"], dtype=torch.float64)
    with torch.no_grad():
        for own in tuned.parameters():
            own.copy_(torch.randn_like(own))
    tuned.save(folder)
    return tuned


@pytest.mark.parametrize(
    ("spec", "factor"),
    [(sl.shira(9, alpha=3.0), 1), (sl.c3a(4, alpha=3.0), 2 / 16), (sl.dora(sl.shira(9)), 1), (sl.dora(sl.c3a(4)), 2 / 16)],
    ids=["shira", "c3a", "dora(shira)", "dora(c3a)"],
)
def test_show_tells_norms_of_nodes_with_maps(spec: sl.AdapterSpec, factor: float, tmp_path: Path) -> None:
    """Each number stands in dW once; of circulant blocks four times, divided by the weight's 16 inputs."""
    tuned = saved_anew(spec, tmp_path)
    contents = show(tmp_path)
    for shown in contents.weights:
        values = [v for n, v in tuned._members[shown.name].adapter.named_parameters() if n != "magnitude"]
        own = float(np.linalg.norm(values[0].detach().numpy()))
        assert shown.norm == pytest.approx(abs(spec.scale) * own * factor, rel=1e-6)  # the norm of a float32 dW
        assert (shown.method, shown.scale, shown.dora) == ("network", spec.scale, spec.join is not None)
        assert shown.size == values[0].numel() + 16 * shown.dora
    assert sum(shown.size for shown in contents.weights) == tuned.num_parameters
    assert "the base" not in str(contents)


def test_show_tells_dora_of_ours_as_that_of_others(tmp_path: Path) -> None:
    """dW is what is added to W before the rows are scaled."""
    tuned = saved_anew(sl.dora(sl.lora(3, alpha=5)), tmp_path / "own")
    tuned.save(tmp_path / "peft", "peft")
    for path in ("own", "peft"):
        contents = show(tmp_path / path)
        for shown in contents.weights:
            nodes = {n: v.detach().numpy() for n, v in tuned._members[shown.name[-1]].adapter.named_parameters()}
            wanted = 5 / 3 * nodes["node_factor_out"] @ nodes["node_factor_in"].T
            assert shown.norm == pytest.approx(np.linalg.norm(wanted), rel=1e-6)
            assert shown.largest == pytest.approx(np.linalg.norm(wanted, 2), rel=1e-6)
            assert (shown.method, shown.ranks, shown.dora) == ("lora", (3,), True)
            assert path == "peft" or shown.size == 3 * 32 + 16
        assert "lora (DoRA)" in str(contents)


@pytest.mark.parametrize(
    "spec", [sl.oft(4), sl.boft(4, scaled=True), sl.AdapterSpec(sl.CP(2), join=sl.Multiply("left"))], ids=str
)
def test_show_says_that_a_product_needs_the_base(
    spec: sl.AdapterSpec, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tuned = saved_anew(spec, tmp_path)
    assert main(["show", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert f"{spec.join}, dW needs the base's weights" in printed
    assert "norm of dW" not in printed
    contents = show(tmp_path)
    assert [(w.norm, w.largest, w.shape, w.join) for w in contents.weights] == [(None, None, (16, 16), str(spec.join))] * 2
    assert sum(w.size for w in contents.weights) == sum(t.numel() for t in tuned._saved().tensors.values())
    assert main(["show", str(tmp_path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["weights"][0]["norm"] is None


@pytest.mark.parametrize("name", CATALOGUE)
def test_show_looks_into_every_variant(name: str, tmp_path: Path) -> None:
    other = {"c3a": "size", "oft": "size", "vb_lora": "length"}
    setting = other.get(name, size_setting(name))
    spec = CATALOGUE[name](**{} if setting is None else {setting: 4})
    assert isinstance(spec, sl.AdapterSpec)
    tuned = saved_anew(spec, tmp_path)
    contents = show(tmp_path)
    assert len(contents.weights) == 2
    assert str(contents)
    for shown in contents.weights:
        if spec.join is None:
            assert shown.norm == pytest.approx(float(tuned.delta(shown.name).detach().norm()), rel=1e-6)
    # What several share is counted once.
    assert sum(w.size for w in contents.weights) == sum(t.numel() for t in tuned._saved().tensors.values())


def test_show_and_convert_as_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    adapter = made(sl.loha(2, alpha=3), LAYERS)
    save(adapter, tmp_path / "a", "lycoris")
    place = str(base(Net(), tmp_path / "base"))
    assert main(["convert", str(tmp_path / "a"), str(tmp_path / "b"), "--to", "peft", "--base", place, "--rank", "2"]) == 0
    printed = capsys.readouterr().out
    assert all(name in printed for name in LAYERS)
    assert "rank 2" in printed
    assert main(["show", str(tmp_path / "b"), "--json", "--draw", str(tmp_path / "b.png")]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["origin"] == "peft"
    assert {w["method"] for w in data["weights"]} == {"lora"}
    assert (tmp_path / "b.png").stat().st_size > 1000
    assert main(["show", str(tmp_path / "a")]) == 0
    assert "loha" in capsys.readouterr().out


REFUSED = {
    "no file": (["show", "{}/nowhere"], "is missing; give a file or folder that is there"),
    "no adapter": (["show", "{}/base"], "holds 2 files such as"),
    "no base": (["convert", "{}/a", "{}/b", "--to", "peft"], "are known only with the base model; give it: --base FILE."),
    "no part": (["convert", "{}/a", "{}/b", "--to", "kohya", "--part", "vae"], "has no part 'vae'"),
    "an error out of reach": (
        ["convert", "{}/a", "{}/b", "--to", "kohya", "--rank", "1", "--error", "1e-6"],
        "for a relative error of 1e-06, above rank=1",
    ),
    "heads without gguf": (["convert", "{}/a", "{}/b", "--to", "kohya", "--heads", "2", "2"], "are for --to gguf"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused_is_one_line_and_status_2(case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save(made(sl.loha(2, alpha=3), LAYERS), tmp_path / "a", "kohya")
    base(Net(), tmp_path / "base")
    words, answer = REFUSED[case]
    assert main([w.format(tmp_path) for w in words]) == 2
    told = capsys.readouterr().err
    assert answer in told
    assert told.count("\n") == 1
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize("spec", [sl.lotr(2), sl.lorta(2), sl.lokr(2), sl.AdapterSpec(sl.Sum(sl.CP(1), sl.CP(2)))], ids=str)
def test_show_counts_each_tensor_once(spec: sl.AdapterSpec, tmp_path: Path) -> None:
    """Nodes that several weights share are in the whole once."""
    adapter = made(spec, LAYERS)
    save(adapter, tmp_path, "superlora")
    contents = show(tmp_path)
    numbers = sum(tensor.numel() for tensor in adapter.tensors.values())
    assert sum(w.size for w in contents.weights) == numbers
    assert f"{numbers:,} numbers (float32), {4 * numbers:,} bytes" in str(contents)


def test_convert_replaces_no_file_that_holds_no_adapter(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save(made(sl.lora(2), LAYERS), tmp_path / "lora", "superlora")
    base = tmp_path / "base.safetensors"
    save_file(Net().state_dict(), base)
    before = base.read_bytes()
    words = ["convert", str(tmp_path / "lora"), str(base), "--to", "kohya"]
    assert main(words) == 2
    assert "base.safetensors is there and holds no adapter; name another, or replace it (--force)." in capsys.readouterr().err
    assert base.read_bytes() == before
    assert main([*words, "--force"]) == 0
    assert main(words) == 0  # an adapter replaces an adapter
    assert "is what is read, too" in str(refusal(base, base, "lycoris"))
    snake = tmp_path / "snake.safetensors"  # a model whose activations have a parameter of a name that adapters use
    save_file({"block.0.alpha": torch.ones(4), "block.0.conv.weight": torch.ones(4, 4, 3)}, snake)
    assert "holds no adapter" in str(refusal(tmp_path / "lora", snake, "kohya"))


def test_convert_leaves_one_adapter_in_a_folder(tmp_path: Path) -> None:
    place = tmp_path / "lora"
    save(made(sl.lora(2), LAYERS), place, "superlora")
    assert "holds an adapter in the format superlora (adapter.json)" in str(refusal(place, place, "peft"))
    assert "is what is read, too" not in str(refusal(place, place, "peft"))
    convert(place, place, "peft", force=True)
    assert show(place).origin == "peft"
    assert sorted(file.name for file in place.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    for format, held in (("superlora", "adapter_config.json"), ("kohya", "adapter_config.json")):
        assert f"in the format peft ({held})" in str(refusal(place, place, format))
    assert "is what is read, too" in str(refusal(place, place, "peft"))
    convert(place, tmp_path / "one", "gguf")
    convert(place, tmp_path / "one", "gguf")
    assert "in the format gguf (lora.gguf)" in str(refusal(place, tmp_path / "one", "kohya"))
    (tmp_path / "one" / "lora.gguf").write_bytes(b"GGUF, and not an adapter")
    assert "holds no adapter" in str(refusal(place, tmp_path / "one", "gguf"))


def refusal(source: Path, target: Path, to: Any) -> CheckpointError:
    """Why nothing was converted."""
    with pytest.raises(CheckpointError) as found:
        convert(source, target, to)
    return found.value


def test_show_says_what_only_a_model_knows(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    peft_folder(peft.VeraConfig(target_modules=["to_q", "ff.0"], r=4), Net(), tmp_path)
    contents = show(tmp_path)
    assert {(w.method, w.norm) for w in contents.weights} == {("vera", None)}
    assert "vera" in str(contents)


def test_layers_by_name() -> None:
    assert layer_of("text_model.encoder.layers.11.mlp.fc1") == "text_model.encoder.layers.11"
    assert layer_of("lora_te1_text_model_encoder_layers_11_mlp_fc1") == "lora_te1_text_model_encoder_layers_11"
    assert layer_of("head") == "head"


def test_a_base_is_read_by_its_headers(tmp_path: Path) -> None:
    model = Net()
    place = base_model(base(model, tmp_path / "base"))
    assert place.shapes == shapes(model)
    assert place.kernels == {"conv_in": (3, 3), "down_blocks.0": (1, 1), "down_blocks.1": (3, 3)}
    for name in place.shapes:
        assert torch.equal(place.weight(name), model.get_submodule(name).weight.flatten(1))  # type: ignore[operator]
    with pytest.raises(CheckpointError, match="holds no safetensors file"):
        base_model(tmp_path)


def test_a_base_that_keeps_in_out_is_told_by_its_biases(tmp_path: Path) -> None:
    """GPT-2's layers: (out, in) of what is not square; the values of a square one, which is either way round, are refused."""
    sizes = {"attn.c_attn": (6, 18), "attn.c_proj": (6, 6), "mlp.c_fc": (6, 24), "mlp.c_proj": (24, 6)}
    tensors = {f"h.0.{n}.{k}": torch.randn(s if k == "weight" else s[1:]) for n, s in sizes.items() for k in ("weight", "bias")}
    write(tmp_path / "base.safetensors", tensors)
    place = base_model(tmp_path / "base.safetensors")
    assert place.shapes == {f"h.0.{name}": shape[::-1] for name, shape in sizes.items()}
    assert torch.equal(place.weight("h.0.attn.c_attn"), tensors["h.0.attn.c_attn.weight"].T)
    with pytest.raises(CheckpointError, match=r"'h.0.attn.c_proj' is square, .* 'h.0.attn.c_attn' keeps \(in, out\); load\(\)"):
        place.weight("h.0.attn.c_proj")
    adapter = {"lora_unet_h_0_attn_c_attn.lora_up.weight": torch.randn(18, 2)}
    adapter |= {"lora_unet_h_0_attn_c_attn.lora_down.weight": torch.randn(2, 6)}
    write(tmp_path / "a.safetensors", adapter)
    convert(tmp_path / "a.safetensors", tmp_path / "b", "peft", base=place)
    up, down = adapter.values()
    assert np.allclose(parsed(tmp_path / "b").weights[0].dense().numpy(), (up.double() @ down.double()).numpy(), rtol=WAYS)


def test_an_adapter_of_ours_keeps_its_declaration(tmp_path: Path) -> None:
    """Kohya's file of a LoTR is one of LoRAs, but a copy in this format is the LoTR itself."""
    adapter = filled_in(made(sl.lotr(2), LAYERS).entries[0])
    save(adapter, tmp_path / "a", "superlora")
    convert(tmp_path / "a", tmp_path / "b", "superlora")
    assert own.read(tmp_path / "b").entries == adapter.entries


def test_values_beside_become_this_librarys(tmp_path: Path) -> None:
    """Biases and norms that are added need the base; whole modules do not."""
    tensors = {"lora_unet_body.lora_up.weight": torch.ones(16, 2), "lora_unet_body.lora_down.weight": torch.ones(2, 16)}
    write(tmp_path / "a.safetensors", {**tensors, "lora_unet_norm.w_norm": torch.full((16,), 0.5)})
    model = Words()
    place = base_model(base(model, tmp_path / "base"))
    convert(tmp_path / "a.safetensors", tmp_path / "b", "superlora", base=place)
    saved = own.read(tmp_path / "b")
    assert saved.targets == {"body": (16, 16)}
    assert torch.equal(saved.buffers["norm.weight"], model.norm.weight + 0.5)
    fitted = fit(tmp_path / "a.safetensors", model)
    with pytest.raises(CheckpointError, match=r"'norm.weight' is \(3,\) in this base and \(16,\) in the file"):
        fitted.saved(lambda name: torch.ones(3))
    peft = pytest.importorskip("peft")
    setting = peft.LoraConfig(target_modules=["body"], modules_to_save=["classifier"], r=4)
    peft_folder(setting, model, tmp_path / "p")
    convert(tmp_path / "p", tmp_path / "q", "superlora")
    assert own.read(tmp_path / "q").buffers.keys() == {"classifier.weight", "classifier.bias"}
    convert(tmp_path / "q", tmp_path / "r", "peft")
    first, second = fit(tmp_path / "p", model), fit(tmp_path / "r", model)
    assert all(torch.equal(value, second.replaced[name]) for name, value in first.replaced.items())


LOADED = {
    "lora": lambda peft: peft.LoraConfig(r=4, lora_alpha=12, rank_pattern={"to_q": 2}),
    "loha": lambda peft: peft.LoHaConfig(r=3, alpha=6, use_effective_conv2d=True),
    "lokr": lambda peft: peft.LoKrConfig(r=2, alpha=5),
}


@pytest.mark.parametrize("case", LOADED)
def test_pefts_adapter_runs_here(case: str, tmp_path: Path) -> None:
    """Read, written in this library's format, loaded onto the model: equal outputs, merged and not."""
    peft = pytest.importorskip("peft")
    setting = LOADED[case](peft)
    setting.target_modules = {"to_q", "to_v", "ff.0", "conv_in", "down_blocks.0", "down_blocks.1"}
    model, x = Net(), inputs()
    peft_folder(setting, model, tmp_path / "a")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.PeftModel.from_pretrained(copy.deepcopy(model), str(tmp_path / "a"))
    convert(tmp_path / "a", tmp_path / "b", "superlora", base=base_model(base(model, tmp_path / "base")))
    ours = copy.deepcopy(model)
    tuned = sl.load(ours, tmp_path / "b")
    with torch.no_grad():
        wanted = theirs(x)
        assert (wanted - model(x)).abs().max() > 100 * OUTPUTS
        torch.testing.assert_close(ours(x), wanted, atol=OUTPUTS, rtol=OUTPUTS)
        tuned.merge()
        torch.testing.assert_close(ours(x), wanted, atol=OUTPUTS, rtol=OUTPUTS)


class Normal(nn.Module):
    """A batch norm, whose running means are buffers, between two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8, 8)
        self.norm = nn.BatchNorm1d(8)
        self.last = nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(n, 8) to (n, 3)."""
        y: torch.Tensor = self.last(self.norm(self.first(x)))
        return y


BESIDE = {
    "a bias of a target": ["first.bias"],
    "a bias of another layer": ["last.bias"],
    "a whole layer": ["last.weight", "last.bias"],
    "a whole norm": [f"norm.{n}" for n in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")],
    "running means alone": ["norm.running_mean", "norm.running_var"],
}


@pytest.mark.parametrize("case", BESIDE)
def test_peft_takes_what_trains_beside(case: str, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model, x = Normal().eval(), torch.randn(5, 8)
    state = model.state_dict()
    values = {n: state[n] + torch.rand(state[n].shape).to(state[n].dtype) for n in BESIDE[case]}
    adapter = filled_in(Entry(sl.lora(2, alpha=3), {"first": (8, 8)}))
    beside = Beside(replaced=values, known=tuple(state))
    save_as(adapter.entries, adapter.tensors, tmp_path, "peft", beside=beside)
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(model), str(tmp_path)).eval()
    ours = copy.deepcopy(model)
    with torch.no_grad():
        ours.first.weight += torch.from_numpy(deltas(adapter)["first"]).float()
        for name, value in values.items():
            ours.state_dict()[name].copy_(value)
        torch.testing.assert_close(theirs(x), ours(x), atol=OUTPUTS, rtol=OUTPUTS)
    again = parsed(tmp_path).fitted({"first": (8, 8)}, parameters=list(state))
    assert again.replaced.keys() == values.keys()
    assert all(torch.equal(value, values[name]) for name, value in again.replaced.items())
