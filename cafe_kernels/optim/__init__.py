"""`RowSparseAdam`: Adam for embedding tables of millions of rows, whose step reads and writes the rows of the gradient only.

Adam: Kingma and Ba (2015); decoupled weight decay: Loshchilov and Hutter (2019). How the exact mode makes up for skipped steps:
history.py.
"""

import importlib
import math
from collections.abc import Callable, Iterable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from cafe_kernels import _C
from cafe_kernels.backends import choose_backend
from cafe_kernels.optim import history as past

__all__ = ["RowSparseAdam"]

MODULES = {"reference": "reference", "cpu": "cpu", "triton": "triton_rows"}
ON_DEVICE = ("exp_avg", "exp_avg_sq", "last_step", "history")  # of the state; the rest are numbers, kept on the CPU
STATE = {"lazy": {"step", "exp_avg", "exp_avg_sq"}}
STATE["exact"] = STATE["lazy"] | {"last_step", "history", "flushed_step", "block_step", "constants"}
SMALLEST_EPS = 1e-30  # sqrt(1 - beta2^t) times less could be 0 in float32


def backend_module(name: str) -> ModuleType:
    """Its `update` does what reference.py's does."""
    return importlib.import_module(f"cafe_kernels.optim.{MODULES[name]}")


class RowSparseAdam(torch.optim.Optimizer):
    """Adam on (V, d) tables with sparse gradients: a step costs what its rows cost, whatever V.

    Args:
        params: tables, or groups of them as in every torch optimizer: 2-D, contiguous, float32, bfloat16 or float64 (reference).
            Their gradients must be sparse COO, coalesced or not, as nn.Embedding(sparse=True) makes them. Repeated rows are
            summed in the order of their appearance.
        lr, betas, eps: as torch.optim.Adam. lr may change at every step (torch.optim.lr_scheduler), betas and eps may not in the
            exact mode, unless right after a `flush` (OneCycleLR: cycle_momentum=False). There, beta1 < sqrt(beta2).
        weight_decay: decoupled, as torch.optim.AdamW.
        mode: "lazy" is torch.optim.SparseAdam: moments and weights of a row move only when it has a gradient, and so does its
            weight decay. "exact" is torch.optim.Adam (AdamW) on the whole table: a row with a gradient first makes up, at once, for
            all steps that it was left out of. Tables are up to date after `flush`. A table keeps the mode of its first step.
        moments_dtype: of exp_avg and exp_avg_sq; default float32 (float64 for float64 tables). bfloat16 halves them.
        seed: of the stochastic rounding of bfloat16 tables and moments (Philox; the same numbers on every backend and for any number
            of threads). None rounds to nearest, which loses updates smaller than 1/256 of what they change.
        backend: "reference" (PyTorch, any dtype), "cpu" (C++), "triton"; None chooses.

    In the exact mode the forward pass should read rows as dense Adam has them: call `catch_up(table, rows)` before it. Without, the
    gradients are those of rows that lack the last steps' momentum; the update of a given gradient is exact either way. Call `flush`
    before anybody else reads the table: evaluation, export. A checkpoint needs no flush, if it holds this optimizer's state
    too, and continues bit for bit.

    State of a table: exp_avg and exp_avg_sq (V, d), step; in the exact mode also last_step (V) int32, and a history of 64 bytes a
    step since the last flush. All are tensors. As in torch, load_state_dict shares the tensors it is given, but for the counters.

    Errors: from torch's optimizers in float64, float32's rounding: some 2e-6 of a weight after 1,000 steps, less than torch's own in
    float32. In the norm of what a table moved in 1,000 steps of lr 1e-4 (weights of size 0.1): 3e-6 in float32; 0.008 with bfloat16
    moments; 0.10 with a bfloat16 table, which is the noise of stochastic rounding, of mean 0 (to nearest 0.91: it stands still).
    Gradients that are not finite spoil their elements, as in torch.optim, and no other.

    Raises:
        ValueError: options out of range; a table or gradient that is not as above; a state of another mode or optimizer.

    Dense parameters belong to torch.optim.AdamW, beside this one:

        >>> model = torch.nn.Sequential(torch.nn.Embedding(1000, 16, sparse=True), torch.nn.Linear(16, 1))
        >>> tables = RowSparseAdam([model[0].weight], lr=1e-3, mode="exact")
        >>> others = torch.optim.AdamW(model[1].parameters(), lr=1e-3)
        >>> items = torch.tensor([3, 7, 3])
        >>> tables.catch_up(model[0].weight, items)
        >>> model(items).sum().backward()
        >>> tables.step(), others.step()
        (None, None)
        >>> tables.flush()
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        mode: str = "lazy",
        moments_dtype: torch.dtype | None = None,
        seed: int | None = 0,
        backend: str | None = None,
    ) -> None:
        if moments_dtype not in (None, torch.float32, torch.bfloat16, torch.float64):
            raise ValueError(f"moments_dtype must be float32, bfloat16 or float64, got {moments_dtype}")
        self.moments_dtype, self.backend = moments_dtype, backend
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "mode": mode, "seed": seed}
        super().__init__(params, defaults)

    def __getstate__(self) -> dict[str, Any]:
        """For copy.deepcopy and pickle: torch's keeps the state and the groups alone."""
        return {**super().__getstate__(), "moments_dtype": self.moments_dtype, "backend": self.backend}

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As torch.optim.Optimizer's, with checks."""
        super().add_param_group(param_group)
        try:
            _check_group(self.param_groups[-1])
            for table in self.param_groups[-1]["params"]:
                _check_table(table)
                choose_backend(self.backend, backend_module, table)
        except ValueError:
            self.param_groups.pop()
            raise

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of every table that has a gradient. Returns what `closure`, if given, returns."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            _check_group(group)
            self._check_mode(group)
            gradients = [(table, *_rows_and_values(table)) for table in group["params"] if table.grad is not None]
            for table, rows, values in gradients:
                self._update(table, group, rows, values)
        return loss

    @torch.no_grad()
    def catch_up(self, table: Tensor, rows: Tensor) -> None:
        """Brings `rows` (integers of any shape, repeats allowed) of `table` up to date: what a forward pass is about to read."""
        for group in self.param_groups:
            if any(table is p for p in group["params"]):
                self._check_mode(group)
                if rows.is_floating_point() or rows.is_complex() or rows.dtype == torch.bool:
                    raise ValueError(f"catch_up takes the numbers of rows, integers, got {rows.dtype}")
                if group["mode"] == "exact" and self.state[table]:
                    self._update(table, group, rows.detach().reshape(-1).long(), None)
                return
        raise ValueError(f"catch_up got a tensor of shape {tuple(table.shape)} that is not a table of this optimizer")

    @torch.no_grad()
    def flush(self) -> None:
        """Brings every row of every table up to date, and shortens the history. Costs a pass over the tables in the exact mode, and
        nothing in the lazy one."""
        for group in self.param_groups:
            self._check_mode(group)
            for table in group["params"]:
                state = self.state[table]
                if group["mode"] != "exact" or not state or int(state["step"]) == int(state["flushed_step"]):
                    continue
                self._update(table, group, None, None)
                state["history"] = past.new(table.device)
                state["flushed_step"] = state["step"].clone()
                state["block_step"] = state["step"].clone()

    def _update(self, table: Tensor, group: dict[str, Any], rows: Tensor | None, values: Tensor | None) -> None:
        state = self.state[table] or self._new_state(table, group)
        self.state[table] = state
        exact = group["mode"] == "exact"
        lr, (beta1, beta2), eps, decay = float(group["lr"]), group["betas"], group["eps"], group["weight_decay"]
        step = int(state["step"]) + (values is not None)
        first = int(state["flushed_step"]) if exact else 0
        if exact:
            _check_constants(state, beta1, beta2, eps)
        backend_module(choose_backend(self.backend, backend_module, table)).update(
            table, state["exp_avg"], state["exp_avg_sq"], state.get("last_step"), state.get("history"), rows, values,
            first, step, lr, beta1, beta2, eps, decay, group["seed"],
        )  # fmt: skip
        increment_version(table)
        if values is None:
            return
        state["step"] += 1
        if exact:
            state["history"], block = past.append(
                state["history"], first, int(state["block_step"]), step, lr, decay, beta1, beta2
            )
            state["block_step"].fill_(block)

    def _new_state(self, table: Tensor, group: dict[str, Any]) -> dict[str, Any]:
        default = torch.float64 if table.dtype == torch.float64 else torch.float32
        state = {"step": torch.zeros((), dtype=torch.int64)}
        for name in ("exp_avg", "exp_avg_sq"):
            moment = torch.empty(table.shape, dtype=self.moments_dtype or default, device=table.device)
            if table.device.type == "cpu":  # before it is first written
                _C.use_huge_pages(moment.view(torch.uint8).numpy(), False)
            state[name] = moment.zero_()
        if table.device.type == "cpu":
            _C.use_huge_pages(table.detach().view(torch.uint8).numpy(), True)
        if group["mode"] == "exact":
            state["last_step"] = torch.zeros(len(table), dtype=torch.int32, device=table.device)
            state["history"] = past.new(table.device)
            state["flushed_step"] = torch.zeros((), dtype=torch.int64)
            state["block_step"] = torch.zeros((), dtype=torch.int64)
            state["constants"] = torch.tensor([*group["betas"], group["eps"]], dtype=torch.float64)
        return state

    def _check_mode(self, group: dict[str, Any]) -> None:
        for table in group["params"]:
            if (state := self.state.get(table)) and state.keys() != STATE[group["mode"]]:
                raise ValueError(
                    f"mode was changed to {group['mode']!r}, but a table keeps the mode of its first step: make a new optimizer"
                )

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch.optim.Optimizer's, which would cast the whole state to the tables' dtype.

        Raises:
            ValueError: a state of another optimizer or mode, or of tables of other shapes.
        """
        # torch compares their number.
        for saved, group in zip(state_dict["param_groups"], self.param_groups, strict=False):
            if not {"mode", "seed"} <= saved.keys():
                raise ValueError(
                    f"the state is of another optimizer than RowSparseAdam: its groups have {', '.join(saved)}"
                )
            if saved["mode"] != group["mode"]:
                raise ValueError(f"the state is of mode {saved['mode']!r}, this optimizer's is {group['mode']!r}")
            for index, table in zip(saved["params"], group["params"], strict=False):
                state = state_dict["state"].get(index)
                if state and (state.keys() != STATE[saved["mode"]] or not _fits(state, table)):
                    raise ValueError(
                        f"the state of table {index} is not one of RowSparseAdam for a {tuple(table.shape)} table: it has "
                        + ", ".join(f"{name} {tuple(getattr(x, 'shape', ()))}" for name, x in state.items())
                    )
        super().load_state_dict({**state_dict, "state": {}})
        saved = [index for group in state_dict["param_groups"] for index in group["params"]]
        tables = [table for group in self.param_groups for table in group["params"]]
        for index, table in zip(saved, tables, strict=True):
            if index in state_dict["state"]:
                self.state[table] = {
                    name: x.to(table.device) if name in ON_DEVICE else x.to("cpu", copy=True)
                    for name, x in state_dict["state"][index].items()
                }


def _fits(state: dict[str, Any], table: Tensor) -> bool:
    """Are the shapes and dtypes, and the order of the steps, those of a state of this table?"""
    moments = [state["exp_avg"], state["exp_avg_sq"]]
    kinds = [(x.shape, x.dtype) for x in moments]
    if kinds[0] != kinds[1] or kinds[0][0] != table.shape or not moments[0].is_floating_point():
        return False
    if state.keys() != STATE["exact"]:
        return state["step"].numel() == 1
    numbers = [state[name] for name in ("flushed_step", "block_step", "step")]
    if any(x.dtype != torch.int64 or x.dim() for x in numbers) or state["constants"].shape != (3,):
        return False
    first, block, step = map(int, numbers)
    history, last = state["history"], state["last_step"]
    return (
        0 <= first <= block <= step < 2**31
        and (last.shape, last.dtype) == (table.shape[:1], torch.int32)
        and (history.shape[1:], history.dtype) == ((8,), torch.float64)
        and len(history) > step - first
    )


def _check_group(group: dict[str, Any]) -> None:
    lr, betas, eps, decay = group["lr"], group["betas"], group["eps"], group["weight_decay"]
    if not (math.isfinite(lr) and lr >= 0):
        raise ValueError(f"lr must be finite and at least 0, got {lr}")
    if len(betas) != 2 or not all(0 <= beta < 1 for beta in betas):
        raise ValueError(f"betas must be two numbers in [0, 1), got {betas}")
    if not (math.isfinite(eps) and eps >= SMALLEST_EPS):
        raise ValueError(f"eps must be finite and at least {SMALLEST_EPS:g}, got {eps}")
    if not (decay >= 0 and lr * decay < 1):
        raise ValueError(f"weight_decay must be at least 0, and lr * weight_decay below 1, got {decay} with lr {lr}")
    if group["mode"] not in ("lazy", "exact"):
        raise ValueError(f"mode must be 'lazy' or 'exact', got {group['mode']!r}")
    if group["mode"] == "exact" and not betas[0] ** 2 < betas[1]:
        raise ValueError(f"the exact mode needs beta1 < sqrt(beta2), as Adam itself does to converge; got {betas}")
    seed = group["seed"]
    if not (seed is None or (isinstance(seed, int) and 0 <= seed < 2**63)):
        raise ValueError(f"seed must be an integer in [0, 2^63) or None, got {seed!r}")


def _check_table(table: Tensor) -> None:
    if table.layout != torch.strided or table.dim() != 2 or 0 in table.shape:
        raise ValueError(
            f"RowSparseAdam takes dense (V, d) tables, got {table.layout} {tuple(table.shape)}; "
            "give other parameters to torch.optim.AdamW"
        )
    if table.dtype not in (torch.float32, torch.bfloat16, torch.float64):
        raise ValueError(f"a table must be float32, bfloat16 or float64, got {table.dtype}")
    if not table.is_contiguous():
        raise ValueError(f"a table must be contiguous, got strides {table.stride()}; make it so with .contiguous()")
    if len(table) > 2**31:
        raise ValueError(f"a table must have at most 2^31 rows, got {len(table)}")


def _rows_and_values(table: Tensor) -> tuple[Tensor, Tensor]:
    """The sparse gradient as rows (n) and values (n, d)."""
    grad = table.grad
    assert grad is not None
    if grad.layout != torch.sparse_coo:
        raise ValueError(
            f"the gradient of a {tuple(table.shape)} table is dense, which RowSparseAdam refuses: its step would cost what the "
            "table costs. Give this parameter to torch.optim.AdamW, or make its gradient sparse (torch.nn.Embedding(sparse=True))"
        )
    if grad.sparse_dim() != 1:
        raise ValueError(f"the gradient must have 1 sparse dimension (rows), got {grad.sparse_dim()}")
    return grad._indices()[0].contiguous(), grad._values().contiguous()


def _check_constants(state: dict[str, Any], *constants: float) -> None:
    if (former := tuple(state["constants"].tolist())) == constants:
        return
    if int(state["step"]) != int(state["flushed_step"]):
        raise ValueError(
            f"(beta1, beta2, eps) went from {former} to {constants}: in the exact mode they may change only right after flush(), "
            "since rows that wait to be brought up to date rely on them (OneCycleLR: set cycle_momentum=False)"
        )
    state["constants"] = torch.tensor(constants, dtype=torch.float64)
