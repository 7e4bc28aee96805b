"""Fuzzes the C++ entry points (tests/fuzz_kernels.py) and the readers of files (tests/fuzz_readers.py).

    python -m tests.fuzz sampler attention --seconds 600
    make sanitize SECONDS=600        # all kernels, under AddressSanitizer and UBSan; `make fuzz` the readers

The inputs are drawn by the Hypothesis strategies that the tests use. With atheris (pip install atheris) their choices come from
libFuzzer, which is guided by what the inputs reach: basic blocks of csrc/ in a build with tests/fuzz_coverage.cpp (CAFE_EXTENSION),
branches of cafe's Python in the readers. Without, Hypothesis draws at random. A target runs for so many seconds of CPU time. What fails
ends it with exit code 1 or the sanitizer's; libFuzzer leaves the input in crash-*, and `--input FILE` runs that one again.
"""

import argparse
import contextlib
import ctypes
import glob
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

READERS = ("tables", "raw", "checkpoint", "sharded", "run", "evaluation", "experiment")
PARTS = ("sampler", "attention", "losses", "optim", "topk")


def target(name: str) -> Any:
    """The function `draw -> bool` of a target: True where the input was accepted, an exception where something is wrong."""
    if name in PARTS:
        from tests.fuzz_kernels import KERNELS

        return KERNELS[name]
    from tests.fuzz_readers import TARGETS

    return TARGETS[name]


class Runs:
    """Counts what was run, and ends the process when its CPU time is over."""

    def __init__(self, name: str, seconds: float) -> None:
        self.name, self.seconds, self.outcomes, self.counters = name, seconds, Counter[bool](), None
        self.start = time.process_time()

    def count(self, accepted: bool) -> None:
        self.outcomes[accepted] += 1
        if time.process_time() - self.start >= self.seconds:
            self.report()
            os._exit(0)

    def report(self) -> None:
        accepted, refused = self.outcomes[True], self.outcomes[False]
        print(
            f"{self.name}: {accepted + refused:,} inputs in {time.process_time() - self.start:.0f} CPU seconds, {accepted:,} accepted, "
            f"{refused:,} refused, nothing wrong",
            flush=True,
        )


def run(name: str, seconds: float, number: int, file: Path | None) -> None:
    """Runs one target in this process."""
    with instrumented(name in READERS and file is None) as libfuzzer:
        function = target(name)
    runs = Runs(name, seconds)

    @settings(
        max_examples=10**9, deadline=None, database=None, phases=[Phase.generate], suppress_health_check=list(HealthCheck),
        print_blob=False,
    )  # fmt: skip
    @seed(number)
    @given(st.data())
    def one(data: Any) -> None:
        runs.count(function(data.draw))

    if file is not None:
        one.hypothesis.fuzz_one_input(file.read_bytes())  # type: ignore[attr-defined]
    elif libfuzzer is None:
        one()
    else:
        counters(libfuzzer)
        corpus = tempfile.mkdtemp()
        # Hypothesis refuses inputs that are too short.
        limits = [
            "-max_len=4096",
            "-len_control=0",
            "-timeout=60",
            "-rss_limit_mb=8192",
            "-print_final_stats=0",
            "-verbosity=1",
        ]
        libfuzzer.Setup([sys.argv[0], corpus, f"-seed={number + 1}", *limits], one.hypothesis.fuzz_one_input)  # type: ignore[attr-defined]
        libfuzzer.Fuzz()


@contextlib.contextmanager
def instrumented(python: bool) -> Any:
    """atheris, or None; what is imported in the block tells it its branches."""
    try:
        import atheris
    except ImportError:
        yield None
        return
    if not python:
        yield atheris
        return
    with atheris.instrument_imports(include=["cafe", "tomllib"]):
        yield atheris


def counters(libfuzzer: Any) -> None:
    """Shows libFuzzer the counters of the extension, if it is built with them."""
    if not (path := os.environ.get("CAFE_EXTENSION")):
        return
    extension = ctypes.CDLL(path)
    extension.cafe_counters.restype = extension.cafe_places.restype = ctypes.c_void_p
    first, places, size = extension.cafe_counters(), extension.cafe_places(), extension.cafe_size()
    core = ctypes.CDLL(glob.glob(f"{Path(libfuzzer.__file__).parent}/core_with_libfuzzer*.so")[0])
    core["__sanitizer_cov_8bit_counters_init"](ctypes.c_void_p(first), ctypes.c_void_p(first + size))
    core["__sanitizer_cov_pcs_init"](ctypes.c_void_p(places), ctypes.c_void_p(places + 16 * size))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "targets", nargs="*", metavar="TARGET", help=f"of {', '.join([*PARTS, *READERS])}; all if none is given"
    )
    parser.add_argument("--seconds", type=float, default=60, help="CPU time of each target")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--input", type=Path, help="a file that libFuzzer left")
    options = parser.parse_args()
    names = options.targets or [*PARTS, *READERS]
    if unknown := set(names) - {*PARTS, *READERS}:
        parser.error(f"no target {', '.join(unknown)}; there are {', '.join([*PARTS, *READERS])}")
    if len(names) == 1:
        run(names[0], options.seconds, options.seed, options.input)
        return 0
    same = ["--seconds", str(options.seconds), "--seed", str(options.seed)]
    return max(subprocess.call([sys.executable, "-m", "tests.fuzz", name, *same]) != 0 for name in names)


if __name__ == "__main__":
    sys.exit(main())
