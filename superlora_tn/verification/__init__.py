"""Verify a declaration by property: Hypothesis draws sizes, scales, dtypes and batches, and checks it against references.

    certificate = sl.verify(sl.lokr(rank=2))          # all properties, and every reference that has such a method
    assert certificate; print(certificate)

What is proven, against what, and with which bound: `docs/verify.md`. Hypothesis is optional (extra ``verify``); so are
PEFT and LyCORIS, without which their rows are listed as skipped.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from types import ModuleType

from superlora_tn.declare.fold import Shape
from superlora_tn.network.spec import AdapterSpec
from superlora_tn.verification.cases import Case
from superlora_tn.verification.certificate import Certificate, Row
from superlora_tn.verification.checks import REFERENCES, Against
from superlora_tn.verification.references.carry import Carried, from_peft, kind_of, to_peft

__all__ = [
    "REFERENCES",
    "Carried",
    "Certificate",
    "Row",
    "VerifyError",
    "check",
    "from_peft",
    "kind_of",
    "run",
    "to_peft",
    "verify",
    "verify_peers",
    "verify_reductions",
]


class VerifyError(RuntimeError):
    """Verification cannot start; the message says what it needs."""


def _engine() -> ModuleType:
    """The part that needs Hypothesis, loaded when it is asked for."""
    try:
        import hypothesis  # noqa: F401
    except ImportError as error:
        raise VerifyError("verification needs Hypothesis: pip install 'superlora_tn[verify]'.") from error
    from superlora_tn.verification import engine

    return engine


def verify(
    spec: AdapterSpec | str,
    against: Against | Sequence[Against] | None = None,
    examples: int = 25,
    seed: int = 0,
    shapes: Mapping[str, Shape] | Sequence[Shape] | None = None,
) -> Certificate:
    """Check a declaration by property, and against independent references.

    Args:
        spec: a declaration, whose scale is varied; or a preset's name such as ``"lokr"``, whose settings are drawn too.
        against: ``"formula"``, ``"paper"``, ``"tensorly"``, ``"peft"``, ``"lycoris"``, a function, or a list of these.
            None takes all that have the method, and lists those that are not installed as skipped. A reference that is
            named here and cannot be tried makes the certificate false. ``"-"`` alone checks the properties that need none.
            A function takes one group's values, ``{node: float64 array}``, and returns dW before the scale
            alpha / rank: (out, in) for one weight; for several, stacked or one after another in the order of targets.
        examples: cases that are drawn for each claim.
        seed: of the draws; equal seeds draw equal cases.
        shapes: (out, in) of each weight, by name or as a list, in place of drawn ones.

    Returns:
        A certificate, true exactly when everything that was asked for held; print it, or take `to_dict`.

    Raises:
        VerifyError: Hypothesis is not installed.
        SpecError: an unknown reference or preset, no weights or such as the declaration has no sizes on, or examples below 1.
    """
    certificate: Certificate = _engine().verify_spec(spec, against, examples, seed, shapes)
    return certificate


def verify_reductions(examples: int = 25, seed: int = 0) -> Certificate:
    """Check the identities between methods: the rows of SuperLoRA's table, and the algebra of networks.

    Raises:
        VerifyError: Hypothesis is not installed.
    """
    certificate: Certificate = _engine().verify_reductions(examples, seed)
    return certificate


def verify_peers() -> Certificate:
    """Show where the installed PEFT and LyCORIS differ from the textbook. News about them: no row of it can fail.

    Raises:
        VerifyError: Hypothesis is not installed.
    """
    certificate: Certificate = _engine().verify_peers()
    return certificate


def check(
    spec: AdapterSpec,
    shapes: Mapping[str, Shape],
    claim: str,
    against: Against = "-",
    *,
    seed: int = 0,
    dtype: str = "float64",
    batch: tuple[int, ...] = (2,),
    other: AdapterSpec | None = None,
) -> float:
    """Repeat one case, as the line of a failed certificate does.

    Args:
        spec, shapes: the declaration, and (out, in) of its weights by name.
        claim, against: a property's name and its reference.
        seed: of all values.
        dtype: ``"float64"`` or ``"float32"``, of the code under test.
        batch: shape of the activation before its last axis.
        other: the right side of a reduction.

    Returns:
        The error in units of the rounding bound.

    Raises:
        AssertionError: it does not hold.
    """
    error: float = _engine().check_case(Case(spec, tuple(shapes.items()), seed, dtype, batch, other), claim, against)
    return error


def run(names: Sequence[str] = (), examples: int = 25, as_json: bool = False, seed: int = 0) -> int:
    """What ``superlora-tn verify`` does: verify presets, print the certificate, report progress on stderr.

    Args:
        names: presets, JSON files of declarations (`AdapterSpec.to_dict`), or folders of saved adapters; none takes all
            presets, the reductions, and the peers' differences.
        examples: cases for each claim.
        as_json: print the certificate as JSON.
        seed: of the draws.

    Returns:
        The exit status: 0 when everything held, else 1.

    Raises:
        VerifyError: Hypothesis is not installed.
        SpecError: an unknown preset, a file without a declaration, or examples below 1.
    """
    certificate: Certificate = _engine().run_all(names, examples, seed, lambda line: print(line, file=sys.stderr, flush=True))
    print(json.dumps(certificate.to_dict(), indent=1) if as_json else certificate)
    return 0 if certificate else 1
