"""The offline compiler: known faults are flagged, known traffic is counted, and the library's own kernels break no rule."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from triton import knobs

from cafe_kernels import compile as offline
from cafe_kernels.compile import Resources, Row, occupancy, violations
from cafe_kernels.traffic import Traffic, count_traffic
from tests.cafe_kernels.toy_kernels import llvm_waves
from tests.interpreter import run_python

TOYS = "tests.cafe_kernels.toy_kernels"


@pytest.fixture(scope="module")
def toys():
    return {(row.name, row.target): row for row in offline.report(modules=[TOYS])}


def test_every_case_and_target_has_a_row(toys):
    assert len(toys) == 5 * len(offline.TARGETS)


@pytest.mark.parametrize("target", offline.TARGETS)
def test_violations_name_the_faults_and_nothing_else(toys, target):
    found = violations(row for row in toys.values() if row.target == target)
    spills, local, no_dots, rereading, wrong_type = found
    assert re.fullmatch(rf"spilling on {target} spills \d+ bytes", spills)
    assert re.fullmatch(rf"spilling on {target} uses \d+ bytes of local memory", local)
    assert no_dots == f"no dots on {target} has no tensor-core instruction"
    # Two programs read x three times and bias once, and write out: against one of each. `allowed` counts distinct addresses.
    assert rereading == f"rereading moves {2 * 260 / 132:.2f} times the floor of 528 bytes (issued) on thrice"
    assert wrong_type.startswith(
        f"wrong type on {target} does not compile: CompilationError: Both operands must be same dtype"
    )


def test_a_violation_on_every_target_is_told_once(toys):
    assert sum("moves" in line for line in violations(toys.values())) == 1


def test_resources_of_a_product(toys):
    instructions = {target: toys["product", target].resources.matrix_instructions for target in offline.TARGETS}
    # 64 x 64 x 64 in 4 warps: 16x8x16 on sm_80; a 64-row group instruction for k = 16 each on sm_90 and sm_100.
    assert instructions["sm_80"] == 64**3 // (16 * 8 * 16) // 4
    assert instructions["sm_90"] == 4
    assert instructions["sm_100"] > 0
    assert (
        instructions["gfx942"] == 64**3 // (32 * 32 * 8) // 4 or instructions["gfx942"] == 64**3 // (16 * 16 * 16) // 4
    )
    assert toys["product", "sm_100"].resources.tensor_columns == 64
    for target in offline.TARGETS:
        r = toys["product", target].resources
        assert 16 < r.registers < 256
        assert 2 * 64 * 64 <= r.shared_bytes <= 5 * 64 * 64 * 2
        assert (r.spill_bytes, r.local_bytes, r.num_warps) == (0, 0, 4)


def test_traffic_of_masked_loads_and_dots(toys):
    (whole,) = toys["product", "sm_80"].counted
    traffic = whole.traffic
    assert traffic.loaded_lanes == traffic.loaded_issued == traffic.loaded_distinct == 2 * (50 * 48 + 48 * 48)
    assert traffic.stored_lanes == traffic.stored_issued == traffic.stored_distinct == 2 * 50 * 48
    assert (traffic.flops, traffic.launches) == (2 * 64**3, 1)


def test_traffic_counts_lanes_issued_and_distinct_addresses(toys):
    x, bias, programs, repeats = 64, 4, 2, 3
    assert toys["rereading", "sm_80"].counted[0].traffic == Traffic(
        loaded_lanes=4 * programs * (repeats * x + x),
        loaded_issued=4 * programs * (repeats * x + bias),
        loaded_distinct=4 * (x + bias),
        stored_lanes=4 * programs * x,
        stored_issued=4 * programs * x,
        stored_distinct=4 * x,
        launches=1,
    )


def test_traffic_of_atomics_and_of_several_launches():
    code = f"""
