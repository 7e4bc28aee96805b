"""What is built and pinned: wheels without an earlier build's kernels, an sdist that can be tested, versions that agree."""

import re
import runpy
import subprocess
import sys
import tarfile
from pathlib import Path

import pybind11.setup_helpers
import pytest
import setuptools
from packaging.requirements import Requirement

ROOT = Path(__file__).parent.parent


@pytest.fixture
def build(monkeypatch, tmp_path):
    """Runs setup.py's build into tmp_path without the C++ compiler; gives what was run."""
    ran, given, torch = [], {}, True
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(setuptools, "setup", lambda **options: given.update(options))
    monkeypatch.setattr(pybind11.setup_helpers.build_ext, "run", lambda self: ran.append("C++"))

    def run(command, **_):
        ran.append("imports" if "import torch, triton" in command else "Triton")
        return subprocess.CompletedProcess(command, returncode=not torch)

    monkeypatch.setattr(subprocess, "run", run)

    def build(targets="", without_torch=False):
        nonlocal torch
        torch = not without_torch
        monkeypatch.setenv("CAFE_KERNELS_PRECOMPILE", targets)
        runpy.run_path("setup.py")
        command = given["cmdclass"]["build_ext"](setuptools.Distribution())
        command.inplace, command.build_lib = False, str(tmp_path)
        command.run()
        return ran

    build.ran = ran
    return build


def test_a_wheel_has_no_kernels_of_an_earlier_build(build, tmp_path):
    left = tmp_path / "cafe_kernels/compiled/key"
    left.mkdir(parents=True)
    assert build() == ["C++"]
    assert not left.parent.exists()


def test_precompiling_looks_for_torch_before_the_long_build(build):
    assert build("sm_90") == ["imports", "C++", "Triton"]
    build.ran.clear()
    with pytest.raises(SystemExit, match="needs torch and triton"):
        build("sm_90", without_torch=True)
    assert build.ran == ["imports"]


def test_the_sdist_can_be_installed_as_pinned_tested_and_documented(tmp_path):
    command = [sys.executable, "setup.py", "-q", "egg_info", "-e", str(tmp_path), "sdist", "-d", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    with tarfile.open(next(tmp_path.glob("*.tar.gz"))) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert names >= {
        "constraints.txt", "CHANGELOG.md", "Makefile", "mkdocs.yml", "docs/install.md", "tests/test_packaging.py",
        "tests/cafe/conftest.py", "examples/drop_in.py", "benchmarks/common.py", "csrc/cpu.h",
    }  # fmt: skip
    assert not [name for name in names if name.endswith((".so", ".pyc", ".json"))]


@pytest.mark.parametrize("python", ["3.10", "3.11", "3.12", "3.13"])
def test_every_python_has_one_pinned_version_of_each_package(python):
    lines = [Requirement(line) for line in (ROOT / "constraints.txt").read_text().splitlines() if line[0] != "#"]
    meant = [r.name for r in lines if not r.marker or r.marker.evaluate({"python_version": python})]
    assert len(meant) == len(set(meant))
    assert set(meant) == {r.name for r in lines}


def test_the_oldest_triton_is_the_same_everywhere():
    launched = pytest.importorskip("cafe_kernels.launched")
    oldest = ".".join(map(str, launched.OLDEST))
    assert f"triton>={oldest};" in (ROOT / "pyproject.toml").read_text()
    for page in ("README.md", "docs/install.md"):
        assert set(re.findall(r"triton ?>= ?([\d.]*\d)", (ROOT / page).read_text())) == {oldest}
