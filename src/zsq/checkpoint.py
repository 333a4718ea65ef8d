"""State on disk: trees of tensors and plain values in one safetensors file, written atomically; never pickle.

A file is either complete or absent: it is written under a temporary name beside its place, flushed to the disk, then
renamed.
"""

from __future__ import annotations

import errno
import json
import math
import os
from collections import Counter, OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from zsq.errors import BadInput

STRUCTURE = "zsq_tree"  # key of the header metadata that holds the structure
TEMPORARY = ".tmp"  # what a kill in the middle of a write may leave behind: .NAME.PID.tmp
_NO_DIRECTORY_SYNC = {errno.EINVAL, errno.ENOTSUP, errno.EBADF, errno.EACCES}  # file systems that cannot sync a folder


def save_tree(path: Path | str, tree: object, *, metadata: Mapping[str, str] | None = None) -> None:
    """Write a tree to one safetensors file, atomically; the same tree always gives the same bytes.

    Args:
        path: the file; an existing one is replaced only once the new one is complete.
        tree: nested dicts, lists and tuples of tensors, None, bool, int, float (also inf and nan) and str. Keys of any
            such plain kind survive. A dict of tensors gives a file whose tensors carry the dict's keys, readable by any
            safetensors reader. Tensors that share memory are written separately.
        metadata: further strings for the header.

    Raises:
        BadInput: if the file system refuses (full, read-only, ...); the previous file is intact then.
        TypeError: if the tree holds anything else; the message names the place.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_tree(f"{folder}/a.safetensors", {"w": torch.ones(2), "lr": {0: 0.1}})
        ...     load_tree(f"{folder}/a.safetensors")
        {'w': tensor([1., 1.]), 'lr': {0: 0.1}}
    """
    tensors: dict[str, Tensor] = {}
    structure = json.dumps(_pack(tree, "", tensors), allow_nan=False)
    data = safetensors.torch.save(tensors, metadata={**(metadata or {}), STRUCTURE: structure})
    write_atomic(Path(path), _ordered_header(data))


def load_tree(path: Path | str) -> Any:
    """Read what `save_tree` wrote; tensors are on the CPU and own their memory.

    Raises:
        BadInput: if the file is missing, truncated, or was not written by `save_tree`.
    """
    path = Path(path)
    what = "a safetensors file written by zsq"
    try:
        data = path.read_bytes()
    except OSError as error:
        raise BadInput(str(path), expected=what, got=_reason(error), fix="Check the file name.") from error
    try:
        structure = json.loads(_header(data)[0]["__metadata__"][STRUCTURE])
        return _unpack(structure, safetensors.torch.load(data))
    except (safetensors.SafetensorError, ValueError, KeyError, TypeError) as error:
        got = "a truncated file or one of another kind"
        fix = "Pickled checkpoints are never read. If a copy was cut short, copy the file again."
        raise BadInput(str(path), expected=what, got=got, fix=fix) from error


def write_json_atomic(path: Path | str, value: object) -> None:
    """Write JSON, atomically; inf and nan, which JSON does not have, become the strings "inf", "-inf" and "nan".

    Args:
        path: the file.
        value: dicts, lists, tuples, strings, numbers, None; paths become strings.

    Raises:
        BadInput: if the file system refuses; the previous file is intact then.
    """
    text = json.dumps(plain(value), indent=2, allow_nan=False, ensure_ascii=False)
    write_atomic(Path(path), (text + "\n").encode())


def read_json(path: Path | str) -> Any:
    """Read a JSON file.

    Raises:
        BadInput: if it is missing or damaged.
    """
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise BadInput(str(path), expected="a JSON file", got=_reason(error), fix="Check the path.") from error
    except ValueError as error:
        fix = "The file was changed or cut short by something else; restore it, or start in another directory."
        raise BadInput(str(path), expected="a JSON file", got=f"damaged text ({error})", fix=fix) from error


def plain(value: object) -> Any:
    """A copy that JSON can hold: tuples as lists, paths and non-finite numbers as strings.

    Raises:
        TypeError: for anything that is not plain data.
    """
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, float) and not math.isfinite(value):
        return repr(float(value))
    if value is None or isinstance(value, str | bool | int | float):
        return value
    raise TypeError(f"expected plain data for JSON, got {type(value).__name__}: {value!r:.80}")


