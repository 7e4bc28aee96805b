"""The contestant of end_to_end.py that RecBole trains: its SASRec, by its own data loader and trainer.

RecBole makes a training sequence of every prefix of a history and predicts what follows its end alone, so that one of its epochs reads an
item many times. All that is not COMMON is its default: a feed-forward part of 256, GELU, no biased first step. Histories are padded on the
right.
"""

import os
import sys
import tempfile
import warnings
from importlib.metadata import version

import numpy as np
import torch
from recbole.config import Config
from recbole.data import create_dataset
from recbole.data.dataloader import TrainDataLoader
from recbole.model.sequential_recommender import SASRec
from recbole.trainer import Trainer
from recbole.utils import init_seed
from torch import Tensor

from benchmarks.peers.contestant import Contestant


def main() -> None:
    warnings.filterwarnings("ignore")
    contestant = Contestant()
    settings, data = contestant.settings, contestant.data
    sys.argv = sys.argv[:1]  # RecBole would read it, too
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)  # it keeps logs where it is
        os.mkdir("histories")
        users = np.repeat(np.arange(len(data)), np.diff(data.indptr))
        with open("histories/histories.inter", "w") as file:
            file.write("user_id:token\titem_id:token\ttimestamp:float\n")
            file.writelines(f"{u}\t{i}\t{t}\n" for t, (u, i) in enumerate(zip(users, data.items, strict=True)))
        config = Config(
            model="SASRec",
            dataset="histories",
            config_dict={
                "data_path": folder,
                "load_col": {"inter": ["user_id", "item_id", "timestamp"]},
                "MAX_ITEM_LIST_LENGTH": settings["max_len"],
                "loss_type": settings["loss"],
                "train_neg_sample_args": None,
                "hidden_size": settings["dim"],
                "n_layers": settings["layers"],
                "n_heads": settings["heads"],
                "hidden_dropout_prob": settings["dropout"],
                "attn_dropout_prob": settings["dropout"],
                "train_batch_size": settings["batch_size"],
                "learning_rate": settings["lr"],
                "seed": settings["seed"],
                "use_gpu": False,
                "checkpoint_dir": folder,
            },
        )
        init_seed(config["seed"], True)
        dataset = create_dataset(config)
        dataset._change_feat_format()  # what dataset.build does before it splits: every prefix a sequence
        loader = TrainDataLoader(config, dataset, None, shuffle=True)
        model = SASRec(config, dataset)
        trainer = Trainer(config, model)
    torch.set_num_threads(settings["threads"])
    items = np.array(dataset.id2token("item_id", np.arange(1, dataset.item_num)), np.int64)
    number = np.zeros(data.num_items + 1, np.int64)  # of our items plus 1; 0 is the padding
    number[items + 1] = np.arange(1, len(items) + 1)

    def scores(users: np.ndarray) -> Tensor:
        rows = np.zeros((len(users), settings["max_len"]), np.int64)
        lengths = np.zeros(len(users), np.int64)
        for row, user in enumerate(users):
            newest = number[data.history(user)[-settings["max_len"] :] + 1]
            rows[row, : len(newest)], lengths[row] = newest, len(newest)
        state = model.forward(torch.from_numpy(rows), torch.from_numpy(lengths))
        values = torch.full((len(users), data.num_items), -torch.inf)
        values[:, torch.from_numpy(items)] = (state @ model.item_embedding.weight.T)[:, 1:]
        return values

    contestant.start({name: version(name) for name in ("recbole", "torch", "numpy")})
    epoch, going = 0, True
    while going:
        trainer._train_epoch(loader, epoch)
        model.eval()
        going = contestant.epoch_done(scores)
        epoch += 1


if __name__ == "__main__":
    main()
