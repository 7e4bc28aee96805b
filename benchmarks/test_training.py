"""Training speed on real histories: cafe's packed step against a plain padded PyTorch SASRec, and whether both learn the same.

    pytest benchmarks/test_training.py [--data FOLDER]      FOLDER: Amazon Beauty's interactions.csv.gz and items.csv.gz

A step is everything: building the batch, drawing negatives, forward, backward, optimizer. One thread each, d = 64, n = 50, 2 blocks,
1 head, 128 users a step. Everybody gets the same users in the same order, interleaved in one run; speed is the median over windows of
8 steps, in TRUE tokens a second: places that are padding count for nobody. A ratio is the median of the windows' ratios.
`SASRec paper` has the peer's objective, one uniform negative and BCE, so that ratio is like for like; the others do more for each
token and are shown for information. `benchmarks/profile_step.py` says where our time goes.
"""

import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.common import find_data, machine, quartiles, write
from benchmarks.peers.sasrec_padded import PaddedTrainer
from cafe.batches import Batches
from cafe.config import Config
from cafe.data.dataset import Dataset
from cafe.data.prepare import prepare
from cafe.evaluate import evaluate
from cafe.models import build
from cafe.train import make_optimizers, train_step

PEER, OURS = "padded PyTorch SASRec", "SASRec paper"
RECIPES = {
    OURS: ("sasrec", "paper"),
    "SASRec best": ("sasrec", "best"),
    "CAFE paper": ("cafe", "paper"),
    "CAFE best": ("cafe", "best"),
}
WINDOW = 8  # steps
EPOCHS = 24  # of the test that both learn
TARGET = 5.0


def config(name: str, **options: Any) -> Config:
    model, preset = RECIPES[name]
    return Config.make(model, preset, **{"dim": 64, "batch_size": 128} | options)


class Trainer:
    """What `cafe train` does at each step, batch included."""

    def __init__(self, config: Config, dataset: Dataset) -> None:
        torch.manual_seed(config.seed)
        self.model = build(config, dataset).train()
        self.batches, self.optimizers, self.done = Batches(config, dataset), make_optimizers(self.model), 0

    def step(self, users: np.ndarray) -> None:
        train_step(self.model, self.optimizers, self.batches(users, self.done))
        self.done += 1


def load(name: str, given: str | None = None) -> Dataset:
    folder = find_data(name, given)
    if folder is None:
        pytest.skip(f"no data set {name}: give its folder by --data")
    return prepare(folder / "interactions.csv.gz", folder / "items.csv.gz")


def epoch(dataset: Dataset, config: Config, number: int) -> list[np.ndarray]:
    """The users of each step of an epoch; the last, smaller step is left out."""
    order = Batches(config, dataset).order(number)
    return [order[i : i + config.batch_size] for i in range(0, len(order) - config.batch_size + 1, config.batch_size)]


def tokens_per_second(
    trainers: dict[str, Callable[[np.ndarray], None]],
    steps: list[np.ndarray],
    tokens: Callable[[np.ndarray], int],
    seconds: float,
) -> dict[str, list[float]]:
    """Of each trainer, by window. All take each window's steps before the next window, in a random order."""
    speeds: dict[str, list[float]] = {name: [] for name in trainers}
    names, shuffle, start = list(trainers), np.random.default_rng(0), time.perf_counter()
    for number in range(10**6):
        if number > 5 and time.perf_counter() - start > seconds:
            break
        window = [steps[(number * WINDOW + i) % len(steps)] for i in range(WINDOW)]
        shuffle.shuffle(names)
        for name in names:
            began = time.perf_counter()
            for users in window:
                trainers[name](users)
            speeds[name].append(sum(map(tokens, window)) / (time.perf_counter() - began))
    return {name: values[1:] for name, values in speeds.items()}  # the first window warms up


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_speed(pytestconfig: pytest.Config, capsys: pytest.CaptureFixture[str]) -> None:
    dataset = load("beauty", pytestconfig.getoption("--data"))
    lengths = np.minimum(dataset.train().lengths - 1, config(OURS).max_len)
    ours = {name: Trainer(config(name), dataset) for name in RECIPES}
    peer = PaddedTrainer(config(OURS), dataset)
    speeds = tokens_per_second(
        {PEER: peer.step, **{name: trainer.step for name, trainer in ours.items()}},
        epoch(dataset, config(OURS), 0),
        lambda users: int(lengths[users].sum()),
        seconds=60,
    )
    medians = {name: statistics.median(values) for name, values in speeds.items()}
    ratios = {name: statistics.median(np.divide(values, speeds[PEER])) for name, values in speeds.items()}
    padding = 1 - lengths[lengths > 0].mean() / config(OURS).max_len
    path = write(
        "training",
        {
            "ours": list(RECIPES), "threads": 1, "windows": len(speeds[PEER]), "steps_a_window": WINDOW, "share_of_padding": padding,
            "tokens_per_second": medians, "ratio_to_padded": ratios, "target": {OURS: TARGET},
            "of_1000_tokens": {
                "median_seconds": {name: 1000 / median for name, median in medians.items()},
                "quartiles": {name: quartiles([1000 / speed for speed in values]) for name, values in speeds.items()},
            },
        },
    )  # fmt: skip
    with capsys.disabled():
        print(f"\n{'':<24}{'true tokens/s':>14}{'x padded':>10}{'quartiles':>20}")
        for name, values in speeds.items():
            low, high = np.quantile(values, [0.25, 0.75])
            print(f"{name:<24}{medians[name]:>14,.0f}{ratios[name]:>10.2f}{low:>10,.0f}{high:>10,.0f}")
        print(
            f"{OURS} / padded = {ratios[OURS]:.2f} (target: >= {TARGET:.0f}); {padding:.0%} of the peer's places are padding"
        )
        print(f"{machine()}, 1 thread\nwritten: {path}")


@pytest.mark.slow
def test_both_learn_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    """Same data, same users, same number of epochs: the same validation NDCG within the noise of 3 seeds."""
    dataset = load("beauty-sparse")
    reached: dict[str, list[float]] = {PEER: [], OURS: []}
    for seed in range(3):
        chosen = config(OURS, seed=seed, batch_size=64)
        for name, trainer in ((PEER, PaddedTrainer(chosen, dataset)), (OURS, Trainer(chosen, dataset))):
            for number in range(EPOCHS):
                for users in epoch(dataset, chosen, number):
                    trainer.step(users)
            reached[name].append(evaluate(trainer.model, dataset, "valid").mean("ndcg@10"))
            trainer.model.train()
    means = {name: statistics.mean(values) for name, values in reached.items()}
    error = (sum(statistics.variance(values) / len(values) for values in reached.values())) ** 0.5
    with capsys.disabled():
        print(
            f"\nvalidation NDCG@10 after {EPOCHS} epochs of beauty-sparse, 3 seeds, standard error of the difference {error:.4f}:"
        )
        print(reached)
    torch.manual_seed(0)
    untrained = evaluate(build(config(OURS), dataset), dataset, "valid").mean("ndcg@10")
    assert min(means.values()) > 1.5 * untrained
    # Both standard deviations together have 4 degrees of freedom: |t| < 4.6 in 99% of runs of equal models.
    assert abs(means[PEER] - means[OURS]) < 4.6 * error
