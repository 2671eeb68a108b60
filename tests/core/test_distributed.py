"""The processes of a training: how they join, what they gather, and whose errors they tell."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest
import torch

from pskd import distributed
from pskd.distributed import World, gather, join, leave, on_first_process

PRELOADED = ["pskd.distributed", "pytest"]


def test_without_torchrun_there_is_one_process():
    assert join("cpu") == World(0, 1, torch.device("cpu"))
    assert join("cpu").is_first
    leave()  # there is nothing to leave
    assert gather("all") == ["all"]
    assert on_first_process(lambda: 7) == 7


@pytest.mark.parametrize("available", [False, True])
def test_where_no_device_is_named_a_gpu_is_taken_if_there_is_one(available, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: available)
    assert join().device == torch.device("cuda" if available else "cpu")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("tpu", "--device: expected cpu, cuda or cuda:NUMBER, got 'tpu'"),
        ("mps", "--device: expected cpu, cuda or cuda:NUMBER, got 'mps'"),
        ("cuda:2", "--device: expected one that torch finds, got cuda:2 of 2 GPUs"),
    ],
)
def test_a_device_that_is_not_there_is_refused(name, message, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ValueError, match=message):
        join(name)


def test_under_torchrun_each_process_has_the_gpu_of_its_local_rank(monkeypatch):
    called = []
    for name, value in {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", called.append)
    monkeypatch.setattr(distributed.dist, "init_process_group", called.append)
    monkeypatch.setattr(distributed.dist, "get_rank", lambda: 3)
    monkeypatch.setattr(distributed.dist, "get_world_size", lambda: 4)
    assert join("cuda") == World(3, 4, torch.device("cuda", 1))
    assert called == [torch.device("cuda", 1), "cpu:gloo,cuda:nccl"]


def fails() -> None:
    raise ValueError("no such file")


def one_process(rank: int, size: int, folder: Path) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": (folder / "port").read_text()}
    world = join("cpu")
    left = {"world": world, "gathered": gather(f"of {rank}"), "first": on_first_process(os.getpid)}
    try:
        on_first_process(fails)
    except (ValueError, RuntimeError) as error:
        left["error"] = f"{type(error).__name__}: {error}"
    torch.save(left | {"pid": os.getpid()}, folder / f"{rank}.pt")
    leave()


def test_what_the_first_process_does_is_known_to_all(tmp_path, in_processes):

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        (tmp_path / "port").write_text(str(free.getsockname()[1]))
    in_processes(one_process, 2, tmp_path)
    first, second = (torch.load(tmp_path / f"{r}.pt", weights_only=False) for r in (0, 1))
    assert first["world"] == World(0, 2, torch.device("cpu"))
    assert second["world"] == World(1, 2, torch.device("cpu"))
    assert (first["gathered"], second["gathered"]) == (["of 0", "of 1"], None)
    assert first["first"] == second["first"] == first["pid"] != second["pid"]
    assert first["error"] == "ValueError: no such file"
    assert second["error"] == "RuntimeError: the first process failed: ValueError: no such file"
