"""Result files and folders that are there whole or not at all, and JSON files that know whether they are as written.

What is new is written beside the wanted place, flushed to the disk and then renamed. Whatever goes wrong before the
rename, the former result is still there and nothing half-written is left.
"""

import fcntl
import json
import os
import shutil
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from hashlib import blake2b
from pathlib import Path
from typing import Any


def write_file(path: Path, chunks: Iterable[Any]) -> None:
    """Writes bytes-like chunks to a new file and flushes it to the disk. A link that lies there is replaced, not followed."""
    try:
        path.unlink(missing_ok=True)
        with path.open("xb") as file:
            for chunk in chunks:
                file.write(chunk)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise OSError(
            f"cannot write {path}: {error.strerror}; what was there before is kept. Put that right and run it again "
            "(cafe train: with --resume)"
        ) from None


def write_with_checksum(path: Path, chunks: Iterable[Any]) -> str:
    """`write_file`; returns what `checksum` will find."""
    digest = blake2b(digest_size=16)

    def summed() -> Iterator[Any]:
        for chunk in chunks:
            digest.update(chunk)
            yield chunk

    write_file(path, summed())
    return digest.hexdigest()


def write_atomically(contents: dict[Path, Iterable[Any]]) -> None:
    """Writes files (bytes-like chunks) beside the wanted ones and renames them once ALL are on the disk: each is the former or the
    whole new one."""
    temporary = {path.with_name(f".{path.name}.tmp"): path for path in contents}
    try:
        for file, path in temporary.items():
            write_file(file, contents[path])
        for file, path in temporary.items():
            file.replace(path)
        for folder in {path.parent for path in contents}:
            _flush_folder(folder)
    except BaseException:
        for file in temporary:
            file.unlink(missing_ok=True)
        raise


def seal(meta: dict[str, Any]) -> bytes:
    """JSON of `meta` with a checksum of it, for `read_sealed`."""
    return json.dumps(meta | {"checksum": _checksum_of(meta)}, indent=2).encode()


def read_sealed(path: Path, format: str, version: int, remedy: str) -> dict[str, Any]:
    """What `seal` wrote to `path`; anything else is a ValueError that names the file and ends in the `remedy`."""
    if path.exists() and not path.is_file():
        raise ValueError(f"{path} is not a file: restore it, or {remedy}")
    try:
        meta = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged ({error}): restore it, or {remedy}") from None
    if not isinstance(meta, dict) or meta.get("format") != format:
        raise ValueError(f"{path} does not describe a {format}: restore it, or {remedy}")
    if meta.get("version") != version:
        raise ValueError(f"{path} has format version {meta.get('version')}, this release reads {version}: {remedy}")
    if meta.pop("checksum", None) != _checksum_of(meta):
        raise ValueError(f"{path} is damaged or was altered (its checksum differs): restore it, or {remedy}")
    return meta


def _checksum_of(meta: dict[str, Any]) -> str:
    return blake2b(json.dumps(meta, sort_keys=True).encode(), digest_size=16).hexdigest()


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
        content = json.loads((folder / marker).read_text()) if (folder / marker).is_file() else None
    except (FileNotFoundError, NotADirectoryError, ValueError, RecursionError):
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

    An earlier result at `out` is replaced (see `check_replaceable`) only once the new one is complete and on the disk. What a process
    killed at once leaves (`.NAME.tmp`, `.NAME.old`) the next one for the same `out` clears away or puts back.

    Raises:
        FileExistsError: `out` is a link to nothing, or holds something else.
        OSError: it cannot be made.
        BlockingIOError: another process writes the same `out`.
    """
    out = Path(out).expanduser()
    if out.is_symlink() and not out.exists():
        raise FileExistsError(
            f"{out} is a link to {out.readlink()}, which is not there: remove it, or choose another folder"
        )
    out = out.resolve()
    temporary, former = (out.with_name(f".{out.name}.{suffix}") for suffix in ("tmp", "old"))
    if former.exists() and not out.exists():
        former.rename(out)
    check_replaceable(out, marker, format, names)
    if temporary.is_symlink():
        temporary.unlink()
    try:
        temporary.mkdir(parents=True, exist_ok=True)
    except OSError as error:  # it names the temporary folder
        raise OSError(f"cannot write {out}: {error.strerror}; choose another output folder") from None
    descriptor = os.open(temporary, os.O_RDONLY)
    try:
        lock(descriptor, f"another process writes {out}: wait for it, or choose another output folder")
        try:
            for left in (*temporary.iterdir(), former):
                whole = left.is_dir() and not left.is_symlink()
                shutil.rmtree(left, ignore_errors=True) if whole else left.unlink(missing_ok=True)
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
    finally:
        os.close(descriptor)


def lock(descriptor: int, busy: str) -> None:
    """Locks an open file or folder until it is closed; BlockingIOError(`busy`) where another process has it."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise BlockingIOError(busy) from None
    except OSError:
        pass  # a file system without locks


def _flush_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
