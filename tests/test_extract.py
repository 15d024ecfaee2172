"""Adapters from weights: of the difference of two checkpoints, and of another adapter, through the public names."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from models import TARGETS, Tiny, noise, perturb, seeded
from safetensors.torch import save_file
from torch import nn

import superlora_tn as sl
from superlora_tn.cli import main
from superlora_tn.tools.extract import extract

SPECS = {
    "lora": sl.lora(2, alpha=4),
    "lokr": sl.lokr(2),
    "lotr": sl.lotr(2),
    "train": sl.AdapterSpec(sl.TensorTrain(2), sl.PhysicalFold("member out in")),
}


def checkpoints(folder: Path, spec: sl.AdapterSpec) -> tuple[nn.Module, nn.Module]:
    """A model before and after, in float64, whose difference a declaration made; their files."""
    model = seeded(0, Tiny).double()
    save_file(model.state_dict(), folder / "base.safetensors")
    tuned = sl.attach(model, spec, TARGETS, seed=1, dtype=torch.float64)
    perturb(tuned)
    after = tuned.bake()
    save_file(after.state_dict(), folder / "tuned.safetensors")
    return seeded(0, Tiny).double(), after


@pytest.mark.parametrize("name", SPECS)
def test_what_a_declaration_made_is_recovered(name: str, tmp_path: Path) -> None:
    before, after = checkpoints(tmp_path, SPECS[name])
    found = extract(tmp_path / "base.safetensors", tmp_path / "tuned.safetensors", SPECS[name], model=before)
    # dW lies in the difference of two float64 weights, some ten times as large.
    assert found.adapter.error < 1e-12
    assert not found.left
    found.adapter.write(tmp_path / "adapter", torch.float64)
    sl.load(before, tmp_path / "adapter")
    x = noise(2, 5, 12, dtype=torch.float64)
    torch.testing.assert_close(before(x), after(x), rtol=1e-9, atol=1e-9)


def test_errors_are_those_of_the_oracle(tmp_path: Path) -> None:
    """Of rank 1 where 2 are needed: the rest of the singular values, weight by weight."""
    before, after = checkpoints(tmp_path, SPECS["lora"])
    files = (tmp_path / "base.safetensors", tmp_path / "tuned.safetensors")
    found = sl.extract(*files, sl.lora(1), ["q_proj", "up"], model=before)
    assert {n.rpartition(".")[2] for n in found.adapter.shapes} == {"q_proj", "up"}
    for name, error in found.adapter.errors.items():
        delta = after.get_submodule(name).weight.detach() - before.get_submodule(name).weight.detach()
        values = torch.linalg.svdvals(delta)
        assert error == pytest.approx(float(values[1:].norm() / values.norm()), rel=1e-9)
    assert {n.rpartition(".")[0].rpartition(".")[2] for n in found.left} == {"v_proj", "down"}
    assert "left as in the base" in str(found)


def test_a_checkpoint_of_another_model_is_refused(tmp_path: Path) -> None:
    save_file({"a.weight": torch.zeros(2, 3)}, tmp_path / "a.safetensors")
    save_file({"a.weight": torch.zeros(2, 4)}, tmp_path / "b.safetensors")
    save_file({"a.weight": torch.zeros(2, 3), "c.weight": torch.zeros(2, 2)}, tmp_path / "c.safetensors")
    for first, second, words in (("a", "b", "of shape"), ("a", "c", "which .* lacks"), ("c", "a", "not at all")):
        with pytest.raises(sl.CheckpointError, match=words):
            extract(tmp_path / f"{first}.safetensors", tmp_path / f"{second}.safetensors", sl.lora(1))
    with pytest.raises(sl.CheckpointError, match="no weight differs"):
        extract(tmp_path / "a.safetensors", tmp_path / "a.safetensors", sl.lora(1))


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoints(tmp_path, SPECS["lokr"])
    files = [str(tmp_path / f"{name}.safetensors") for name in ("base", "tuned")]
    out = tmp_path / "out"
    assert main(["extract", *files, "--variant", "lokr", "--rank", "2", "--out", str(out), "--linear"]) == 0
    printed = capsys.readouterr().out
    assert "in all the relative error is" in printed
    assert f"saved: {out}" in printed
    assert sl.load(seeded(0, Tiny).double(), out).spec == sl.lokr(2)
    assert main(["extract", *files, "--variant", "lora", "--budget", "300", "--out", str(out), "--json", "--linear"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["parameters"] <= 300
    assert 0 < facts["error"] < 1
    assert set(facts["errors"]) == set(sl.load(seeded(0, Tiny).double(), out).targets)
    assert (
        main(["extract", *files, "--variant", "lora", "--rank", "1", "--out", str(tmp_path / "x.safetensors"), "--linear"]) == 2
    )
    assert "is the name of a file, and this library's own format is a folder" in capsys.readouterr().err
    for words in ("--variant lorra", "--budget 9 --rank 2", "--variant krona --budget 9", "--budget 9"):
        assert main(["extract", *files, "--linear", *words.split()]) == 2
        assert capsys.readouterr().err.count("\n") == 1


def test_checkpoints_are_probed_by_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """LoRA's energy is that of the first singular values; HiRA made the difference of the base's own W, so it holds it all."""
    before, after = checkpoints(tmp_path, sl.hira(1))
    words = ["probe", str(tmp_path / "base.safetensors"), str(tmp_path / "tuned.safetensors")]
    names = ["--variants", "lora", "hira", "c3a", "--targets", "q_proj", "--linear"]
    assert main([*words, *names, "--budgets", "50", "100", "--json", "--plot", str(tmp_path / "probe.png")]) == 0
    data = json.loads(capsys.readouterr().out)
    assert (tmp_path / "probe.png").read_bytes().startswith(b"\x89PNG")
    changes = [after.get_submodule(n).weight - before.get_submodule(n).weight for n in shapes_of(before, "q_proj")]
    values = [torch.linalg.svdvals(change.detach()) for change in changes]
    energy = {(row["variant"], row["parameters"]): row["energy"] for row in data["points"]}
    sides = sum(sum(shape) for shape in shapes_of(before, "q_proj").values())
    for r in (1, 2):
        wanted = sum(float(v[:r].square().sum()) for v in values) / sum(float(v.square().sum()) for v in values)
        assert energy["lora", r * sides] == pytest.approx(wanted, rel=1e-9)
    assert energy["hira", sides] == pytest.approx(1.0, abs=1e-12)
    assert set(data["refused"]) == {"c3a"}
    assert main([*words, *names, "--budgets", "50"]) == 0
    told = capsys.readouterr().out
    assert told.splitlines()[0].split() == ["variant", "parameters", "of", "dW", "energy"]
    assert "c3a is left out: " in told


def shapes_of(model: nn.Module, ending: str) -> dict[str, tuple[int, int]]:
    named = {n: m for n, m in model.named_modules() if n.endswith(ending) and isinstance(m, nn.Linear)}
    return {n: (m.out_features, m.in_features) for n, m in named.items()}


def test_an_adapter_becomes_another(tmp_path: Path) -> None:
    model = seeded(0, Tiny).double()
    tuned = sl.attach(model, sl.lokr(1, decompose_both=True), TARGETS, seed=1, dtype=torch.float64)
    perturb(tuned)
    tuned.save(tmp_path / "lokr")
    for source in (tuned, tmp_path / "lokr"):
        found = sl.convert(source, sl.lora(1))
        assert found.is_exact
        for name, delta in found.deltas().items():
            torch.testing.assert_close(delta, tuned.delta(name).detach(), rtol=1e-10, atol=1e-12)
    nearest = sl.convert(tuned, sl.lotr(1))
    assert not nearest.is_exact
    assert 0 < nearest.error < 1


@pytest.mark.parametrize(
    ("source", "to"),
    [(sl.lokr(1), sl.lora(4)), (sl.lora(2), sl.lotr(8)), (sl.lora(2), sl.lora(1))],
    ids=["lokr in lora", "lora in lotr", "truncated"],
)
def test_dora_becomes_another_dora(source: sl.AdapterSpec, to: sl.AdapterSpec, tmp_path: Path) -> None:
    """Its magnitudes stay with their rows; W' is m (W + dW) / ||W + dW|| by the formula, of what dW became."""
    base = seeded(0, Tiny).double()
    model = seeded(0, Tiny).double()
    tuned = sl.attach(model, sl.dora(source), TARGETS, seed=1, dtype=torch.float64)
    perturb(tuned)
    own = {name: adapter for adapter in tuned.adapters for name in adapter.group.members}
    norms = {name: adapter.magnitude_of(name).detach().clone() for name, adapter in own.items()}
    tuned.save(tmp_path / "dora")
    for given in (tuned, tmp_path / "dora"):
        found = sl.convert(given, sl.dora(to))
        plain = sl.convert(sl.attach(seeded(0, Tiny).double(), source, TARGETS, seed=1, dtype=torch.float64), to)
        assert found.num_parameters == plain.num_parameters + sum(norm.numel() for norm in norms.values())
        found.write(tmp_path / "other", torch.float64)
        again = sl.load(seeded(0, Tiny).double(), tmp_path / "other")
        for name, norm in norms.items():
            weight = base.get_submodule(name).weight.detach()
            delta = own[name].delta(name).detach()
            if not found.is_exact:
                left, values, right = torch.linalg.svd(delta)
                delta = left[:, :1] * values[:1] @ right[:1]
            moved = weight + delta
            wanted = norm[:, None] * moved / moved.norm(dim=1, keepdim=True) - weight
            torch.testing.assert_close(again.delta(name), wanted, rtol=1e-9, atol=1e-10)  # dW by SVD, in float64
        again.detach()
    with pytest.raises(sl.SpecError, match="joins otherwise"):
        sl.convert(tuned, to)
    tuned.detach()
    with pytest.raises(sl.SpecError, match="joins otherwise"):
        sl.convert(sl.attach(model, source, TARGETS, seed=1), sl.dora(to))


