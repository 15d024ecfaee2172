"""Every wrong declaration raises SpecError, which says what was given, what was expected and what to do."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import bounded, noise, perturb
from torch import nn

import superlora_tn as sl
from superlora_tn import (
    CP,
    AdapterSpec,
    Dense,
    Fastfood,
    FlatFold,
    Hadamard,
    Kronecker,
    Network,
    Node,
    PhysicalFold,
    Shuffle,
    SpecError,
    TensorTrain,
    Tucker,
)

# A declaration costs some microseconds, so these get more examples than the profile's.
many = settings(max_examples=10 * settings().max_examples)
Make = Callable[[], object]
ONE = {"layers.0.up": (20, 12)}
GRID = {f"layers.{k}.{name}": (12, 12) for k in range(2) for name in ("q", "v")}


def count(network: object, fold: object = None, shapes: object = ONE) -> int:
    return AdapterSpec(network, fold or PhysicalFold()).count(shapes)


DECLARATIONS: list[tuple[str, Make, list[str]]] = [
    # nodes
    ("index not a name", lambda: Node("o 2r"), ["'o 2r'", "index '2r'", "a letter followed by"]),
    ("index with comma", lambda: Node("o,r"), ["'o,r'", "Separate indices by spaces"]),
    ("index twice on a node", lambda: Node("o o"), ["index 'o' twice", "diagonal", "name of its own"]),
    ("indices no string", lambda: Node(3), ["indices 3", "string of names such as 'o r'"]),
    ("bad init", lambda: Node("o r", init="zero"), ["init='zero'", "choose one of", "zeros", "orthogonal"]),
    ("bad trainable", lambda: Node("o r", trainable=1), ["trainable=1", "True or False"]),
    # networks
    ("unknown index", lambda: Network("o i", w="o i", v="o x", sizes={"x": 2}), ["v='o x'", "'x'", "no other node", "'o i'"]),
    (
        "open index on no node",
        lambda: Network("o i", w="o r", v="o r", sizes={"r": 2}),
        ["open index 'i'", "on no node", "put it"],
    ),
    ("mode index twice", lambda: Network("o o", w="o"), ["'o o'", "index 'o' twice", "use two names"]),
    ("bond unsized", lambda: Network("o i", a="o r", b="r i"), ["bond 'r' has no size", "sizes={'r': 8}"]),
    ("size of nothing", lambda: Network("o i", {"x": 2}, a="o i"), ["index 'x'", "on no node", "indices are i, o"]),
    (
        "two zeros",
        lambda: Network("o i", {"r": 2}, a=Node("o r", init="zeros"), b=Node("r i", init="zeros")),
        ["a and b at zero"],
    ),
    ("no trainable", lambda: Network("o i", a=Node("o i", trainable=False)), ["no trainable node", "at least one"]),
    ("no node at all", lambda: Network("o i"), ["'o i'", "on no node"]),
    ("node's name", lambda: Network("o i", **{"a.b": "o i"}), ["named 'a.b'", "a letter"]),
    ("no mode", lambda: Network("", a="o i"), ["modes ''", "at least one index"]),
    ("empty mode", lambda: Network("() i", a="i"), ["'() i'", "a mode is empty"]),
    ("open parenthesis", lambda: Network("(o i", a="o i"), ["'(o i'", "stray '('"]),
    ("nested parentheses", lambda: Network("((o) i)", a="o i"), ["cannot read the modes", "stray"]),
    ("modes no string", lambda: Network(7, a="o i"), ["modes 7", "string such as"]),
    ("bond of 0", lambda: Network("o i", {"r": 0}, a="o r", b="r i"), ["'r'", "rank=0", "at least 1"]),
    ("more modes than the fold", lambda: count(Network("m o i", a="m o i")), ["3 modes", "the fold has 2", "out=20, in=12"]),
    ("sizes disagree", lambda: count(Network("o i", {"o": 7}, a="o i")), ["'out' of size 20", "o=7", "multiply to 20"]),
    (
        "split does not factor",
        lambda: count(Network("(o1 o2) i", {"o1": 3}, a="o1 o2 i")),
        ["(o1 o2)", "o1=3", "size 20", "choose sizes that do"],
    ),
    (
        "split sizes disagree",
        lambda: count(Network("(o1 o2) i", {"o1": 4, "o2": 4}, a="o1 o2 i")),
        ["o1=4, o2=4", "which does not multiply to 20"],
    ),
    (
        "bond named as a mode",
        lambda: count(Network("o i", {"out": 2}, a="o out", b="out i")),
        ["bond 'out'", "a mode of the fold", "call the bond otherwise"],
    ),
    # ranks
    ("rank 0", lambda: CP(0), ["CP", "rank=0", "Choose rank >= 1"]),
    ("rank negative", lambda: Tucker(-2), ["Tucker", "rank=-2", "at least 1"]),
    ("rank a float", lambda: TensorTrain(2.0), ["TensorTrain", "rank=2.0", "whole number"]),
    ("rank True", lambda: CP(True), ["rank=True"]),
    ("rank text", lambda: sl.lora("8"), ["rank='8'"]),
    ("rank beyond 2**20", lambda: CP(2**20 + 1), ["CP", f"rank={2**20 + 1}"]),
    ("no ranks", lambda: Tucker(()), ["empty tuple of ranks"]),
    ("rank list", lambda: Tucker([2, 2]), ["rank=[2, 2]"]),
    ("one rank wrong", lambda: Tucker((2, 0)), ["rank=0"]),
    ("CP above its bound", lambda: count(CP(13)), ["CP", "rank=13", "(20, 12)", "above 12 adds nothing", "rank <= 12"]),
    ("Tucker above its bound", lambda: count(Tucker((2, 13))), ["Tucker", "rank=13", "rank <= 12"]),
    ("Tucker above every bound", lambda: count(Tucker(21)), ["rank=21", "rank <= 20"]),
    ("TensorTrain above its bound", lambda: count(TensorTrain(13)), ["TensorTrain", "rank=13", "rank <= 12"]),
    ("Tucker's ranks do not match", lambda: count(Tucker((2, 2, 2))), ["3 ranks", "2 modes", "['out', 'in']"]),
    ("TensorTrain's ranks", lambda: count(TensorTrain((2, 2))), ["2 ranks for 2 modes", "give 1"]),
    ("over unknown", lambda: CP(2, over="cut"), ["CP", "over='cut'", "'refuse', 'cap' or 'keep'"]),
    ("over no string", lambda: Tucker(2, over=None), ["Tucker", "over=None"]),
    ("over of a train", lambda: TensorTrain(2, over=True), ["TensorTrain", "over=True"]),
    ("factors unknown", lambda: count(Tucker(2, factors="out inn")), ["'out inn'", "no mode 'inn'", "['out', 'in']"]),
    ("factors twice", lambda: count(Tucker(2, factors="out out")), ["'out out'"]),
    ("factors no string", lambda: count(Tucker(2, factors=3)), ["factors=3"]),
    ("dense_if_large no bool", lambda: CP(2, dense_if_large="yes"), ["dense_if_large='yes'", "True or False"]),
    # products
    ("empty Kronecker", lambda: Kronecker(), ["Kronecker was given no part", "Kronecker(CP(4), CP(4))"]),
    ("empty Hadamard", lambda: Hadamard(), ["Hadamard was given no part"]),
    ("Kronecker of text", lambda: Kronecker("CP"), ["'CP'", "a part is one of", "Tucker"]),
    ("Kronecker of nested text", lambda: Kronecker(Hadamard(CP(2), 7)), ["given 7", "a part is one of"]),
    ("factor 0", lambda: Kronecker(CP(1), CP(1), factor=0), ["factor=0", "or -1"]),
    ("factor True", lambda: Kronecker(CP(1), CP(1), factor=True), ["factor=True"]),
    ("factor for three", lambda: Kronecker(CP(1), CP(1), CP(1), factor=2), ["factor=2 for 3 parts", "splits in two"]),
    (
        "splits that do not fit",
        lambda: AdapterSpec(Hadamard(Kronecker(Dense(), Dense(), factor=2), Kronecker(Dense(), Dense(), factor=3))).count(
            {"a": (12, 12)}
        ),
        ["split in two ways", "size 12", "the same split"],
    ),
    (
        "rank of a nested split",
        lambda: count(Kronecker(Tucker(2), Hadamard(CP(5), CP(1)))),
        ["CP", "rank=5", "rank <= 4"],
    ),
    # folds
    ("unknown mode", lambda: PhysicalFold("out in layers"), ["mode 'layers'", "modes are out, head, in, kernel"]),
    ("mode twice", lambda: PhysicalFold("out in out"), ["'out' twice", "name it once"]),
    ("no in", lambda: PhysicalFold("out layer"), ["'out layer'", "both 'out' and 'in'"]),
    ("fold no string", lambda: PhysicalFold(None), ["None", "both 'out' and 'in'"]),
    ("member beside layer", lambda: PhysicalFold("member layer out in"), ["'member' beside 'layer'", "already numbers"]),
    ("head without heads", lambda: PhysicalFold("head out in"), ["heads=...", "exactly when"]),
    ("heads without head", lambda: PhysicalFold("out in", heads=4), ["heads=...", "exactly when"]),
    ("out before head", lambda: PhysicalFold("out head in", heads=4), ["'out' before 'head'", "write 'head out'"]),
    (
        "heads do not divide",
        lambda: count(CP(2), PhysicalFold("head out in", 3)),
        ["out=20", "heads=3", "'layers.0.up'", "divide"],
    ),
    ("heads 0", lambda: PhysicalFold("head out in", heads=0), ["heads=0"]),
    ("heads negative", lambda: PhysicalFold("head out in", heads=-2), ["heads=-2"]),
    ("heads text", lambda: PhysicalFold("head out in", heads="4"), ["heads='4'"]),
    ("heads True", lambda: PhysicalFold("head out in", heads=True), ["heads=True"]),
    ("heads a float", lambda: PhysicalFold("head out in", heads=4.0), ["heads=4.0"]),
    (
        "incomplete grid",
        lambda: count(CP(2), PhysicalFold("layer type out in"), {k: GRID[k] for k in list(GRID)[:3]}),
        ["every type in every layer", "3 targets", "2 layers x 2 types (4 cells)", "'member'"],
    ),
    ("order 0", lambda: FlatFold(order=0), ["order=0", "from 1 to 32"]),
    ("order text", lambda: FlatFold(order="3"), ["order='3'"]),
    ("splits 33", lambda: FlatFold(splits=33), ["splits=33", "from 1 to 32"]),
    ("multiple and stacked", lambda: FlatFold(2, stacked=True, multiple=4), ["multiple=4", "stacked=True", "multiple=1"]),
    ("groups 0", lambda: FlatFold(groups=0), ["groups=0", "at least 1", "'weight'"]),
    ("groups text", lambda: FlatFold(groups="weights"), ["groups='weights'", "'weight'"]),
    ("groups True", lambda: FlatFold(groups=True), ["groups=True"]),
    (
        "groups beyond the elements",
        lambda: count(Dense(), FlatFold(1, groups=241)),
        ["groups=241", "240 elements", "at most 240"],
    ),
    ("stacked of order 3", lambda: FlatFold(order=3, stacked=True), ["two-dimensional", "order=3"]),
    ("stacked no bool", lambda: FlatFold(order=2, stacked="no"), ["stacked='no'", "True or False"]),
    # maps
    ("ratio 0", lambda: Fastfood(ratio=0), ["ratio=0", "above 0 and at most 1"]),
    ("ratio above 1", lambda: Fastfood(ratio=1.5), ["ratio=1.5"]),
    ("ratio NaN", lambda: Fastfood(ratio=float("nan")), ["ratio=nan"]),
    ("ratio text", lambda: Fastfood(ratio="1"), ["ratio='1'"]),
    ("seed negative", lambda: Shuffle(seed=-1), ["Shuffle", "seed=-1", "whole number"]),
    ("seed too large", lambda: Fastfood(seed=2**63), ["Fastfood", f"seed={2**63}"]),
    ("tanh no bool", lambda: Fastfood(tanh="no"), ["tanh='no'", "True or False"]),
    # specs
    ("network missing", lambda: AdapterSpec(None), ["network=None", "CP(8)"]),
    ("network a class", lambda: AdapterSpec(Dense), ["network=", "give a part"]),
    ("network a node", lambda: AdapterSpec(Node("o i")), ["network=Node", "give a part"]),
    ("fold a string", lambda: AdapterSpec(CP(2), "out in"), ["fold='out in'", "PhysicalFold(...)"]),
    ("projection a string", lambda: AdapterSpec(CP(2), FlatFold(2), "fastfood"), ["projection='fastfood'", "Fastfood(...)"]),
    ("projection on a physical fold", lambda: AdapterSpec(CP(2), projection=Fastfood()), ["physical", "FlatFold(...)"]),
    ("alpha text", lambda: sl.lora(2, alpha="16"), ["alpha='16'", "finite number"]),
    ("alpha True", lambda: sl.lora(2, alpha=True), ["alpha=True"]),
    ("alpha NaN", lambda: sl.lora(2, alpha=float("nan")), ["alpha=nan", "finite"]),
    ("alpha infinite", lambda: sl.lora(2, alpha=float("inf")), ["alpha=inf", "finite"]),
    ("alpha beyond floats", lambda: sl.lora(2, alpha=10**400), ["alpha=1000", "finite number"]),
    ("dropout 1", lambda: sl.lora(2, dropout=1.0), ["dropout=1.0", "from 0 up to, not including, 1"]),
    ("dropout negative", lambda: sl.lora(2, dropout=-0.1), ["dropout=-0.1"]),
    ("dropout None", lambda: sl.lora(2, dropout=None), ["dropout=None"]),
    ("rslora no bool", lambda: sl.lora(2, rslora=1), ["rslora=1", "True or False"]),
    (
        "rslora of a network",
        lambda: AdapterSpec(sl.Network("o i", {"r": 2}, B="o r", A="r i"), alpha=16, rslora=True),
        ["Network declares none", "alpha itself", "Leave rslora out"],
    ),
    (
        "a preset that caps no rank",
        lambda: sl.abba(16).count({"w": (10, 12)}),
        ["Choose rank <= 10;", "where the part itself is declared, CP(16, over='cap')"],
    ),
    ("rslora of dense", lambda: sl.dense(alpha=16, rslora=True), ["Dense declares none"]),
    ("rslora without alpha", lambda: sl.lora(2, rslora=True), ["alpha=None scales by 1", "give alpha"]),
    ("superlora splits 0", lambda: sl.superlora(2, splits=0), ["splits=0", "from 1 to 32"]),
    ("superlora order text", lambda: sl.superlora(2, order="2"), ["order='2'"]),
    ("superlora order 0", lambda: sl.superlora(2, order=0), ["order=0"]),
    ("lonkr splits 0", lambda: sl.lonkr(2, splits=0), ["splits=0", "from 1 to 64"]),
    ("lonkr splits text", lambda: sl.lonkr(2, splits="3"), ["splits='3'"]),
    # targets
    ("no target", lambda: sl.lora(2).count({}), ["no target", "at least one weight"]),
    ("shape of three", lambda: sl.lora(2).count({"w": (2, 3, 4)}), ["'w'", "(2, 3, 4)", "(out, in)"]),
    ("shape of nought", lambda: sl.lora(2).count({"w": (0, 4)}), ["'w'", "(0, 4)", "at least 1"]),
    ("shape of text", lambda: sl.lora(1).count({"w": ("2", 4)}), ["('2', 4)"]),
    # from dict
    ("a bare shape", lambda: sl.lora(2).count((8, 8)), ["(8, 8)", "[(768, 768)]"]),
    ("a kernel", lambda: sl.lokr(8).count([(64, 64, 3, 3)]), ["(64, 64, 3, 3)", "(64, 64 * 9)"]),
    ("a bare shape for a budget", lambda: sl.superlora(budget=90).choose((8, 8)), ["(8, 8)", "[(768, 768)]"]),
    ("a node named sizes", lambda: sl.Network("o i", {"r": 2}, sizes="o r", A="r i"), ["named 'sizes'", "another name"]),
    ("a node named modes", lambda: sl.Network("o i", {"r": 2}, modes="o r", A="r i"), ["named 'modes'"]),
    ("a node named self", lambda: sl.Network("o i", {"r": 2}, self="o r", A="r i"), ["named 'self'"]),
    (
        "a field that is near",
        lambda: AdapterSpec.from_dict({{"alpha": "alfa"}.get(k, k): v for k, v in sl.lora(2).to_dict().items()}),
        ["a spec has no field 'alfa'; did you mean alpha?"],
    ),
    (
        "a field that is near, inside",
        lambda: AdapterSpec.from_dict(sl.lora(2).to_dict() | {"network": {"kind": "CP", "rnk": 2}}),
        ["CP in a declaration has no field 'rnk'; did you mean rank?"],
    ),
    ("not a dict", lambda: AdapterSpec.from_dict([]), ["dict of its fields", "list"]),
    (
        "missing field",
        lambda: AdapterSpec.from_dict({"network": {}}),
        ["a spec needs the fields", "missing are alpha, dropout, fold, pro"],
    ),
    (
        "unknown kind",
        lambda: AdapterSpec.from_dict(sl.lora(2).to_dict() | {"network": {"kind": "CPU"}}),
        ["'CPU'", "known kinds"],
    ),
    (
        "unknown field",
        lambda: AdapterSpec.from_dict(sl.lora(2).to_dict() | {"fold": {"kind": "PhysicalFold", "modes": "out in"}}),
        ["PhysicalFold in a declaration needs the fields heads, modes; missing are heads."],
    ),
]


@pytest.mark.parametrize(("make", "words"), [d[1:] for d in DECLARATIONS], ids=[d[0] for d in DECLARATIONS])
def test_a_wrong_declaration_says_what_is_wrong(make: Make, words: list[str]) -> None:
    with pytest.raises(SpecError) as caught:
        make()
    for word in words:
        assert word in str(caught.value)


def test_a_name_given_to_two_nodes_raises() -> None:
    twice = {"kind": "Network", "modes": "o i", "sizes": [["r", 2]]}
    node = {"kind": "Node", "init": "auto", "trainable": True}
    twice["nodes"] = [["a", {**node, "indices": "o r"}], ["a", {**node, "indices": "r i"}]]
    with pytest.raises(SpecError, match="names a node twice"):
        AdapterSpec.from_dict(sl.lora(2).to_dict() | {"network": twice})


def test_a_size_said_twice_or_in_parts_raises() -> None:
    spec = AdapterSpec(sl.Network("(a b) i", {"b": -1, "r": 2}, w="a r", v="b r i")).to_dict()
    for sizes, words in (([["r", 2], ["r", 3]], "sizes an index twice"), ([["b", -1.0], ["r", 2]], "'b'.*-1.0")):
        with pytest.raises(SpecError, match=words):
            AdapterSpec.from_dict(spec | {"network": {**spec["network"], "sizes": sizes}})


@pytest.mark.parametrize(
    "bond", ["r", "out1", "out2", "in", "in1", "token", "item", "batch", "group", "member", "x", "k1_r", "TOKEN"]
)
def test_a_bond_of_any_name_raises_or_is_a_bond(bond: str) -> None:
    """Names that the library makes itself (the digits of a split mode, the tokens) must not meet the user's."""
    network = Network("(a b) i", {bond: 2, "a": 4}, u=f"a {bond}", v=f"{bond} b i")
    model = nn.ModuleDict({"up": nn.Linear(12, 20)})
    try:
        tuned = sl.attach(model, AdapterSpec(network), ["up"], seed=0)
    except SpecError as error:
        assert bond in str(error)
        return
    perturb(tuned)
    u, v = tuned.parameters()
    expected = torch.einsum("ar,rbi->abi", u, v).reshape(20, 12)
    torch.testing.assert_close(tuned.delta("up"), expected)
    x = noise(3, 12)
    torch.testing.assert_close(model["up"](x), x @ (model["up"].weight + expected).T + model["up"].bias)


