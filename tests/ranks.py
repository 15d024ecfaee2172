"""What `test_distributed` runs in each of several processes: ``python ranks.py RANK WORLD FOLDER``.

Every scenario runs in all ranks one after another; what it returns, or how it failed, is written to ``FOLDER/<rank>.json``.
"""

from __future__ import annotations

import json
import sys
import traceback
import warnings
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint import load as dcp_load
from torch.distributed.checkpoint import save as dcp_save
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import superlora_tn as sl

WIDTH, ROWS, STEPS = 8, 8, 3
SPECS = {
    "lora": sl.lora(2, alpha=4),
    "lokr": sl.lokr(1),
    "lotr": sl.lotr(2),
    "vera": sl.vera(3),
    "lorta": sl.lorta(2, groups=2),
    "fastfood": sl.lorta(2, projection=sl.Fastfood(0.5, seed=1)),
    "shira": sl.shira(20),  # at outputs where several processes run
}
Scenario = Callable[[Path], Any]
SCENARIOS: dict[str, Scenario] = {}


def scenario(function: Scenario) -> Scenario:
    SCENARIOS[function.__name__] = function
    return function


class Net(nn.Module):
    """Three layers that read one x, and one behind them; the three may be checkpointed."""

    def __init__(self, reentrant: bool | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.parts = nn.ModuleDict({k: nn.Linear(WIDTH, WIDTH) for k in ("q", "k", "v")})
        self.last, self.reentrant = nn.Linear(WIDTH, WIDTH), reentrant
        self.double()

    def _first(self, x: Tensor) -> Tensor:
        return torch.tanh(sum(part(x) for part in self.parts.values()))  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        if self.reentrant is None:
            return self.last(self._first(x))
        return self.last(checkpoint(self._first, x, use_reentrant=self.reentrant))


def attached(
    spec: sl.AdapterSpec, model: nn.Module | None = None, seed: int | None = 0, **options: Any
) -> tuple[Any, sl.Tuned]:
    """The net with an adapter whose dW is not zero."""
    model = Net() if model is None else model
    tuned = sl.attach(model, spec, "all-linear", seed=seed, dtype=torch.float64, **options)
    with torch.no_grad():
        for node in tuned.parameters():
            node.add_(0.1)
    return model, tuned


def batch() -> Tensor:
    """All rows; each rank takes its own."""
    return torch.linspace(-1, 1, ROWS * WIDTH, dtype=torch.float64).reshape(ROWS, WIDTH).sin()


def trained(model: nn.Module, nodes: Sequence[nn.Parameter], x: Tensor) -> list[float]:
    """Losses of a few steps; the mean over all rows is the mean of the ranks' means."""
    optimizer, losses = torch.optim.AdamW(nodes, lr=1e-2), []
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss = (model(x.clone().requires_grad_()) - 1).square().mean()
        loss.backward()
        optimizer.step()
        whole = loss.detach().clone()
        dist.all_reduce(whole)
        losses.append(float(whole) / dist.get_world_size())
    return losses


def whole(tensor: Tensor) -> Tensor:
    full = getattr(tensor, "full_tensor", None)
    return (tensor if full is None else full()).detach()


def share() -> Tensor:
    """This rank's rows."""
    return batch().chunk(dist.get_world_size())[dist.get_rank()]


def off(nodes: Sequence[Tensor], losses: list[float], own: Sequence[Tensor], expected: list[float]) -> float:
    """How far nodes and losses are from the expected ones, relative to the largest number of each."""
    found = [*nodes, torch.tensor(losses, dtype=torch.float64)]
    pairs = zip(found, [*own, torch.tensor(expected, dtype=torch.float64)], strict=True)
    return max(float((a.reshape(b.shape) - b).detach().abs().max() / b.abs().max()) for a, b in pairs)


def compared(
    spec: sl.AdapterSpec,
    wrap: Callable[[Any, sl.Tuned], nn.Module],
    reentrant: bool | None = None,
    split: bool = True,
    **options: Any,
) -> float:
    """How far losses and nodes are from one process's after a few steps, relative to the largest number."""
    model, tuned = attached(spec, Net(reentrant), **options)
    wrapped = wrap(model, tuned)
    losses = trained(wrapped, list(tuned.parameters()), share() if split else batch())
    alone, own = attached(spec, Net(reentrant))
    expected = trained(alone, list(own.parameters()), batch())
    return off([whole(p) for p in tuned.parameters()], losses, list(own.parameters()), expected)


def mesh() -> DeviceMesh:
    return init_device_mesh("cpu", (dist.get_world_size(),))


def sharded(model: nn.Module) -> nn.Module:
    """FSDP2, a unit each layer and the rest one."""
    for layer in [m for m in model.modules() if isinstance(m, nn.Linear)]:
        fully_shard(layer, mesh=mesh())
    return fully_shard(model, mesh=mesh())


def averaged(tuned: sl.Tuned) -> None:
    """Gradients of a whole adapter are averaged over the ranks as they come."""
    for node in tuned.parameters():
        node.register_post_accumulate_grad_hook(lambda p: dist.all_reduce(p.grad.div_(dist.get_world_size())))


def parallel(model: nn.Module) -> nn.Module:
    """Tensor parallel as it is usual: columns, what is between by element, then rows."""
    styles = {f"parts.{k}": ColwiseParallel() for k in "qkv"} | {"last": RowwiseParallel()}
    return parallelize_module(model, mesh(), styles)


def refused(call: Callable[[], Any], *errors: type[Exception]) -> str:
    """The error's words; an empty text where there was none."""
    try:
        call()
    except errors as error:
        return str(error)
    return ""


def caught(call: Callable[[], Any]) -> list[str]:
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        call()
    return [str(w.message) for w in found if w.category is UserWarning]


# --- scenarios ---


@scenario
def ddp(folder: Path) -> Any:
    return {name: compared(spec, lambda m, _: DistributedDataParallel(m)) for name, spec in SPECS.items()}


@scenario
def ddp_checkpointed(folder: Path) -> Any:
    return {name: compared(spec, lambda m, _: DistributedDataParallel(m), False) for name, spec in SPECS.items()}


@scenario
def ddp_compiled(folder: Path) -> Any:
    wrap = lambda m, _: torch.compile(DistributedDataParallel(m), backend="aot_eager")  # noqa: E731
    return {name: compared(SPECS[name], wrap) for name in ("lora", "lotr")}


@scenario
def ddp_static_graph_and_reentrant(folder: Path) -> Any:
    wrap = lambda m, _: DistributedDataParallel(m, static_graph=True)  # noqa: E731
    return {name: compared(spec, wrap, True) for name, spec in SPECS.items()}


@scenario
def ddp_reentrant_is_warned_of(folder: Path) -> Any:
    def step(spec: sl.AdapterSpec) -> None:
        model, _ = attached(spec, Net(True))
        DistributedDataParallel(model)(batch().requires_grad_()).square().mean().backward()

    words = {name: caught(lambda spec=SPECS[name]: step(spec)) for name in ("lora", "lotr", "lorta")}
    own = {"lora": SPECS["lora"], "loha": sl.loha(2), "lokr": SPECS["lokr"]}  # no node of two layers
    return [words, {name: compared(spec, lambda m, _: DistributedDataParallel(m), True) for name, spec in own.items()}]


@scenario
def fsdp2_attached_before(folder: Path) -> Any:
    return {name: compared(spec, lambda m, _: sharded(m)) for name, spec in SPECS.items()}


@scenario
def fsdp2_at_the_weight(folder: Path) -> Any:
    return {name: compared(SPECS[name], lambda m, _: sharded(m), at="weight") for name in ("lora", "shira")}


@scenario
def fsdp2_checkpointed(folder: Path) -> Any:
    return {f"{name} {re}": compared(spec, lambda m, _: sharded(m), re) for name, spec in SPECS.items() for re in (False, True)}


@scenario
def fsdp2_adapter_ignored(folder: Path) -> Any:
    """The base is sharded, the adapter is whole in each process, and its gradients are averaged by a hook."""

    def wrap(model: nn.Module, tuned: sl.Tuned) -> nn.Module:
        fully_shard(model, mesh=mesh(), ignored_params=set(tuned.parameters()))
        averaged(tuned)
        return model

    return {name: compared(spec, wrap) for name, spec in SPECS.items()}


@scenario
def fsdp2_attached_after(folder: Path) -> Any:
    """It is warned of, as nothing averages the adapter's gradients; with a hook that does it trains as one process."""
    words, found = [], {}
    for name, spec in SPECS.items():
        model = sharded(Net())
        words += caught(lambda spec=spec, model=model: attached(spec, model))
        averaged(sl.tuned(model))
        nodes = list(sl.tuned(model).parameters())
        losses = trained(model, nodes, share())
        alone, own = attached(spec)
        found[name] = off(nodes, losses, list(own.parameters()), trained(alone, list(own.parameters()), batch()))
    return [words, found]


def flattened(model: nn.Module) -> nn.Module:
    """FSDP1, one unit."""
    return FullyShardedDataParallel(model, use_orig_params=True, device_id=torch.device("cpu"))


def compared_flattened(spec: sl.AdapterSpec, reentrant: bool | None = None) -> float:
    """As `compared`, under FSDP1."""
    model, tuned = attached(spec, Net(reentrant))
    wrapped = flattened(model)
    losses = trained(wrapped, list(tuned.parameters()), share())
    alone, own = attached(spec, Net(reentrant))
    expected = trained(alone, list(own.parameters()), batch())
    with FullyShardedDataParallel.summon_full_params(wrapped):
        return off(list(tuned.parameters()), losses, list(own.parameters()), expected)


@scenario
def fsdp1(folder: Path) -> Any:
    return {name: compared_flattened(spec) for name, spec in SPECS.items()}


@scenario
def fsdp1_checkpointed(folder: Path) -> Any:
    return {f"{name} {re}": compared_flattened(spec, re) for name, spec in SPECS.items() for re in (False, True)}


@scenario
def saved_while_sharded(folder: Path) -> Any:
    """Every rank saves into one folder; the file holds the whole adapter."""
    found = {}
    for name, spec in SPECS.items():
        model, tuned = attached(spec)
        expected = {t: tuned.delta(t) for t in tuned.targets}
        sharded(model)
        tuned.save(folder / name)
        dist.barrier()
        again = sl.load(Net(), folder / name)
        found[name] = max(float((again.delta(t) - d).abs().max() / d.abs().max()) for t, d in expected.items())
    return found


@scenario
def merge_while_sharded(folder: Path) -> Any:
    model, tuned = attached(sl.lora(2))
    sharded(model)
    words = refused(tuned.merge, sl.AttachError)
    model.unshard()  # type: ignore[operator]
    return [words, refused(tuned.merge, sl.AttachError), tuned.merged]


@scenario
def drawn_without_a_seed(folder: Path) -> Any:
    torch.manual_seed(dist.get_rank() + 100)
    model = Net()
    torch.manual_seed(dist.get_rank() + 100)
    tuned = sl.attach(model, sl.lotr(2), "all-linear")
    return [float(node.double().sum()) for node in tuned.parameters()]


@scenario
def found_in_wrappers(folder: Path) -> Any:
    """`sl.tuned` of the wrapped model is the handle."""
    found = {}
    model, handle = attached(sl.lora(2))
    found["ddp"] = sl.tuned(DistributedDataParallel(model)) is handle
    model, handle = attached(sl.lora(2))
    found["compiled ddp"] = sl.tuned(torch.compile(DistributedDataParallel(model), backend="eager")) is handle
    model, handle = attached(sl.lora(2))
    found["fsdp2"] = sl.tuned(sharded(model)) is handle
    model, handle = attached(sl.lora(2))
    found["fsdp1"] = sl.tuned(flattened(model)) is handle
    return found


@scenario
def distributed_checkpoint(folder: Path) -> Any:
    """Written by all ranks, read by one and by all."""
    model, tuned = attached(sl.lotr(2))
    expected = {t: tuned.delta(t) for t in tuned.targets}
    sharded(model)
    dcp_save({"model": get_model_state_dict(model)}, checkpoint_id=folder / "dcp")
    dist.barrier()
    other, again = attached(sl.lotr(2), seed=5)
    sharded(other)
    state = {"model": get_model_state_dict(other)}
    dcp_load(state, checkpoint_id=folder / "dcp")
    set_model_state_dict(other, state["model"])
    again.save(folder / "again")
    dist.barrier()
    found = sl.load(Net(), folder / "again")
    return max(float((found.delta(t) - d).abs().max()) for t, d in expected.items())


@scenario
def tensor_parallel(folder: Path) -> Any:
    """Attached before: all ranks see all rows, and train what one process does."""
    return {name: compared(spec, lambda m, _: parallel(m), split=False) for name, spec in SPECS.items()}


@scenario
def tensor_parallel_checkpointed(folder: Path) -> Any:
    return {
        f"{name} {re}": compared(spec, lambda m, _: parallel(m), re, split=False)
        for name, spec in SPECS.items()
        for re in (False, True)
    }


@scenario
def tensor_parallel_gradient_of_x(folder: Path) -> Any:
    found = {}
    for name, spec in SPECS.items():
        slopes = []
        for change in (parallel, lambda m: m):
            x = batch().requires_grad_()
            change(attached(spec)[0])(x).square().mean().backward()
            slopes.append(x.grad)
        found[name] = float((slopes[0] - slopes[1]).abs().max() / slopes[1].abs().max())
    return found


@scenario
def tensor_parallel_refused(folder: Path) -> Any:
    """Attached after; merged; with dropout; by rows of a batch."""
    model = parallel(Net())
    found = {name: refused(lambda name=name: sl.attach(model, sl.lora(2), [name]), sl.AttachError) for name in ("q", "last")}
    model, tuned = attached(sl.lora(2))
    found["merge"] = refused(parallel(model) and tuned.merge, sl.AttachError)
    with sl.rows(model, ["superlora"] * ROWS):
        found["rows"] = refused(lambda: model(batch()), sl.LayerError)
    model = parallel(attached(sl.lora(2, dropout=0.5))[0])
    found["dropout"] = refused(lambda: model(batch()), sl.LayerError)
    return found


@scenario
def tensor_parallel_saved(folder: Path) -> Any:
    model, tuned = attached(sl.lokr(1))
    expected = {t: tuned.delta(t) for t in tuned.targets}
    parallel(model)
    tuned.save(folder / "parallel")
    dist.barrier()
    again = sl.load(Net(), folder / "parallel")
    return all(torch.equal(again.delta(t), d) for t, d in expected.items())


def main(rank: int, world: int, folder: Path) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(str(folder / "store"), world)
    dist.init_process_group("gloo", rank=rank, world_size=world, store=store, timeout=timedelta(seconds=60))
    results: dict[str, Any] = {}
    for name, run in SCENARIOS.items():
        try:
            results[name] = run(folder)
        except Exception:
            results[name] = {"failed": traceback.format_exc()}
        (folder / f"{rank}.json").write_text(json.dumps(results))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
