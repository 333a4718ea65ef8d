"""Weights from safetensors files into a network, with everything checked first. Pickles are recognised, never read."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from zsq.errors import BadInput

IGNORED = "num_batches_tracked"  # a counter that evaluation never reads; files have it or not
SHOWN = 3  # how many names a message lists
DENORMAL_SHARE = 0.001  # above this share of the weights, denormal arithmetic is what a CPU spends its time on

_CONVERT = """A pickle can run any code when it is read. Convert it once, with a torch that refuses code:
    import torch; from safetensors.torch import save_file
    state = torch.load({name!r}, map_location="cpu", weights_only=True)  # maybe ["state_dict"] of it
    save_file({{k: v.contiguous() for k, v in state.items()}}, {new!r})"""


def read_weights(path: Path | str, *, what: str = "weights") -> dict[str, Tensor]:
    """Read a safetensors file; tensors are on the CPU.

    Args:
        path: the file.
        what: the option that names it, for messages.

    Returns:
        Name -> tensor.

    Raises:
        BadInput: if it is missing, a pickle (recognised by its first bytes), truncated, or of another kind.
    """
    path = Path(path)
    subject = f"{what} {path}"
    if not path.is_file():
        got = "a directory" if path.is_dir() else "no such file"
        raise BadInput(subject, expected="a .safetensors file", got=got, fix=f"Check the name given as --{what}.")
    try:
        with path.open("rb") as file:
            start = file.read(9)
        size = path.stat().st_size
    except OSError as error:
        raise BadInput(
            subject, expected="a readable file", got=str(error.strerror), fix="Check its permissions."
        ) from error
    if kind := _pickled(start):
        new = f"{path.stem}.safetensors"
        raise BadInput(subject, expected="a .safetensors file", got=kind, fix=_CONVERT.format(name=path.name, new=new))
    header = int.from_bytes(start[:8], "little")
    if len(start) < 9 or start[8:] != b"{":
        raise BadInput(
            subject,
            expected="a .safetensors file",
            got=f"a file of another kind ({size} bytes)",
            fix=f"Save the {what} with safetensors.torch.save_file.",
        )
    if (need := _bytes_needed(path, header, size)) > size:
        raise BadInput(
            subject,
            expected=f"{need} bytes, as its header says",
            got=f"{size}: the file is truncated",
            fix="Copy or download it again.",
        )
    try:
        return load_file(path)
    except (SafetensorError, KeyError, ValueError) as error:
        raise BadInput(
            subject, expected="a .safetensors file", got=f"a damaged one ({error})", fix="Copy or download it again."
        ) from error


def _pickled(start: bytes) -> str | None:
    if start.startswith(b"PK"):
        return "a zip archive, as torch.save writes it (a pickle inside)"
    # The length of a safetensors header may begin with the same two bytes; then its ninth byte opens the header.
    if start[8:] != b"{" and start[:1] == b"\x80" and start[1:2] in (b"\x01", b"\x02", b"\x03", b"\x04", b"\x05"):
        return "a pickle"
    return None


def _bytes_needed(path: Path, header: int, size: int) -> int:
    """Size that the header promises; the header's own end if that is already beyond the file."""
    if 8 + header > size:
        return 8 + header
    with path.open("rb") as file:
        file.seek(8)
        try:
            entries = json.loads(file.read(header))
            ends = [entry["data_offsets"][1] for name, entry in entries.items() if name != "__metadata__"]
        except (ValueError, KeyError, TypeError, IndexError, AttributeError):
            return 0  # damaged in another way, which reading it will say
    return 8 + header + max(ends, default=0)


