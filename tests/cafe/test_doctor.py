"""`cafe doctor` tells what works, and what is broken."""

import json
import subprocess
import sys

import pytest

import cafe_kernels
from cafe import doctor


@pytest.fixture(scope="module")
def found():
    return doctor.examine()


def test_all_is_well_here(found):
    assert found["problems"] == []
    rows = {(row["op"], row["backend"]): row for row in found["ops"]}
    assert len(rows) == 2 * len(doctor.OPS)
    assert all(row["status"] == "ok" for (_, backend), row in rows.items() if backend == "cpu")
    public = set(cafe_kernels.__all__) - {"DistanceMaskedAttention", "TopK"}
    assert {name.partition(",")[0] for name in doctor.OPS} == public
    assert "portable" in found["extension"]["instructions"]
    text = doctor.text(found)
    assert text.endswith("no problem found")
    for name in ("torch", "distance_attention", "_C."):
        assert name in text


def test_the_command_prints_json_and_text():
    from cafe import cli

    for options in ([], ["--json"]):
        done = subprocess.run([sys.executable, "-m", cli.__name__, "doctor", *options], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        if options:
            assert json.loads(done.stdout)["versions"]["cafe-kernels"]
        else:
            assert done.stdout.rstrip().endswith("no problem found")


def test_an_op_that_computes_something_else_is_a_problem(monkeypatch):
    right = doctor.OPS["TopKIndex"]

    def wrong(backend, device):
        items, scores = right(backend, device)
        return [items, scores + (1e-3 * scores.abs().max() if backend == "cpu" else 0)]

    monkeypatch.setattr(doctor, "OPS", {"TopKIndex": wrong})
    found = doctor.examine()
    assert found["ops"][0]["status"] == "wrong"
    assert found["problems"][0].startswith("TopKIndex on cpu differs from the reference by ")


def test_an_op_that_raises_is_a_problem(monkeypatch):
    def broken(backend, device):
        raise RuntimeError("no such kernel image")

    monkeypatch.setattr(doctor, "OPS", {"sampled_softmax": broken})
    assert "sampled_softmax on cpu failed: RuntimeError: no such kernel image" in doctor.examine()["problems"]


@pytest.mark.parametrize(("module", "said"), [("cafe_kernels._C", "C++ extension"), ("torch", "pip install torch")])
def test_what_cannot_be_imported_is_said(module, said):
    code = f"import sys; sys.modules[{module!r}] = None; from cafe.doctor import main; sys.exit(main([]))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1
    assert said in done.stdout.splitlines()[-1]
    assert "Traceback" not in done.stdout + done.stderr


def test_a_torch_without_its_libraries_is_said(tmp_path):
    (tmp_path / "torch.py").write_text("raise OSError('libcudart.so.12: cannot open shared object file')")
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); from cafe.doctor import main; sys.exit(main([]))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1
    assert "torch cannot be imported (libcudart.so.12: " in done.stdout.splitlines()[-1]
    assert not done.stderr


def test_a_gpu_that_the_kernels_cannot_use_is_a_problem(monkeypatch):
    gpu = {"name": "H", "architecture": "sm_90", "memory_gb": 80.0, "kernels_judged_for_it": True}
    monkeypatch.setattr(doctor, "_gpus", lambda torch: [gpu])
    monkeypatch.setattr(doctor, "_driver", lambda: "driver 570")
    names = "distance_attention, two-sided", "joint_topk"
    monkeypatch.setattr(doctor, "OPS", {name: doctor.OPS[name] for name in names})
    found = doctor.examine()
    assert [line.partition(":")[0] for line in found["problems"]] == [f"{name} does not use the GPU" for name in names]
    assert "driver 570" in doctor.text(found)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ("import triton; triton.__version__ = '3.6.0'", "triton 3.6.0 is too old: update torch (its triton must be >= 3.7)"),
        ("sys.modules['triton'] = None", 'a GPU build of torch brings it, pip install "cafe-kernels[gpu]" adds it'),
    ],
)  # fmt: skip
def test_every_op_says_what_is_wrong_with_triton(change, why):
    pytest.importorskip("triton")
    code = f"import sys; {change}; from cafe.doctor import main; sys.exit(main(['--json']))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    rows = [row for row in json.loads(done.stdout)["ops"] if row["backend"] == "triton"]
    assert {(row["status"], row["why"].endswith(why)) for row in rows} == {("unusable", True)}


def test_variables_that_name_nothing_are_problems(monkeypatch):
    monkeypatch.setenv("CAFE_KERNELS_STORE", "/nonexistent")
    monkeypatch.setenv("CAFE_KERNELS_BACKEND", "foo")
    assert doctor.examine()["problems"] == [
        "CAFE_KERNELS_BACKEND=foo is no backend: expected reference, cpu, triton",
        "CAFE_KERNELS_STORE=/nonexistent is not a folder: kernels will be compiled",
    ]


@pytest.mark.parametrize("content", ["{", "{}", "[]", '{"target": 3}', "\xff"])
def test_files_that_are_no_kernels_are_problems(monkeypatch, tmp_path, content):
    (tmp_path / "key").mkdir()
    (tmp_path / "key/kernel.json").write_text(content, encoding="latin1")
    monkeypatch.setenv("CAFE_KERNELS_STORE", str(tmp_path))
    assert doctor.examine()["problems"] == [
        f"{tmp_path}/key/kernel.json does not describe a compiled kernel: delete {tmp_path}/key"
    ]


def test_wrong_options_are_refused(capsys):
    assert doctor.main(["--yaml"]) == 2
    assert "usage" in capsys.readouterr().err


def test_kernels_compiled_beforehand_are_counted(monkeypatch, tmp_path):
    for name, arch in (("a", 90), ("b", 90), ("c", "gfx942")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "kernel.json").write_text(json.dumps({"target": {"arch": arch}}))
    monkeypatch.setenv("CAFE_KERNELS_STORE", str(tmp_path))
    found = doctor.examine()
    assert found["compiled kernels"]["targets"] == {"sm_90": 2, "gfx942": 1}
    assert f"2 for sm_90, 1 for gfx942 ({tmp_path})" in doctor.text(found)
