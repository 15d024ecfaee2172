"""Several processes: two of them on this machine, by gloo, train as one does; what cannot be done there is refused in words."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from launched import HERE, environment, launched
from optional import library
from ranks import SCENARIOS, SPECS, STEPS, Net, attached, batch
from torch.nn.utils import prune

import superlora_tn as sl

if not torch.distributed.is_available() or sys.platform == "win32":
    pytest.skip("torch.distributed with gloo is not here", allow_module_level=True)
# Sums in another order, in float64, through three steps of AdamW, which divides by square roots of small numbers.
BOUND = 1e-11


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[dict[str, Any]], Path]:
    """What each rank found, by scenario, and the folder they worked in."""
    folder = tmp_path_factory.mktemp("ranks")
    command = [sys.executable, str(HERE / "ranks.py")]
    ranks = [
        subprocess.Popen(
            [*command, str(r), "2", str(folder)], env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        for r in range(2)
    ]
    try:
        printed = [rank.communicate(timeout=300)[0] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    found = [folder / f"{r}.json" for r in range(2)]
    assert all(file.exists() for file in found), "\n".join(printed)[-4000:]
    return [json.loads(file.read_text()) for file in found], folder


@pytest.fixture
def found(results: tuple[list[dict[str, Any]], Path], request: pytest.FixtureRequest) -> list[Any]:
    """What the ranks found in the scenario that the test is named after."""
    name = request.node.originalname.removeprefix("test_")
    both = [rank.get(name, {"failed": "not reached: a rank before it hung or died"}) for rank in results[0]]
    failed = [one["failed"] for one in both if isinstance(one, dict) and "failed" in one]
    assert not failed, failed[0]
    return both


def test_every_scenario_has_a_test() -> None:
    assert {f"test_{name}" for name in SCENARIOS} <= set(globals())


def as_one_process(found: list[dict[str, float]]) -> None:
    for rank in found:
        assert {name.split()[0] for name in rank} == set(SPECS)
        assert max(rank.values()) < BOUND, rank


def test_ddp(found: list[Any]) -> None:
    as_one_process(found)


def test_ddp_checkpointed(found: list[Any]) -> None:
    as_one_process(found)


def test_ddp_compiled(found: list[Any]) -> None:
    assert all(max(rank.values()) < BOUND and len(rank) == 2 for rank in found), found


def test_ddp_static_graph_and_reentrant(found: list[Any]) -> None:
    as_one_process(found)


def test_ddp_reentrant_is_warned_of(found: list[Any]) -> None:
    """There DDP takes the first gradient of a parameter that layers share for the whole; without such ones it is right."""
    for rank, own in found:
        assert max(own.values()) < BOUND, own
        assert not [words for words in rank["lora"] if "share factors" in words]
        for name in ("lotr", "lorta"):
            assert any("use_reentrant=False, or wrap with static_graph=True" in words for words in rank[name])


def test_fsdp2_attached_before(found: list[Any]) -> None:
    as_one_process(found)


def test_fsdp2_at_the_weight(found: list[Any]) -> None:
    assert all(max(rank.values()) < BOUND and len(rank) == 2 for rank in found), found


def test_fsdp2_checkpointed(found: list[Any]) -> None:
    as_one_process(found)


def test_fsdp2_adapter_ignored(found: list[Any]) -> None:
    as_one_process(found)


def test_fsdp2_attached_after(found: list[Any]) -> None:
    for words, trained in found:
        assert len([w for w in words if "Attach first, then shard" in w]) == len(SPECS)
        as_one_process([trained])


def test_fsdp1(found: list[Any]) -> None:
    as_one_process(found)


def test_fsdp1_checkpointed(found: list[Any]) -> None:
    as_one_process(found)


def test_a_pruned_node_is_not_taken_for_fsdp1s_view() -> None:
    model, tuned = attached(SPECS["lora"])
    adapter = next(m for m in tuned.modules() if "node_factor_out" in m._parameters)
    prune.l1_unstructured(adapter, "node_factor_out", 0.5)
    with pytest.raises(sl.SpecError, match="'factor_out' is no parameter any more"):
        model(batch())


def test_saved_while_sharded(found: list[Any]) -> None:
    assert all(rank == dict.fromkeys(SPECS, 0.0) for rank in found)  # copies of the same numbers


def test_merge_while_sharded(found: list[Any]) -> None:
    for sharded, gathered, merged in found:
        assert "is sharded over processes" in sharded
        assert "is sharded over processes" in gathered
        assert not merged


def test_drawn_without_a_seed(found: list[Any]) -> None:
    assert found[0] == found[1]
    assert any(found[0])


def test_found_in_wrappers(found: list[Any]) -> None:
    assert all(all(rank.values()) and len(rank) == 4 for rank in found)


def test_distributed_checkpoint(found: list[Any], results: tuple[list[dict[str, Any]], Path]) -> None:
    """Written by two processes; read by two, and here by one."""
    assert found == [0.0, 0.0]
    expected = attached(sl.lotr(2))[1]
    model, tuned = attached(sl.lotr(2), seed=5)
    state = {"model": model.state_dict()}
    with pytest.warns(UserWarning, match="load in a single process"):
        torch.distributed.checkpoint.load(state, checkpoint_id=results[1] / "dcp", no_dist=True)
    model.load_state_dict(state["model"])
    assert all(torch.equal(tuned.delta(t), expected.delta(t)) for t in tuned.targets)


def test_tensor_parallel(found: list[Any]) -> None:
    as_one_process(found)


def test_tensor_parallel_checkpointed(found: list[Any]) -> None:
    as_one_process(found)


def test_tensor_parallel_gradient_of_x(found: list[Any]) -> None:
    as_one_process(found)


def test_tensor_parallel_refused(found: list[Any]) -> None:
    for rank in found:
        assert "'parts.q' has a weight that is a DTensor" in rank["q"]
        assert "'last' has a weight that is a DTensor" in rank["last"]
        assert "the weight of 'parts.q' is sharded over processes" in rank["merge"]
        assert "'parts.q' is tensor parallel" in rank["rows"]
        assert "'parts.q' is tensor parallel" in rank["dropout"]


def test_tensor_parallel_saved(found: list[Any]) -> None:
    assert found == [True, True]


LAUNCHED = """
import json, sys
import torch
from accelerate import Accelerator
from ranks import STEPS, SPECS, Net, attached, batch