def load_weights(net: nn.Module, state: Mapping[str, Tensor], *, name: str) -> None:
    """Copy weights into a network after checking names, shapes, types and values; nothing is copied if one check fails.

    Args:
        net: the network; changed in place.
        state: name -> tensor. Counters of BatchNorm (num_batches_tracked) may be there or not, and a tensor that the
            network uses under several names may have any of them.
        name: where the weights come from, for messages.

    Raises:
        BadInput: for missing, unexpected, wrong-shape, integer or non-finite tensors; the first few are named.
    """
    wanted = {key: value for key, value in net.state_dict().items() if isinstance(value, Tensor)}
    given = {key: value for key, value in state.items() if not key.endswith(IGNORED)}
    present = {(value.data_ptr(), value.shape) for key, value in wanted.items() if key in given and value.numel()}
    missing = [
        key
        for key, value in wanted.items()
        if key not in given and not key.endswith(IGNORED) and (value.data_ptr(), value.shape) not in present
    ]
    unexpected = [key for key in given if key not in wanted]
    if missing or unexpected:
        found = [
            f"{len(keys)} {kind} ({_first(keys)})"
            for kind, keys in (("missing", missing), ("unexpected", unexpected))
            if keys
        ]
        count = sum(not key.endswith(IGNORED) for key in wanted)
        fix = "Give the weights of this network, or the network of these weights."
        if unexpected and all(key.partition(".")[2] in wanted for key in unexpected):
            fix = f"Every name starts with {unexpected[0].partition('.')[0] + '.'!r}: save them without it."
        raise BadInput(f"weights {name}", expected=f"the {count} tensors of the network", got=", ".join(found), fix=fix)
    shapes = [
        f"{key} {list(wanted[key].shape)} / {list(value.shape)}"
        for key, value in given.items()
        if value.shape != wanted[key].shape
    ]
    if shapes:
        raise BadInput(
            f"weights {name}",
            expected="the network's shapes",
            got=f"{len(shapes)} others (expected / got: {_first(shapes)})",
            fix="Build the network with the number of classes and widths of these weights.",
        )
    kinds = [
        f"{key} {value.dtype}"
        for key, value in given.items()
        if wanted[key].is_floating_point() and not value.is_floating_point()
    ]
    if kinds:
        raise BadInput(
            f"weights {name}", expected="floating point tensors", got=_first(kinds), fix="Save float weights."
        )
    check_finite(given, name=name)
    net.load_state_dict(dict(state) if any(k.endswith(IGNORED) for k in wanted) else given, strict=False)


def check_finite(state: Mapping[str, Tensor], *, name: str) -> None:
    """Refuse weights that hold NaN or infinity.

    Raises:
        BadInput: naming the first tensors that do.
    """
    bad = [key for key, value in state.items() if value.is_floating_point() and not bool(value.isfinite().all())]
    if bad:
        raise BadInput(
            f"weights {name}",
            expected="finite numbers",
            got=f"NaN or infinity in {_first(bad)}",
            fix="Take a checkpoint from before the training diverged.",
        )


def flush_denormals(net: nn.Module) -> bool:
    """Turn denormal arithmetic off for this process if many weights are denormal; it makes a CPU about 50 times slower.

    Denormals are numbers below 1.2e-38; a weight of that size does nothing. The switch is torch's and stays on.

    Args:
        net: a network with float32 weights.

    Returns:
        Whether it was switched.
    """
    tiny, total = 0, 0
    for value in net.parameters():
        if value.dtype == torch.float32:
            tiny += int(((value != 0) & (value.abs() < torch.finfo(torch.float32).tiny)).sum())
            total += value.numel()
    return tiny > DENORMAL_SHARE * total and torch.set_flush_denormal(True)


def fingerprint(net: nn.Module) -> str:
    """SHA-256 over names, types, shapes and bytes of all parameters and buffers, but for BatchNorm's counters.

    Example:
        >>> fingerprint(nn.ReLU())[:8]
        'e3b0c442'
    """
    digest = hashlib.sha256()
    for key, value in sorted(named_tensors(net).items()):
        digest.update(f"{key} {value.dtype} {list(value.shape)}\n".encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def named_tensors(net: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by name, without BatchNorm's counters."""
    found: dict[str, Tensor] = dict(net.named_parameters()) | dict(net.named_buffers())
    return {key: value for key, value in found.items() if not key.endswith(IGNORED)}


def _first(names: list[str]) -> str:
    more = len(names) - SHOWN
    return ", ".join(names[:SHOWN]) + (f" and {more} more" if more > 0 else "")