def test_the_digits_of_a_split_mode_do_not_meet_another_mode() -> None:
    """Mode m1 split in two gives digits m11 and m12; the eleventh and twelfth modes are called so as well."""
    network = Network("(a b) c d e f g h i j k l n", w="a b c d e f", v="g h i j k l n")
    size = 4**12
    model = nn.ModuleDict({"w": nn.Linear(4**6, 4**6, bias=False, device="meta")})
    assert count(network, FlatFold(12), {"w": (4**6, 4**6)}) == 4**5 + 4**7
    graph = AdapterSpec(network, FlatFold(12)).lay_out({"w": (4**6, 4**6)})[0][1]
    assert math.prod(graph.size[i] for i in graph.open("flat")) == size
    assert len(set(graph.open("flat"))) == len(graph.open("flat")) == 13
    assert sl.attach(model, AdapterSpec(network, FlatFold(12)), ["w"]).num_parameters == 4**5 + 4**7


@pytest.mark.parametrize("sizes", [{"group": 2}, {"group": 2, "group_": 3}])
def test_a_bond_named_group_does_not_meet_the_flat_folds_groups(sizes: dict[str, int]) -> None:
    network = Network("a b", sizes, u=f"a {' '.join(sizes)}", v=f"{' '.join(sizes)} b")
    bond = math.prod(sizes.values())
    assert AdapterSpec(network, FlatFold(2, groups=2)).count([(4, 8)]) == 2 * (4 * bond + bond * 4)


