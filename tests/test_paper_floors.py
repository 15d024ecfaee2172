"""The order of the paper's experiments, read from the source: words below, an experiment a floor, the report of all above."""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import test_floors as house

PAPER = house.ROOT / "benchmarks" / "paper" / "superlora_tn_paper"
FLOORS = [
    ["store", "data_folder", "vit", "unet", "differences", "rates", "values"],
    ["markdown", "task", "domains", "classification_settings", "diffusion_settings", "classification_answers"],
    ["hub", "judge", "denoising", "classification_training", "first_steps"],
    ["classification_report", "geometry_report", "diffusion_report", "stopping"],
    ["classification", "diffusion", "converged_report"],
    ["converged", "diffusion_converged", "report"],
    ["geometry"],
    ["command"],
]
FLOOR = {room: k for k, rooms in enumerate(FLOORS) for room in rooms}
SOURCES = sorted(PAPER.glob("*.py"))
each_source = pytest.mark.parametrize("source", SOURCES, ids=lambda s: s.stem)
RULES = [
    house.test_files_stay_below_400_lines,
    house.test_functions_stay_below_80_lines,
    house.test_no_guessing_and_no_global_backend,
    house.test_every_module_and_public_name_says_what_it_is,
]


def own_imports(source: Path) -> Iterator[str]:
    """Modules of the package that one of it imports, inside functions too."""
    for node in ast.walk(ast.parse(source.read_text())):
        if isinstance(node, ast.Import):
            assert not any(alias.name.startswith(PAPER.name) for alias in node.names), f"{source.name}: import by `from`"
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{source} imports relatively; write the whole name"
            package, _, module = (node.module or "").partition(".")
            if package == PAPER.name:
                yield from [module] if module else [alias.name for alias in node.names]


def test_every_room_is_built_and_known() -> None:
    assert {source.stem for source in SOURCES} - {"__init__"} == set(FLOOR)


@each_source
def test_imports_go_strictly_downward(source: Path) -> None:
    for imported in own_imports(source):
        assert FLOOR[imported] < FLOOR[source.stem], f"{source.stem} imports {imported}"


@each_source
def test_the_library_is_used_without_its_private_names(source: Path) -> None:
    for node in ast.walk(ast.parse(source.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "superlora_tn":
            assert not [alias.name for alias in node.names if alias.name.startswith("_")], f"{source.name}:{node.lineno}"


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__.removeprefix("test_"))
@each_source
def test_the_rules_of_the_house_hold_here(source: Path, rule: Callable[[Path], None]) -> None:
    rule(source)


def test_the_library_imports_the_experiments_in_its_command_alone() -> None:
    users = {s.name for s in house.SOURCES if any(n.split(".")[0] == PAPER.name for n in house.imports(s))}
    assert users == {"commands.py"}
