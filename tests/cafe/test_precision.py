"""Training under bfloat16 autocast: products in bfloat16, all that is kept in float32, and it still learns."""

import pytest
import torch

from cafe.batches import Batches
from cafe.config import Config
from cafe.evaluate import evaluate
from cafe.models import build
from cafe.runs import load_run
from cafe.train import fit, make_optimizers, train_step

TINY = {"dim": 16, "max_len": 8, "batch_size": 16}


def test_learns_what_is_there(dataset, tmp_path):
    dataset.save(tmp_path / "data")
    config = Config.make("cafe", "best", **TINY, epochs=20, dropout=0.1, precision="bf16")
    fit(config, dataset, tmp_path / "bf16", data=tmp_path / "data")
    model, _ = load_run(tmp_path / "bf16")
    popular = build(Config.make("poprec"), dataset)
    ours, theirs = (evaluate(x, dataset, "test", "full").mean("ndcg@10") for x in (model, popular))
    assert ours > 2 * theirs


@pytest.mark.parametrize(("model", "options"), [("cafe", {}), ("cafe", {"block": "query_norm"}), ("sasrec", {})])
@pytest.mark.parametrize("preset", ["paper", "best"])
def test_what_is_bfloat16_and_what_is_not(dataset, model, preset, options):
    losses = {}
    for precision in ("fp32", "bf16"):
        config = Config.make(model, preset, **TINY, precision=precision, **options)
        torch.manual_seed(0)
        net, batches = build(config, dataset), Batches(config, dataset)
        optimizers, dtypes = make_optimizers(net), {}
        attention, block = net.item_encoder.blocks[0].attention, net.item_encoder.blocks[0]
        attention.out_proj.register_forward_hook(
            lambda m, x, y, dtypes=dtypes: dtypes.update(attended=(x[0].dtype, y.dtype))
        )
        block.register_forward_hook(lambda m, x, y, dtypes=dtypes: dtypes.update(residual=y.dtype))
        losses[precision] = [float(train_step(net, optimizers, batches(batches.rows[:16], step))) for step in range(5)]
        low = torch.bfloat16 if precision == "bf16" else torch.float32
        assert dtypes == {"attended": (low, low), "residual": torch.float32}
        kept = [*net.parameters(), *(p.grad for p in net.parameters() if p.grad is not None)]
        kept += [x for o in optimizers for state in o.state.values() for x in (state["exp_avg"], state["exp_avg_sq"])]
        assert {x.dtype for x in kept} == {torch.float32}
    assert losses["bf16"] != losses["fp32"]
    assert losses["bf16"] == pytest.approx(losses["fp32"], rel=2**-7)  # a rounding of the logits


def test_an_unknown_precision_is_refused():
    with pytest.raises(ValueError, match="precision='fp8': expected one of 'fp32', 'bf16'"):
        Config.make("cafe", precision="fp8")