@pytest.mark.parametrize("sizes", [{1: 2}, {"r": None}, {"r": "2"}, {None: 1, "r": 2}, [("r", 2)], 5, "r"])
def test_sizes_of_the_wrong_type_raise(sizes: object) -> None:
    with pytest.raises(SpecError):
        Network("o i", sizes, a="o r", b="r i")


def test_messages_end_as_sentences_and_name_no_internals() -> None:
    for _, make, _ in DECLARATIONS:
        try:
            make()
        except SpecError as error:
            text = str(error)
            assert text[-1] in ".)?"
            assert not any(word in text for word in ("Traceback", "NoneType", "Axis(", "Draft("))
        except Exception:  # the test above reports it
            continue


def test_declarations_are_frozen_equal_and_hashable() -> None:
    one, two = sl.lokr(2, alpha=4), sl.lokr(2, alpha=4)
    assert one == two
    assert hash(one) == hash(two)
    assert one != sl.lokr(2, alpha=5)
    for value, field in ((one, "alpha"), (CP(2), "rank"), (Node("o r"), "indices"), (PhysicalFold(), "modes")):
        with pytest.raises(AttributeError):
            setattr(value, field, 1)


# --- any text ------------------------------------------------------------------------------------------------------

notation = st.text(alphabet="oir12_ ()\t\n,.é", max_size=30) | st.text(max_size=30)