def test_what_a_conversion_would_not_keep_is_refused(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 4))
    rows = sl.attach(model, sl.lora(1), [sl.Rows("0", ("a", "b"), use=("a",))], name="rows")
    beside = sl.attach(model, sl.lora(1), ["1"], name="beside", also=["1.bias"])
    for handle, words in ((rows, "block of rows"), (beside, "beside it")):
        with pytest.raises(sl.CheckpointError, match=words):
            sl.convert(handle, sl.lora(2))
    beside.save(tmp_path / "peft", format="peft")
    with pytest.raises(sl.CheckpointError, match="another library"):
        sl.convert(tmp_path / "peft", sl.lora(2))


def test_decompose_is_public() -> None:
    weights = {"a": noise(6, 4, dtype=torch.float64), "b": noise(6, 4, seed=1, dtype=torch.float64)}
    found = sl.decompose(weights, sl.lora(4))
    assert found.is_exact
    with pytest.raises(sl.FitError, match="not finite"):
        sl.decompose({"a": torch.full((2, 2), torch.nan)}, sl.lora(1))


def test_a_conversion_takes_the_bases_own_values_from_the_model(tmp_path: Path) -> None:
    """Of a network in itself with larger bonds, and of dW that HiRA made and `dense` holds, which W alone tells apart."""
    model = seeded(0, Tiny).double()
    tuned = sl.attach(model, sl.hira(1), TARGETS, seed=1, dtype=torch.float64)
    perturb(tuned)
    tuned.save(tmp_path / "hira")
    deltas = {name: tuned.delta(name).detach().clone() for name in tuned.targets}
    for source in (tuned, tmp_path / "hira"):
        grown = sl.convert(source, sl.hira(2))
        assert grown.is_exact
        for name, delta in grown.deltas().items():
            torch.testing.assert_close(delta, deltas[name], rtol=1e-12, atol=1e-14)
    sl.convert(tuned, sl.dense()).write(tmp_path / "dense", torch.float64)
    tuned.merge()
    with pytest.raises(sl.FitError, match=r"nodes do not tell; unmerge\(\) it first"):  # W is not what it was
        sl.convert(tuned, sl.lora_xs(1))
    tuned.unmerge()
    tuned.detach()
    with pytest.raises(sl.FitError, match=r"load\(\) the adapter on its base"):
        sl.convert(tmp_path / "dense", sl.hira(1))
    found = sl.convert(sl.load(model, tmp_path / "dense"), sl.hira(1))
    assert found.error < 1e-9  # W rounds once in float64, and least squares solve with the squares of its values
    for name, delta in found.deltas().items():
        torch.testing.assert_close(delta, deltas[name], rtol=1e-7, atol=1e-9)


