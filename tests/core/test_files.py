"""What is read from a user's files is bounded, and what is written is whole or not there."""

from __future__ import annotations

import csv
import errno
import io
import json
import os
import re
import resource
import stat
import zipfile

import numpy as np
import pytest
import torch

from pskd_tools import files
from pskd_tools.checkpoint import load_archive, read_checkpoint, write_archive


@pytest.fixture
def small_files():
    """Let no file grow beyond 64 KiB: to a program that is a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


# ---- reading -------------------------------------------------------------------------------------

ALIASES = "a0: &a0 [x, x]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 10)
)
MERGES = "a0: &a0 {k: 1}\n" + "".join(
    f"a{i}: &a{i} {{<<: [{', '.join([f'*a{i - 1}'] * 9)}]}}\n" for i in range(1, 10)
)
HARM = {
    "json nested": (files.read_json, b'{"a": ' + b"[" * 100_000, "expected JSON, got values that"),
    "json digits": (files.read_json, b'{"a": ' + b"9" * 400 + b"}", "an integer of 400 digits"),
    "json more": (files.read_json, b'{"a": ' + b"9" * 9999 + b"}", "an integer of 9999 digits"),
    "json list": (files.read_json, b"[]", "expected a JSON object, got list"),
    "json text": (files.read_json, b"\xff\xfe\xff", "expected JSON, got"),
    "yaml nested": (
        files.read_yaml,
        b"[" * 5000 + b"]" * 5000,
        "expected YAML, got values nested too deeply",
    ),
    "yaml open": (files.read_yaml, b"[" * 100_000, "expected YAML, got values nested too deeply"),
    "yaml aliases": (files.read_yaml, ALIASES.encode(), "81 aliases, more than 32"),
    "yaml merges": (files.read_yaml, MERGES.encode(), "81 aliases, more than 32"),
    "yaml digits": (files.read_yaml, b"a: " + b"9" * 9999, "expected YAML, got"),
    "yaml date": (files.read_yaml, b"a: 2020-99-99", "expected YAML, got month must be in"),
    "yaml tag": (files.read_yaml, b"a: !!bool x", "expected YAML, got"),
    "yaml code": (files.read_yaml, b"!!python/object/apply:os.getcwd []", "expected YAML, got"),
    "npz text": (files.read_npz, b"text", "expected arrays as numpy.savez writes them"),
}


@pytest.mark.parametrize(("read", "content", "message"), HARM.values(), ids=HARM)
def test_a_file_made_to_do_harm_is_named(read, content, message, tmp_path):
    if read is files.read_yaml:
        pytest.importorskip("yaml", reason="needs yaml: pip install pyyaml")
    path = tmp_path / "given"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"given: .*{message}") as error:
        read(path)
    assert len(str(error.value)) < 1000


@pytest.mark.parametrize("read", [files.read_json, files.read_yaml, files.read_npz])
def test_a_pipe_is_not_waited_for(read, tmp_path):
    pytest.importorskip("yaml", reason="needs yaml: pip install pyyaml")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError, match="pipe: expected a file, got a pipe or a device"):
        read(tmp_path / "pipe")
    with pytest.raises(FileNotFoundError, match="absent"):
        read(tmp_path / "absent")


def test_the_anchors_of_a_config_are_read(tmp_path):
    pytest.importorskip("yaml", reason="needs yaml: pip install pyyaml")
    (tmp_path / "x.yaml").write_text("a: &a {lr: 1}\nb: {<<: *a, seed: 2}\n")
    assert files.read_yaml(tmp_path / "x.yaml")["b"] == {"lr": 1, "seed": 2}


ARRAYS = {
    "b": np.array([[True], [False]]),
    "n": np.array(["ä", "bc"]),
    "x": np.asfortranarray(np.arange(6.0).reshape(2, 3)),
    "scalar": np.float64(2.5),
    "none": np.empty((0, 3)),
}


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_arrays_come_back(save, tmp_path):
    save(tmp_path / "x.npz", **ARRAYS)
    found = files.read_npz(tmp_path / "x.npz")
    assert found.keys() == ARRAYS.keys()
    for name, array in ARRAYS.items():
        np.testing.assert_array_equal(found[name], array)
        assert found[name].dtype == array.dtype


def _npy(shape: object, descr: str = "<f8", data: bytes = b"") -> bytes:
    stream = io.BytesIO()
    header = f"{{'descr': {descr!r}, 'fortran_order': False, 'shape': {shape}, }}".encode()
    stream.write(b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + data)
    return stream.getvalue()


@pytest.mark.parametrize(
    "member",
    [
        _npy("(1099511627776,)"),
        _npy("(1099511627776,)", "<U0"),
        _npy("(" + "9" * 400 + ",)"),
        _npy("(-1,)"),
        _npy("(" * 3000),
        _npy("(2,)", "|O", b"\x80\x04N." * 20),
        b"text",
        b"",
    ],
    ids=["2^40", "2^40 empty", "400 digits", "negative", "nested", "pickle", "text", "empty"],
)
def test_an_array_that_claims_more_than_it_holds_is_refused(member, tmp_path):
    with zipfile.ZipFile(tmp_path / "x.npz", "w") as archive:
        archive.writestr("a.npy", member)
    with pytest.raises(ValueError, match=r"x.npz: expected arrays as numpy.savez writes them"):
        files.read_npz(tmp_path / "x.npz")


def test_an_archive_that_unpacks_to_more_than_memory_should_hold_is_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "x.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        for name in range(3):
            with archive.open(f"{name}.npy", "w") as member:
                member.write(_npy(f"({1 << 24},)"))
                for _ in range(8):
                    member.write(bytes(1 << 24))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files, "_MOST_BYTES", 1 << 28)
        with pytest.raises(ValueError, match="402,653,... bytes of arrays, more than 268,435,456"):
            files.read_npz(tmp_path / "x.npz")


def test_a_checkpoint_that_unpacks_to_more_than_its_size_is_refused(tmp_path):
    torch.save({"model": torch.zeros(1 << 18)}, tmp_path / "x.pth")
    with (
        zipfile.ZipFile(tmp_path / "x.pth") as plain,
        zipfile.ZipFile(tmp_path / "bomb.pth", "w", zipfile.ZIP_DEFLATED) as packed,
    ):
        for name in plain.namelist():
            packed.writestr(name, plain.read(name))
    assert load_archive(tmp_path / "x.pth", "weights")["model"].shape == (1 << 18,)
    with pytest.raises(ValueError, match=r"bomb.pth: expected weights, got .*archive of 1,0"):
        load_archive(tmp_path / "bomb.pth", "weights")


def test_a_pipe_is_no_checkpoint(tmp_path):
    os.mkfifo(tmp_path / "x.pth")
    with pytest.raises(ValueError, match="x.pth: expected a file, got a pipe or a device"):
        read_checkpoint(tmp_path / "x.pth", {"model"})


@pytest.mark.parametrize(
    "value",
    [10**5000, "x" * 5000, [[[[[[[[1]]]]]]]] * 999, {i: i for i in range(999)}, 10**400],
    ids=range(5),
)
def test_what_is_shown_of_a_value_is_short(value):
    assert 0 < len(files.shown(value)) < 500


# ---- writing -------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [100_000, 3_000_000])
def test_a_full_disk_leaves_the_old_checkpoint(count, tmp_path, small_files):
    path = tmp_path / "checkpoint.pth"
    write_archive(path, {"epoch": 1, "weight": torch.ones(2)})
    with pytest.raises(OSError, match=re.escape(str(path))) as error:
        write_archive(path, {"epoch": 2, "weight": torch.ones(count)})
    assert error.value.errno == errno.EFBIG
    content = read_checkpoint(path, {"epoch"})
    assert content["epoch"] == 1 and torch.equal(content["weight"], torch.ones(2))
    assert [file.name for file in tmp_path.iterdir()] == ["checkpoint.pth"]


def test_a_file_aside_is_new_and_its_name_cannot_be_guessed(tmp_path, monkeypatch):
    flags, names = [], []
    real = os.open
    monkeypatch.setattr(os, "open", lambda *a: (flags.append(a[1]), real(*a))[1])
    for _ in range(2):
        with files.written_aside(tmp_path / "x.json") as aside:
            names.append(aside.name)
            aside.write_text("{}")
    assert len(set(names)) == 2 and all(re.fullmatch(r"x\.\w{16}\.part\.json", n) for n in names)
    assert len(flags) == 2 and all(flag & os.O_EXCL for flag in flags)
    mask = os.umask(0o022)
    os.umask(mask)
    assert stat.S_IMODE((tmp_path / "x.json").stat().st_mode) == 0o666 & ~mask


def test_an_error_that_is_none_of_the_disk_is_told_as_it_is(tmp_path):
    error = RuntimeError("no model")
    with pytest.raises(RuntimeError) as told, files.written_aside(tmp_path / "x"):
        raise error
    assert told.value is error and not list(tmp_path.iterdir())


@pytest.mark.parametrize("fails", [0, 1, 2])
def test_files_that_belong_together_are_all_replaced_or_none(fails, tmp_path, monkeypatch):
    paths = [tmp_path / name for name in ("a", "b", "c")]
    for path in paths[:2]:
        path.write_text("old")
    before = {path.name: path.read_text() for path in tmp_path.iterdir()}
    real = os.replace

    def replace(source, target):
        if target == paths[fails] and source.read_text() == "new":
            raise PermissionError(errno.EACCES, "Permission denied", source, None, target)
        real(source, target)

    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(PermissionError), files.written_together(paths) as asides:
        for aside in asides:
            aside.write_text("new")
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == before
    monkeypatch.undo()
    with files.written_together(paths) as asides:
        for aside in asides:
            aside.write_text("new")
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == dict.fromkeys(
        "abc", "new"
    )


def test_no_cell_of_a_table_is_a_formula():
    cells = ["=1+1", "+cmd", "-cmd", "@x", "\n=1", "-5", "-1e-3", "plain", -0.5, None, "a=b"]
    text = files.csv_text(["=key", "value"], [{"=key": c, "value": 1} for c in cells])
    head, *lines = csv.reader(io.StringIO(text))
    assert head == ["'=key", "value"]
    assert [line[0] for line in lines] == [
        "'=1+1", "'+cmd", "'-cmd", "'@x", "'\n=1", "-5", "-1e-3", "plain", "-0.5", "", "a=b",
    ]  # fmt: skip


def test_what_was_written_is_read(tmp_path):
    files.write_json(tmp_path / "x.json", {"a": float("nan"), "b": np.arange(2)}, indent=2)
    assert files.read_json(tmp_path / "x.json") == {"a": None, "b": [0, 1]}
    assert json.loads((tmp_path / "x.json").read_text()) == {"a": None, "b": [0, 1]}
