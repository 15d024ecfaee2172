"""The TensorLy plug-in: TensorLy's own functions on this library's planner.

    from superlora_tn_backends.tenalg import planned
    with planned():
        tensorly.tucker_to_tensor(...)

`einsum` turns an equation into a contraction plan and runs the default backend's program of it. `planned` lends it to
TensorLy for the current thread, as a numeric backend whose einsum it is and as a tenalg backend that puts TensorLy's
algebra through einsum. Importing this module switches nothing. See `docs/tensorly.md` for what TensorLy routes here.
"""

from __future__ import annotations

import string
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from tensorly import backend, set_backend, tenalg
from tensorly.backend.pytorch_backend import PyTorchBackend
from tensorly.tenalg import core_tenalg
from tensorly.tenalg import set_backend as set_tenalg_backend
from tensorly.tenalg.einsum_tenalg import EinsumTenalgBackend
from torch import Tensor

from superlora_tn.contraction.layout import Equation, Indices
from superlora_tn.contraction.plan import plan_equation
from superlora_tn.contraction.profile import CPU, DEVICES
from superlora_tn.contraction.search import Optimizer
from superlora_tn.declare.bounds import KEPT_LINES
from superlora_tn.declare.cache import forked, kept
from superlora_tn_backends.tensorly_torch import Program, compile

BACKEND_NAME = "superlora_tn"
CACHE = 512  # equations kept; the least recently used one goes first
LETTERS = sorted(string.ascii_letters)
_FIRST = 0x4E00  # of characters that go on for thousands, where letters run out
Axes = tuple[tuple[int, ...], ...]
_KINDS = ((backend, set_backend), (tenalg, set_tenalg_backend))
_lock = forked()


@contextmanager
def planned(optimize: Optimizer = "dp") -> Iterator[None]:
    """Run TensorLy on the planner in this thread, on PyTorch tensors, until the block is left.

    Other threads keep their backends; leaving restores this thread's own, or that it had none, also where the blocks of
    several coroutines are left in another order than they were entered. `optimize`: see `make_plan`.
    """
    with _lock:  # so that TensorLy's idiom `set_backend(get_backend())` works inside
        for manager, _ in _KINDS:
            if BACKEND_NAME not in manager.available_backend_names:
                manager.available_backend_names.append(BACKEND_NAME)
    # This thread's settings themselves: a block may be left by another thread, as a generator's is that is collected there.
    settings = [_own(manager) for manager, _ in _KINDS]
    blocks, mine = _open.blocks, _Block([dict(own) for own in settings])
    blocks.append(mine)
    try:
        for (_, switch), ours in zip(_KINDS, (PlannedBackend(optimize), PlannedTenalgBackend()), strict=True):
            switch(ours, local_threadsafe=True)
        yield
    finally:
        place = next(k for k, block in enumerate(blocks) if block is mine)
        if place + 1 < len(blocks):  # a block that was entered later is open still: a coroutine's
            blocks[place + 1].before = mine.before
        else:
            for own, before in zip(settings, mine.before, strict=True):
                own.clear()
                own.update(before)
        del blocks[place]


class _Block:
    """An open `planned` block, and what the thread's settings were before it."""

    def __init__(self, before: list[dict[str, Any]]) -> None:
        self.before = before


class _Open(threading.local):
    """The open blocks of a thread, in the order in which they were entered; coroutines leave them in another."""

    def __init__(self) -> None:
        self.blocks: list[_Block] = []


_open = _Open()


def _own(manager: Any) -> dict[str, Any]:
    """This thread's own setting, if any. TensorLy has no public way to be without one again; setting the default pins it."""
    return cast(dict[str, Any], vars(manager._THREAD_LOCAL_DATA))


