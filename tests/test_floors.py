"""The house's order, read from the source: imports go strictly downward, files and functions stay small."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import superlora_tn

ROOT = Path(superlora_tn.__file__).parents[1]
CORE, BACKENDS = ROOT / "superlora_tn", ROOT / "backends" / "superlora_tn_backends"
# Folders from the ground up, and in each its rooms from the ground up; what is in none of them stands on top.
HOUSE = {
    "declare": [
        ["bounds", "cache", "divisors", "source"],
        ["checks"],
        ["node_maps"],
        ["nodes"],
        ["parts"],
        ["maps", "fold", "rows", "joins"],
        ["codec"],
    ],
    "network": [
        ["graph", "axes"],
        ["terms"],
        ["based", "applied"],
        ["expand"],
        ["spec"],
        ["kernels"],
        ["budget", "sums", "joined"],
        ["variants", "relatives", "convolved"],
        ["mapped"],
        ["catalogue"],
    ],
    "contraction": [
        ["profile"],
        ["layout", "exact"],
        ["search"],
        ["plan"],
        ["summed", "sharing", "cut", "rows"],
        ["chain", "backend"],
    ],
    "update": [
        ["eager", "regions", "initialise", "placed", "based"],
        ["passes", "walsh", "magnitudes", "links"],
        ["fixed_maps", "node_maps"],
        ["base"],
        ["lookup", "joined", "plain"],
        ["physical", "flat"],
        ["together", "summed"],
        ["make"],
    ],
    "files": [
        ["errors"],
        ["bounds", "folder", "whole", "dialects"],
        ["record", "tensors", "container", "forms", "names"],
        ["own", "weight"],
        ["settings", "thin"],
        ["fuse", "anatomy"],
        ["foreign", "plain"],
        ["single", "formats"],
        ["structured", "peft_methods", "gguf"],
        ["peft"],
        ["read", "writes"],
        ["base_model", "show", "standing"],
        ["convert"],
        ["command"],
    ],
    "model": [
        ["spans", "blocks", "frozen", "describe", "trainer"],
        ["kinds"],
        ["stacks"],
        ["convolutions"],
        ["tried", "shown", "tables"],
        ["packed"],
        ["recognise"],
        ["places"],
        ["targets"],
        ["joins", "buffers"],
        ["weights", "rowwise"],
        ["site"],
        ["merging", "states"],
        ["tuned"],
        ["beside", "several", "kernels", "saved"],
        ["chosen"],
        ["attach"],
    ],
    "tools": [
        ["draw", "measure", "singular", "environment", "looks", "layers", "merges"],
        ["diagram", "difference", "geometry", "closed_forms", "problem"],
        ["als"],
        ["summed"],
        ["frames", "newton", "starts"],
        ["deflated"],
        ["fitting"],
        ["decompose"],
        ["convert", "origins"],
        ["allocate", "combine", "extract", "probe", "shapes", "suggest"],
    ],
}
ROOMS = [(folder, room) for folder, storeys in HOUSE.items() for rooms in storeys for room in rooms]
STOREYS = [(folder, k) for folder, storeys in HOUSE.items() for k in range(len(storeys))]
FLOOR = {
    f"{folder}.{room}": STOREYS.index((folder, k))
    for folder, storeys in HOUSE.items()
    for k, rooms in enumerate(storeys)
    for room in rooms
}
TOP = len(STOREYS)
NO_TORCH = ("declare", "network", "contraction")
SOURCES = sorted([*CORE.rglob("*.py"), *BACKENDS.rglob("*.py")])
each_source = pytest.mark.parametrize("source", SOURCES, ids=lambda s: str(s.relative_to(ROOT)))


def tree(source: Path) -> ast.Module:
    return ast.parse(source.read_text())


def imports(source: Path) -> Iterator[str]:
    """Full names of all imported modules, those inside functions too."""
    for node in ast.walk(tree(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{source} imports relatively; write the whole name"
            module = node.module or ""
            # `from package import module` imports the module; the package's own names are its face.
            inner = [f"{module}.{a.name}" for a in node.names if (ROOT / module.replace(".", "/") / f"{a.name}.py").exists()]
            yield from inner if len(inner) == len(node.names) else [module, *inner]


def floor(module: str) -> int:
    """The floor of a module of the core by its full name; what is in no room of the house stands on top."""
    return FLOOR.get(".".join(module.split(".")[1:3]), TOP)


def own_imports(source: Path) -> set[str]:
    return {name for name in imports(source) if name.startswith("superlora_tn.")}


@pytest.mark.parametrize("folder", HOUSE)
def test_every_room_is_built_and_known(folder: str) -> None:
    built = {source.stem for source in (CORE / folder).glob("*.py")} - {"__init__"}
    assert built == {room for own, room in ROOMS if own == folder}


@pytest.mark.parametrize(("folder", "room"), ROOMS)
def test_imports_go_strictly_downward(folder: str, room: str) -> None:
    source = CORE / folder / f"{room}.py"
    for imported in own_imports(source):
        assert floor(imported) < FLOOR[f"{folder}.{room}"], f"{folder}/{room} imports {imported}"
    assert "superlora_tn" not in set(imports(source)), f"{folder}/{room} imports the package's own face"


def test_the_face_imports_the_core_only() -> None:
    assert all(floor(name) < TOP or name == "superlora_tn.verification" for name in own_imports(CORE / "__init__.py"))


@pytest.mark.parametrize("source", sorted(BACKENDS.glob("*.py")), ids=lambda s: s.stem)
def test_backends_import_nothing_above_the_plan(source: Path) -> None:
    assert all(floor(name) <= FLOOR["contraction.plan"] or name == "superlora_tn.update.eager" for name in own_imports(source))
    assert "superlora_tn" not in set(imports(source))


def test_only_the_planner_imports_opt_einsum() -> None:
    users = {s.relative_to(ROOT).as_posix() for s in SOURCES if any(n.split(".")[0] == "opt_einsum" for n in imports(s))}
    assert users == {"superlora_tn/contraction/plan.py", "superlora_tn/contraction/search.py"}


@pytest.mark.parametrize("folder", NO_TORCH)
def test_the_lower_floors_import_no_torch(folder: str) -> None:
    for source in (CORE / folder).glob("*.py"):
        assert not {n.split(".")[0] for n in imports(source)} & {"torch", "tensorly", "safetensors", "transformers"}, source


def test_the_core_imports_tensorly_in_backends_only() -> None:
    assert not [s for s in SOURCES if CORE in s.parents and any(n.split(".")[0] == "tensorly" for n in imports(s))]


@each_source
def test_files_stay_below_400_lines(source: Path) -> None:
    assert len(source.read_text().splitlines()) <= 400


@each_source
def test_functions_stay_below_80_lines(source: Path) -> None:
    for node in ast.walk(tree(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert (node.end_lineno or 0) - node.lineno + 1 <= 80, f"{source.name}:{node.lineno} {node.name}"


@each_source
def test_no_guessing_and_no_global_backend(source: Path) -> None:
    for node in ast.walk(tree(source)):
        if isinstance(node, ast.Name):
            assert node.id not in ("hasattr", "__getattr__"), f"{source.name}:{node.lineno}"
        if isinstance(node, ast.FunctionDef):
            assert node.name not in ("__getattr__", "__getattribute__"), f"{source.name}:{node.lineno}"
        if isinstance(node, ast.Attribute):
            assert node.attr not in ("set_backend", "__getattr__"), f"{source.name}:{node.lineno}"


@each_source
def test_no_generator_keeps_gradients_off_while_another_runs(source: Path) -> None:
    """What is yielded within `torch.no_grad()` turns them off for its caller, and back to what they were whenever it ends."""
    for node in ast.walk(tree(source)):
        if isinstance(node, ast.FunctionDef) and "contextmanager" not in map(ast.unparse, node.decorator_list):
            for block in (n for n in ast.walk(node) if isinstance(n, ast.With)):
                modes = [ast.unparse(item) for item in block.items if re.search("grad|inference_mode", ast.unparse(item))]
                yields = any(isinstance(n, ast.Yield | ast.YieldFrom) for n in ast.walk(block))
                assert not (modes and yields), f"{source.name}:{block.lineno} {node.name} yields within {modes[0]}"


@each_source
def test_every_module_and_public_name_says_what_it_is(source: Path) -> None:
    module = tree(source)
    assert ast.get_docstring(module)
    for node in module.body:
        overloads = any(isinstance(d, ast.Name) and d.id == "overload" for d in getattr(node, "decorator_list", []))
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_") and not overloads:
            assert ast.get_docstring(node), f"{source.name}:{node.lineno} {node.name}"


def fresh(code: str) -> str:
    """What a new Python prints."""
    path = f"import sys; sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / 'backends')!r}]\n"
    command = [sys.executable, "-W", "error", "-c", path + code]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout.strip()


def test_importing_and_running_the_library_changes_nothing_global() -> None:
    printed = fresh(
        "import random, numpy, torch, tensorly as tl, warnings\n"
        "def state():\n"
        "    return (tl.get_backend(), torch.get_default_dtype(), torch.is_grad_enabled(),\n"
        "            torch.get_num_threads(),\n"
        "            hash(random.getstate()), hash(numpy.random.get_state()[1].tobytes()),\n"
        "            hash(torch.get_rng_state().numpy().tobytes()), len(warnings.filters), numpy.geterr()['over'])\n"
        "before = state()\n"
        "import superlora_tn as sl\n"
        "assert state() == before, (before, state())\n"
        "m = torch.nn.Sequential(torch.nn.Linear(4, 4)); before = state()\n"
        "t = sl.attach(m, sl.lorta(2, projection=sl.Fastfood(0.5)), ['0'], seed=0)\n"
        "m(torch.zeros(2, 4)); t.merge(); t.detach()\n"
        "assert state() == before, (before, state())\n"
        "print(tl.get_backend())\n"
    )
    assert printed == "numpy"


def test_importing_the_library_pulls_in_no_optional_package() -> None:
    optional = [
        "peft",
        "transformers",
        "lycoris",
        "matplotlib",
        "PIL",
        "rich",
        "sklearn",
        "hypothesis",
        "pytest",
        "scipy.stats",
    ]
    assert fresh(f"import superlora_tn, sys; print([m for m in {optional} if m in sys.modules])") == "[]"
