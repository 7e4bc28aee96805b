"""Contestants of end_to_end.py that RecTools trains: its SASRecModel with each of its losses, by PyTorch Lightning.

Its catalog are the items that occur in training, those that never do rank last. All that is not COMMON is its default: Adam's betas of .9
and .98, negatives drawn uniformly, gbce_t = .2.
"""

import warnings
from importlib.metadata import version
from typing import Any

import numpy as np
import pandas as pd
import pytorch_lightning as lightning
import torch
from rectools import Columns
from rectools.dataset import Dataset
from rectools.models import SASRecModel
from torch import Tensor

from benchmarks.peers.contestant import Contestant

FOREVER = 10**6  # epochs


def interactions(contestant: Contestant) -> pd.DataFrame:
    data = contestant.data
    users = np.repeat(np.arange(len(data)), np.diff(data.indptr))
    when = pd.Timestamp("2000-01-01") + pd.to_timedelta(np.arange(len(users)), unit="s")
    return pd.DataFrame({Columns.User: users, Columns.Item: data.items, Columns.Weight: 1.0, Columns.Datetime: when})


class Turns(lightning.Callback):
    def __init__(self, contestant: Contestant) -> None:
        self.contestant = contestant

    def __deepcopy__(self, memo: Any) -> "Turns":  # RecTools fits by a copy of its trainer
        return self

    def on_train_epoch_start(self, trainer: Any, module: Any) -> None:
        if trainer.current_epoch == 0:
            names = ("rectools", "pytorch-lightning", "torch", "numpy")
            self.contestant.start({name: version(name) for name in names})

    def on_train_epoch_end(self, trainer: Any, module: Any) -> None:
        model, data = module.torch_model, self.contestant.data
        known = module.data_preparator.item_id_map  # 0 is the padding
        number = np.zeros(data.num_items + 1, np.int64)  # of our items plus 1
        items = np.array(known.external_ids[1:], np.int64)
        number[items + 1] = np.arange(1, len(items) + 1)

        def scores(users: np.ndarray) -> Tensor:
            rows = torch.from_numpy(number)[data.padded(users, self.contestant.settings["max_len"])]
            table = model.item_model.get_all_embeddings()
            state = model.encode_sessions({"x": rows}, table)[:, -1]
            values = torch.full((len(users), data.num_items), -torch.inf)
            values[:, torch.from_numpy(items)] = (state @ table.T)[:, 1:]
            return values

        module.eval()
        if not self.contestant.epoch_done(scores):
            trainer.should_stop = True
        module.train()


def main() -> None:
    warnings.filterwarnings("ignore")
    contestant = Contestant()
    settings = contestant.settings
    model = SASRecModel(
        n_factors=settings["dim"],
        n_blocks=settings["layers"],
        n_heads=settings["heads"],
        session_max_len=settings["max_len"],
        dropout_rate=settings["dropout"],
        lr=settings["lr"],
        batch_size=settings["batch_size"],
        loss=settings["loss"],
        n_negatives=settings["negatives"] or 1,
        get_trainer_func=lambda: lightning.Trainer(
            max_epochs=FOREVER,
            min_epochs=1,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            accelerator="cpu",
            devices=1,
            callbacks=[Turns(contestant)],
        ),
    )
    model.fit(Dataset.construct(interactions(contestant)))


if __name__ == "__main__":
    main()
