"""Checkpoints: safetensors with a JSON state in the header and a checksum of everything, replaced whole or not at all."""

import json
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from cafe.data.folders import write_atomically

TYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16",
    torch.int64: "I64", torch.int32: "I32", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip


def save_checkpoint(path: Path, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
    """Saves tensors and a JSON-able state to `path`; an earlier checkpoint there stays until this one is complete.

    Written here and not by safetensors.torch, whose `save` copies all tensors and whose `save_file` leaves a file with a name of its
    own behind when the process is killed."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in sorted(tensors.items())}
    text = json.dumps(state)
    checksums = {"state_crc32": str(zlib.crc32(text.encode())), "tensors_crc32": str(_crc(tensors))}
    header: dict[str, Any] = {"__metadata__": {"state": text, **checksums}}
    end = 0
    for name, tensor in tensors.items():
        start, end = end, end + tensor.nbytes
        header[name] = {"dtype": TYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    write_atomically({path: [len(encoded).to_bytes(8, "little"), encoded, *map(_bytes, tensors.values())]})


def load_checkpoint(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors and state of `path`; a missing, truncated or altered file is an error that names it."""
    with _opened(path) as file:
        state, tensors = _state(file), {name: _aligned(file.get_tensor(name)) for name in sorted(file.keys())}
        if int(file.metadata()["tensors_crc32"]) != _crc(tensors):
            raise ValueError("its checksum differs")
    return tensors, state


def restore_checked(
    path: Path, fits: bool, restore: Callable[[dict[str, Tensor]], Any], tensors: dict[str, Tensor]
) -> None:
    """Passes the tensors of a run's checkpoint to `restore`; a ValueError that names `path` where they do not fit the run."""
    try:
        if not fits:
            raise RuntimeError
        restore(tensors)
    except Exception:  # what torch and cafe_kernels say of another model's tensors is of many kinds
        raise ValueError(
            f"{path} does not fit config.json: config.json was altered, or this is the checkpoint of another run; "
            "restore it or train again"
        ) from None


def read_state(path: Path) -> dict[str, Any]:
    """The state alone, from the header: no tensor is read, nor its checksum checked. Errors as in `load_checkpoint`."""
    with _opened(path) as file:
        return _state(file)


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        if path.exists() and not path.is_file():
            raise ValueError("not a file")
        with safe_open(path, framework="pt") as file:
            yield file
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} is missing: the run has no such checkpoint; train it (again)") from None
    except (SafetensorError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{path} is damaged ({error}): restore it or train again") from None


def _state(file: Any) -> dict[str, Any]:
    metadata = file.metadata() or {}
    if int(metadata["state_crc32"]) != zlib.crc32(metadata["state"].encode()):
        raise ValueError("its checksum differs")
    if not isinstance(state := json.loads(metadata["state"]), dict):
        raise ValueError("its state is no JSON object")
    return state


def _aligned(tensor: Tensor) -> Tensor:
    """A file packs tensors without gaps, so that one may begin where the C++ kernels, which ask for whole elements, do not read."""
    return tensor if tensor.data_ptr() % tensor.element_size() == 0 else tensor.clone()


def _crc(tensors: dict[str, Tensor]) -> int:
    """CRC-32, as it is the fastest of the standard library and is to find damage, not forgery."""
    crc = 0
    for name, tensor in tensors.items():
        crc = zlib.crc32(f"{name}{tensor.dtype}{tuple(tensor.shape)}".encode(), crc)
        crc = zlib.crc32(_bytes(tensor), crc)
    return crc


def _bytes(tensor: Tensor) -> memoryview:
    return tensor.reshape(-1).view(torch.uint8).numpy().data
