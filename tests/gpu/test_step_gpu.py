"""The training step on a GPU: the driver itself refuses whatever waits. Run as `pytest -m gpu`."""

import pytest
import torch

from cafe.batches import Batches
from cafe.config import Config
from cafe.models import build
from cafe.train import fit, make_optimizers, train_step
from tests.cafe.conftest import shop

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]


@pytest.mark.parametrize("preset", ["paper", "best"])
@pytest.mark.parametrize("model", ["cafe", "sasrec"])
def test_a_step_does_not_wait(model, preset):
    data = shop(items=6000)  # a table with more numbers than its gradient has rows
    config = Config.make(model, preset, dim=16, max_len=8, batch_size=16)
    net, batches = build(config, data).cuda(), Batches(config, data)
    optimizers, rows = make_optimizers(net), batches.order(0)[:16]
    train_step(net, optimizers, batches(rows, 0).to(torch.device("cuda")))
    for step in range(1, 20):
        batch = batches(rows, step).pinned().to(torch.device("cuda"))
        torch.cuda.set_sync_debug_mode("error")
        try:
            loss = train_step(net, optimizers, batch)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert loss.isfinite()


def test_fit_trains_on_it(tmp_path):
    config = Config.make("cafe", "best", dim=16, max_len=8, batch_size=16, epochs=2)
    model = fit(config, shop(), tmp_path / "run", device="cuda")
    assert all(x.is_cuda for x in model.state_dict().values())
