"""Compiled kernels in a folder are what the launcher asks for; shown without a GPU, by all of Triton's launch but the last step."""

import json
import os
import shutil

import pytest

pytest.importorskip("triton")

from tests.interpreter import run_python

NAME = "short_starts"
# Launches the kernel as the attention does, as if on sm_90; says where it came from, and what is of its value.
LAUNCH = """
import json, sys
import torch, triton
from triton import knobs
from cafe_kernels.attention import triton_short
from cafe_kernels.compile import offline
found = {}
knobs.compilation.listener = lambda **seen: found.update(hit=seen["cache_hit"], files=sorted(seen["metadata_group"].values()))
triton.JITFunction.__getitem__ = lambda kernel, grid: lambda *given, **options: kernel.run(
    *given, grid=grid, warmup=True, **options)
with offline(sys.argv[1]):
    triton_short._starts(torch.zeros(65, dtype=torch.int32, device="meta"), 16, True)
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stored") / "made here"
    out = run_python("-m", "cafe_kernels.compile", "--target", "sm_90", "--match", f"^{NAME}", "--out", str(folder))
    assert out == f"2 kernels for sm_90 in {folder}\n"
    return folder


def launch(store, cache, target="sm_90", **more):
    environment = {"TRITON_CACHE_DIR": str(cache), "CAFE_KERNELS_STORE": str(store), **more}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        return json.loads(run_python("-W", "error", "-c", LAUNCH, target, interpreted=False))


def test_a_launch_finds_the_stored_kernel_wherever_the_folder_lies(store, tmp_path):
    moved = shutil.copytree(store, tmp_path / "moved")
    found = launch(moved, tmp_path / "cache")
    assert found["hit"]
    assert [os.path.splitext(file)[1] for file in found["files"]] == [".cubin", ".json"]
    assert all(file.startswith(str(moved)) for file in found["files"])


@pytest.mark.parametrize(
    ("target", "more"), [("sm_80", {}), ("sm_90", {"TRITON_CACHE_MANAGER": "triton.runtime.cache:FileCacheManager"})]
)
def test_what_is_not_stored_or_not_wanted_is_compiled(store, tmp_path, target, more):
    found = launch(store, tmp_path / "cache", target, **more)
    assert not found["hit"]
    assert not any(file.startswith(str(store)) for file in found["files"])


def test_a_store_that_is_not_there_is_told(tmp_path):
    with pytest.raises(AssertionError, match="is not a folder: kernels will be compiled"):
        launch(tmp_path / "none", tmp_path / "cache")


def test_storing_again_changes_nothing(store):
    before = {file: file.read_bytes() for file in store.rglob("*") if file.is_file()}
    run_python("-m", "cafe_kernels.compile", "--target", "sm_90", "--match", f"^{NAME}$", "--out", str(store))
    assert {file: file.read_bytes() for file in store.rglob("*") if file.is_file()} == before


def test_one_kernel_serves_all_numbers():
    """1, multiples of 16 and what needs 64 bits would each be a kernel of their own for a plain triton.jit."""
    code = """
from cafe_kernels.compile import offline
from cafe_kernels.optim.triton_rows import adam_rows
from triton import knobs
import torch
asked = set()
knobs.runtime.jit_cache_hook = lambda *, key, **more: asked.add(str(key)) or True
with offline("sm_90"):
    for n, first, step, seed in ((1, 0, 1, 0), (16, 1, 16, 1), (7, 16, 17, 2**62), (2**20, 5, 3, 16)):
        adam_rows.warmup(
            *[torch.float32] * 3, torch.int32, torch.float64, torch.int64, torch.int64, torch.float32, n, first, step,
            *[0.5] * 10, seed, 64, 64, True, True, False, 1e-9, grid=(1,),
        )
print(len(asked))
"""
    assert run_python("-c", code, interpreted=False) == "1\n"
