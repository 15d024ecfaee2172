"""What `write` makes of tensors of any kind, and what it refuses: several declarations, buffers, dtypes, views, shards."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from saved import edit_json, forked, join, names, two_files
from torch import Tensor

import superlora_tn as sl
from superlora_tn.files.own import Entry, Saved, read, tensor_name, write

ENTRY = Entry(sl.lora(2), {"a": (4, 3)})
FLOATS = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
OTHERS = [torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool]


def nodes(**changed: Tensor) -> dict[str, Tensor]:
    """The nodes of ENTRY, some replaced."""
    own = {"factor_out": torch.randn(4, 2), "factor_in": torch.randn(3, 2)}
    return {f"group0.{name}": tensor for name, tensor in (own | changed).items()}


def round_trip(folder: Path, tensors: dict[str, Tensor], buffers: dict[str, Tensor] | None = None) -> Saved:
    """What is read after writing; all equal in dtype and in every bit."""
    write(folder, [ENTRY], tensors, buffers or {})
    found = read(folder)
    for given, got in ((tensors, found.tensors), (buffers or {}, found.buffers)):
        assert set(got) == set(given)
        for name, tensor in given.items():
            assert got[name].dtype == tensor.dtype
            assert torch.equal(got[name], tensor)
    return found


# --- several declarations ------------------------------------------------------------------------------------------


def test_several_declarations_number_their_groups_in_order(tmp_path: Path) -> None:
    first = Entry(sl.lotr(2, alpha=3), {f"layers.{k}.up": (4, 4) for k in range(3)})
    second = Entry(sl.lora(1), {"head": (5, 4), "tail": (2, 5)})
    groups = [graph for entry in (first, second) for _, graph in entry.spec.lay_out(entry.targets)]
    assert len(groups) == 3
    tensors = {tensor_name(k, node): torch.randn(node.shape) for k, graph in enumerate(groups) for node in graph.nodes}
    write(tmp_path, [first, second], tensors)
    found = read(tmp_path)
    assert found.entries == (first, second)
    assert found.targets == {**first.targets, **second.targets}
    assert set(found.tensors) == set(tensors)
    assert all(torch.equal(found.tensors[name], tensor) for name, tensor in tensors.items())
    with pytest.raises(sl.CheckpointError, match="has 2 declarations"):
        _ = found.spec


def test_a_target_belongs_to_one_declaration(tmp_path: Path) -> None:
    twice = {f"group{k}.{node}": torch.ones(n, 2) for k in range(2) for node, n in (("factor_out", 4), ("factor_in", 3))}
    with pytest.raises(sl.CheckpointError, match="two declarations adapt 'a'"):
        write(tmp_path, [ENTRY, ENTRY], twice)
    write(tmp_path, [ENTRY], nodes())
    edit_json(tmp_path, lambda body: body.update(entries=2 * body["entries"]))
    with pytest.raises(sl.CheckpointError, match="two declarations adapt 'a'"):
        read(tmp_path)


def test_without_a_declaration_nothing_is_saved(tmp_path: Path) -> None:
    with pytest.raises(sl.CheckpointError, match="one declaration at least"):
        write(tmp_path, [], {})
    with pytest.raises(sl.CheckpointError, match="no target"):
        write(tmp_path, [Entry(sl.lora(1), {})], {})
    assert names(tmp_path) == []


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda tensors: tensors.pop("group0.factor_in"), "lacks the tensor 'group0.factor_in'"),
        (lambda tensors: tensors.update(other=torch.ones(1)), "holds the tensor 'other'"),
        (lambda tensors: tensors.update({"base.b": torch.ones(1)}), "holds the tensor 'base.b'"),
        (lambda tensors: tensors.update({"group0.factor_in": torch.ones(2, 3)}), r"shape \(2, 3\).*declared is \(3, 2\)"),
        (lambda tensors: tensors.update({"group0.factor_in": torch.ones(6)}), "summon_full_params"),
        (lambda tensors: tensors.update({"group0.factor_in": torch.ones(0)}), "summon_full_params"),
        (lambda tensors: tensors.update({"group0.factor_in": torch.ones(3, 2, device="meta")}), "meta device.*no values"),
        (lambda tensors: tensors.update({"group0.factor_in": [1.0]}), "is a list"),
        (lambda tensors: tensors.update({"group0.factor_in": torch.ones(3, 2).to_sparse()}), "cannot be copied to the CPU"),
        *(
            (lambda tensors, d=dtype: tensors.update({"group0.factor_in": torch.ones(3, 2, dtype=d)}), "convert it to one of")
            for dtype in (torch.int64, torch.bool, torch.complex64, torch.float8_e4m3fn)
        ),
    ],
)
def test_tensors_that_are_not_the_declarations_raise(
    change: Callable[[dict[str, Any]], object], words: str, tmp_path: Path
) -> None:
    write(tmp_path, [ENTRY], nodes())
    before, tensors = (tmp_path / "adapter.json").read_bytes(), nodes()
    change(tensors)
    with pytest.raises(sl.CheckpointError, match=words):
        write(tmp_path, [ENTRY], tensors)
    assert (tmp_path / "adapter.json").read_bytes() == before
    assert names(tmp_path) == two_files(tmp_path)


def test_more_than_would_be_read_is_not_saved(tmp_path: Path) -> None:
    name = "x" * 5000
    with pytest.raises(sl.CheckpointError, match="a string of 5,000 characters"):
        write(tmp_path, [Entry(sl.lora(2), {name: (4, 3)})], nodes())
    with pytest.raises(sl.CheckpointError, match="a string of 5,005 characters"):
        write(tmp_path, [ENTRY], nodes(), {name: torch.ones(1)})
    with pytest.raises(sl.CheckpointError, match="surrogates not allowed"):
        write(tmp_path, [Entry(sl.lora(2), {"\ud800": (4, 3)})], nodes())
    assert names(tmp_path) == []


# --- dtypes and memory ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("first", FLOATS)
@pytest.mark.parametrize("second", FLOATS)
def test_each_node_keeps_its_dtype(first: torch.dtype, second: torch.dtype, tmp_path: Path) -> None:
    round_trip(tmp_path, nodes(factor_out=torch.randn(4, 2).to(first), factor_in=torch.randn(3, 2).to(second)))


def test_buffers_of_all_dtypes_and_shapes_come_back(tmp_path: Path) -> None:
    buffers = {str(dtype): (torch.randn(3, 2) * 3).to(dtype) for dtype in FLOATS + OTHERS}
    shapes = {"number": torch.tensor(7), "nothing": torch.zeros(0, 4), "1.running_mean": torch.randn(8), "": torch.ones(1)}
    round_trip(tmp_path, nodes(), {**buffers, **shapes, "group0.factor_in": torch.ones(5), "base.x": torch.ones(2)})


def test_a_buffer_that_no_file_holds_raises(tmp_path: Path) -> None:
    for buffer in (torch.ones(2, dtype=torch.complex64), torch.ones(2, device="meta")):
        with pytest.raises(sl.CheckpointError, match=r"'base\.b' is"):
            write(tmp_path, [ENTRY], nodes(), {"b": buffer})


def test_views_are_saved_as_what_they_show(tmp_path: Path) -> None:
    memory = torch.randn(40)
    cut, turned = memory[3:11].view(4, 2), memory[10:16].view(2, 3).T
    round_trip(tmp_path, nodes(factor_out=cut, factor_in=turned))
    assert all(path.stat().st_size < 2000 for path in tmp_path.iterdir())
    round_trip(tmp_path, nodes(factor_out=torch.ones(1, 2).expand(4, 2), factor_in=memory[:6].view(3, 2)), {"same": memory})
    negated = torch._neg_view(torch.ones(3, 2))
    assert negated.is_neg()
    round_trip(tmp_path, nodes(factor_in=negated))
    parameter = torch.nn.Parameter(torch.randn(3, 2))
    assert not round_trip(tmp_path, nodes(factor_in=parameter)).tensors["group0.factor_in"].requires_grad


def test_values_that_are_no_numbers_come_back_bit_for_bit(tmp_path: Path) -> None:
    strange = torch.tensor([[float("nan"), float("inf")], [-0.0, 1e-45], [-float("inf"), 3.4e38]])
    write(tmp_path, [ENTRY], nodes(factor_in=strange))
    assert torch.equal(read(tmp_path).tensors["group0.factor_in"].view(torch.int32), strange.view(torch.int32))


def test_the_default_device_and_mode_change_nothing(tmp_path: Path) -> None:
    tensors = nodes()
    with torch.device("meta"), torch.inference_mode():
        write(tmp_path, [ENTRY], tensors)
    with torch.device("meta"):
        found = read(tmp_path)
    assert all(torch.equal(found.tensors[name], tensor) for name, tensor in tensors.items())


def test_what_was_read_is_the_readers_own(tmp_path: Path) -> None:
    write(tmp_path, [ENTRY], nodes())
    one, other = read(tmp_path).tensors, read(tmp_path).tensors
    for tensor in one.values():
        tensor.zero_()
    assert all(tensor.any() for tensor in other.values())


# --- sharded -------------------------------------------------------------------------------------------------------


def shard_and_save(rank: int, folder: Path, store: Path, ranks: int) -> None:
    from torch.distributed import destroy_process_group, init_device_mesh, init_process_group
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=ranks)
    try:
        mesh = init_device_mesh("cpu", (ranks,))
        whole = nodes(factor_out=torch.arange(8.0).view(4, 2), factor_in=torch.arange(6.0).view(3, 2))
        kinds = {"group0.factor_out": Shard(0), "group0.factor_in": Shard(0)}
        sharded = {name: distribute_tensor(tensor, mesh, [kinds[name]]) for name, tensor in whole.items()}
        buffers = {"replicated": distribute_tensor(torch.ones(3), mesh, [Replicate()])}
        assert sharded["group0.factor_out"].to_local().shape == (2, 2)
        write(folder, [ENTRY], sharded, buffers)
        found = read(folder)
        assert all(torch.equal(found.tensors[name], tensor) for name, tensor in whole.items())
        assert torch.equal(found.buffers["replicated"], torch.ones(3))
    finally:
        destroy_process_group()


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no torch.distributed")
@pytest.mark.skipif(not hasattr(os, "fork"), reason="the two processes are forked")
def test_shards_are_gathered_by_all_processes_that_save(tmp_path: Path) -> None:
    """Two processes, three rows over two of them, both saving into one folder."""
    folder, store = tmp_path / "adapter", tmp_path / "store"
    join(forked(*(lambda r=rank: shard_and_save(r, folder, store, 2) for rank in range(2))))
    assert names(folder) == two_files(folder)
    assert torch.equal(read(folder).tensors["group0.factor_in"], torch.arange(6.0).view(3, 2))


def test_targets_that_are_tables_are_kept_and_no_part_of_the_declaration(tmp_path: Path) -> None:
    tables = Entry(ENTRY.spec, ENTRY.targets, tables=["a"])
    write(tmp_path, [tables], nodes())
    assert read(tmp_path).tables == {"a"}
    assert read(tmp_path).entries == (ENTRY,)  # a handle takes the values of a file that does not say it
    for wrong in ("a", ["b"], [3], {"a": True}):
        edit_json(tmp_path, lambda body, given=wrong: body["entries"][0].update(tables=given))  # type: ignore[misc]
        with pytest.raises(sl.CheckpointError, match="tables must be a list of some of the targets"):
            read(tmp_path)
