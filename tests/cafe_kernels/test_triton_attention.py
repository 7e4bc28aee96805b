"""The Triton backend of distance_attention in Triton's interpreter against the reference in fp64.

Triton looks at TRITON_INTERPRET when it is imported, so these tests run in a process of their own, which the first test starts.

TOLERANCE bounds the norm of the error by the norm of the truth, as in test_cpu_attention.py, and single elements may be ten times as
far off. float32 (u = 2^-24 = 6e-8): logits of size 5 carry some 10 u, the sums of up to 300 terms sqrt(300) u: together below 3e-6.
float16 and bfloat16: what is stored, the weights and the gradients of the logits between two products, and the output that delta
is made of carry 2^-11 and 2^-8 (the interpreter cuts bfloat16 off, a GPU rounds it to 2^-9); a few of them add up.
"""

import pytest
import torch
from torch.nn.functional import pad

from cafe_kernels.attention import distance_attention, ops
from tests.interpreter import INTERPRETED, check_compile_cases, run_python

pytest.importorskip("triton")
F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
TOLERANCE = {F32: 5e-6, F16: 2**-9, BF16: 2**-6}
OPTIONS = {
    "plain": {},  # log_theta alone
    "dropout": {"dropout_p": 0.3, "seed": 2**40 + 7, "offset": 2**33 + 5},
    "window": {"window": 20},
    "both": {"window": 40, "dropout_p": 0.5, "seed": 1, "scale": 0.2},
}
# All heads, widths, types, options and lengths on both paths, mixed.
CASES = [
    (1, 16, F32, "dropout", [0, 1, 2, 9, 50, 63, 64]),
    (2, 20, F16, "dropout", [50, 9, 0, 64, 1, 2]),
    (4, 64, BF16, "window", [9, 63, 2, 0, 50]),
    (2, 128, F32, "both", [64, 1, 50, 0, 9]),
    (4, 128, F16, "plain", [9, 50]),
    (1, 64, F16, "both", [50, 63, 9, 9]),
    (2, 64, F32, "dropout", [63, 2, 64]),
    (4, 20, F32, "both", [2, 9]),
    (1, 128, BF16, "dropout", [2, 64, 50]),
    (2, 16, BF16, "plain", [9] * 20),
    (1, 20, BF16, "window", [63, 64]),
    (4, 16, F16, "window", [50]),
    (1, 200, F32, "dropout", [50, 9, 2]),
    (1, 256, BF16, "both", [64, 9]),
    (1, 16, F32, "plain", [300, 0]),
    (2, 20, F32, "dropout", [111, 0, 1]),
    (1, 64, F16, "both", [111, 65, 9]),
    (4, 64, BF16, "window", [65, 2]),
    (1, 128, BF16, "plain", [70, 0, 50]),
    (2, 16, BF16, "window", [64, 111]),
    (1, 20, F16, "dropout", [65, 63]),
    (2, 128, F32, "window", [65, 0]),
    (4, 16, F16, "plain", [65]),
    (1, 200, F16, "dropout", [65, 9]),
    (1, 256, F32, "both", [65]),
    (1, 16, F32, "plain", [1] * 130),
]
TWO_SIDED_CASES = [
    (1, 16, F32, "dropout", [0, 1, 2, 9, 50, 63, 64]),
    (2, 20, BF16, "plain", [9, 0, 64, 1, 2]),
    (1, 64, F16, "both", [50, 9]),
    (1, 20, F32, "window", [63, 64, 1]),
    (2, 128, F32, "plain", [9, 50]),
    (2, 16, F32, "plain", [111, 0, 1, 65]),
    (1, 20, F32, "dropout", [65, 63]),
    (1, 64, BF16, "both", [111, 2]),
    (1, 20, F32, "window", [150, 64]),
    (1, 200, F16, "plain", [65]),
]

if not INTERPRETED:

    def test_in_the_interpreter():
        assert f"{len(CASES) + len(TWO_SIDED_CASES)} cases" in run_python("-m", "pytest", "-x", __file__)

    def kernels():
        from cafe_kernels.attention import triton_long, triton_short

        return triton_short.compile_cases() + triton_long.compile_cases()

    def test_compile_cases_fit_their_kernels():
        check_compile_cases(kernels())

    @pytest.mark.parametrize("name", ["short_forward", "short_backward", "long_forward", "long_backward"])
    def test_compiles_for_a_width_that_is_no_power_of_two(name):
        import triton
        from triton.backends.compiler import GPUTarget
        from triton.compiler import ASTSource

        for case in kernels():
            if case["name"].startswith(name) and case["name"].endswith("d16 bf16 mask dropout"):
                constants = case["constexprs"] | {"HEAD_DIM": 12}
                source = ASTSource(case["kernel"], case["signature"], constants)
                options = {"num_warps": case["num_warps"], "num_stages": case["num_stages"]}
                assert "mma" in triton.compile(source, target=GPUTarget("cuda", 80, 32), options=options).asm["ptx"]

    def test_refusals(monkeypatch):
        q = torch.zeros(5, 2, 16)
        cu = torch.tensor([0, 5], dtype=torch.int32)
        with pytest.raises(ValueError, match="it runs on a GPU, q is on cpu; TRITON_INTERPRET=1"):
            distance_attention(q, q, q, None, cu, backend="triton")
        monkeypatch.setattr(ops.backend_module("triton"), "MISSING", "No module named 'triton'")
        with pytest.raises(ValueError, match="cannot run: No module named 'triton'"):
            distance_attention(q, q, q, None, cu, backend="triton")