def einsum(equation: str, *operands: Any, optimize: Optimizer = "dp") -> Tensor:
    """`torch.einsum` by a contraction plan, with any characters as indices and any number of them.

    What has no plan goes to TensorLy's PyTorch einsum, and so do its errors: dtypes that are mixed or neither floating
    nor complex, sizes of 0, sizes that do not fit or are symbols, sparse tensors, devices that differ, and code under
    torch.compile.
    """
    if _has_plan(equation, operands):
        trained = tuple(t.requires_grad and torch.is_grad_enabled() for t in operands)
        contraction = _contraction(equation, tuple(t.shape for t in operands), trained, optimize, operands[0].device.type)
        if contraction is not None:
            return contraction(operands)
    return cast(Tensor, PyTorchBackend.einsum(_lettered(equation), *operands))


class PlannedBackend(PyTorchBackend, backend_name=BACKEND_NAME):  # type: ignore[misc, call-arg]
    """TensorLy's PyTorch backend with einsum by a contraction plan."""

    def __init__(self, optimize: Optimizer = "dp") -> None:
        self.optimize = optimize

    def einsum(self, equation: str, *operands: Any) -> Tensor:
        """See `einsum`."""
        return einsum(equation, *operands, optimize=self.optimize)


class PlannedTenalgBackend(EinsumTenalgBackend, backend_name=BACKEND_NAME):  # type: ignore[misc, call-arg]
    """TensorLy's einsum algebra; what it gets wrong, some of it silently, goes to TensorLy's core or is put right."""

    @staticmethod
    def mode_dot(tensor: Any, matrix_or_vector: Any, mode: int, transpose: bool = False) -> Any:
        """TensorLy's mode_dot; its einsum form takes a negative mode for none at all."""
        algebra = core_tenalg if mode < 0 else EinsumTenalgBackend
        return algebra.mode_dot(tensor, matrix_or_vector, mode, transpose=transpose)

    @staticmethod
    def multi_mode_dot(
        tensor: Any, matrix_or_vec_list: Any, modes: Any = None, skip: Any = None, transpose: Any = False
    ) -> Any:
        """TensorLy's multi_mode_dot; its einsum form cannot take no matrix, a negative mode, or a mode twice.

        And of what is transposed it conjugates matrices alone.
        """
        places = list(range(len(matrix_or_vec_list)) if modes is None else modes)
        chained = not places or min(places) < 0 or len(set(places)) < len(places)
        if transpose and not chained:
            matrix_or_vec_list = [backend.conj(m) if backend.ndim(m) == 1 else m for m in matrix_or_vec_list]
        algebra = core_tenalg if chained else EinsumTenalgBackend
        return algebra.multi_mode_dot(tensor, matrix_or_vec_list, modes=modes, skip=skip, transpose=transpose)

    @staticmethod
    def kronecker(matrices: Any, skip_matrix: Any = None, reverse: bool = False) -> Any:
        """TensorLy's kronecker; its einsum form takes matrices alone, and no vectors or tensors of higher order."""
        algebra = EinsumTenalgBackend if all(backend.ndim(m) == 2 for m in matrices) else core_tenalg
        return algebra.kronecker(matrices, skip_matrix=skip_matrix, reverse=reverse)

    @staticmethod
    def khatri_rao(matrices: Any, weights: Any = None, skip_matrix: Any = None, mask: Any = None) -> Any:
        """TensorLy's khatri_rao; its einsum form leaves a mask in the caller's list, and takes none with one axis or two."""
        algebra = EinsumTenalgBackend if mask is None else core_tenalg
        return algebra.khatri_rao(list(matrices), weights=weights, skip_matrix=skip_matrix, mask=mask)

    @staticmethod
    def inner(tensor1: Any, tensor2: Any, n_modes: Any = None) -> Any:
        """TensorLy's inner; its einsum form takes more modes than there are for some index that stands nowhere else."""
        algebra = core_tenalg if n_modes is not None and n_modes > backend.ndim(tensor1) else EinsumTenalgBackend
        return algebra.inner(tensor1, tensor2, n_modes=n_modes)

    @staticmethod
    def unfolding_dot_khatri_rao(tensor: Any, cp_tensor: Any, mode: int) -> Any:
        """TensorLy's MTTKRP; its einsum form conjugates the factors, but not the weights."""
        weights, factors = cp_tensor
        weights = None if weights is None else backend.conj(weights)
        return EinsumTenalgBackend.unfolding_dot_khatri_rao(tensor, (weights, factors), mode)

    @staticmethod
    def higher_order_moment(tensor: Any, order: int) -> Any:
        """The mean over samples of the outer product of `order` copies: TensorLy's forms sum it, or raise above order 1."""
        features = backend.ndim(tensor) - 1
        symbols = [chr(_FIRST + k) for k in range(1 + order * features)]
        own = ["".join(symbols[1 + k * features : 1 + (k + 1) * features]) for k in range(order)]
        equation = f"{','.join(symbols[0] + axes for axes in own)}->{''.join(own)}"
        return backend.einsum(equation, *[tensor] * order) / backend.shape(tensor)[0]


