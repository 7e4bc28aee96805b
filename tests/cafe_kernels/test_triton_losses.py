"""The Triton losses in Triton's interpreter against the reference, in a process of their own (tests/interpreter.py)."""

import pytest
import torch

from tests.interpreter import INTERPRETED, check_compile_cases, run_python

pytest.importorskip("triton")
LOSSES, SHARING = ("bce", "gbce", "softmax"), ("token", "sequence", "batch")

if not INTERPRETED:

    def test_in_the_interpreter():
        run_python("-m", "pytest", "-x", __file__)

    def test_compile_cases_fit_their_kernels():
        from cafe_kernels.losses.triton_losses import compile_cases

        check_compile_cases(compile_cases())

    def test_a_cpu_tensor_is_refused():
        from cafe_kernels import sampled_bce

        with pytest.raises(ValueError, match="it runs on a GPU, h is on cpu; TRITON_INTERPRET=1"):
            sampled_bce(torch.zeros(2, 4), torch.zeros(9, 4), torch.arange(2), torch.arange(3), backend="triton")

else:
    from tests.cafe_kernels.test_losses import case, check, compute

    @pytest.mark.parametrize("sharing", SHARING)
    @pytest.mark.parametrize("name", LOSSES)
    @pytest.mark.parametrize(("tokens", "count", "dim"), [(1, 1, 1), (37, 2, 20), (33, 17, 40)])
    def test_equals_reference(name, sharing, tokens, count, dim):
        check(name, case(tokens, count, dim, sharing, log_q=name == "softmax"), "triton")

    @pytest.mark.parametrize("sparse_grad", [False, True])
    @pytest.mark.parametrize("reduction", ["mean", "none"])
    @pytest.mark.parametrize("sharing", SHARING)
    @pytest.mark.parametrize("name", ["gbce", "softmax"])
    def test_composed_and_ignored(name, sharing, reduction, sparse_grad):
        arguments = case(18, 9, 24, sharing, compose=True, ignore=True)
        check(name, arguments, "triton", reduction=reduction, sparse_grad=sparse_grad)

    @pytest.mark.parametrize("each", [1, 12])
    def test_short_and_long_sequences(each):
        check("softmax", case(18, 9, 24, "sequence", compose=True, ignore=True, log_q=True, each=each), "triton")

    def test_several_parts():
        check("softmax", case(1050, 5, 8, "batch", items=9), "triton")

    @pytest.mark.parametrize("sharing", SHARING)
    def test_no_tokens(sharing):
        h, table, positives, negatives, options = case(0, 4, 16, sharing, dtype=torch.float32)
        total = compute("bce", h, table, positives, negatives, options, "triton", reduction="sum")
        assert total["loss"] == 0
        assert (total["table"] == 0).all()

    @pytest.mark.parametrize("sharing", SHARING)
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_half_precision_table(sharing, dtype):
        h, table, positives, negatives, options = case(20, 9, 24, sharing, dtype=torch.float32)
        low = table.to(dtype)
        ours = compute("softmax", h, low, positives, negatives, options, "triton")
        expected = compute("softmax", h, low.float(), positives, negatives, options, "reference")
        torch.testing.assert_close(ours["loss"], expected["loss"], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(ours["table"].float(), expected["table"], rtol=2**-8, atol=1e-6)

    @pytest.mark.parametrize("sharing", SHARING)
    @pytest.mark.parametrize("name", ["bce", "softmax"])
    def test_all_ignored(name, sharing):
        h, table, positives, negatives, options = case(20, 4, 8, sharing)
        positives, negatives = torch.full_like(positives, 3), torch.full_like(negatives, 3)
        check(name, (h, table, positives, negatives, options), "triton")
