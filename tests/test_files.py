import argparse
import collections
import datetime
import errno
import json
import os
import random
import re
import sys
import warnings
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from segprune.files import (
    atomic_files,
    atomic_path,
    check_writable,
    is_same_path,
    read_json,
    write_json,
)
from segprune.tensor_files import load_record, read_file, save_record, save_tensors


@contextmanager
def disk_full(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    def fsync(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fsync)
        yield


class Attack:
    """Pickled, it asks for a marker file to be made when it is opened."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, (str(self.marker),))


def test_what_is_written_takes_the_place_of_the_old_file_and_nothing_else_is_left(
    tmp_path: Path,
) -> None:
    path = tmp_path / "new" / "a.json"
    write_json({"é": 1}, path)
    write_json({"é": [1.5, None]}, path)
    assert json.loads(path.read_text(encoding="utf-8")) == {"é": [1.5, None]}
    assert os.listdir(path.parent) == ["a.json"]


def test_a_failure_while_writing_keeps_the_old_file_and_removes_the_new_one(
    tmp_path: Path,
) -> None:
    path = tmp_path / "a.txt"
    path.write_text("old")

    def write() -> None:
        with atomic_path(path) as temporary:
            temporary.write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write()
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["a.txt"]


def test_files_that_belong_together_come_together_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "new" / "a.xml"

    def write(text: str) -> None:
        with atomic_files(path) as temporary:
            assert temporary.name == "a.xml"
            temporary.write_text(text)
            temporary.with_suffix(".bin").write_text(text)
            if text == "bad":
                raise KeyboardInterrupt

    write("one")
    with pytest.raises(KeyboardInterrupt):
        write("bad")
    with (
        disk_full(monkeypatch),
        pytest.raises(OSError, match=r"a.xml could not be written \(No space left on device\)"),
    ):
        write("full")
    assert {
        name: (path.parent / name).read_text() for name in os.listdir(path.parent)
    } == dict.fromkeys(("a.xml", "a.bin"), "one")


def test_a_full_disk_is_named_and_keeps_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.pth"
    save_record({"x": torch.ones(3)}, path)
    message = rf"^{path} could not be written \(No space left on device\); give another place, or see to it that {tmp_path}"
    with disk_full(monkeypatch), pytest.raises(OSError, match=message):
        save_record({"x": torch.zeros(3)}, path)
    assert torch.equal(load_record(path)["x"], torch.ones(3))
    assert os.listdir(tmp_path) == ["a.pth"]


@pytest.mark.skipif(
    not Path("/dev/full").exists(), reason="Linux has a device that is always full"
)
def test_the_error_of_a_full_disk_comes_through_torch_too(tmp_path: Path) -> None:
    path = tmp_path / "a.pth"
    path.with_name(f".a.pth.{os.getpid()}.tmp").symlink_to("/dev/full")
    with pytest.raises(
        OSError, match=r"could not be written \(No space left on device\); give another place"
    ):
        save_record({"x": torch.zeros(100_000)}, path)
    assert os.listdir(tmp_path) == []


def test_a_place_below_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    message = r"could not be written \(.*\); give another place, or see to it that .*file is a folder with free space"
    with pytest.raises(OSError, match=message):
        write_json({}, tmp_path / "file" / "a.json")
    with pytest.raises(OSError, match=message):
        check_writable(tmp_path / "file")


def test_a_folder_in_the_place_of_the_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.json").mkdir()
    with pytest.raises(OSError, match=r"a\.json could not be written \(Is a directory\)"):
        write_json({}, tmp_path / "a.json")


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_permission_is_refused(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(
        OSError, match=r"could not be written \(Permission denied\); give another place"
    ):
        write_json({}, tmp_path / "a.json")
    with pytest.raises(
        OSError, match=r"could not be written \(Permission denied\); give another place"
    ):
        check_writable(tmp_path)


def test_of_a_check_whether_a_folder_can_be_written_nothing_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    check_writable(tmp_path / "a" / "b")
    check_writable("a/b")
    assert os.listdir(tmp_path) == []
    (tmp_path / "a").mkdir()
    check_writable("a")
    assert os.listdir("a") == []


def test_a_folder_that_could_not_be_made_is_refused_by_its_own_name(tmp_path: Path) -> None:
    (tmp_path / "lost").symlink_to(tmp_path / "nowhere")
    for name in ("lost/b", "b" * 300):
        with pytest.raises(
            OSError, match=re.escape(f"{tmp_path / name}/.writable could not be written (")
        ):
            check_writable(tmp_path / name)


def test_a_record_comes_back_as_it_was(tmp_path: Path) -> None:
    record = {
        "step": 3,
        "state": {0: {"exp_avg": torch.randn(2, 3)}},
        "losses": [0.5, 0.25],
        "scaler": None,
    }
    save_record(record, tmp_path / "resume.pth")
    found = load_record(tmp_path / "resume.pth")
    assert torch.equal(found["state"][0].pop("exp_avg"), record["state"][0].pop("exp_avg"))  # type: ignore[index]
    assert found == record


def test_a_file_that_is_no_record_is_refused(tmp_path: Path) -> None:
    torch.save([1, 2], tmp_path / "a.pth")
    with pytest.raises(
        ValueError,
        match=r"a\.pth holds a list, not a saved record; give the file of another run",
    ):
        load_record(tmp_path / "a.pth")
    with pytest.raises(
        FileNotFoundError, match=r"b\.pth does not exist; give the path of a checkpoint"
    ):
        load_record(tmp_path / "b.pth")


@pytest.mark.parametrize("new_zip", [True, False])
def test_numpy_numbers_in_a_wrapper_are_read_as_plain_ones(
    new_zip: bool, tmp_path: Path
) -> None:
    numbers = [
        np.float64(0.1),
        np.float32(0.5),
        np.int64(-3),
        np.uint8(7),
        np.bool_(True),
        np.float64(2).astype(">f8"),
    ]
    path = tmp_path / "a.pth"
    torch.save(
        {"meta": numbers, "x": torch.ones(2)}, path, _use_new_zipfile_serialization=new_zip
    )
    found = read_file(path)[0]["meta"]
    assert found == [0.1, 0.5, -3, 7, True, 2.0]
    assert [type(number) for number in found] == [float, float, int, int, bool, float]


def test_the_old_name_of_numpys_constructor_is_known_too(tmp_path: Path) -> None:
    path = tmp_path / "a.pth"
    torch.save({"miou": np.float64(0.75)}, path, _use_new_zipfile_serialization=False)
    path.write_bytes(
        path.read_bytes().replace(b"cnumpy._core.multiarray\n", b"cnumpy.core.multiarray\n")
    )
    assert read_file(path)[0] == {"miou": 0.75}


@pytest.mark.parametrize("new_zip", [True, False])
def test_the_logs_that_mmengine_leaves_beside_the_weights_are_passed_over(
    new_zip: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "mmengine.logging.history_buffer"
    module = ModuleType(name)
    module.HistoryBuffer = type("HistoryBuffer", (), {"__module__": name})
    for part in ("mmengine", "mmengine.logging"):
        monkeypatch.setitem(sys.modules, part, ModuleType(part))
    monkeypatch.setitem(sys.modules, name, module)
    losses = module.HistoryBuffer()
    losses.max_length, losses._log_history, losses._count_history = (
        10,
        np.array([0.5, 0.25]),
        np.array([1, 1]),
    )
    record = {
        "state_dict": {"x": torch.ones(2)},
        "message_hub": {"log_scalars": {"train/loss": losses}},
    }
    torch.save(record, tmp_path / "iter_10.pth", _use_new_zipfile_serialization=new_zip)
    for part in ("mmengine", "mmengine.logging", name):
        monkeypatch.delitem(sys.modules, part)
    found = read_file(tmp_path / "iter_10.pth")[0]
    assert torch.equal(found["state_dict"]["x"], torch.ones(2))
    assert vars(found["message_hub"]["log_scalars"]["train/loss"]) == {}


@pytest.mark.parametrize(
    "number", [np.datetime64("2026-01-01"), np.str_("a"), np.longdouble(1)]
)
def test_other_numpy_values_are_passed_over(number: Any, tmp_path: Path) -> None:
    torch.save({"meta": number, "x": torch.ones(2)}, tmp_path / "a.pth")
    found = read_file(tmp_path / "a.pth")[0]
    assert found["meta"] is None
    assert torch.equal(found["x"], torch.ones(2))


class Slotted:
    """Its fields are pickled as a tuple, not as a dict."""

    __slots__ = ("lr",)

    def __init__(self, lr: float) -> None:
        self.lr = lr


class Options(dict[str, Any]):
    """A kind of dict with attributes, as configs are."""


def _marked_options() -> Options:
    options = Options(lr=0.1)
    options.values = 5  # type: ignore[assignment, method-assign]
    return options


@pytest.mark.parametrize("new_zip", [True, False])
@pytest.mark.parametrize(
    "value",
    [
        argparse.Namespace(lr=0.1),
        Path("data"),
        _marked_options(),
        Slotted(0.1),
        collections.deque([1.0]),
        collections.defaultdict(list, a=[1]),
        datetime.datetime(2026, 1, 1),
        torch.optim.lr_scheduler.StepLR,
    ],
    ids=lambda value: type(value).__name__,
)
def test_objects_of_training_scripts_are_passed_over_and_none_is_built(
    value: Any, new_zip: bool, tmp_path: Path
) -> None:
    content = {"args": value, "x": torch.ones(2)}
    torch.save(content, tmp_path / "a.pth", _use_new_zipfile_serialization=new_zip)
    found = read_file(tmp_path / "a.pth")[0]
    assert torch.equal(found["x"], torch.ones(2))
    kind = found["args"] if isinstance(found["args"], type) else type(found["args"])
    assert kind.__module__ in ("builtins", "collections", "segprune.stand_ins")


@pytest.mark.parametrize(
    "name", ["weights.pth.tar", "epoch=3.ckpt", "a.pkl", "A.PTH", "best", "best.pth.old"]
)
@pytest.mark.parametrize("new_zip", [True, False])
def test_a_file_of_torch_save_is_read_whatever_its_ending(
    name: str, new_zip: bool, tmp_path: Path
) -> None:
    torch.save({"x": torch.ones(2)}, tmp_path / name, _use_new_zipfile_serialization=new_zip)
    assert torch.equal(read_file(tmp_path / name)[0]["x"], torch.ones(2))


def test_files_of_other_kinds_are_refused_with_what_to_do(tmp_path: Path) -> None:
    with pytest.warns(DeprecationWarning, match="jit"):
        traced = torch.jit.trace(torch.nn.Linear(2, 2), torch.ones(1, 2))
    traced.save(str(tmp_path / "traced.pt"))
    torch.save({"x": torch.ones(2)}, tmp_path / "newer.pth", pickle_protocol=4)
    (tmp_path / "tf_model.h5").write_bytes(b"\x89HDF")
    for name, message in (
        ("traced.pt", "TorchScript, .*give the checkpoint that it was traced from"),
        ("newer.pth", "newer protocol .*torch.save\\(model.state_dict\\(\\), path\\)"),
        ("tf_model.h5", "from_tf=True"),
    ):
        with pytest.raises(ValueError, match=message):
            read_file(tmp_path / name)


@pytest.mark.parametrize("new_zip", [True, False])
@pytest.mark.parametrize("suffix", [".pth", ".pt", ".bin"])
def test_a_file_that_would_run_code_is_refused_by_name_and_runs_nothing(
    suffix: str, new_zip: bool, tmp_path: Path
) -> None:
    path, marker = tmp_path / f"a{suffix}", tmp_path / "marker"
    content = {"state_dict": {"x": torch.ones(1)}, "meta": Attack(marker)}
    torch.save(content, path, _use_new_zipfile_serialization=new_zip)
    message = r"asks for (posix|nt)\.mkdir, and building that could run any code, .*torch\.save\(model\.state_dict\(\)"
    for read in (read_file, load_record):
        with pytest.raises(ValueError, match=message):
            read(path)
    assert not marker.exists()
    torch.load(path, weights_only=False)
    assert marker.exists()  # the attack was a real one


def test_a_whole_pickled_network_is_refused_with_the_remedy(tmp_path: Path) -> None:
    torch.save(torch.nn.Linear(2, 2), tmp_path / "a.pth")
    message = r"asks for torch\.nn\.modules\.linear\.Linear, .*; save the weights alone where it was made: torch\.save"
    with pytest.raises(ValueError, match=message):
        read_file(tmp_path / "a.pth")


NOT_TENSORS = {
    "picture": b"\xff\xd8\xff\xe0\x00\x10JFIF\x00\x01" * 40,
    "text": b"hello world\n",
    "binary": bytes(range(256)),
    "zip": b"PK\x03\x04" + bytes(100),
}


@pytest.mark.parametrize("content", NOT_TENSORS.values(), ids=NOT_TENSORS)
@pytest.mark.parametrize(
    ("suffix", "kind"), [(".pth", "PyTorch checkpoint"), (".safetensors", "safetensors file")]
)
def test_a_file_of_another_kind_is_refused(
    content: bytes, suffix: str, kind: str, tmp_path: Path
) -> None:
    path = tmp_path / f"a{suffix}"
    path.write_bytes(content)
    with pytest.raises(
        ValueError,
        match=f"^{path} is not a {kind}, or only a part of one; copy or download it again",
    ):
        read_file(path)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_a_flipped_bit_never_loads_as_other_weights(suffix: str, tmp_path: Path) -> None:
    weights = {f"layer{i}.weight": torch.full((40, 5), float(i)) for i in range(4)}
    path, rng = tmp_path / f"a{suffix}", random.Random(0)
    if suffix == ".pth":
        save_record(weights, path)
    else:
        save_tensors(weights, {"format": "segprune", "spec": "{}"}, path)
    data, right = path.read_bytes(), read_file(path)

    refused = 0
    for _ in range(200):
        flipped = bytearray(data)
        flipped[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        path.write_bytes(flipped)
        try:
            tensors, metadata = read_file(path)
        except ValueError:
            refused += 1
            continue
        # What loads is what was written; bits between the parts of a zip file mean nothing.
        assert tensors.keys() == right[0].keys()
        assert all(torch.equal(tensors[name], right[0][name]) for name in tensors)
        assert suffix == ".pth" or metadata.items() >= right[1].items()
    assert refused > 100


def test_a_bit_that_flipped_in_the_weights_is_said(tmp_path: Path) -> None:
    path = tmp_path / "a.pth"
    save_record({"a": torch.full((1000,), 3.0)}, path)
    data = bytearray(path.read_bytes())
    data[data.index(torch.full((1000,), 3.0).numpy().tobytes()) + 7] ^= 1
    path.write_bytes(data)
    with pytest.raises(
        ValueError, match=r"a\.pth was changed since it was written: its checksum"
    ):
        load_record(path)


def test_a_file_written_without_checksums_is_read(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.serialization.set_crc32_options(False)
        try:
            torch.save({"a": torch.ones(3)}, tmp_path / "a.pth")
        finally:
            torch.serialization.set_crc32_options(True)
    save_file({"a": torch.ones(3)}, tmp_path / "a.safetensors")
    assert torch.equal(load_record(tmp_path / "a.pth")["a"], torch.ones(3))
    assert torch.equal(read_file(tmp_path / "a.safetensors")[0]["a"], torch.ones(3))


def test_a_file_that_unpacks_to_far_more_than_its_size_is_refused(tmp_path: Path) -> None:
    torch.save({"a": torch.zeros(100_000)}, tmp_path / "a.pth")
    with (
        zipfile.ZipFile(tmp_path / "a.pth") as plain,
        zipfile.ZipFile(tmp_path / "b.pth", "w", zipfile.ZIP_DEFLATED) as packed,
    ):
        for name in plain.namelist():
            packed.writestr(name, plain.read(name))
    with pytest.raises(
        ValueError, match=r"unpacks to 40\d+ bytes, more than 16 times its size"
    ):
        read_file(tmp_path / "b.pth")


@pytest.mark.parametrize("share", [0.01, 0.5, 0.99])
def test_a_truncated_file_is_refused(share: float, tmp_path: Path) -> None:
    path = tmp_path / "a.pth"
    torch.save({"x": torch.randn(1000)}, path)
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    with pytest.raises(
        ValueError,
        match="is not a PyTorch checkpoint, or only a part of one; copy or download it a",
    ):
        read_file(path)


def test_an_empty_file_a_missing_one_a_folder_and_an_unknown_ending_are_refused(
    tmp_path: Path,
) -> None:
    (tmp_path / "empty.pth").touch()
    (tmp_path / "picture.jpg").write_text("x")
    for name, kind, message in (
        ("empty.pth", ValueError, "is empty; copy or download it again"),
        ("missing.pth", FileNotFoundError, "does not exist; give the path of a checkpoint"),
        (".", FileNotFoundError, "is a folder; give the file in it"),
        (
            "picture.jpg",
            ValueError,
            r"ends in '\.jpg'; a checkpoint ends in \.pth, \.pt, \.bin or \.safetensors, or is",
        ),
    ):
        with pytest.raises(kind, match=message):
            read_file(tmp_path / name)


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="root may read everything")
def test_a_file_that_may_not_be_read_is_refused(tmp_path: Path) -> None:
    torch.save({}, tmp_path / "a.pth")
    (tmp_path / "a.pth").chmod(0)
    with pytest.raises(
        OSError,
        match=r"could not be opened \(Permission denied\); see to it that you may read it",
    ):
        read_file(tmp_path / "a.pth")


def test_a_path_that_is_no_utf_8_survives_a_json_file(tmp_path: Path) -> None:
    name = os.fsdecode(b"a\xff.pth")
    write_json({"file": name, "name": "背景"}, tmp_path / "a.json")
    assert read_json(tmp_path / "a.json", "a plan") == {"file": name, "name": "背景"}


def test_a_small_json_file_is_read_and_anything_else_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(b'\xef\xbb\xbf{"a": [1, {"b": null}]}')
    assert read_json(path, "a plan") == {"a": [1, {"b": None}]}

    deep = b'{"a":' + b"[" * 60 + b"]" * 60 + b"}"
    deeper = b'{"a":' + b"[" * 200_000 + b"]" * 200_000 + b"}"
    for data, said in (
        (b"{", "is not valid JSON"),
        (b"\xff", "is not valid JSON"),
        (b"[1]", "holds a list instead of names and values"),
        (deep, "nested deeper than 50"),
        (deeper, "nested deeper than 50"),
        (b'{"a": ' + b"1" * 5000 + b"}", "is not valid JSON"),
    ):
        path.write_bytes(data)
        with pytest.raises(ValueError, match=rf"a\.json {said}|{said}.*; give a plan"):
            read_json(path, "a plan")


def test_a_large_json_file_is_not_read_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("segprune.files.MAX_JSON", 1 << 20)
    (tmp_path / "a.json").write_bytes(b" " * (1 << 20) + b"{}")
    with pytest.raises(ValueError, match="longer than 1 MiB"):
        read_json(tmp_path / "a.json", "a plan")


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such files")
def test_devices_and_pipes_are_refused_before_they_are_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.json")
    for path in (tmp_path / "pipe.json", Path("/dev/zero")):
        with pytest.raises(ValueError, match=f"{path} is a device or a pipe and no file"):
            read_json(path, "a plan")
        with pytest.raises(ValueError, match=f"{path} is a device or a pipe and no file"):
            read_file(path)


def test_paths_are_the_same_where_links_lead_to_one_place_and_a_link_to_itself_is_none(
    tmp_path: Path,
) -> None:
    (tmp_path / "a").write_text("")
    (tmp_path / "link").symlink_to("a")
    (tmp_path / "loop").symlink_to("loop")
    assert is_same_path(tmp_path / "link", tmp_path / "a")
    assert is_same_path(tmp_path / "b", f"{tmp_path}/c/../b")
    assert not is_same_path(tmp_path / "loop", tmp_path / "a")


FROZEN = (
    Path(__file__).parent / "files"
)  # written with the real packages, by the script beside them


@pytest.mark.parametrize("name", ["mmengine.pth", "lightning.ckpt"])
def test_training_files_of_the_real_packages_open_without_them(name: str) -> None:
    found = read_file(FROZEN / name)[0]
    assert torch.equal(found["state_dict"]["x"], torch.ones(2))
    beside = found["message_hub"] if "message_hub" in found else found["hyper_parameters"]
    assert beside.keys()