from cafe_kernels.traffic import count_traffic
from {TOYS} import run_counting, run_product
counted = count_traffic(lambda: [run_counting(), run_product(), run_counting()])
print({{name: vars(traffic) for name, traffic in counted.items()}})
"""
    counted = eval(run_python("-c", code))
    assert list(counted) == ["counting", "product"]
    # 16 indices, and 8 counts of which two lanes each read and write.
    assert Traffic(**counted["counting"]) == Traffic(
        loaded_lanes=2 * 4 * (16 + 16),
        loaded_issued=2 * 4 * (16 + 8),
        loaded_distinct=2 * 4 * (16 + 8),
        stored_lanes=2 * 4 * 16,
        stored_issued=2 * 4 * 8,
        stored_distinct=2 * 4 * 8,
        launches=2,
    )


def test_counting_without_the_interpreter_is_refused(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET=1"):
        count_traffic(lambda: None)


@pytest.mark.parametrize(
    ("target", "registers", "shared", "warps", "share", "limit"),
    [
        ("sm_80", 32, 0, 4, 1.0, "warps"),
        ("sm_80", 32, 0, 1, 0.5, "warps"),  # 32 blocks at most
        ("sm_80", 128, 0, 4, 0.25, "registers"),
        ("sm_80", 129, 0, 4, 3 * 4 / 64, "registers"),  # allocated in eights: 136, so 3 warps of each scheduler
        ("sm_80", 255, 0, 8, 8 / 64, "registers"),
        ("sm_80", 32, 163 * 1024, 4, 4 / 64, "shared memory"),
        ("sm_80", 32, 163 * 1024 + 1, 4, 0.0, "shared memory"),
        ("sm_90", 32, 227 * 1024, 4, 4 / 64, "shared memory"),
        ("sm_90", 32, 56 * 1024, 4, 4 * 4 / 64, "shared memory"),  # and 1 KiB for the system each
        ("sm_100", 255, 0, 16, 0.0, "registers"),
        ("gfx942", 64, 0, 4, 1.0, "warps"),
        ("gfx942", 65, 0, 4, 7 / 8, "registers"),
        ("gfx942", 512, 0, 4, 1 / 8, "registers"),
        ("gfx942", 512, 0, 8, 0.0, "registers"),
        ("gfx942", 64, 16 * 1024, 4, 0.5, "shared memory"),
    ],
)
def test_occupancy(target, registers, shared, warps, share, limit):
    assert occupancy(target, Resources(registers, 0, 0, 0, shared, 0, 0, warps)) == (share, limit)


def test_tensor_memory_limits_occupancy():
    assert occupancy("sm_100", Resources(64, 0, 0, 0, 0, 256, 8, 4)) == (2 * 4 / 64, "tensor memory")


def test_registers_limit_occupancy_on_amd_as_llvm_says(toys):
    """LLVM writes the waves of a SIMD that a kernel's registers allow into its assembly."""
    rows = [row for row in toys.values() if row.target == "gfx942" and row.resources]
    with offline._processes(interpret=False) as pool:
        waves = list(pool.map(llvm_waves, [row.name for row in rows]))
    assert [occupancy("gfx942", replace(row.resources, shared_bytes=0))[0] for row in rows] == [w / 8 for w in waves]


def test_a_kernel_that_fits_nowhere_is_a_violation():
    row = Row("greedy", "toys.greedy", "sm_80", "fp32", False, Resources(64, 0, 3, 0, 200 * 1024, 0, 0, 4))
    assert violations([row]) == [
        "greedy on sm_80 spills 3 scalar registers",
        "greedy on sm_80 cannot run: too much shared memory",
    ]


def test_command(capsys, monkeypatch, toys):
    asked = []
    monkeypatch.setattr(
        offline, "report", lambda *given: asked.append(given) or [r for r in toys.values() if r.target == "sm_80"]
    )
    assert offline.main(["--module", TOYS, "--target", "sm_80", "--json"]) == 1
    assert asked == [(["sm_80"], [TOYS], "", None)]
    record = json.loads(capsys.readouterr().out)
    assert [row["name"] for row in record["rows"]] == [name for name, target in toys if target == "sm_80"]
    assert record["violations"] == violations(row for row in toys.values() if row.target == "sm_80")
    assert record["rows"][0]["resources"]["matrix_instructions"] == 32
    assert offline.main(["--module", TOYS]) == 1
    assert asked[1] == (offline.TARGETS, [TOYS], "", None)
    printed = capsys.readouterr()
    assert "nothing here was measured on a GPU" in printed.out
    assert "spilling on sm_80 spills" in printed.err


def test_table_has_a_line_for_each_row_and_a_failure_is_seen(toys):
    plain, markdown = offline.table(toys.values()), offline.table(toys.values(), markdown=True)
    lines = sum(max(len(row.counted), 1) for row in toys.values())
    assert len(plain.splitlines()) == lines + 1
    assert len(markdown.splitlines()) == lines + 2
    assert sum("failed" in line for line in plain.splitlines()) == len(offline.TARGETS)
    assert len({line.count("|") for line in markdown.splitlines()}) == 1


