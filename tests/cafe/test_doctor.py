"""`cafe doctor` tells what works, and what is broken."""

import json
import subprocess
import sys

import pytest

from cafe import doctor


@pytest.fixture(scope="module")
def found():
    return doctor.examine()


def test_all_is_well_here(found):
    assert found["problems"] == []
    rows = {(row["op"], row["backend"]): row for row in found["ops"]}
    assert len(rows) == 2 * len(doctor.OPS) == 10
    assert all(row["status"] == "ok" for (_, backend), row in rows.items() if backend == "cpu")
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
