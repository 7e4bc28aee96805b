"""The Triton backend of exact top-k in Triton's interpreter (on a GPU where there is one): the brute force's answer to the bit.

The cases run in a process of their own: see tests/interpreter.py.
"""

import pytest
import torch

from tests.interpreter import check_compile_cases, run_python

CASES = """
import torch
from cafe_kernels import TopKIndex

device = "cuda" if torch.cuda.is_available() else "cpu"
SIZES = (1, 1, 1, 1, 1), (63, 20, 5, 2, 70), (300, 20, 300, 33, 5), (400, 111, 7, 2, 10)
KINDS = "random", "integers", "equal", "tiny"
for items, dim, intents, users, k in SIZES:
    for kind in KINDS if items == 63 else KINDS[:1] if users > 30 else KINDS[:2]:
        g = torch.Generator().manual_seed(items)
        table, user = torch.randn(items, dim, generator=g), torch.randn(users, dim, generator=g)
        scores, intent = torch.randn(users, intents, generator=g), torch.randint(0, intents, (items,), generator=g)
        if kind == "integers":
            table, user, scores = table.round(), user.round(), scores.round()
        if kind == "equal":
            table, scores = torch.full_like(table, 0.1), torch.zeros_like(scores)
        if kind == "tiny":
            table, scores = table * 1e-7, torch.zeros_like(scores)
        each = 5 if items > 1 else 0
        exclude = torch.arange(users + 1) * each, torch.randint(0, items, (users * each,), generator=g)
        table, user, scores, intent = (x.to(device) for x in (table, user, scores, intent))
        slow, fast = (TopKIndex(table, intent, intents, backend=b) for b in ("reference", "triton"))
        for join, given, left_out in (("identity", None, None), ("identity", scores, exclude), ("log_sigmoid", scores, exclude)):
            want, got = (x.search(user, k, given, join=join, exclude=left_out) for x in (slow, fast))
            assert torch.equal(want.items, got.items), (items, dim, kind, join, want.items, got.items)
            assert torch.equal(want.scores, got.scores), (items, dim, kind, join)
everything = torch.tensor([0, items, items]), torch.arange(items)
result = fast.search(user, 4, exclude=everything)
assert result.items[0].tolist() == [-1] * 4 and (result.items[1] >= 0).all()
print("all the same")
"""


def test_same_as_brute_force() -> None:
    assert "all the same" in run_python("-c", CASES, interpreted=not torch.cuda.is_available())


def test_compile_cases_fit_their_kernels() -> None:
    pytest.importorskip("triton")
    from cafe_kernels.topk.triton_topk import compile_cases

    check_compile_cases(compile_cases())
    assert len(compile_cases()) == 6