else:
    from hypothesis import given, settings
    from hypothesis import strategies as st

    from cafe_kernels.attention import triton_common, triton_long, triton_short
    from cafe_kernels.backends import choose_backend
    from tests.cafe_kernels.test_cpu_attention import TWO_SIDED, check, compute, packed, truth, which_kept

    @pytest.mark.parametrize(("heads", "dim", "dtype", "option", "lengths"), CASES)
    def test_equals_reference(heads, dim, dtype, option, lengths):
        arguments = packed(lengths, heads, dim, dtype)
        actual = compute(*arguments, backend="triton", **OPTIONS[option])
        assert actual["out"].dtype == actual["dv"].dtype == dtype
        assert actual["dlog_theta"].dtype == F32
        check(actual, truth(*arguments, **OPTIONS[option]), TOLERANCE[dtype])

    @pytest.mark.filterwarnings(
        "ignore:divide by zero|invalid value:RuntimeWarning"
    )  # where rows past the end see nothing
    @pytest.mark.parametrize(("heads", "dim", "dtype", "option", "lengths"), TWO_SIDED_CASES)
    def test_two_sided_equals_reference(heads, dim, dtype, option, lengths):
        arguments = packed(lengths, heads, dim, dtype, causal=False)
        actual = compute(*arguments, backend="triton", **TWO_SIDED[option])
        check(actual, truth(*arguments, **TWO_SIDED[option]), TOLERANCE[dtype])

    @pytest.mark.parametrize("lengths", [[9, 0, 40], [9, 70]])
    @pytest.mark.parametrize("causal", [True, False])
    def test_dropout_keeps_what_the_reference_keeps(causal, lengths):
        options = {"causal": causal, "dropout_p": 0.4, "seed": 2**50, "offset": 2**40}
        found, expected = (which_kept(lengths, 70, backend=b, **options) for b in ("triton", "reference"))
        assert torch.equal(found, expected)

    @pytest.mark.parametrize("window", [62, 63])
    def test_the_widest_windows_of_the_short_path(window):
        arguments = packed([64], 1, 16)
        check(compute(*arguments, backend="triton", window=window), truth(*arguments, window=window), TOLERANCE[F32])

    def test_the_reduction_sums_all_programs():
        partial = torch.randn(200, 3, 40, generator=torch.Generator().manual_seed(0))
        found = triton_common.reduce(partial, torch.empty(3, 55), causal=True)
        torch.testing.assert_close(found[:, :40], partial.sum(0), rtol=1e-5, atol=1e-5)
        assert (found[:, 40:] == 0).all()
        for distances in (55, 9):  # distance 0 is in column 27 or 4, and in column 20 of partial
            found = triton_common.reduce(partial, torch.empty(3, distances), causal=False)
            expected = pad(partial.sum(0), (20, 20))[:, 40 - distances // 2 :][:, :distances]
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)

    @pytest.mark.parametrize("longest", [50, 100])
    @pytest.mark.parametrize("causal", [True, False])
    def test_programs_share_the_work(causal, longest, monkeypatch):
        """Few programs walk many blocks each, in both kinds of kernels."""
        arguments = packed([longest, 3, 0, 33, 9, 50, 2, 20], 1, 16, causal=causal)
        expected = truth(*arguments, causal=causal)
        for programs in (2, 5) if causal else (2,):
            monkeypatch.setattr(triton_short, "PROGRAMS", programs)
            monkeypatch.setattr(triton_long, "PROGRAMS", programs)
            check(compute(*arguments, causal=causal, backend="triton"), expected, TOLERANCE[F32])

    @settings(max_examples=8, deadline=None, derandomize=True)
    @given(
        st.lists(st.integers(0, 64), max_size=9),
        st.integers(1, 2),
        st.integers(1, 40),
        st.none() | st.integers(1, 70),
        st.booleans(),
        st.booleans(),
    )
    def test_any_lengths(lengths, heads, dim, window, learned, causal):
        q, k, v, log_theta, *rest = packed(lengths, heads, dim, seed=sum(lengths), causal=causal)
        arguments, options = (q, k, v, log_theta if learned else None, *rest), {"causal": causal, "window": window}
        actual = compute(*arguments, backend="triton", **options)
        check(actual, truth(*arguments, **options), TOLERANCE[F32], floor=1)

    @pytest.mark.parametrize("lengths", [[3, 50], [3, 70]])
    @pytest.mark.parametrize("causal", [True, False])
    def test_without_log_theta(lengths, causal):
        q, k, v, _, *rest = packed(lengths, 1, 16)
        arguments = (q, k, v, None, *rest)
        check(compute(*arguments, causal=causal, backend="triton"), truth(*arguments, causal=causal), TOLERANCE[F32])

    @pytest.mark.parametrize(
        ("lengths", "hidden", "causal"),
        [
            ([3, 50], -float("inf"), True),
            ([3, 70], -float("inf"), True),
            ([50], -1e38, True),
            ([3, 50], -float("inf"), False),
            ([3, 70], -float("inf"), False),
        ],
    )
    def test_log_theta_hides_distances(lengths, hidden, causal):
        arguments = packed(lengths, 1, 16, causal=causal)
        arguments[3][:, 1::2] = hidden
        check(compute(*arguments, causal=causal, backend="triton"), truth(*arguments, causal=causal), TOLERANCE[F32])

    @pytest.mark.filterwarnings("ignore:divide by zero|invalid value:RuntimeWarning")
    @pytest.mark.parametrize("lengths", [[3, 50], [3, 70]])
    def test_nothing_to_attend_to_is_nan(lengths):
        q, k, v, log_theta, _, cu = packed(lengths, 1, 16)
        log_theta[:, 0] = -float("inf")  # the first token of a sequence has nothing else
        out = distance_attention(q, k, v, log_theta, cu, backend="triton")
        expected = distance_attention(q, k, v, log_theta, cu, backend="reference")
        torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5, equal_nan=True)
        assert out.isnan().any(-1).sum() == 2

    def test_gradient_is_zero_beyond_the_longest_distance():
        arguments = packed([9, 50], 2, 16)
        wide = torch.cat([arguments[3], torch.ones(2, 200)], 1)
        found = compute(*arguments[:3], wide, *arguments[4:], backend="triton")["dlog_theta"]
        assert (found[:, :50] != 0).all()
        assert (found[:, 50:] == 0).all()

    def operator_arguments(longest, dtype, learned, causal=True):
        q, k, v, log_theta, grad_out, cu = packed([2, 0, longest], 1, 16, dtype, causal=causal)
        return [q, k, v, log_theta if learned else None], cu, grad_out, (0, 0.25, causal, -1, 0.0, 5, 0, "triton")

    @pytest.mark.parametrize(
        ("longest", "dtype", "learned", "causal"),
        [(20, F32, True, True), (65, F16, True, True), (20, F16, False, True), (20, F32, True, False)],
    )
    def test_opcheck(longest, dtype, learned, causal):
        inputs, cu, grad_out, options = operator_arguments(longest, dtype, learned, causal)
        out, lse = ops.forward_op(*inputs, cu, *options)
        torch.library.opcheck(ops.backward_op, (grad_out, *inputs, cu, out, lse, *options))
        leaves = [x if x is None else x.requires_grad_() for x in inputs]
        torch.library.opcheck(ops.forward_op, (*leaves, cu, *options))

    @pytest.mark.parametrize("longest", [20, 70])
    @pytest.mark.parametrize("causal", [True, False])
    def test_log_sum_exp(longest, causal):
        (q, k, v, log_theta), cu, _, options = operator_arguments(longest, F32, True, causal)
        _, lse = ops.forward_op(q, k, v, log_theta, cu, *options)
        _, expected = ops.forward_op(q, k, v, log_theta, cu, *options[:-1], "cpu")
        torch.testing.assert_close(lse, expected, rtol=1e-5, atol=1e-5)

    @pytest.mark.parametrize("causal", [True, False])
    def test_compile(causal):
        compiled = torch.compile(distance_attention, fullgraph=True, backend="aot_eager")
        q, k, v, log_theta, _, cu = packed([3, 20], 2, 16, causal=causal)
        options = {"backend": "triton", "causal": causal, "dropout_p": 0.2, "seed": 3}
        torch.testing.assert_close(
            compiled(q, k, v, log_theta, cu, **options), distance_attention(q, k, v, log_theta, cu, **options)
        )

    def test_choice_of_backend(monkeypatch):
        """The interpreter is never chosen by itself."""
        q = torch.zeros(5, 1, 16)
        assert choose_backend(None, ops.backend_module, q) == "cpu"
        monkeypatch.setenv("CAFE_KERNELS_BACKEND", "triton")
        assert choose_backend(None, ops.backend_module, q) == "triton"
        for wrong, message in (
            (q.double(), "it takes float32, float16 and bfloat16, got torch.float64"),
            (torch.zeros(5, 1, 257), "it takes heads of at most 256 columns, got 257"),
        ):
            with pytest.raises(ValueError, match=f"backend 'triton' cannot run: {message}"):
                choose_backend(None, ops.backend_module, wrong)
        with pytest.raises(ValueError, match="sequences of at most 8192 tokens, got 9000"):
            distance_attention(q, q, q, None, torch.tensor([0, 5], dtype=torch.int32), max_seqlen=9000)

    def test_all_cases_ran(capsys):
        with capsys.disabled():
            print(f"{len(CASES) + len(TWO_SIDED_CASES)} cases")