def parses_or_spec_error(make: Make) -> None:
    try:
        with bounded(20_000):
            make()
    except SpecError as error:
        assert str(error)


@many
@given(notation)
def test_any_text_as_node_indices_parses_or_raises(text: str) -> None:
    parses_or_spec_error(lambda: Node(text))


@many
@given(notation, notation, notation, st.dictionaries(notation, st.integers(-1, 5), max_size=3))
def test_any_text_as_a_network_parses_or_raises(modes: str, left: str, right: str, sizes: dict[str, int]) -> None:
    parses_or_spec_error(lambda: count(Network(modes, sizes, left=left, right=right)))


@many
@given(notation)
def test_any_text_as_fold_modes_and_factors_parses_or_raises(text: str) -> None:
    parses_or_spec_error(lambda: count(CP(1), PhysicalFold(text)))
    parses_or_spec_error(lambda: count(Tucker(1, factors=text)))


@pytest.mark.parametrize("text", ["(" * 50_000, ")" * 50_000, "(a" * 20_000, "a " * 3_000, "(" + "a" * 50_000, " " * 50_000])
def test_long_text_is_refused_in_bounded_work(text: str) -> None:
    with bounded(300_000):
        with pytest.raises(SpecError):
            Network(text, w="a")
        with pytest.raises(SpecError):
            PhysicalFold(text)


@pytest.mark.parametrize("shape", [(2**47 - 115, 2**47 - 115), (2**48, 3), (1, 2**48), (1, 1)])
@pytest.mark.parametrize(
    "spec",
    [sl.lora(1), sl.lokr(1), sl.lonkr(1, 5), sl.lorta(1, 5), sl.superlora(1, order=3, splits=4)],
    ids=lambda s: str(s)[12:50],
)
def test_counting_ends_for_any_shape(spec: AdapterSpec, shape: tuple[int, int]) -> None:
    try:
        assert spec.count({"w": shape}) > 0
    except SpecError as error:
        assert "rank" in str(error)