def _has_plan(equation: Any, operands: tuple[Any, ...]) -> bool:
    """Whether the operands are of a kind that plans are for."""
    if not isinstance(equation, str) or not operands or not all(isinstance(t, Tensor) for t in operands):
        return False
    first = operands[0]
    alike = all(t.dtype == first.dtype and t.device == first.device and t.layout == torch.strided for t in operands)
    if not alike or not (first.is_floating_point() or first.is_complex()) or torch.compiler.is_compiling():
        return False
    return not any(isinstance(size, torch.SymInt) for t in operands for size in t.shape)


def _lettered(equation: Any) -> Any:
    """The equation in letters, the only indices that torch.einsum knows, in the same alphabetic order."""
    symbols = sorted(set(equation) - set(" .,->")) if isinstance(equation, str) else []
    if set(symbols) <= set(LETTERS):
        return equation
    if len(symbols) > len(LETTERS):
        needed = "its operands must be dense floating or complex tensors of one dtype and device, with sizes that fit, none 0"
        raise ValueError(f"einsum was given {len(symbols)} different indices; above {len(LETTERS)} {needed}.")
    return equation.translate({ord(symbol): letter for symbol, letter in zip(symbols, LETTERS, strict=False)})


@dataclass(frozen=True)
class _View:
    """What is done to an operand before the plan: diagonals taken, broadcast axes dropped, its own indices summed."""

    diagonals: Axes
    squeezed: tuple[int, ...]
    summed: tuple[int, ...]

    def __call__(self, tensor: Tensor) -> Tensor:
        for first, second in self.diagonals:
            tensor = tensor.diagonal(dim1=first, dim2=second)
        tensor = tensor.squeeze(self.squeezed) if self.squeezed else tensor
        return tensor.sum(self.summed) if self.summed else tensor


@dataclass(frozen=True)
class _Contraction:
    """An einsum ready to run: a view of each operand, then the program, or a permutation of the only operand."""

    views: tuple[_View, ...]
    program: Program | None
    order: tuple[int, ...]

    def __call__(self, operands: tuple[Tensor, ...]) -> Tensor:
        tensors = [view(t) for view, t in zip(self.views, operands, strict=True)]
        if self.program is None:
            return tensors[0].permute(self.order)
        # The program's written gradient is for real numbers of one dtype; autograd's own knows conjugates and casts.
        kind = tensors[0].device.type
        plain = kind == "meta" or torch.is_autocast_enabled(kind) or tensors[0].is_complex()
        return cast(Tensor, (self.program.run if plain else self.program)(*tensors))


class _NoPlan(Exception):
    """torch.einsum shall judge the equation."""


