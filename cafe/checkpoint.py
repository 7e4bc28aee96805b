"""Checkpoints: safetensors with a JSON state in the header and a checksum of everything, replaced whole or not at all."""

import json
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from cafe.data.folders import cannot_write, write_atomically


def save_checkpoint(path: Path, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
    """Saves tensors and a JSON-able state to `path`; an earlier checkpoint there stays until this one is complete. Tensors on the
    CPU are written from where they are."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in sorted(tensors.items())}
    text = json.dumps(state)
    checksums = {"state_crc32": str(zlib.crc32(text.encode())), "tensors_crc32": str(_crc(tensors))}

    def write(file: Path) -> None:
        with cannot_write(path, SafetensorError):
            save_file(tensors, file, {"state": text, **checksums})

    write_atomically({path: write})


def load_checkpoint(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors and state of `path`; a missing, truncated or altered file is an error that names it."""
    with _opened(path) as file:
        state, tensors = _state(file), {name: file.get_tensor(name) for name in sorted(file.keys())}
        if int(file.metadata()["tensors_crc32"]) != _crc(tensors):
            raise ValueError("its checksum differs")
    return tensors, state


def read_state(path: Path) -> dict[str, Any]:
    """The state alone, from the header: no tensor is read, nor its checksum checked. Errors as in `load_checkpoint`."""
    with _opened(path) as file:
        return _state(file)


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} is missing: the run has no such checkpoint; train it (again)") from None
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is damaged ({error}): restore it or train again") from None


def _state(file: Any) -> dict[str, Any]:
    metadata = file.metadata() or {}
    if int(metadata["state_crc32"]) != zlib.crc32(metadata["state"].encode()):
        raise ValueError("its checksum differs")
    return json.loads(metadata["state"])


def _crc(tensors: dict[str, Tensor]) -> int:
    """CRC-32, as it is the fastest of the standard library and is to find damage, not forgery."""
    crc = 0
    for name, tensor in tensors.items():
        crc = zlib.crc32(f"{name}{tensor.dtype}{tuple(tensor.shape)}".encode(), crc)
        crc = zlib.crc32(tensor.reshape(-1).view(torch.uint8).numpy().data, crc)
    return crc
