"""Embedding tables larger than a GPU: the table and its optimizer's state stay in host memory, a step's rows visit the device.

    ids = the distinct rows that a step reads, ascending, known on the host        (the step uses their numbers 0 ... n - 1)
    rows = lend(table, ids, device)           host -> device, through page-locked memory where there is CUDA
    loss(rows).backward()                     on the device, whose table is `rows`
    give_back(table, ids, rows)               device -> host: table.grad, for RowSparseAdam's C++ step

The order of the rows is kept, so the numbers are those of training with the whole table on one device, to the bit where the device
is the CPU. A step waits for the device once, in give_back: the next rows depend on this gradient.
"""

import torch
from torch import Tensor


def lend(table: Tensor, ids: Tensor, device: torch.device | str) -> Tensor:
    """Rows `ids` of a table on the CPU as a leaf on `device` that gathers a gradient.

    Args:
        table: (V, d) on the CPU. ids: int64 (n,) on the CPU, distinct, ascending.

    Returns:
        (n, d) of table's dtype.

    Raises:
        ValueError: not on the CPU, or of another shape or dtype. IndexError: ids out of range.

    Example:
        >>> table, ids = torch.nn.Parameter(torch.arange(8.0).view(4, 2)), torch.tensor([1, 3])
        >>> rows = lend(table, ids, "cpu")
        >>> torch.nn.functional.embedding(torch.tensor([0, 1, 1]), rows, sparse=True).sum().backward()
        >>> give_back(table, ids, rows)
        >>> table.grad.to_dense().tolist()
        [[0.0, 0.0], [1.0, 1.0], [0.0, 0.0], [2.0, 2.0]]
    """
    _check(table, ids)
    device = torch.device(device)
    shape = len(ids), table.shape[1]
    rows = torch.empty(shape, dtype=table.dtype, pin_memory=device.type == "cuda")
    torch.index_select(table.detach(), 0, ids, out=rows)
    return rows.to(device, non_blocking=True).requires_grad_()


def give_back(table: Tensor, ids: Tensor, rows: Tensor) -> None:
    """Makes the gradient that `rows` = lend(table, ids, ...) gathered, sparse or dense, table.grad: sparse, on the CPU.

    Raises:
        ValueError: `rows` is not what was lent.
    """
    _check(table, ids)
    if rows.shape != (len(ids), table.shape[1]):
        raise ValueError(f"rows must be {(len(ids), table.shape[1])}, what was lent, got {tuple(rows.shape)}")
    if rows.grad is None:
        table.grad = None
        return
    if rows.grad.layout == torch.sparse_coo:
        places, values = _to_host(rows.grad._indices()[0], rows.grad._values())
        ids = ids[places]
    else:
        (values,) = _to_host(rows.grad)
    table.grad = torch.sparse_coo_tensor(ids[None], values, table.shape, check_invariants=False)


def _to_host(*tensors: Tensor) -> list[Tensor]:
    if not tensors[0].is_cuda:
        return [x.cpu() for x in tensors]
    host = [torch.empty(x.shape, dtype=x.dtype, pin_memory=True).copy_(x, non_blocking=True) for x in tensors]
    torch.cuda.current_stream(tensors[0].device).synchronize()
    return host


def _check(table: Tensor, ids: Tensor) -> None:
    if table.device.type != "cpu" or table.dim() != 2:
        raise ValueError(f"table must be (V, d) on the CPU, got {tuple(table.shape)} on {table.device}")
    if ids.device.type != "cpu" or ids.dim() != 1 or ids.dtype != torch.int64:
        raise ValueError(f"ids must be int64 (n,) on the CPU, got {ids.dtype} {tuple(ids.shape)} on {ids.device}")
