"""Files of tensors: written with a checksum where the format has none, and opened without running what is in them.

Tensors are read with `weights_only=True`, which builds nothing but tensors and plain containers. What else training
scripts leave in their files is passed over: see stand_ins.py.
"""

from __future__ import annotations

import io
import os
import re
import warnings
import zipfile
import zlib
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as safetensors_bytes
from torch import Tensor

from segprune.files import require_file, write_bytes
from segprune.stand_ins import STAND_INS, Fields, Sealed, is_harmless

PICKLES = (".pth", ".pt", ".bin")
SUFFIXES = (*PICKLES, ".ckpt", ".pkl", ".tar", ".safetensors")
CHECKSUM = "segprune.crc32"  # in the metadata of our .safetensors files
MAX_UNPACKED = 16  # times the size of a zip file; weights hardly shrink, zeros a thousandfold
_TENSORFLOW = (
    "; TensorFlow's weights are converted with transformers 4: "
    "SegformerForSemanticSegmentation.from_pretrained(folder, from_tf=True).save_pretrained(other_folder)"
)
ELSEWHERE = {  # how files of other frameworks become one that is read
    **dict.fromkeys((".h5", ".keras", ".pb", ".index"), _TENSORFLOW),
    ".msgpack": _TENSORFLOW.replace("TensorFlow", "Flax").replace("from_tf", "from_flax"),
    ".pdparams": "; PaddlePaddle's weights are not read, so give the PyTorch checkpoint that they were converted from",
}
EXPORTED = (".onnx", ".xml", ".pt2", ".torchscript", ".param")  # what segprune export writes


def save_record(record: Mapping[str, Any], path: str | os.PathLike[str]) -> None:
    """Writes tensors and plain containers of them, as `load_record` reads them back.

    An OrderedDict is written with its attributes, as a module's state dict has them.
    """
    # Serialised in memory first, so that writing is one step whose errors are ours to tell.
    buffer = io.BytesIO()  # written to a full disk by torch itself, the OSError would be lost
    torch.save(record if isinstance(record, OrderedDict) else dict(record), buffer)
    write_bytes(buffer.getbuffer(), path)


