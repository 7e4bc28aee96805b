"""Where the time of a training step goes, by part, and what share of it is matrix products at the speed of sgemm.

    python -m benchmarks.profile_step [--data FOLDER] [--write]        --write: replace the section in benchmarks/README.md

torch.profiler sees every operator. Each is counted for the part of the model that called it; in the backward pass, for the part
whose forward operator made that node of the graph (they share a sequence number). The profiler slows small operators down, so only
the shares are taken from it; they are of the step's median time without it. One thread, Amazon Beauty, d = 64, 128 users a step.
"""

import argparse
import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile, record_function
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.common import machine
from benchmarks.test_training import RECIPES, Trainer, config, epoch, load
from cafe.models.blocks import Block, Encoder
from cafe_kernels import DistanceMaskedAttention

README = Path(__file__).with_name("README.md")
BEGIN, END = "<!-- written by profile_step.py -->", "<!-- end of profile_step.py -->"
PRODUCTS = {"aten::mm", "aten::addmm", "aten::bmm"}
OUTSIDE = "the rest"
ATTENTION = "_Forward"  # cafe_kernels.attention.ops, within a module's attention
# Which operators of a part are parts of their own.
WITHIN = {
    "attention": lambda op: "attention op" if op == ATTENTION else "projections",
}
ORDER = (
    "batch and negatives", "embeddings", "positions and dropout masks", "projections", "attention op", "norms", "feed-forward",
    "residuals and dropout", "loss", "gradients of weights, added", "optimizer", OUTSIDE,
)  # fmt: skip


def label(trainer: Trainer) -> None:
    """Names the parts of a trainer's step for the profiler."""

    def wrap(owner: Any, method: str, name: str) -> None:
        call: Callable[..., Any] = getattr(owner, method)

        def labelled(*args: Any, **kwargs: Any) -> Any:
            with record_function(f"part: {name}"):
                return call(*args, **kwargs)

        setattr(owner, method, labelled)

    model = trainer.model
    wrap(trainer, "batches", "batch and negatives")
    for optimizer in trainer.optimizers:
        wrap(optimizer, "step", "optimizer")
        wrap(optimizer, "zero_grad", "optimizer")
    wrap(trainer.optimizers.tables, "catch_up", "optimizer")
    wrap(model, "embed", "embeddings")
    wrap(model, "loss", "loss")
    for module in model.modules():
        if isinstance(module, Encoder):
            wrap(module, "forward", "positions and dropout masks")
        elif isinstance(module, Block):
            wrap(module, "forward", "residuals and dropout")
            wrap(module.inner, "forward", "feed-forward")
            wrap(module.outer, "forward", "feed-forward")
        elif isinstance(module, DistanceMaskedAttention):
            wrap(module, "packed" if hasattr(module, "packed") else "forward", "attention")
        elif isinstance(module, torch.nn.LayerNorm):
            wrap(module, "forward", "norms")


def measure(trainer: Trainer, steps: list[np.ndarray]) -> tuple[dict[str, tuple[float, float]], float]:
    """Share of each part in forward and backward, and the median seconds of a step without the profiler."""
    seconds = []
    for users in steps:
        began = time.perf_counter()
        trainer.step(users)
        seconds.append(time.perf_counter() - began)
    label(trainer)
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        for users in steps[:30]:
            with record_function(f"part: {OUTSIDE}"):
                trainer.step(users)
    events = [event for event in profiler.events() if event.device_type == torch.autograd.DeviceType.CPU]
    forward, backward = (defaultdict(float) for _ in range(2))
    made_by: dict[int, str] = {}  # sequence number of a node of the graph -> part

    def part(event: Any) -> tuple[str, bool]:
        """Of the nearest enclosing label or node of the graph; True in the backward pass."""
        op = event.name
        while event is not None:
            if event.name.startswith("part: "):
                name = event.name.removeprefix("part: ")
                return WITHIN[name](op) if name in WITHIN else name, False
            if event.name.startswith("autograd::engine::evaluate_function: "):
                if "AccumulateGrad" in event.name:
                    return "gradients of weights, added", True
                return made_by.get(event.sequence_nr, OUTSIDE), True
            op = event.name if event.name == ATTENTION else op
            event = event.cpu_parent
        return OUTSIDE, False

    for event in sorted(events, key=lambda event: event.time_range.start):
        name, is_backward = part(event)
        if not is_backward and event.sequence_nr >= 0:
            made_by[event.sequence_nr] = name  # the last operator that sees a number is the one that uses it up
    for event in events:
        name, is_backward = part(event)
        (backward if is_backward else forward)[name] += event.self_cpu_time_total
    total = sum(forward.values()) + sum(backward.values())
    return {name: (forward[name] / total, backward[name] / total) for name in ORDER}, statistics.median(seconds)


def matrix_flops(trainer: Trainer, steps: list[np.ndarray], lengths: np.ndarray) -> float:
    """Floating point operations of a step's matrix products; the attention's 7 count causal pairs only."""
    with FlopCounterMode(display=False) as counter:
        for users in steps[:10]:
            trainer.step(users)
    n = lengths[np.concatenate(steps[:10])].astype(float)
    blocks = sum(isinstance(module, Block) for module in trainer.model.modules())
    attention = 7 * 2 * trainer.model.config.dim * (n * (n + 1) / 2).sum() * blocks
    return (counter.get_total_flops() + attention) / 10


def sgemm_peak() -> float:
    """FLOP/s of a square product that is large enough."""
    a, seconds = torch.randn(1024, 1024), []
    for _ in range(12):
        began = time.perf_counter()
        torch.mm(a, a)
        seconds.append(time.perf_counter() - began)
    return 2 * 1024**3 / statistics.median(seconds)


def report(data: str | None) -> str:
    torch.set_num_threads(1)
    dataset = load("beauty", data)
    lengths = np.minimum(dataset.train().lengths - 1, config("CAFE best").max_len)
    lines = [f"{machine()}, 1 thread, torch.mm of 1024 x 1024 reaches {sgemm_peak() / 1e9:.0f} GFLOP/s."]
    for name in RECIPES:
        steps = epoch(dataset, config(name), 0)[:100]
        trainer = Trainer(config(name), dataset)
        flops = matrix_flops(trainer, steps, lengths)
        shares, seconds = measure(trainer, steps)
        peak = sgemm_peak()
        tokens = np.mean([lengths[users].sum() for users in steps])
        lines += [
            "",
            f"### {name}: {1e3 * seconds:.1f} ms a step, {tokens:.0f} tokens",
            "",
            "| part | forward, ms | backward, ms | share |",
            "|---|---|---|---|",
        ]
        for part, (forward, backward) in shares.items():
            lines.append(
                f"| {part} | {1e3 * seconds * forward:.2f} | {1e3 * seconds * backward:.2f} | {forward + backward:.0%} |"
            )
        lines.append(
            f"\nMatrix products: {flops / 1e6:.0f} MFLOP, {flops / seconds / 1e9:.0f} GFLOP/s over the whole step, "
            f"{flops / seconds / peak:.0%} of sgemm's peak of {peak / 1e9:.0f} in the same minute."
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="folder with interactions.csv.gz and items.csv.gz")
    parser.add_argument("--write", action="store_true", help="replace the section in benchmarks/README.md")
    arguments = parser.parse_args()
    text = report(arguments.data)
    print(text)
    if arguments.write:
        before, _, rest = README.read_text().partition(BEGIN)
        README.write_text(f"{before}{BEGIN}\n\n{text}\n{END}{rest.partition(END)[2]}")


if __name__ == "__main__":
    main()
