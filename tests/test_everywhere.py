"""Every variant of the catalogue, and networks of no paper, through everything that takes a declaration, by no code of its own.

What cannot be is refused in a sentence. A variant is covered from the day it is entered.
"""

from __future__ import annotations

import copy
import inspect
import json
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from optional import library
from safetensors.torch import save_file
from torch import Tensor, nn

import superlora_tn as sl
from superlora_tn.cli import main
from superlora_tn.declare.nodes import BASED
from superlora_tn.files.errors import CheckpointError
from superlora_tn.network.catalogue import VARIANTS
from superlora_tn.tools.decompose import FitError

SIDE, LAYERS, CLASSES = 64, 2, 5
TARGETS = ["q_proj", "v_proj"]
SHAPES = {f"layers.{k}.{name}": (SIDE, SIDE) for k in range(LAYERS) for name in TARGETS}


def usual(name: str) -> sl.AdapterSpec:
    """A variant at rank 2, with its other defaults."""
    maker = VARIANTS[name]
    made = maker(rank=2) if "rank" in inspect.signature(maker).parameters else maker()
    assert isinstance(made, sl.AdapterSpec)
    return made


RING = sl.Network(
    "(a b) i", {"a": 9, "r": 2, "s": 2, "t": 2}, crop=True, A="a i r s", B="b i s t", C=sl.Node("i t r", init="zeros")
)
# Of no paper: circulant blocks and a LoRA with a node that is frozen; a ring whose nodes share i, of 72 rows cut to 64; the
# magnitudes of DoRA on one train over all layers; and a product from the left.
OWN = {
    "sum": sl.AdapterSpec(
        sl.Sum(sl.Network("o i", w=sl.Node("o i", map=sl.Circulant(8))), sl.Network("o i", {"r": 2}, B="o r", A="r i")),
        alpha=2.0,
    ),
    "ring": sl.AdapterSpec(RING),
    "train": sl.dora(sl.AdapterSpec(sl.TensorTrain(2), sl.PhysicalFold("layer type out in"))),
    "left": sl.AdapterSpec(sl.CP(2), join=sl.Multiply("left")),
}
CASES: dict[str, Callable[[], sl.AdapterSpec]] = {
    **{name: lambda name=name: usual(name) for name in VARIANTS},  # type: ignore[misc]
    **{f"dora of {name}": lambda name=name: sl.dora(usual(name)) for name in ("lokr", "lotr", "c3a")},  # type: ignore[misc]
    **{f"own {name}": lambda spec=spec: spec for name, spec in OWN.items()},  # type: ignore[misc]
}
each = pytest.mark.parametrize("name", CASES)
each_own = pytest.mark.parametrize("name", OWN)
# Hundreds of float32 terms, summed in another order through three layers.
CLOSE = {"rtol": 1e-4, "atol": 1e-4}


class Layer(nn.Module):
    """x plus what two projections say."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.v_proj = nn.Linear(SIDE, SIDE), nn.Linear(SIDE, SIDE)

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.tanh(self.q_proj(x)) + torch.tanh(self.v_proj(x))


class Classifier(nn.Module):
    """Layers of two targets each, and a head that stays frozen."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer() for _ in range(LAYERS))
        self.head = nn.Linear(SIDE, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return self.head(x)  # type: ignore[no-any-return]


def classifier() -> Classifier:
    torch.manual_seed(0)
    return Classifier()


def task() -> tuple[Tensor, Tensor]:
    """Rows and their classes."""
    draws = torch.Generator().manual_seed(1)
    return torch.randn(24, SIDE, generator=draws), torch.randint(0, CLASSES, (24,), generator=draws)


def learn(model: nn.Module) -> tuple[float, float]:
    """The losses before and after three steps of AdamW over what trains."""
    rows, classes = task()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-3, weight_decay=0.0)
    losses = list[float]()
    for _ in range(4):
        loss = nn.functional.cross_entropy(model(rows), classes)
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        if len(losses) < 4:
            optimizer.step()
    return losses[0], losses[-1]


