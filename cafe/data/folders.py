"""Result folders that are there whole or not at all.

Every file is written into a temporary folder beside the wanted one and flushed to the disk; the folder is then renamed.
Whatever goes wrong before the rename, the former result is still there and nothing half-written is left.
"""

import json
import os
import secrets
import shutil
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from hashlib import blake2b
from pathlib import Path
from typing import Any


def write_file(path: Path, chunks: Iterable[Any]) -> str:
    """Writes bytes-like chunks to a file, flushes it to the disk, and returns its checksum (see `checksum`)."""
    digest = blake2b(digest_size=16)
    try:
        with path.open("wb") as file:
            for chunk in chunks:
                file.write(chunk)
                digest.update(chunk)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise OSError(f"cannot write {path}: {error.strerror}; what was there before is kept") from None
    return digest.hexdigest()


def checksum(path: Path) -> str:
    """BLAKE2b (128 bits) of a file, in hexadecimal."""
    digest = blake2b(digest_size=16)
    with path.open("rb") as file:
        while chunk := file.read(1 << 22):
            digest.update(chunk)
    return digest.hexdigest()


def read_marker(folder: Path, marker: str) -> dict[str, Any] | None:
    """The JSON object in `folder/marker`, or None where there is none."""
    try:
        content = json.loads((folder / marker).read_text())
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return None
    return content if isinstance(content, dict) else None


def check_replaceable(out: Path, marker: str, format: str, names: Collection[str]) -> None:
    """Refuses (FileExistsError) an `out` that is neither absent, nor empty, nor an earlier result of the same kind.

    An earlier result has a `marker` file with this `format`, and no file but those in `names`.
    """
    if not out.exists():
        return
    if not out.is_dir():
        raise FileExistsError(f"{out} exists and is not a folder: choose another output folder")
    present = {entry.name for entry in out.iterdir()}
    if present and (read_marker(out, marker) or {}).get("format") != format:
        raise FileExistsError(f"{out} is not empty and not a {format} folder: choose another output folder")
    if strangers := sorted(present - set(names)):
        raise FileExistsError(f"{out} holds other files ({', '.join(strangers[:3])}): choose another folder")


@contextmanager
def new_folder(out: str | Path, marker: str, format: str, names: Collection[str]) -> Iterator[Path]:
    """Gives a temporary folder to fill, which becomes `out` when the block ends without an error.

    An earlier result at `out` is replaced (see `check_replaceable`) only once the new one is complete and on the disk.
    """
    out = Path(out).expanduser().resolve()
    check_replaceable(out, marker, format, names)
    out.parent.mkdir(parents=True, exist_ok=True)
    tag = secrets.token_hex(4)
    temporary, former = (out.parent / f".{out.name}.{tag}.{suffix}" for suffix in ("tmp", "old"))
    temporary.mkdir()
    try:
        yield temporary
        _flush_folder(temporary)
        if out.exists():
            out.rename(former)
        try:
            temporary.rename(out)
        except BaseException:
            if former.exists():
                former.rename(out)
            raise
        _flush_folder(out.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.rmtree(former, ignore_errors=True)


def _flush_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
