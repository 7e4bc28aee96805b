"""Checkpoints: safetensors with a JSON state in the header and a checksum of everything, replaced whole or not at all."""

import json
import zlib
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from cafe.data.folders import write_file


def write_atomically(path: Path, content: bytes) -> None:
    """Writes a file beside `path`, flushes it to the disk and renames it: `path` is the former file or the whole new one."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        write_file(temporary, [content])
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def save_checkpoint(path: Path, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
    """Saves tensors and a JSON-able state to `path`; an earlier checkpoint there stays until this one is complete."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in sorted(tensors.items())}
    text = json.dumps(state)
    write_atomically(path, save(tensors, {"state": text, "crc32": str(_crc(tensors, text))}))


def load_checkpoint(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors and state of `path`; a missing, truncated or altered file is a ValueError that names it."""
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in sorted(file.keys())}
        if int(metadata["crc32"]) != _crc(tensors, metadata["state"]):
            raise ValueError("its checksum differs")
        return tensors, json.loads(metadata["state"])
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} is missing: the run has no such checkpoint") from None
    except (SafetensorError, KeyError, ValueError) as error:
        raise ValueError(f"{path} is damaged ({error}): restore it or train again") from None


def read_state(path: Path) -> dict[str, Any]:
    """The state alone, from the header: no tensor is read, nor the checksum checked. {} where the header is damaged."""
    try:
        with safe_open(path, framework="pt") as file:
            state = json.loads((file.metadata() or {})["state"])
    except (SafetensorError, KeyError, ValueError):
        return {}
    return state if isinstance(state, dict) else {}


def _crc(tensors: dict[str, Tensor], text: str) -> int:
    crc = zlib.crc32(text.encode())
    for name, tensor in tensors.items():
        crc = zlib.crc32(f"{name}{tensor.dtype}{tuple(tensor.shape)}".encode(), crc)
        crc = zlib.crc32(tensor.reshape(-1).view(torch.uint8).numpy().data, crc)
    return crc