def is_sentence(words: str) -> bool:
    """Whether a refusal says more than a class's name, and ends."""
    return len(words.split()) > 8 and words.endswith(".") and "object at 0x" not in words


@each
def test_it_learns_is_kept_merges_and_leaves_no_trace(name: str, tmp_path: Path) -> None:
    spec, model, (rows, _) = CASES[name](), classifier(), task()
    before, start = copy.deepcopy(model.state_dict()), model(rows)
    tuned = sl.attach(model, spec, TARGETS, seed=0)
    if name != "hra":  # its reflections start in pairs, an odd one would not
        torch.testing.assert_close(model(rows), start, **CLOSE)
    first, last = learn(model)
    assert last < first
    assert sum(p.numel() for p in tuned.parameters() if p.requires_grad) == spec.count(SHAPES)
    learnt = model(rows).detach()
    tuned.save(tmp_path)
    other = classifier()
    sl.load(other, tmp_path)
    assert torch.equal(other(rows), learnt)
    tuned.merge()
    torch.testing.assert_close(model(rows), learnt, **CLOSE)
    tuned.unmerge()
    assert torch.equal(model(rows), learnt)
    tuned.detach()
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[key], before[key]) for key in before)


@pytest.fixture
def quiet() -> Any:
    """PEFT warns of a base that is on no hub, and newer releases of transformers of what they rename."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="`.*gradient_checkpointing.*` is deprecated")
        warnings.filterwarnings("ignore", message="Could not find a config file")
        yield


@each
def test_it_is_a_method_of_peft(name: str, tmp_path: Path, quiet: None) -> None:
    peft, plugin = library("peft"), library("superlora_tn.peft")
    spec, (rows, _) = CASES[name](), task()
    model = peft.get_peft_model(classifier(), plugin.SuperLoraConfig(spec=spec, target_modules=TARGETS, seed=0))
    first, last = learn(model)
    assert last < first
    learnt = model(rows).detach()
    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(classifier(), tmp_path)
    kept, found = peft.get_peft_model_state_dict(model), peft.get_peft_model_state_dict(again)
    assert list(kept) == list(found)
    assert all(torch.equal(kept[key], found[key]) for key in kept)
    torch.testing.assert_close(again(rows), learnt, **CLOSE)
    merged = again.merge_and_unload()
    assert [key for key, _ in merged.named_parameters()] == [key for key, _ in classifier().named_parameters()]
    torch.testing.assert_close(merged(rows), learnt, **CLOSE)


@pytest.mark.parametrize("name", VARIANTS)
def test_peft_knows_it_by_name(name: str) -> None:
    plugin = library("superlora_tn.peft")
    settings = {"rank": 2} if "rank" in inspect.signature(VARIANTS[name]).parameters else {}
    assert plugin.SuperLoraConfig(spec=name, settings=settings).adapter_spec == usual(name)


def tuned_by(spec: sl.AdapterSpec) -> tuple[nn.Module, sl.Tuned]:
    """A model after three steps."""
    model = classifier()
    tuned = sl.attach(model, spec, TARGETS, seed=0)
    learn(model)
    return model, tuned


def holds(found: Mapping[str, float], error: float) -> bool:
    """Whether errors are numbers of all weights, none above one, which is dW = 0."""
    return set(found) == set(SHAPES) and all(0 <= value <= 1 + 1e-6 for value in found.values()) and error <= 1 + 1e-6


@each
def test_it_is_fitted_and_converted_or_refused_in_words(name: str, tmp_path: Path) -> None:
    spec = CASES[name]()
    _, tuned = tuned_by(spec)
    deltas = {target: tuned.delta(target).detach().double() for target in SHAPES}
    few: Any = {"steps": 3, "restarts": 1}
    try:
        fitted = sl.decompose(deltas, spec, **few)
    except (sl.SpecError, FitError) as error:
        assert is_sentence(str(error)), error
    else:
        assert holds(fitted.errors, fitted.error)
    try:
        own = sl.convert(tuned, spec, **few)
    except (sl.SpecError, FitError, CheckpointError) as error:
        assert is_sentence(str(error)), error
    else:
        assert own.is_exact  # the declaration contains itself
        own.write(tmp_path)
        again = classifier()
        loaded = sl.load(again, tmp_path)
        for target, delta in deltas.items():
            # Nodes are written as float32.
            torch.testing.assert_close(loaded.delta(target).detach().double(), delta, rtol=1e-4, atol=1e-6)


@each
def test_the_command_extracts_it_or_refuses_in_words(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spec = CASES[name]()
    _, tuned = tuned_by(spec)
    save_file(classifier().state_dict(), tmp_path / "base.safetensors")
    save_file(tuned.bake().state_dict(), tmp_path / "tuned.safetensors")
    words = ["extract", str(tmp_path / "base.safetensors"), str(tmp_path / "tuned.safetensors"), "--steps", "3", "--linear"]
    (tmp_path / "spec.json").write_text(json.dumps(spec.to_dict()))
    chosen = ["--variant", name, *rank(name)] if name in VARIANTS else ["--spec", str(tmp_path / "spec.json")]
    status = main([*words, *chosen, "--out", str(tmp_path / "adapter"), "--json"])
    told = capsys.readouterr()
    if status:
        assert status == 2
        assert is_sentence(told.err.strip()), told.err
        return
    facts = json.loads(told.out)
    assert holds(facts["errors"], facts["error"])
    assert facts["parameters"] == spec.count(SHAPES)
    if any(node.init in BASED for _, graph in spec.lay_out(SHAPES) for node in graph.nodes):
        # The base's own nodes are taken from it, what is left is linear; dW is the difference of float32 weights.
        assert facts["error"] < 1e-4
    again = classifier()
    assert set(sl.load(again, tmp_path / "adapter").targets) == set(SHAPES)


def rank(name: str) -> list[str]:
    return ["--rank", "2"] if "rank" in inspect.signature(VARIANTS[name]).parameters else []


@each
def test_it_is_planned_and_drawn_by_the_command(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spec = CASES[name]()
    (tmp_path / "spec.json").write_text(json.dumps(spec.to_dict()))
    chosen = [name, *rank(name)] if name in VARIANTS else ["--spec", str(tmp_path / "spec.json")]
    sizes = ["--shape", f"{SIDE}x{SIDE}", "--weights", "4"]
    assert main(["plan", *chosen, *sizes, "--tokens", "64", "--json"]) == 0
    planned = json.loads(capsys.readouterr().out)
    graph = spec.lay_out({f"layer.{k}.weight": (SIDE, SIDE) for k in range(4)})[0][1]
    assert [term["equation"] for term in planned["terms"]] == [term.equation() for term in graph.networks]
    assert planned["join"] == (None if spec.join is None else str(spec.join))
    assert main(["plan", *chosen, *sizes, "--tokens", "64"]) == 0
    told = capsys.readouterr().out
    assert told.count("price ") == len(graph.networks)
    assert ("join  " in told) == (spec.join is not None)
    assert main(["draw", *chosen, *sizes, "--out", str(tmp_path / "network.png")]) == 0
    assert (tmp_path / "network.png").read_bytes().startswith(b"\x89PNG")


def test_all_are_listed_and_suggested(capsys: pytest.CaptureFixture[str]) -> None:
    made = sl.suggest(SHAPES, 4000)
    assert {one.variant for one in made.found} | set(made.refused) == set(VARIANTS)
    for one in made.found:
        assert one.spec.count(SHAPES) == one.count <= 4000
        assert one.cost.seconds > 0
    assert all(is_sentence(words) for words in made.refused.values()), made.refused
    assert main(["variants", "--rank", "2", "--shape", f"{SIDE}x{SIDE}", "--weights", "4", "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)
    assert [row["variant"] for row in listed] == list(VARIANTS)
    shapes = [(SIDE, SIDE)] * 4
    assert all("refused" in row or row["parameters"] == usual(row["variant"]).count(shapes) for row in listed)
    assert not [row["variant"] for row in listed if "refused" in row]