def test_errors_are_clear(capsys, monkeypatch):
    with pytest.raises(ValueError, match="unknown target sm_70: expected sm_80"):
        offline.report(["sm_70"], [TOYS])
    with pytest.raises(ValueError, match="no module lists Triton kernels to compile"):
        offline.report(modules=[])
    with pytest.raises(ValueError, match="no case's name matches nothing"):
        offline.report(["sm_80"], [TOYS], "nothing")
    assert offline.main(["--module", "cafe_kernels.nowhere"]) == 2
    assert "No module named 'cafe_kernels.nowhere'" in capsys.readouterr().err
    monkeypatch.setattr(type(knobs.nvidia).__dict__["cuobjdump"], "default_path", "/nowhere")
    assert offline.main(["--module", TOYS, "--target", "sm_80"]) == 2
    assert "Cannot find cuobjdump" in capsys.readouterr().err
    with pytest.raises(AttributeError, match="compile_cases"):
        offline._names("cafe_kernels.traffic")


# Of every kernel the cases with the most in them: for two targets, for the sake of time, of two different compilers.
# `make gate` compiles all cases for all four.
COVERING = "d64 bf16 mask|starts|reduce|softmax of items, d=128, bf16|segments|moments bf16, dim 128|d128 joint|exact d128|sample_"


@pytest.fixture(scope="module")
def library():
    return offline.report(["sm_90", "gfx942"], match=COVERING)


def test_the_kernels_of_the_library_break_no_rule(library):
    assert violations(library) == []


def sources():
    package = Path(offline.__file__).parent
    for path in package.rglob("*.py"):
        if path.name != "compile.py":
            yield ".".join([package.name, *path.relative_to(package).with_suffix("").parts]), path.read_text()


def test_every_module_with_cases_is_listed():
    assert sorted(offline.MODULES) == sorted(name for name, code in sources() if "def compile_cases(" in code)


def test_every_kernel_that_is_launched_has_a_case(library):
    """Found in the sources: a function that is called with a grid. All are under @launched, for which see there."""
    launched = {
        f"{module}.{name}"
        for module, code in sources()
        for name in re.findall(r"@(?:triton\.jit|launched)[^\n]*\n *def (\w+)", code)
        if re.search(rf"\b{name}\[[^\n]*\]\(", code)
    }
    assert launched == {row.kernel for row in library}
    typed = [f"{module}.{name}" for module, code in sources() for name in re.findall(r"@launched\(.*\ndef (\w+)", code)]
    assert sorted(launched) == sorted(typed)


def test_workloads_of_the_attention(monkeypatch):
    """Their inputs are right for a backend, and the floor is q, k, v and out in bytes."""
    from cafe_kernels.attention import cpu, workloads

    lengths = {"few": [3, 0, 5]}
    (forward,) = workloads.workloads(cpu, lengths, 20, torch.float32, 0.1, backward=False, tensors=4)
    (backward,) = workloads.workloads(cpu, lengths, 20, torch.bfloat16, backward=True, tensors=7, bound="distinct")
    (two_sided,) = workloads.workloads(cpu, lengths, 20, torch.float32, 0.1, False, backward=False, tensors=4)
    assert two_sided["floor"] == forward["floor"]
    assert (forward["name"], forward["floor"], forward["bound"]) == ("few", 4 * 8 * workloads.HEADS * 20 * 4, "issued")
    assert (backward["name"], backward["floor"], backward["bound"]) == (
        "few",
        7 * 8 * workloads.HEADS * 20 * 2,
        "distinct",
    )
    called = []
    for op in (cpu.forward, cpu.backward):
        monkeypatch.setattr(cpu, op.__name__, lambda *given, op=op: called.append(op.__name__) or op(*given))
    forward["run"]()
    backward["run"]()
    two_sided["run"]()
    assert called == ["forward", "backward", "forward"]


@pytest.mark.parametrize(("out", "why"), [("kernels", "File exists"), ("kernels/sm_90", "Not a directory")])
def test_a_file_to_write_kernels_into_is_refused(tmp_path, capsys, out, why):
    (tmp_path / "kernels").touch()
    with pytest.raises(SystemExit) as refused:
        offline.main(["--out", str(tmp_path / out)])
    assert refused.value.code == 2
    assert f"--out {tmp_path}/{out}: {why}; give a folder" in capsys.readouterr().err
