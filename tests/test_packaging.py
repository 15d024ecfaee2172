"""What is shipped: metadata that is true, entry points that load, and wheels with their own packages and nothing else."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

import superlora_tn as sl

ROOT = Path(sl.__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
META = PROJECT["project"]
PACKAGES = [ROOT / place for place in PROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]]
SOURCES = [source for package in PACKAGES for source in package.rglob("*.py")]
PAPER = ROOT / "benchmarks" / "paper"
PAPER_META = tomllib.loads((PAPER / "pyproject.toml").read_text())["project"]
# Name in `import` where it differs from the name on the index.
IMPORTED = {"lycoris-lora": "lycoris", "pillow": "PIL", "scikit-learn": "sklearn"}


def required(lines: list[str]) -> set[str]:
    names = [line.split("[")[0].split(">")[0].split("=")[0].strip() for line in lines]
    return {IMPORTED.get(name, name) for name in names}


def module_level_imports(source: Path) -> set[str]:
    """First words of what a module imports as it loads."""
    found = set()
    for node in ast.parse(source.read_text()).body:
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add((node.module or "").split(".")[0])
    return found


def test_the_versions_agree() -> None:
    assert META["version"] == sl.__version__
    assert META["name"] == "superlora_tn"


def test_the_files_that_the_metadata_names_exist() -> None:
    for name in (META["readme"], *META["license-files"]):
        assert (ROOT / name).is_file(), name


def test_scripts_name_functions() -> None:
    assert META["scripts"]
    for target in META["scripts"].values():
        module, function = target.split(":")
        assert callable(getattr(importlib.import_module(module), function))


def test_backend_entry_points_name_backends() -> None:
    points = META["entry-points"]["superlora_tn.backends"]
    assert points
    for name, module in points.items():
        loaded = importlib.import_module(module)
        assert name == loaded.NAME
        assert callable(loaded.compile)
        assert name in sl.backends()
        assert name == sl.backend(name).NAME


def test_every_shipped_backend_is_an_entry_point() -> None:
    """One that is not listed would be there in a checkout and gone in the wheel."""
    listed = set(META["entry-points"]["superlora_tn.backends"].values())
    with_a_name = {
        f"superlora_tn_backends.{s.stem}"
        for s in (ROOT / "backends" / "superlora_tn_backends").glob("*.py")
        if any(isinstance(n, ast.Assign) and getattr(n.targets[0], "id", "") == "NAME" for n in ast.parse(s.read_text()).body)
    }
    assert with_a_name == listed


def test_the_core_imports_only_declared_dependencies() -> None:
    declared = required(META["dependencies"]) | set(sys.stdlib_module_names) | {"superlora_tn", "superlora_tn_backends"}
    from_face = {
        n.module for n in ast.parse((ROOT / "superlora_tn/__init__.py").read_text()).body if isinstance(n, ast.ImportFrom)
    }
    for name in from_face:
        place = ROOT / name.replace(".", "/")
        source = place / "__init__.py" if place.is_dir() else place.with_suffix(".py")
        assert module_level_imports(source) <= declared, source
    for source in (ROOT / "backends").rglob("*.py"):
        assert module_level_imports(source) <= declared, source


def test_other_modules_import_only_what_some_extra_brings() -> None:
    extras = META["optional-dependencies"]
    everything = required(META["dependencies"]) | set().union(*(required(lines) for lines in extras.values()))
    known = everything | set(sys.stdlib_module_names) | {"superlora_tn", "superlora_tn_backends"}
    for source in SOURCES:
        assert module_level_imports(source) <= known, source


def test_packaging_that_tensorly_forgets_is_declared() -> None:
    """tensorly 0.10's PyTorch backend imports `packaging` without saying so."""
    assert {"packaging", "tensorly", "torch", "opt_einsum", "numpy", "safetensors"} <= required(META["dependencies"])


def test_extras_refer_to_extras_that_exist() -> None:
    extras = META["optional-dependencies"]
    own = [line for lines in extras.values() for line in lines if line.startswith("superlora_tn[")]
    assert own
    for line in own:
        assert set(line[line.index("[") + 1 : line.index("]")].split(",")) <= set(extras)


def test_each_package_says_it_is_typed() -> None:
    assert "Typing :: Typed" in META["classifiers"]
    for package in PACKAGES:
        assert (package / "py.typed").is_file(), package.name


