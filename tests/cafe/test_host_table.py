"""A table in host memory, whose rows visit the device: the same training, to the bit."""

import doctest

import pytest
import torch

from cafe.batches import Batches
from cafe.config import Config
from cafe.models import build
from cafe.train import fit, make_optimizers, place, train_step
from cafe_kernels import host_table
from cafe_kernels.host_table import give_back, lend
from tests.faults import equal

TINY = {"dim": 16, "max_len": 8, "batch_size": 16, "epochs": 2}
CASES = [("cafe", "paper"), ("cafe", "best"), ("sasrec", "paper"), ("sasrec", "best")]


@pytest.mark.parametrize(("model", "preset"), CASES)
def test_training_is_the_same_to_the_bit(dataset, tmp_path, model, preset):
    few = {"batch_size": 4, "negatives": 5}  # a step reads some items only: their numbers on the device are others
    config = Config.make(model, preset, **TINY | few)
    for table in ("device", "host"):
        fit(config, dataset, tmp_path / table, table=table)
    assert equal(tmp_path / "device", tmp_path / "host")


def test_only_the_rows_of_the_step_visit_the_device(dataset, monkeypatch):
    config = Config.make("cafe", "best", **TINY | {"negatives": 5})
    net, batches = build(config, dataset), Batches(config, dataset)
    optimizers, seen = make_optimizers(net), []
    monkeypatch.setattr("cafe.train.lend", lambda *arguments: seen.append(lend(*arguments)) or seen[-1])
    batch = batches(batches.order(0)[:4], 0)
    drawn = torch.cat([batch.items, batch.positives, batch.negatives]).unique()
    before = net.item_embedding.detach().clone()
    train_step(net, optimizers, batch.of_its_rows())
    (rows,) = seen
    assert torch.equal(rows.detach(), before[drawn])
    assert len(drawn) < dataset.num_items
    moved = (net.item_embedding != before).any(1).nonzero()[:, 0]
    assert set(moved.tolist()) <= set(drawn.tolist())
    assert len(moved) > 10


def test_place_leaves_the_table_on_the_host(dataset):
    net = build(Config.make("cafe", "best", **TINY), dataset)
    place(net, torch.device("meta"), on_host=True)
    on_cpu = {name for name, x in (*net.named_parameters(), *net.named_buffers()) if x.device.type == "cpu"}
    assert on_cpu == {"item_embedding"}


@pytest.mark.parametrize("sparse", [False, True])
def test_gradients_of_both_layouts(sparse):
    table, ids = torch.nn.Parameter(torch.randn(50, 3)), torch.tensor([2, 7, 40])
    picked = torch.tensor([2, 0, 2, 1])
    rows = lend(table, ids, "cpu")
    (torch.nn.functional.embedding(picked, rows, sparse=sparse) ** 2).sum().backward()
    give_back(table, ids, rows)
    expected = torch.zeros(50, 3).index_add_(0, ids[picked], 2 * table.detach()[ids[picked]])
    assert torch.equal(table.grad.to_dense(), expected)
    give_back(table, ids, lend(table, ids, "cpu"))
    assert table.grad is None


def test_bad_arguments(dataset, tmp_path):
    table, ids = torch.zeros(5, 2), torch.tensor([1, 3])
    with pytest.raises(ValueError, match=r"table must be \(V, d\) on the CPU, got \(5,\) on cpu"):
        lend(table[:, 0], ids, "cpu")
    with pytest.raises(ValueError, match=r"ids must be int64 \(n,\) on the CPU, got torch.int32 \(2,\)"):
        lend(table, ids.int(), "cpu")
    with pytest.raises(ValueError, match=r"rows must be \(2, 2\), what was lent, got \(5, 2\)"):
        give_back(table, ids, table)
    with pytest.raises(IndexError):
        lend(table, torch.tensor([7]), "cpu")
    with pytest.raises(ValueError, match="table='disk': expected 'device' or 'host'"):
        fit(Config.make("sasrec", **TINY), dataset, tmp_path / "run", table="disk")


def test_docstring_examples():
    assert doctest.testmod(host_table) == (0, 5)
