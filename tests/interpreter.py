"""Triton looks at TRITON_INTERPRET when it is imported, so what it interprets runs in a process of its own."""

import os
import subprocess
import sys
from typing import Any

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def run_python(*arguments: str, interpreted: bool = True) -> str:
    """What `python *arguments` prints, in Triton's interpreter unless told otherwise; it must succeed."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TRITON_INTERPRET": str(int(interpreted))}
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    return done.stdout


def check_compile_cases(cases: list[dict[str, Any]]) -> None:
    """Their names differ, and each names every argument of its kernel, in order, and which of them are constants."""
    assert len({case["name"] for case in cases}) == len(cases) > 0
    for case in cases:
        assert list(case["signature"]) == list(case["kernel"].arg_names)
        constants = {name for name, kind in case["signature"].items() if kind == "constexpr"}
        assert constants == case["constexprs"].keys()
        assert constants >= {p.name for p in case["kernel"].params if p.is_constexpr}