def test_the_python_floor_is_said_alike_everywhere() -> None:
    floor = META["requires-python"].removeprefix(">=")
    assert f"Programming Language :: Python :: {floor}" in META["classifiers"]
    assert PROJECT["tool"]["mypy"]["python_version"] == floor
    assert PROJECT["tool"]["ruff"]["target-version"] == f"py{floor.replace('.', '')}"


def test_the_public_names_exist_and_are_sorted_out() -> None:
    assert len(set(sl.__all__)) == len(sl.__all__)
    for name in sl.__all__:
        assert getattr(sl, name) is not None
        assert (getattr(sl, name).__doc__ or "").strip(), name


def test_the_experiments_are_of_the_very_same_release() -> None:
    """They use more of the library than its public names."""
    version = importlib.import_module("superlora_tn_paper").__version__
    assert PAPER_META["name"] == "superlora_tn_paper"
    assert PAPER_META["version"] == version == sl.__version__
    assert f"superlora_tn[demo]=={sl.__version__}" in PAPER_META["dependencies"]
    assert PAPER_META["requires-python"] == META["requires-python"]


def test_the_experiments_import_only_what_they_declare() -> None:
    known = required([*META["dependencies"], *META["optional-dependencies"]["demo"], *PAPER_META["dependencies"]])
    known |= set(sys.stdlib_module_names) | {"superlora_tn", "superlora_tn_paper"}
    for source in (PAPER / "superlora_tn_paper").glob("*.py"):
        assert module_level_imports(source) <= known, source


def built(project: Path, folder: Path) -> zipfile.ZipFile:
    if importlib.util.find_spec("hatchling") is None:
        pytest.skip("hatchling is not installed, and the tests fetch nothing")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    subprocess.run(command, cwd=project, check=True, capture_output=True, timeout=120)
    (wheel,) = folder.glob("*.whl")
    return zipfile.ZipFile(wheel)


def test_the_wheel_holds_both_packages_and_nothing_else(tmp_path: Path) -> None:
    names = built(ROOT, tmp_path).namelist()
    assert {n.split("/")[0] for n in names} == {p.name for p in PACKAGES} | {f"superlora_tn-{sl.__version__}.dist-info"}
    for source in SOURCES:
        package = next(p for p in PACKAGES if p in source.parents)
        assert source.relative_to(package.parent).as_posix() in names
    assert not [n for n in names if n.endswith((".pyc", ".pth", ".safetensors")) or "reproduce" in n]


def test_the_experiments_have_a_wheel_of_their_own(tmp_path: Path) -> None:
    wheel = built(PAPER, tmp_path)
    sources = {source.relative_to(PAPER).as_posix() for source in (PAPER / "superlora_tn_paper").glob("*.py")}
    packed = {n for n in wheel.namelist() if ".dist-info/" not in n}
    assert packed == {*sources, "superlora_tn_paper/py.typed"}
    (metadata,) = (n for n in wheel.namelist() if n.endswith("/METADATA"))
    assert f"Requires-Dist: superlora-tn[demo]=={sl.__version__}" in wheel.read(metadata).decode().replace("_", "-")


def test_the_library_works_from_its_wheel_alone(tmp_path: Path) -> None:
    """Nothing of the checkout is needed; the experiments, which are not in it, are named with how to get them."""
    built(ROOT, tmp_path).extractall(tmp_path / "site")
    dependencies = Path(importlib.import_module("torch").__file__).parents[1]
    # A folder on PYTHONPATH brings its packages, but not the links of editable installs, so the wheel is what is imported.
    environment = {"PYTHONPATH": f"{tmp_path / 'site'}:{dependencies}", "PATH": "", "HOME": str(tmp_path)}
    found = "import superlora_tn, sys; print(superlora_tn.__file__); from superlora_tn.cli import main; sys.exit(main({}))"
    for words, status, out, err in (
        (["variants"], 0, "24 weights of 768x768", ""),
        (["reproduce", "geometry"], 2, "", "pip install ./benchmarks/paper"),
    ):
        command = [sys.executable, "-S", "-c", found.format(words)]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
        assert done.returncode == status, done.stderr
        assert done.stdout.startswith(str(tmp_path / "site"))
        assert out in done.stdout
        assert err in done.stderr
