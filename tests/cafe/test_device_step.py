"""A training step on a device never waits for it, as far as that can be shown without one.

The step of `cafe train` runs on PyTorch's device "meta": tensors that have shapes and no values, so that whatever would read one raises.
Below the models everything is what a GPU gets: the operators' own Python for the Triton backends, up to the launches of the kernels,
which are recorded in place of being made. `no_waiting` refuses what "meta" lets pass. Not seen: waiting inside a kernel of PyTorch's
own (tests/gpu/test_step_gpu.py asks the driver). What the kernels compute is tested elsewhere, in Triton's interpreter.
"""

import json
import sys
from contextlib import contextmanager

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils import _foreach_utils
from torch.utils._python_dispatch import TorchDispatchMode

from cafe.batches import Batches
from cafe.config import Config
from cafe.models import build
from cafe.train import make_optimizers, train_step
from cafe_kernels import compile as offline
from cafe_kernels.attention import ops as attention
from cafe_kernels.losses import ops as losses
from cafe_kernels.optim import backend_module

triton = pytest.importorskip("triton")
META = torch.device("meta")
aten = torch.ops.aten


class _NoCopies(TorchDispatchMode):
    """From pageable memory to the device, which waits: a batch comes from pinned memory, before the step."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        source = {aten._to_copy.default: 0, aten.copy_.default: 1}.get(func)
        if source is not None and args[source].device != out.device:
            raise AssertionError(f"a copy from {args[source].device} to {out.device} in the step")
        if func in (aten.index_put.default, aten.index_put_.default, aten.index.Tensor) and any(
            x is not None and x.dtype in (torch.bool, torch.uint8) for x in args[1]
        ):
            raise AssertionError("an index by a mask waits for the number of its elements")
        return out


class _NoNumbers(TorchFunctionMode):
    """Numbers of Python's that PyTorch copies to the device as tensors."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is torch.tensor and torch.device(kwargs.get("device") or "cpu").type != "cpu":
            raise AssertionError("torch.tensor copies numbers to the device and waits")
        if func in (torch.Tensor.new_tensor, torch.Tensor.__setitem__) and args[0].device.type != "cpu":
            number = func is torch.Tensor.__setitem__ and (
                isinstance(args[2], torch.Tensor) or args[0][args[1]].dim() > 0
            )
            if not number:
                raise AssertionError("a number is copied to the device: use fill_")
        return func(*args, **kwargs)


@contextmanager
def no_waiting():
    with _NoNumbers(), _NoCopies():
        yield


x, i = torch.zeros(3, device=META), torch.zeros(3, dtype=torch.int64, device=META)
WAITS = {
    "item": lambda: x.sum().item(),
    "bool": lambda: bool(x.sum() > 0),
    "if": lambda: 1 if x.sum() > 0 else 0,
    "float": lambda: float(x.sum()),
    "int": lambda: int(i.sum()),
    "tolist": lambda: i.tolist(),
    "cpu": lambda: x.cpu(),
    "to": lambda: x.to("cpu", non_blocking=True),
    "numpy": lambda: x.numpy(force=True),
    "copy_ from": lambda: torch.zeros(3).copy_(x),
    "copy_ to": lambda: x.copy_(torch.zeros(3)),
    "to device": lambda: torch.zeros(3).to(META),
    "tensor": lambda: torch.tensor([1.0], device=META),
    "new_tensor": lambda: x.new_tensor(1.0),
    "set number": lambda: x.__setitem__(0, 1.0),
    "nonzero": lambda: x.nonzero(),
    "where": lambda: torch.where(x > 0),
    "mask": lambda: x[x > 0],
    "set mask": lambda: x.__setitem__(x > 0, torch.ones(2, device=META)),
    "masked_select": lambda: x.masked_select(x > 0),
    "unique": lambda: i.unique(),
    "unique_consecutive": lambda: i.unique_consecutive(),
    "repeat_interleave": lambda: torch.repeat_interleave(i, i),
    "bincount": lambda: torch.bincount(i),
    "equal": lambda: torch.equal(x, x),
    "slice": lambda: x[: i.sum()],
    "coalesce": lambda: torch.sparse_coo_tensor(i[None], x, (4,)).coalesce(),
}


@pytest.mark.parametrize("name", WAITS)
def test_what_waits_is_refused(name):
    with pytest.raises((RuntimeError, NotImplementedError, AssertionError)), no_waiting():
        WAITS[name]()


def test_what_does_not_wait_is_not_refused():
    with no_waiting():
        x[1:] = 0.5
        x[i] = x
        x.fill_(1.0).add_(2.0)
        torch.sort(i, stable=True)
        torch.searchsorted(i, i)


@pytest.fixture
def launches(monkeypatch):
    """Makes "meta" a GPU for the library, but for the launches, whose kernels' names it collects."""
    names = []

    def launch(kernel, grid):
        def record(*args, **constants):
            tensors = [x for x in args if isinstance(x, torch.Tensor)]
            assert tensors
            assert all(x.is_meta for x in tensors), kernel.fn.__name__
            assert all(isinstance(x, int) for x in grid)
            names.append(kernel.fn.__name__)

        return record

    monkeypatch.setattr(triton.JITFunction, "__getitem__", launch)
    monkeypatch.setenv("CAFE_KERNELS_BACKEND", "triton")
    for module in (attention.backend_module, losses.backend_module, backend_module):
        monkeypatch.setattr(module("triton"), "unavailable", lambda *tensors: None)
    fused_on = _foreach_utils._get_fused_kernels_supported_devices()
    fused = sys.modules[torch.optim.Optimizer.__module__]
    monkeypatch.setattr(fused, "_get_fused_kernels_supported_devices", lambda: [*fused_on, "meta"])

    with (
        torch.library._scoped_library("cafe_kernels", "IMPL") as ours,
        torch.library._scoped_library("aten", "IMPL") as torchs,
    ):
        for module, name in ((attention, "distance_attention"), (losses, "sampled_loss")):
            ours.impl(name, module.forward, "Meta", allow_override=True)
            ours.impl(f"{name}_backward", module.backward, "Meta", allow_override=True)
        torchs.impl("add.Tensor", _sum_of_sparse, "SparseMeta", allow_override=True)
        torchs.impl("clone", lambda x, memory_format=None: _sparse(x, [x]), "SparseMeta", allow_override=True)
        yield names


