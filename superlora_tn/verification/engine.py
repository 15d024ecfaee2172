"""Hypothesis at work: draw cases, keep the worst error, shrink a failure to one line. Needs the extra `verify`."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import hypothesis
import numpy as np
from hypothesis import HealthCheck, Phase, Verbosity, given, settings
from hypothesis import strategies as st
from hypothesis.errors import Unsatisfiable

from superlora_tn.declare.checks import checked_seed, near
from superlora_tn.declare.fold import Shape
from superlora_tn.declare.parts import SpecError, check_count
from superlora_tn.files.own import read as read_adapter
from superlora_tn.network.spec import AdapterSpec
from superlora_tn.verification import checks, draws
from superlora_tn.verification.cases import Case, NotApplicable
from superlora_tn.verification.certificate import Certificate, Row, Status
from superlora_tn.verification.checks import Against, Check
from superlora_tn.verification.claims import identities, reductions
from superlora_tn.verification.references import differs, peers

Report = Callable[[str], None]
SILENT = "has no such method"


class Broken(AssertionError):
    """A property does not hold in a case."""


@dataclass
class Trial:
    """What one search found."""

    tried: int = 0
    worst: float = 0.0
    last: Case | None = None
    error: str = ""


def search(check: Check, cases: st.SearchStrategy[Case], examples: int, seed: int) -> Trial:
    """Try a claim on drawn cases; a failure ends in the smallest case as `last`."""
    check_count("verify", "examples", examples, 1 << 20)
    trial = Trial()

    # The keyed draws of a seed are the same for each claim, so that their plans are made once.
    @hypothesis.seed(seed)
    @settings(
        max_examples=examples,
        database=None,
        deadline=None,
        report_multiple_bugs=False,
        print_blob=False,
        verbosity=Verbosity.quiet,
        phases=(Phase.generate, Phase.shrink),
        suppress_health_check=list(HealthCheck),
    )
    @given(cases)
    def attempt(case: Case) -> None:
        trial.last = case
        try:
            error = check.measure(case)
        except NotApplicable:
            hypothesis.reject()
        if not trial.error:
            trial.tried += 1
            trial.worst = max(trial.worst, error)
        if not error <= 1:
            trial.error = trial.error or "found"  # from here on Hypothesis shrinks
        judge(error)

    try:
        attempt()
    except Unsatisfiable:
        trial.last = None
    except Exception as error:
        trial.error = _words(error)
        _lessen(trial, check)
    return trial


def _words(error: Exception) -> str:
    """A failure in one line."""
    return str(error) if isinstance(error, Broken) else f"{type(error).__name__}: {error}".split("\n")[0]


def _lessen(trial: Trial, check: Check) -> None:
    """Take the smallest drawn weights on which the case fails: Hypothesis shrinks their number in a list, step by step."""
    case = trial.last
    if case is None or case.other is not None:
        return
    pool = draws.layouts(case.spec.network, case.spec.fold, case.spec.projection, case.spec.join)
    for shapes in pool[: pool.index(case.shapes)] if case.shapes in pool else ():
        smaller = replace(case, shapes=shapes)
        try:
            judge(check.measure(smaller))
        except NotApplicable:
            continue
        except Exception as error:
            trial.last, trial.error = smaller, _words(error)
            return


def judge(error: float, claim: str = "") -> float:
    """The error, where it is within the bound.

    Raises:
        Broken: it is not.
    """
    if not error <= 1:
        raise Broken(f"{claim}the error is {error:.3g} times the rounding bound")
    return error


def examine(
    subject: str, check: Check, cases: st.SearchStrategy[Case], examples: int, seed: int, required: bool = False
) -> Row:
    """One row: a claim tried on drawn cases."""
    name = check.reference
    if name in peers.PACKAGES:
        if not peers.is_installed(name):
            return Row(subject, check.claim, name, "skipped", detail="not installed", required=required)
        name = peers.version(name)
    trial = search(check, cases, examples, seed)
    if trial.error:
        line = trial.last.line(check.claim, check.source) if trial.last else ""
        return Row(subject, check.claim, name, "failed", trial.tried, trial.worst, trial.error, line, required)
    if not trial.tried:
        return Row(subject, check.claim, name, "skipped", detail=SILENT, required=required)
    return Row(subject, check.claim, name, "held", trial.tried, trial.worst, required=required)


def verify_spec(
    spec: AdapterSpec | str,
    against: Against | Sequence[Against] | None,
    examples: int,
    seed: int,
    shapes: Mapping[str, Shape] | Sequence[Shape] | None,
    called: str = "",
) -> Certificate:
    """All properties and references of a declaration, `called` so in the rows, or of a preset with drawn settings."""
    given_shapes, rows, seed = draws.named(shapes), [], checked_seed("verify", seed)
    subject, specs = _subject(spec, given_shapes)
    subject = called or subject
    named = checks.as_list(against)
    if subject in draws.LANGUAGE:
        given_shapes = given_shapes or draws.POOL
        # What is drawn at random is no method that has a name; looking for one would take most of the time.
        named = [one for one in named if one in ("formula", "tensorly") or against is not None]
    for check in [checks.join_check(), *checks.property_checks(), *checks.life_checks(), *checks.select(named)]:
        required = against is not None and check.reference != checks.NONE and not check.whole
        fitting = draws.cases(specs.filter(partial(_applies, check)), given_shapes)
        fitting = fitting if check.whole else fitting.map(Case.of_network)
        row = examine(subject, check, fitting, examples, seed, required)
        # A reference that has no such method is no news, unless the caller asked for it.
        if row.status != "skipped" or required or row.detail != SILENT:
            rows.append(row)
    return Certificate(tuple(rows), examples, seed)


def _subject(spec: AdapterSpec | str, given_shapes: Sequence[draws.Shapes]) -> tuple[str, st.SearchStrategy[AdapterSpec]]:
    """The name of what is verified, and the declarations to draw.

    Raises:
        SpecError: no declaration, an unknown preset, or a declaration that has no sizes on the given (or any) weights.
    """
    if isinstance(spec, str):
        return spec, preset(spec)
    if not isinstance(spec, AdapterSpec):
        raise SpecError(f"verify was given {spec!r}; give an AdapterSpec(...), or the name of a variant.")
    able = draws.with_kernels(spec)
    for own in given_shapes:
        able[0].lay_out(dict(own))
    able = [
        one for one in able if (any(draws.fits(one, own) for own in given_shapes) if given_shapes else draws.draw_layouts(one))
    ]
    if not able:
        raise SpecError(f"verify found no weights that {spec!r} fits; give shapes=[(out, in), ...].")
    drawn = draws.rescaled(spec) if able == [spec] else st.sampled_from(able).flatmap(draws.rescaled)
    return type(spec.network).__name__, drawn


def _applies(check: Check, spec: AdapterSpec) -> bool:
    return check.applies(spec if check.whole else replace(spec, join=None))


def preset(name: str) -> st.SearchStrategy[AdapterSpec]:
    """The strategy of a preset's settings.

    Raises:
        SpecError: there is no such preset.
    """
    if name not in draws.PRESETS:
        known = near(name, draws.PRESETS)
        raise SpecError(f"there is no variant '{name}' to verify; {known} Or give the JSON file of a declaration.")
    return draws.PRESETS[name]


def declared(name: str) -> list[tuple[str, AdapterSpec | str]]:
    """What a word of the command line names: a preset, the declaration in a JSON file, or those of a saved adapter.

    Raises:
        SpecError: none of these.
        CheckpointError: a folder without an adapter that can be read.
    """
    place = Path(name)
    if name not in draws.PRESETS and place.is_dir():
        entries = read_adapter(place).entries
        return [(f"{name} {k + 1}" if len(entries) > 1 else name, entry.spec) for k, entry in enumerate(entries)]
    if name not in draws.PRESETS and place.suffix == ".json":
        try:
            return [(name, AdapterSpec.from_dict(json.loads(place.read_text(encoding="utf-8-sig"))))]
        except (ValueError, RecursionError) as error:
            wanted = "give the JSON of a declaration's to_dict(), or the folder of a saved adapter"
            raise SpecError(f"{name} holds no declaration: {error} To verify your own, {wanted}.") from error
    preset(name)
    return [(name, name)]


def verify_reductions(examples: int, seed: int) -> Certificate:
    """All identities between methods."""
    rows, seed = [], checked_seed("verify_reductions", seed)
    for one in (*reductions.REDUCTIONS, *identities.IDENTITIES):
        rows.append(examine("reductions", reduction_check(one), one.cases(), examples, seed))
    return Certificate(tuple(rows), examples, seed)


def reduction_checks() -> list[Check]:
    """All identities as claims."""
    return [reduction_check(one) for one in (*reductions.REDUCTIONS, *identities.IDENTITIES)]


def reduction_check(one: reductions.Reduction | identities.Identity) -> Check:
    """An identity as a claim."""
    return Check(one.claim, one.reference, one.measure, source=repr(one.reference))


def verify_peers(seed: int = 0) -> Certificate:
    """Where PEFT and LyCORIS differ from the textbook, with both numbers."""
    rows = []
    for one in differs.DIFFERENCES:
        if not peers.is_installed(one.package):
            rows.append(Row("peers", one.property, one.package, "skipped", detail="not installed"))
            continue
        theirs, formula = one.show()
        at = np.unravel_index(np.abs(theirs - formula).argmax(), formula.shape)
        differ = not np.allclose(theirs, formula, rtol=1e-12, atol=0)
        numbers = f"{theirs[at]:.10g}, oracle {formula[at]:.10g}, at {list(map(int, at))}"
        status: Status = "peer differs" if differ else "peer agrees"
        rows.append(Row("peers", one.property, peers.version(one.package), status, detail=numbers if differ else ""))
    return Certificate(tuple(rows), 1, seed)


def find(claim: str, against: Against) -> Check:
    """The check that a pasted line names.

    Raises:
        SpecError: there is none.
    """
    known = reduction_checks()
    if not isinstance(against, str) or against in (*checks.REFERENCES, checks.NONE):
        known = [*checks.property_checks(), checks.join_check(), *checks.life_checks(), *checks.select([against])]
    own = against if isinstance(against, str) else None
    for check in known:
        if check.claim == claim and own in (None, check.reference) and (own or check.reference != checks.NONE):
            return check
    raise SpecError(f"there is no property {claim!r} against {against!r}.")


def check_case(case: Case, claim: str, against: Against) -> float:
    """Repeat one case; the error in units of the bound.

    Raises:
        Broken: it does not hold.
    """
    check = find(claim, against)
    return judge(check.measure(case), f"{claim} against {check.reference}: ")


def run_all(names: Sequence[str], examples: int, seed: int, say: Report) -> Certificate:
    """What is named against every reference; with no name, all presets, the reductions and the peers' differences."""
    chosen = [one for name in names for one in declared(name)] or [(name, name) for name in draws.PRESETS]
    steps: list[tuple[str, Callable[[], Certificate]]] = [
        (name, lambda spec=spec, name=name: verify_spec(spec, None, examples, seed, None, name))  # type: ignore[misc]
        for name, spec in chosen
    ]
    if not names:
        steps += [("reductions", lambda: verify_reductions(examples, seed)), ("peers", verify_peers)]
    total = Certificate((), examples, seed)
    for k, (name, step) in enumerate(steps):
        start = time.perf_counter()
        part = step()
        failed = f", {len(part.failures)} FAILED" if part.failures else ""
        say(f"[{k + 1}/{len(steps)}] {name}: {part.count('held')} held{failed} ({time.perf_counter() - start:.1f} s)")
        total += part
    return total