class Convs(nn.Module):
    """Kernels of two sizes, of one position and of none."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.ModuleList(nn.Conv2d(8, 8, 3, padding=1) for _ in range(2))
        self.wide, self.point, self.head = nn.Conv1d(8, 4, 5), nn.Conv2d(8, 8, 1), nn.Linear(8, 6)


def convolved(folder: Path, spec: sl.AdapterSpec, targets: list[str]) -> dict[str, torch.Tensor]:
    """Checkpoints in float64 whose difference `attach` made of a declaration; dW of each weight, as it is stored."""
    model = seeded(0, Convs).double()
    base = {name: value.clone() for name, value in model.state_dict().items()}
    save_file(base, folder / "base.safetensors")
    tuned = sl.attach(model, spec, targets, seed=1, dtype=torch.float64)
    perturb(tuned)
    after = tuned.bake().state_dict()
    save_file(after, folder / "tuned.safetensors")
    return {name: after[name] - base[name] for name in base if bool((after[name] != base[name]).any())}


def test_the_kernel_is_taken_from_the_parameters_of_the_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Channels split 2 x 4: W1 of 4 numbers, W2 = B (4 x 2) A (2 x 36); lokr leaves W2 dense, as 2 is half of 4 channels."""
    delta = convolved(tmp_path, sl.conv_lokr(2), ["conv.0", "conv.1"])["conv.0.weight"]
    files = [str(tmp_path / f"{name}.safetensors") for name in ("base", "tuned")]
    spec = tmp_path / "spec.json"
    spec.write_text(json.dumps(sl.conv_lokr(2).to_dict()))
    words = ["extract", *files, "--targets", "conv.0", "conv.1", "--out", str(tmp_path / "out"), "--json", "--linear"]
    sizes = {("--spec", str(spec)): 4 + 4 * 2 + 2 * 36, ("--variant", "lokr", "--rank", "2"): 4 + 4 * 36}
    for more, size in sizes.items():
        assert main([*words, *more]) == 0
        facts = json.loads(capsys.readouterr().out)
        assert facts["parameters"] == 2 * size
        assert facts["error"] < 1e-9
        model = seeded(0, Convs).double()
        loaded = sl.load(model, tmp_path / "out")
        assert loaded.num_parameters == facts["parameters"]
        torch.testing.assert_close(loaded.delta("conv.0").double(), delta.flatten(1), rtol=1e-6, atol=1e-7)
    assert main(["probe", *files, "--variants", "lokr", "--budgets", str(facts["parameters"]), "--json", "--linear"]) == 0
    [point] = json.loads(capsys.readouterr().out)["points"]
    assert point["parameters"] == facts["parameters"]
    assert point["energy"] == pytest.approx(1, abs=1e-9)
    assert main([*words, "--variant", "lokr", "--budget", "300"]) == 0
    assert json.loads(capsys.readouterr().out)["parameters"] == facts["parameters"]


