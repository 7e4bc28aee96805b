"""Contestants of end_to_end.py that this repository trains: its own models, and the padded PyTorch SASRec that people use."""

import numpy as np
import torch
from torch import Tensor

from benchmarks.peers.contestant import Contestant
from benchmarks.peers.sasrec_padded import PaddedTrainer
from cafe.batches import Batches
from cafe.config import Config
from cafe.data.dataset import Dataset
from cafe.models import build
from cafe.train import make_optimizers, train_step
from cafe.validate import validate

USERS_TO_FIT = 500  # the two weights of CAFE best's joint score: of all users it takes seven times as long


def packed(histories: list[np.ndarray]) -> tuple[Tensor, Tensor]:
    """Items and cu_seqlens of histories, one after another."""
    ends = np.cumsum([len(history) for history in histories])
    items = torch.from_numpy(np.concatenate(histories).astype(np.int64))
    return items, torch.tensor([0, *ends], dtype=torch.int32)


def main() -> None:
    contestant = Contestant()
    settings, data = contestant.settings, contestant.data
    dataset = Dataset.load(settings["dataset"])
    config = Config.make(settings["model"], settings["preset"], seed=settings["seed"], **settings["options"])
    batches = Batches(config, dataset)
    padded = PaddedTrainer(config, dataset) if settings["padded"] else None
    model = build(config, dataset).train() if padded is None else padded.model
    optimizers = make_optimizers(model) if padded is None else None

    def scores(users: np.ndarray) -> Tensor:
        item, intent = model.score(*packed([data.history(user)[-config.max_len :] for user in users]))
        return model.join(item, None if intent is None else intent[:, model.item_intent])

    def calibrate() -> None:
        validate(model, dataset, "full", USERS_TO_FIT)

    contestant.start()
    number, going = 0, True
    while going:
        order = batches.order(number // len(batches))
        for start in range(0, len(order), config.batch_size):
            users = order[start : start + config.batch_size]
            if padded is None:
                train_step(model, optimizers, batches(users, number))
            else:
                padded.step(users)
            number += 1
        if optimizers is not None:
            optimizers.tables.flush()
        model.eval()
        going = contestant.epoch_done(scores, calibrate if config.calibrate and config.model == "cafe" else None)
        model.train()


if __name__ == "__main__":
    main()
