"""An environment of its own for each peer, with the versions pinned in requirements/NAME.txt; and a command run in it.

    python -m benchmarks.peers.env rectools                                  # make it, if it is not there as pinned
    python -m benchmarks.peers.env recbole benchmarks.peers.sampler          # and run a module of this repository in it

Environments are made in build/peers, or in the folder $CAFE_PEERS, by the Python that runs this; RecBole's pins want 3.11. Each takes
0.8 to 1.5 GB. cafe_kernels is not installed there: it is imported from this checkout, whose C++ extension has to be built.
"""

import argparse
import hashlib
import os
import subprocess
import sys
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
REQUIREMENTS = Path(__file__).parent / "requirements"
NAMES = sorted(path.stem for path in REQUIREMENTS.glob("*.txt"))


def folder() -> Path:
    return Path(os.environ.get("CAFE_PEERS", ROOT / "build" / "peers"))


def is_made(name: str) -> bool:
    """Whether the environment is there as pinned now: the stamp is written last."""
    stamp = folder() / name / "pinned"
    return stamp.exists() and stamp.read_text() == _pins(name)


def python_of(name: str) -> Path:
    """The interpreter of the environment `name`, which is made first if it is not there as pinned.

    Raises:
        ValueError: there is no such peer.
        subprocess.CalledProcessError: pip failed; the next call tries again.
    """
    if name not in NAMES:
        raise ValueError(f"peer {name!r}: expected one of {', '.join(NAMES)}")
    where = folder() / name
    python = where / "bin" / "python"
    if not is_made(name):
        print(f"making {where}", file=sys.stderr, flush=True)
        venv.create(where, with_pip=True, clear=True)
        subprocess.run(
            [python, "-m", "pip", "install", "-q", "--no-deps", "-r", REQUIREMENTS / f"{name}.txt"], check=True
        )
        (where / "pinned").write_text(_pins(name))
    return python


def environment(threads: int) -> dict[str, str]:
    """The variables of a contestant's process: this checkout on the path, and so many threads for every library."""
    counts = {name: str(threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")}
    return {**os.environ, **counts, "PYTHONPATH": str(ROOT), "TOKENIZERS_PARALLELISM": "false"}


def _pins(name: str) -> str:
    return hashlib.blake2b((REQUIREMENTS / f"{name}.txt").read_bytes(), digest_size=16).hexdigest()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("name", choices=NAMES)
    parser.add_argument("module", nargs="?", help="run this module in it")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="of the module")
    given = parser.parse_args()
    python = python_of(given.name)
    if given.module is None:
        print(python)
        return
    command = [str(python), "-m", given.module, *given.arguments]
    raise SystemExit(subprocess.run(command, cwd=ROOT, env=environment(given.threads)).returncode)


if __name__ == "__main__":
    main()