def test_weights_of_several_kernels_are_made_into_one_adapter(tmp_path: Path) -> None:
    """A Kronecker product of channels, whatever kernel stands behind them; the linear layer and the point have none."""
    names = ["conv.0", "conv.1", "wide", "point", "head"]
    deltas = convolved(tmp_path, sl.krona(), names)
    before = seeded(0, Convs).double()
    found = sl.extract(tmp_path / "base.safetensors", tmp_path / "tuned.safetensors", sl.krona(), model=before)
    counts = {"conv": 2 * (4 + 16 * 9), "wide": 4 + 2 * 4 * 5, "point": 4 + 16, "head": 2 * 2 + 3 * 4}
    assert found.adapter.num_parameters == sum(counts.values())
    assert found.adapter.error < 1e-12
    assert {entry.spec.fold.kernel for entry in found.adapter.entries} == {None, (3, 3), (5,)}
    assert sl.attach(seeded(0, Convs), sl.krona(), names).num_parameters == found.adapter.num_parameters
    found.adapter.write(tmp_path / "out", torch.float64)
    loaded = sl.load(before, tmp_path / "out")
    for name in names:
        wanted = deltas[f"{name}.weight"].flatten(1)
        # The nearest product by singular values of the rearranged dW, in float64.
        torch.testing.assert_close(loaded.delta(name), wanted, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(found.adapter.deltas()[name], wanted, rtol=1e-9, atol=1e-12)
        kernel = before.get_submodule(name).weight[0, 0].numel()
        (o, i) = halves(wanted.shape[0]), halves(wanted.shape[1] // kernel)
        blocks = wanted.reshape(*o, *i, kernel).permute(0, 2, 1, 3, 4).reshape(o[0] * i[0], -1)
        assert float(torch.linalg.svdvals(blocks)[1:].norm()) < 1e-12


def halves(side: int) -> tuple[int, int]:
    """A side split most evenly, the smaller factor first."""
    return {4: (2, 2), 6: (2, 3), 8: (2, 4)}[side]


def test_an_adapter_of_convolutions_becomes_another_over_the_same_kernels(tmp_path: Path) -> None:
    """A network in itself, in larger bonds and in one that contains it, from the handle and from its folder."""
    pairs = [
        (sl.krona(), sl.krona()),
        (sl.lokr(1), sl.lokr(2)),
        (sl.conv_lokr(1), sl.conv_lokr(2)),
        (sl.conv_lokr(1), sl.krona()),
        (sl.conv_lora(1, tucker=True), sl.conv_lora(2)),
    ]
    names = ["conv.0", "wide", "point", "head"]
    for spec, to in pairs:
        model = seeded(0, Convs).double()
        tuned = sl.attach(model, spec, names, seed=1, dtype=torch.float64)
        perturb(tuned)
        tuned.save(tmp_path / "adapter")
        deltas = {name: tuned.delta(name).detach() for name in names}
        for source in (tuned, tmp_path / "adapter"):
            found = sl.convert(source, to)
            assert found.is_exact, (spec, to)
            found.write(tmp_path / "converted", torch.float64)
            loaded = sl.load(seeded(0, Convs).double(), tmp_path / "converted")
            assert loaded.num_parameters == sl.attach(seeded(0, Convs), to, names).num_parameters == found.num_parameters
            for name in names:
                torch.testing.assert_close(loaded.delta(name), deltas[name], rtol=1e-8, atol=1e-10)


def test_a_folder_that_does_not_tell_its_kernels_is_no_adapter_with_modes_for_them(tmp_path: Path) -> None:
    """LoRA of a convolution says (out, in) alone; its layer says the kernel."""
    tuned = sl.attach(seeded(0, Convs).double(), sl.lora(1), ["conv.0"], seed=1, dtype=torch.float64)
    perturb(tuned)
    tuned.save(tmp_path / "lora")
    with pytest.raises(sl.SpecError, match="has modes for a kernel"):
        sl.convert(tmp_path / "lora", sl.conv_lora(1))
    found = sl.convert(tuned, sl.conv_lora(1))
    assert found.is_exact
    assert [entry.spec.fold.kernel for entry in found.entries] == [(3, 3)]


def test_what_gives_the_declaration_may_ask_for_the_shapes_alone(tmp_path: Path) -> None:
    checkpoints(tmp_path, SPECS["lora"])
    files = [tmp_path / f"{name}.safetensors" for name in ("base", "tuned")]
    seen: list[object] = []

    def alone(shapes: object) -> sl.AdapterSpec:
        seen.append(shapes)
        return sl.lora(2)

    def both(shapes: object, kernels: object) -> sl.AdapterSpec:
        seen.append(shapes)
        return sl.lora(2)

    one, other = (extract(*files, maker, linear=True).adapter for maker in (alone, both))
    assert one.errors == other.errors
    assert seen[0] == seen[1]


# --- which axis is out ----------------------------------------------------------------------------------------------


class Kept(nn.Module):
    """Layers that keep (in, out) beside such that keep (out, in), of each a square one."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.square = nn.Embedding(9, 6), nn.Embedding(6, 6)
        self.body, self.bare, self.head = nn.Linear(6, 6), nn.Linear(6, 9, bias=False), nn.Linear(6, 5)
        self.conv, self.wide = nn.Conv2d(4, 4, 3), nn.Conv1d(3, 5, 2)
        self.back, self.grouped = nn.ConvTranspose2d(4, 4, 3), nn.ConvTranspose1d(4, 6, 2, groups=2)


class Turned(nn.Module):
    """GPT-2's layer, whose weight is (in, out)."""

    def __init__(self, d_in: int, d_out: int) -> None:
        super().__init__()
        conv1d = pytest.importorskip("transformers.pytorch_utils").Conv1D
        self.plain, self.turned = nn.Linear(d_in, d_out), conv1d(d_out, d_in)


def changed(folder: Path, make: Any) -> tuple[nn.Module, dict[str, torch.Tensor], list[Path]]:
    """A model before, all of its values after a change of each of them, and the checkpoints of both."""
    before = seeded(0, make).double()
    base = {name: value.clone() for name, value in before.state_dict().items()}
    after = {name: value + noise(*value.shape, seed=k, dtype=torch.float64) for k, (name, value) in enumerate(base.items())}
    files = [folder / "base.safetensors", folder / "tuned.safetensors"]
    for values, file in zip((base, after), files, strict=True):
        save_file(values, file)
    return before, after, files


def left_out(found: sl.Extracted, of: nn.Module) -> set[str]:
    """The modules of which nothing is in an adapter, by the names of their weights."""
    return {n.removesuffix(".weight") for n, p in of.named_parameters() if p.ndim > 1} - set(found.adapter.shapes)


def holds(found: sl.Extracted, model: nn.Module, after: dict[str, torch.Tensor], folder: Path) -> None:
    """Loaded and baked, an adapter of dense dW gives each of its weights as it is after, and the layers' bases' outputs."""
    found.adapter.write(folder, torch.float64)
    names = list(found.adapter.shapes)
    sl.load(model, folder).bake()
    for name in names:
        # Base + (after - base), each rounded once in float64.
        torch.testing.assert_close(model.get_parameter(f"{name}.weight"), after[f"{name}.weight"], rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_model_tells_which_axis_is_out(device: str, tmp_path: Path) -> None:
    before, after, files = changed(tmp_path, Kept)
    found = sl.extract(*files, sl.dense(), model=seeded(0, Kept).to(device))
    assert not left_out(found, before)
    assert not found.untold
    holds(found, before, after, tmp_path / "adapter")


def test_gpt2s_layers_are_told_by_their_model(tmp_path: Path) -> None:
    before, after, files = changed(tmp_path, lambda: Turned(6, 6))
    holds(sl.extract(*files, sl.dense(), model=before), before, after, tmp_path / "adapter")


def test_files_alone_tell_what_the_sizes_of_biases_leave_one_way(tmp_path: Path) -> None:
    """Not of squares, of layers without a bias, nor of kernels that a transposed convolution in groups may have as well."""
    before, after, files = changed(tmp_path, Kept)
    found = sl.extract(*files, sl.dense())
    assert set(found.adapter.shapes) == {"head", "wide"}
    assert set(found.untold) == {f"{name}.weight" for name in left_out(found, before)}
    assert set(found.untold) < set(found.left)
    assert "7 matrices are left out, as nothing tells which axis is out" in str(found)
    holds(found, before, after, tmp_path / "adapter")
    before, after, files = changed(tmp_path, lambda: Turned(6, 4))
    found = sl.extract(*files, sl.dense())
    assert set(found.adapter.shapes.values()) == {(4, 6)}
    holds(found, before, after, tmp_path / "turned")


def test_what_nothing_tells_is_refused_with_what_to_do(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, _, files = changed(tmp_path, lambda: Turned(6, 6))
    with pytest.raises(
        sl.CheckpointError, match=r"which axis of 'plain.weight' \(6, 6\) is out.*\(model=\.\.\.\).*linear=True"
    ):
        sl.extract(*files, sl.dense())
    for command in ("extract", "probe"):
        assert main([command, *map(str, files)]) == 2
        assert "(--model FOLDER), or say that such weights are (out, in) (--linear)" in capsys.readouterr().err
    with pytest.raises(sl.CheckpointError, match=r"has no config\.json of which transformers or diffusers make a model"):
        sl.extract(*files, sl.dense(), model=tmp_path)
    assert sl.extract(*files, sl.dense(), linear=True).adapter.shapes.keys() == {"plain", "turned"}  # the user's word


def test_a_config_beside_the_files_tells_and_a_tied_table_is_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """GPT-2 with a square output projection: the logits of the model after, from the adapter on the model before."""
    transformers = pytest.importorskip("transformers")
    sizes = {"n_layer": 1, "n_embd": 8, "n_head": 2, "vocab_size": 16, "n_positions": 8, "bos_token_id": 0, "eos_token_id": 0}
    config = transformers.GPT2Config(**sizes)
    before, after = (seeded(0, lambda: transformers.GPT2LMHeadModel(config)).eval() for _ in range(2))
    with torch.no_grad():
        for k, parameter in enumerate(after.parameters()):
            if parameter.ndim > 1:
                parameter.add_(noise(*parameter.shape, seed=k), alpha=0.1)
    for model, name in ((before, "before"), (after, "after")):
        model.save_pretrained(tmp_path / name)
    files = [str(tmp_path / name) for name in ("before", "after")]
    assert main(["extract", *files, "--variant", "dense", "--out", str(tmp_path / "adapter"), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["left"] == facts["untold"] == []
    assert "transformer.wte+lm_head" in facts["errors"]
    words = torch.arange(8)[None]
    wanted = after(words).logits
    sl.load(before, tmp_path / "adapter")
    # float32 through one block
    torch.testing.assert_close(before(words).logits, wanted, rtol=1e-5, atol=1e-6)
    # The same from the files alone, with the config elsewhere.
    for name in ("before", "after"):
        (tmp_path / name / "config.json").rename(tmp_path / f"{name}.json")
    (tmp_path / "model").mkdir()
    (tmp_path / "before.json").rename(tmp_path / "model" / "config.json")
    assert "attn.c_proj" in " ".join(sl.extract(*files, sl.dense(), ["c_attn", "c_proj"]).untold)
    found = sl.extract(*files, sl.dense(), model=tmp_path / "model")
    assert found.adapter.errors.keys() == facts["errors"].keys()