def _sum_of_sparse(a, b, *, alpha=1):
    """As SparseCUDA's, where the table has more numbers than its gradient has rows; "meta" would forget the rows."""
    assert alpha == 1
    return _sparse(a, [a, b])


def _sparse(like, parts):
    indices, values = torch.cat([x._indices() for x in parts], 1), torch.cat([x._values() for x in parts])
    return torch.sparse_coo_tensor(indices, values, like.shape, check_invariants=False)


STEPS = {
    "cafe paper": ("cafe", "paper", {}),
    "cafe best": ("cafe", "best", {}),
    "sasrec paper": ("sasrec", "paper", {}),
    "sasrec best": ("sasrec", "best", {}),
    "long": ("cafe", "best", {"max_len": 100}),
    "code": ("cafe", "paper", {"block": "query_norm", "mask_reads": "values", "qk_positions": True, "heads": 2}),
    "decay": ("cafe", "best", {"weight_decay": 0.1, "intent_loss": "bce"}),
}


@pytest.mark.filterwarnings("ignore:Warning only once")
@pytest.mark.parametrize("case", STEPS)
def test_a_step_does_not_wait(dataset, launches, case):
    model, preset, options = STEPS[case]
    config = Config.make(model, preset, **{"dim": 16, "max_len": 8, "batch_size": 16, **options})
    net, batches = build(config, dataset).to(META), Batches(config, dataset)
    optimizers = make_optimizers(net)
    rows = batches.order(0)[:16]
    train_step(net, optimizers, batches(rows, 0).to(META))  # makes what is kept from then on
    for step in range(1, 6):  # enough for a block of the optimizer's history to end
        batch = batches(rows, step).to(META)
        if case == "long":
            batch.max_seqlen = 70
        launches.clear()
        with no_waiting():
            loss = train_step(net, optimizers, batch)
        assert loss.is_meta
        attention_kernels = {"short_forward", "short_backward"}
        if case == "long":
            attention_kernels = {"long_forward", "long_backward_queries", "long_backward_keys"}
        loss_kernels = {"token_kernel"} if preset == "paper" else {"shared_kernel", "columns_kernel"}
        assert set(launches) >= attention_kernels | loss_kernels | {"segments_kernel", "adam_rows"}
        assert launches.count("adam_rows") == 2  # catch_up, step
    assert optimizers.tables.state[net.item_embedding]["block_step"] > 0


@contextmanager
def asked_for(target):
    """Collects which kernels are asked of Triton's compiler for the target, by all that tells one from another; compiles none."""
    found = {}

    def hook(*, fn, compile, **more):
        source = triton.compiler.ASTSource(
            fn.jit_function, compile["signature"], compile["constants"], compile["configs"][0]
        )
        options = json.loads(compile["specialization_data"])["options"]
        found[source.hash(), json.dumps(options, sort_keys=True)] = fn.name, compile["signature"], compile["constants"]
        return True

    with offline.offline(target), pytest.MonkeyPatch.context() as patch:
        patch.setattr(triton.knobs.runtime, "jit_cache_hook", hook)
        yield found


@pytest.fixture(scope="module")
def compiled_cases():
    with asked_for("sm_90") as found:
        for module in offline.MODULES:
            for case in offline._cases(module).values():
                offline.compile_case(case, "sm_90")
    return found


@pytest.mark.filterwarnings("ignore:Warning only once")
@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize(
    ("model", "preset", "more"),
    [
        *((model, preset, {}) for model in ("cafe", "sasrec") for preset in ("paper", "best")),
        ("sasrec", "best", {"compose_items": True}),
        ("sasrec", "paper", {"compose_items": True}),
    ],
)
def test_a_step_launches_what_is_compiled_beforehand(
    dataset, launches, monkeypatch, compiled_cases, model, preset, more, dim
):
    """So what `make gate` judges is what runs, and what `--out` keeps is what the launcher looks for."""
    monkeypatch.setattr(
        triton.JITFunction,
        "__getitem__",
        lambda kernel, grid: lambda *given, **options: kernel.run(*given, grid=grid, warmup=True, **options),
    )
    config = Config.make(model, preset, **{"dim": dim, "max_len": 8, "batch_size": 16, **more})
    net, batches = build(config, dataset).to(META), Batches(config, dataset)
    optimizers, rows = make_optimizers(net), batches.order(0)[:16]
    with asked_for("sm_90") as found:
        for step in range(2):  # the first, and one of other numbers
            train_step(net, optimizers, batches(rows[step:], step).to(META))
    assert {name for name, *_ in found.values()} >= {"short_forward", "short_backward", "segments_kernel", "adam_rows"}
    assert [found[key] for key in found.keys() - compiled_cases.keys()] == []
