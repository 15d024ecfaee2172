"""Does the suite notice a wrong value anywhere in the library? Plant one fault at a time, and see which test fails.

    python tests/mutations.py                     # all faults, about five minutes on one core
    python tests/mutations.py --list
    python tests/mutations.py --only kronecker-swapped merge-adds-twice
    python tests/mutations.py --jobs 2 --json benchmarks/results/mutations.json

Each fault of `faults` is planted alone in a fresh copy of the working tree, where pytest runs the tests that are most
likely to notice it, and, where these pass, the whole suite but for the slow tests and the demo. First of all the same
tests run in a copy without a fault, where they have to pass; so does a test from elsewhere in the suite that noticed.

The exit status is 0 when every fault is caught, 1 when one survives (a hole in the suite), and 2 when nothing was
shown: a fault's old text is not in the source exactly once, it breaks imports rather than values, or tests fail
without a fault.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from faults import FAULTS, Fault

from superlora_tn.tools.measure import machine

ROOT = Path(__file__).parents[1]
# The check itself stays out of the copies: it would notice any fault by its text.
LEFT_OUT = (".*", "__pycache__", "out", "site", "dist", "build", "mutations.py", "test_mutations.py", "faults.py")
WHOLE = ("-m", "not slow and not gpu", "--ignore=tests/test_demo.py", "tests")
LIMIT = 1800  # seconds that a run of tests may take


class NothingShown(Exception):
    """The check itself does not work; the message says why."""


@dataclass(frozen=True)
class Verdict:
    """What became of one fault: the test that caught it, or None."""

    name: str
    file: str
    caught_by: str | None
    seconds: float


def planted(fault: Fault, root: Path = ROOT) -> str:
    """The text of the fault's file with the fault in it.

    Raises:
        NothingShown: the right text is not there exactly once.
    """
    text = (root / fault.file).read_text()
    if (count := text.count(fault.old)) != 1:
        raise NothingShown(
            f"the fault '{fault.name}' is stale: its text occurs {count} times in {fault.file}, expected once. "
            f"Bring it up to date in tests/faults.py: {fault.old!r}"
        )
    return text.replace(fault.old, fault.new)


def copied(folder: Path) -> Path:
    """A copy of the working tree without what git ignores and without this check."""
    shutil.copytree(ROOT, folder, symlinks=True, ignore=shutil.ignore_patterns(*LEFT_OUT))
    return folder


def failing_test(folder: Path, tests: Sequence[str]) -> str | None:
    """The first test that fails in a copy, or None.

    Raises:
        NothingShown: the tests cannot be collected, there are none, or they do not end.
    """
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *tests]
    dropped = ("SUPERLORA_DATA", "PYTEST_ADDOPTS")
    environment = {k: v for k, v in os.environ.items() if k not in dropped} | {
        "HYPOTHESIS_PROFILE": "default",
        "OMP_NUM_THREADS": "1",
        # A cached module is told from a changed one by size and second, and a fault may change neither.
        "PYTHONDONTWRITEBYTECODE": "1",
        "PYTHONPATH": os.pathsep.join(map(str, (folder, folder / "backends", folder / "tests"))),
    }
    try:
        run = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=LIMIT)
    except subprocess.TimeoutExpired as error:
        raise NothingShown(f"{' '.join(tests)} did not end within {LIMIT} seconds.") from error
    if run.returncode == 0:
        return None
    found = re.search(r"^(?:FAILED|ERROR) (\S+::.+?)(?: - .*)?$", run.stdout, re.MULTILINE)
    if run.returncode != 1 or found is None:
        raise NothingShown(f"pytest {' '.join(tests)} ended with status {run.returncode}:\n{(run.stdout + run.stderr)[-2000:]}")
    return found[1]


def examined(fault: Fault, place: Path, clean: Path) -> Verdict:
    """Plant one fault and run the tests."""
    start = time.perf_counter()
    text, folder = planted(fault), copied(place / fault.name)
    (folder / fault.file).write_text(text)
    try:
        caught_by = failing_test(folder, fault.tests)
        if caught_by is None and (caught_by := failing_test(folder, WHOLE)) and failing_test(clean, [caught_by]):
            raise NothingShown(f"{caught_by} fails without a fault too; mend it first.")
    except NothingShown as error:
        raise NothingShown(f"{fault.name}: {error}") from error
    shutil.rmtree(folder)
    return Verdict(fault.name, fault.file, caught_by, round(time.perf_counter() - start, 1))


def first_tests(faults: Sequence[Fault]) -> list[str]:
    """The tests of all faults, each once; a test of a file that is named whole goes with the file."""
    named = dict.fromkeys(test for fault in faults for test in fault.tests)
    return [test for test in named if "::" not in test or test.partition("::")[0] not in named]


def check(faults: Sequence[Fault], jobs: int = 1) -> list[Verdict]:
    """Examine faults, and print each verdict.

    Raises:
        NothingShown: a fault is stale or breaks more than values, or tests fail without a fault.
    """
    for fault in faults:
        planted(fault)
    verdicts: list[Verdict] = []
    with TemporaryDirectory(prefix="mutations-") as place:
        clean = copied(Path(place) / "clean")
        tests = first_tests(faults)
        if failed := failing_test(clean, tests):
            raise NothingShown(f"{failed} fails without a fault; mend it first.")
        print(f"without a fault: {len(tests)} files and tests pass", flush=True)
        with ThreadPoolExecutor(jobs) as pool:
            for verdict in pool.map(lambda fault: examined(fault, Path(place), clean), faults):
                verdicts.append(verdict)
                print(_line(len(verdicts), len(faults), verdict), flush=True)
    return verdicts


def _line(done: int, of: int, verdict: Verdict) -> str:
    caught = verdict.caught_by.partition("[")[0].removeprefix("tests/") if verdict.caught_by else "SURVIVED"
    place = verdict.file.rpartition("/")[2]
    return f"[{done:2}/{of}] {verdict.name:36} {place:20} {verdict.seconds:6.1f} s  {caught}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the check; returns the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--jobs", type=int, default=1, help="faults examined at once")
    parser.add_argument("--only", nargs="+", metavar="NAME", choices=[f.name for f in FAULTS], help="these faults alone")
    parser.add_argument("--list", action="store_true", help="name the faults and stop")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the verdicts, the machine and the date")
    given = parser.parse_args(arguments)
    faults = [f for f in FAULTS if given.only is None or f.name in given.only]
    if given.list:
        print("\n".join(f"{f.name:36} {f.file}" for f in faults))
        return 0
    start = time.perf_counter()
    try:
        verdicts = check(faults, given.jobs)
    except NothingShown as error:
        print(error, file=sys.stderr)
        return 2
    seconds = round(time.perf_counter() - start, 1)
    survived = [v.name for v in verdicts if v.caught_by is None]
    print(f"{len(verdicts) - len(survived)} of {len(verdicts)} faults caught in {seconds:.0f} s")
    if survived:
        print(f"SURVIVED, so a test is missing: {', '.join(survived)}")
    if given.json is not None:
        cpu = round(os.times().children_user + os.times().children_system, 1)
        counts = {"jobs": given.jobs, "seconds": seconds, "cpu_seconds": cpu, "caught": len(verdicts) - len(survived)}
        data = {"machine": machine(), **counts, "faults": [asdict(verdict) for verdict in verdicts]}
        given.json.write_text(json.dumps(data, indent=1) + "\n")
    return 1 if survived else 0


if __name__ == "__main__":
    sys.exit(main())