def write_atomic(path: Path, data: bytes) -> None:
    """Replace a file by `data`, or leave everything as it was.

    Args:
        path: the file; its folder must exist.
        data: all of its bytes.

    Raises:
        BadInput: if the file system refuses; the temporary file is removed and the previous file intact.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}{TEMPORARY}")
    try:
        try:
            _write_through(temporary, data)
            os.replace(temporary, path)  # noqa: PTH105 - one system call, which tests make fail
        finally:
            temporary.unlink(missing_ok=True)
        _sync_folder(path.parent)
    except OSError as error:
        raise BadInput(
            f"writing {path}",
            expected="a writable folder with enough free space",
            got=_reason(error),
            fix="Nothing on disk was damaged. Make room or choose another --run, then repeat the command"
            " (with --resume if the run had begun).",
        ) from error


def _write_through(path: Path, data: bytes) -> None:
    """Write all bytes and wait until the disk has them."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o666)
    try:
        rest = memoryview(data)
        while rest:
            rest = rest[os.write(descriptor, rest) :]
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sync_folder(folder: Path) -> None:
    """Make a rename survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _NO_DIRECTORY_SYNC:
            raise
    finally:
        os.close(descriptor)


def _reason(error: OSError) -> str:
    return (error.strerror or str(error)).lower()


def _header(data: bytes) -> tuple[dict[str, Any], int]:
    """The JSON header of a safetensors file and where the tensors' bytes begin."""
    end = 8 + int.from_bytes(data[:8], "little")
    if len(data) < end:
        raise ValueError("shorter than its header")
    return json.loads(data[8:end]), end


def _ordered_header(data: bytes) -> bytes:
    """Sort the metadata: the library writes it in an order that changes from call to call."""
    header, end = _header(data)
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + data[end:]


def _pack(value: object, where: str, tensors: dict[str, Tensor]) -> Any:
    """The JSON form of a tree; its tensors go to `tensors`."""
    if isinstance(value, Tensor):
        return _pack_tensor(value, where, tensors)
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else {"float": repr(float(value))}
    if type(value) in (list, tuple, torch.Size):
        items = [_pack(item, f"{where}.{i}", tensors) for i, item in enumerate(value)]  # type: ignore[arg-type, var-annotated]
        return items if isinstance(value, list) else {"tuple": items}
    if type(value) in (dict, OrderedDict, Counter):
        pairs = []
        for key, item in value.items():  # type: ignore[attr-defined]
            if isinstance(key, Tensor):
                raise TypeError(f"{where or 'tree'}: a tensor cannot be a key")
            pairs.append([_pack(key, where, tensors), _pack(item, f"{where}.{key}", tensors)])
        packed = {"counter" if isinstance(value, Counter) else "dict": pairs}
        versions = getattr(value, "_metadata", None)  # nn.Module.state_dict() notes the versions of its modules
        if isinstance(versions, dict):
            packed["versions"] = _pack(dict(versions), where, tensors)
        return packed
    raise TypeError(
        f"{where.strip('.') or 'tree'}: expected tensors, dicts, lists, tuples, numbers, strings or None,"
        f" got {type(value).__name__}. Turn it into these in state_dict()."
    )


def _pack_tensor(value: Tensor, where: str, tensors: dict[str, Tensor]) -> dict[str, Any]:
    if value.layout is not torch.strided or value.is_meta or value.is_quantized:
        raise TypeError(f"{where.strip('.') or 'tree'}: expected a dense tensor, got {value.layout} on {value.device}")
    name = stem = where.strip(".") or "tensor"
    while name in tensors:  # {0: ..., "0": ...} give the same path
        name = f"{stem}~{len(tensors)}"
    value = value.detach()
    tensors[name] = value.cpu().resolve_conj().resolve_neg().clone(memory_format=torch.contiguous_format)
    # channels_last and the like: arithmetic on a resumed state must run in the memory order of the original
    strides = value.stride()
    order = sorted(range(value.ndim), key=lambda d: -strides[d])
    if not value.is_contiguous() and value.permute(order).is_contiguous():
        return {"tensor": name, "order": order}
    return {"tensor": name}


def _unpack(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    if isinstance(value, list):
        return [_unpack(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    if "tensor" in value:
        tensor = tensors[value["tensor"]].clone()  # own, aligned memory instead of a view of the file
        if "order" not in value:
            return tensor
        order = value["order"]
        return tensor.permute(order).contiguous().permute([order.index(d) for d in range(tensor.ndim)])
    if "float" in value:
        return float(value["float"])
    if "tuple" in value:
        return tuple(_unpack(item, tensors) for item in value["tuple"])
    if "counter" in value:
        return Counter({_unpack(key, tensors): _unpack(item, tensors) for key, item in value["counter"]})
    tree = {_unpack(key, tensors): _unpack(item, tensors) for key, item in value["dict"]}
    if "versions" not in value:
        return tree
    state = OrderedDict(tree)
    state._metadata = _unpack(value["versions"], tensors)  # type: ignore[attr-defined]
    return state