def load_record(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Returns what `save_record` wrote, on the CPU; raises ValueError if it is something else."""
    path = require_file(path)
    record = _unpickle(path)
    if not isinstance(record, dict):
        raise ValueError(
            f"{path} holds a {type(record).__name__}, not a saved record; give the file of another run."
        )
    return record


def save_tensors(
    state_dict: Mapping[str, Tensor], metadata: Mapping[str, str], path: Path
) -> None:
    """Writes a .safetensors file. Its metadata hold a checksum of all that is in it, since the format has none."""
    checked = {**metadata, CHECKSUM: _sum_up(state_dict, metadata)}
    write_bytes(safetensors_bytes(dict(state_dict), metadata=checked), path)


def _sum_up(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    """Returns a text that another bit anywhere would change."""
    crc = zlib.crc32(repr(sorted(metadata.items())).encode())
    for name, tensor in sorted(tensors.items()):
        crc = zlib.crc32(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode(), crc)
        crc = zlib.crc32(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data, crc)
    return f"{crc:08x}"


def read_file(path: str | os.PathLike[str]) -> tuple[Any, dict[str, str]]:
    """Returns what a file of torch.save or a .safetensors file holds, and the metadata of the latter, on the CPU.

    Raises FileNotFoundError if there is none, ValueError if it is of another kind, damaged, or needs to run code.
    """
    path = require_file(path)
    suffix = path.suffix.lower()
    if suffix == ".safetensors":
        return _read_safetensors(path)

    # Training scripts choose their own endings, so the first bytes decide for one that is unknown.
    if suffix in SUFFIXES or (suffix not in EXPORTED and _is_saved_by_torch(path)):
        return _unpickle(path), {}

    # An exported network is easily given by mistake: say what reads it.
    elsewhere = (
        "; exported files are read by segprune eval and segprune benchmark"
        if suffix in EXPORTED
        else ELSEWHERE.get(suffix, "")
    )
    raise ValueError(
        f"{path} ends in {path.suffix or 'nothing'!r}; a checkpoint ends in {', '.join(PICKLES)} or .safetensors, "
        f"or is a Hugging Face folder{elsewhere}."
    )


def _is_saved_by_torch(path: Path) -> bool:
    """Tells whether it is a zip file as torch.save writes it, or a pickle of the protocol that it uses."""
    names = _list_archive(path)
    if names:
        return any(name.endswith("/data.pkl") for name in names)
    with path.open("rb") as file:
        return file.read(2) == b"\x80\x02"


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            metadata = dict(file.metadata() or {})
    except SafetensorError as error:
        raise ValueError(_say_damaged(path, "safetensors file")) from error

    # Files of others have none, and ours from before had none.
    expected = metadata.pop(CHECKSUM, None)
    if expected is not None and expected != _sum_up(tensors, metadata):
        raise ValueError(_say_changed(path))
    return tensors, metadata


def _check_archive(path: Path) -> None:
    """Raises ValueError where a part of PyTorch's zip file is not what its checksum says, or unpacks to far more.

    torch.load looks at neither.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            parts = archive.infolist()
            unpacked = sum(part.file_size for part in parts)
            endless = unpacked > MAX_UNPACKED * path.stat().st_size
            # After torch.serialization.set_crc32_options(False) all checksums are zeros.
            unchecked = endless or not any(part.CRC for part in parts)
            changed = None if unchecked else archive.testzip()
    except Exception as error:  # a damaged table of contents fails in every way there is
        raise ValueError(_say_damaged(path, "PyTorch checkpoint")) from error

    if endless:
        raise ValueError(
            f"{path} unpacks to {unpacked} bytes, more than {MAX_UNPACKED} times its size; "
            "save it again with torch.save."
        )
    if changed is not None:
        raise ValueError(_say_changed(path))


def _unpickle(path: Path) -> Any:
    # Since version 1.6 PyTorch writes zip files; older ones have no checksums.
    if zipfile.is_zipfile(path):
        _check_archive(path)
    names = _list_archive(path)
    if any(name.endswith("/constants.pkl") for name in names):
        raise ValueError(
            f"{path} is TorchScript, a program and no state dict; give the checkpoint that it was traced from, or save "
            "one: torch.save(torch.jit.load(path).state_dict(), other_path)."
        )

    # An object of a class that is unknown here is a dict of
    # its fields; where its fields come in another form, it is empty.
    try:
        return _load_tensors(path, Fields)
    except (TypeError, ValueError, AttributeError):
        pass
    except UnpicklingError as error:
        raise _refuse_pickle(path, error) from error
    except Exception as error:  # bytes that are no pickle fail in every way there is
        raise ValueError(_say_damaged(path, "PyTorch checkpoint")) from error

    try:
        return _load_tensors(path, Sealed)
    except UnpicklingError as error:
        raise _refuse_pickle(path, error) from error
    except Exception as error:
        raise ValueError(_say_damaged(path, "PyTorch checkpoint")) from error


class StateDict(dict[str, Any]):
    """A dict with the attribute in which torch keeps the versions of a state dict's layers, whatever that holds."""

    _metadata: Any


def _load_tensors(path: Path, kind: type[Any]) -> Any:
    """Returns what is in the file, a stand-in of that `kind` for each object of a class that is unknown here."""
    # A stand-in is a class, or one with the name that the file has for it.
    stand_ins: list[Any] = list(STAND_INS)
    while True:
        try:
            with torch.serialization.safe_globals(stand_ins), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of other protocols, which then fail
                data = torch.load(path, map_location="cpu", weights_only=True)
            break
        except UnpicklingError as error:
            name = _find_class(error)
            if name is None or not is_harmless(name) or (kind, name) in stand_ins:
                raise

            # All that the file names at once, since every try reads it anew.
            others = [other for other in _list_classes(path) if other != name]
            stand_ins += [(kind, other) for other in (name, *others) if is_harmless(other)]

    # A network that was pickled whole has its weights in objects of which nothing was built.
    empty = isinstance(data, dict) and not data
    if isinstance(data, Sealed) or (empty and len(stand_ins) > len(STAND_INS)):
        raise UnpicklingError(f"GLOBAL {stand_ins[len(STAND_INS)][1]}")

    # A file may hang attributes on an OrderedDict, and they would hide its methods. One is kept.
    if not isinstance(data, OrderedDict):
        return data
    plain = StateDict(dict.items(data))
    plain._metadata = vars(data).get("_metadata")
    return plain


def _find_class(error: UnpicklingError) -> str | None:
    """Returns the class or function that a refused pickle asks for; None where the bytes are damaged."""
    name = re.search(r"GLOBAL (\w[\w.]*\w)", str(error))
    if name is None:
        return None
    return name[1] if "." in name[1] else f"builtins.{name[1]}"


def _list_classes(path: Path) -> list[str]:
    if not zipfile.is_zipfile(path):
        return []
    return torch.serialization.get_unsafe_globals_in_checkpoint(path)


def _list_archive(path: Path) -> list[str]:
    """Returns the names of the parts of a zip file; none of any other file."""
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.namelist()
    except (OSError, ValueError, zipfile.BadZipFile, NotImplementedError):
        return []


def _refuse_pickle(path: Path, error: UnpicklingError) -> ValueError:
    name = _find_class(error)
    if name is not None:
        return ValueError(
            f"{path} asks for {name}, and building that could run any code, so the file was not opened; save the "
            "weights alone where it was made: torch.save(model.state_dict(), path)."
        )
    # These operands came with protocol 4.
    if re.search(r"Unsupported operand 1(40|4[1-9]|50)\b", str(error)):
        return ValueError(
            f"{path} was pickled in a newer protocol than torch.save's own, which cannot be opened safely; write it "
            "again where it was made: torch.save(model.state_dict(), path)."
        )
    return ValueError(_say_damaged(path, "PyTorch checkpoint"))


def _say_damaged(path: Path, kind: str) -> str:
    return f"{path} is not a {kind}, or only a part of one; copy or download it again, or give another file."


def _say_changed(path: Path) -> str:
    return f"{path} was changed since it was written: its checksum is another one; copy or download it again."