accelerator = Accelerator(cpu=True)
model, tuned = attached(SPECS["lotr"])
optimizer = torch.optim.AdamW(tuned.parameters(), lr=1e-2)
model, optimizer = accelerator.prepare(model, optimizer)
x = batch().chunk(accelerator.num_processes)[accelerator.process_index]
for _ in range(STEPS):
    optimizer.zero_grad()
    accelerator.backward((model(x) - 1).square().mean())
    optimizer.step()
if accelerator.is_main_process:
    tuned.save(sys.argv[1])
accelerator.wait_for_everyone()
assert accelerator.num_processes == 2, accelerator.distributed_type
accelerator.end_training()
"""


def test_accelerate_under_torchrun(tmp_path: Path) -> None:
    """Two processes train what one would. accelerate's own launcher starts several on CPUs by MPI alone."""
    library("accelerate")
    launched(LAUNCHED, tmp_path, "adapter")
    compare(tmp_path / "adapter", BOUND)


def compare(saved: Path, bound: float) -> None:
    """What was saved is what one process trains."""
    model, tuned = attached(SPECS["lotr"])
    optimizer = torch.optim.AdamW(tuned.parameters(), lr=1e-2)
    for _ in range(STEPS):
        optimizer.zero_grad()
        (model(batch()) - 1).square().mean().backward()
        optimizer.step()
    again = sl.load(Net(), saved)
    for target in tuned.targets:
        torch.testing.assert_close(again.delta(target).double(), tuned.delta(target), rtol=bound, atol=bound)


ZERO = """
import deepspeed, torch
from ranks import STEPS, SPECS, Net, attached, batch, refused
import superlora_tn as sl

deepspeed.init_distributed("gloo")
for stage in (1, 2, 3):
    model, tuned = attached(SPECS["lotr"])
    optimizer = torch.optim.AdamW(list(tuned.parameters()), lr=1e-2)
    zero = {"stage": stage, "stage3_param_persistence_threshold": 0}
    config = {"train_micro_batch_size_per_gpu": 4, "zero_optimization": zero, "zero_allow_untested_optimizer": True}
    engine = deepspeed.initialize(model=model.float(), optimizer=optimizer, config=config)[0]
    assert sl.tuned(engine) is tuned
    x = batch().chunk(2)[torch.distributed.get_rank()].float()
    for _ in range(STEPS):
        engine.backward((engine(x) - 1).square().mean())
        engine.step()
    if stage == 3:
        assert "deepspeed.zero.GatheredParameters" in refused(lambda: tuned.save("3"), sl.CheckpointError)
        with deepspeed.zero.GatheredParameters(list(tuned.parameters())):
            tuned.save("3")
    else:
        tuned.save(str(stage))
torch.distributed.destroy_process_group()
"""


def test_deepspeed(tmp_path: Path) -> None:
    """ZeRO 1, 2 and 3 train what one process does, in float32; ZeRO-3 saves where it is gathered."""
    if importlib.util.find_spec("deepspeed") is None:
        pytest.skip("deepspeed is not installed")
    launched(ZERO, tmp_path, DS_ACCELERATOR="cpu")
    for stage in "123":
        compare(tmp_path / stage, 1e-5)  # some roundings of float32 numbers around 1, of steps 1e-2 long