@kept(CACHE, KEPT_LINES, lambda _, equation, shapes, *__: len(shapes))
def _contraction(
    equation: str, shapes: tuple[tuple[int, ...], ...], trained: tuple[bool, ...], optimize: Optimizer, device: str
) -> _Contraction | None:
    """Plan and compile an equation; None where there is no plan of it."""
    try:
        terms, output = _read(equation, [*map(len, shapes)])
        size = _sizes(terms, output, shapes)
    except _NoPlan:
        return None
    parts = [_reduced(*operand, size) for operand in zip(terms, shapes, strict=True)]
    uses = Counter(i for term in (*(kept for *_, kept in parts), output) for i in term)
    # An index that is on one operand alone is summed there: a plan holds it on two at least, or in the result.
    views = tuple(_View(pairs, ones, tuple(k for k, i in enumerate(kept) if uses[i] == 1)) for pairs, ones, kept in parts)
    inputs = tuple(tuple(i for i in kept if uses[i] > 1) for *_, kept in parts)
    if len(inputs) == 1:
        return _Contraction(views, None, tuple(inputs[0].index(i) for i in output))
    names, stored = tuple(f"x{k}" for k in range(len(inputs))), tuple(tuple(size[i] for i in term) for term in inputs)
    whole = Equation(names, inputs, stored, trained, tuple((i,) for i in output), tuple(size.items()))
    return _Contraction(views, compile(plan_equation(whole, device=DEVICES.get(device, CPU), optimize=optimize)), ())


def _read(equation: str, orders: Sequence[int]) -> tuple[list[Indices], Indices]:
    """The indices of each operand and of the result; an ellipsis stands for indices counted from the right."""
    left, arrow, right = equation.replace(" ", "").partition("->")
    texts = left.split(",")
    covered = [order - len(text.replace("...", "", 1)) for text, order in zip(texts, orders, strict=False)]
    unfit = any(extra < 0 or (extra and "..." not in text) for text, extra in zip(texts, covered, strict=False))
    if unfit or len(texts) != len(orders):
        raise _NoPlan
    terms = [_indices(text, extra) for text, extra in zip(texts, covered, strict=True)]
    if arrow:
        return terms, _indices(right, max(covered))
    count = Counter(i for term in terms for i in term)
    return terms, (*_indices("...", max(covered)), *sorted(i for i, n in count.items() if n == 1 and len(i) == 1))


def _indices(text: str, covered: int) -> Indices:
    """The indices of one term whose ellipsis covers so many axes."""
    before, dots, after = text.partition("...")
    if set(".,->") & set(before + after):
        raise _NoPlan
    return (*before, *(f"...{k}" for k in range(covered, 0, -1) if dots), *after)


def _sizes(terms: Sequence[Indices], output: Indices, shapes: Sequence[Sequence[int]]) -> dict[str, int]:
    """Index -> size; an extent of 1 is broadcast to another operand's, but not to another one of the same operand."""
    extents: dict[str, set[int]] = {}
    fits = len(set(output)) == len(output)
    for term, shape in zip(terms, shapes, strict=True):
        own = dict(zip(term, shape, strict=True))
        fits &= tuple(own[i] for i in term) == tuple(shape)
        for index, extent in own.items():
            extents.setdefault(index, {1}).add(extent)
    size = {i: max(found) for i, found in extents.items()}
    if not fits or not set(output) <= set(size) or any(not found <= {1, size[i]} for i, found in extents.items()):
        raise _NoPlan
    return size


def _reduced(term: Indices, shape: Sequence[int], size: dict[str, int]) -> tuple[Axes, tuple[int, ...], Indices]:
    """An operand's diagonals to take and broadcast axes to drop, in this order, and the indices left, each once."""
    left, extent = list(term), dict(zip(term, shape, strict=True))
    pairs: list[tuple[int, ...]] = []
    while repeated := [i for i in left if left.count(i) > 1]:
        pairs.append(tuple(k for k, i in enumerate(left) if i == repeated[0])[:2])
        left = [*(i for k, i in enumerate(left) if k not in pairs[-1]), repeated[0]]
    ones = tuple(k for k, i in enumerate(left) if extent[i] != size[i])
    return tuple(pairs), ones, tuple(i for i in left if extent[i] == size[i])


def cache_info() -> Any:
    """Hits, misses, bound and size of the cache of equations, as `functools.lru_cache` counts them; operands of them all."""
    return _contraction.cache_info()


def cache_clear() -> None:
    """Forget all equations and their programs."""
    _contraction.cache_clear()
