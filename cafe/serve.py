"""Recommends from a folder that `cafe export` wrote, with numpy, onnxruntime and polars; `cafe export` puts a copy of this file there.

    python serve.py ITEM,ITEM,...        the ten best items for this history of item ids, oldest first

What a score is, is in export.json: an inner product with a bias, or the joint probability of item and intent (Eq. 10). Where it is an
inner product, a vector store finds the best items from the vectors in items.parquet and `query` alone (metric: inner product, neither
cosine nor L2). For Eq. 10 it finds the best items of each intent, as log sigma rises with the inner product; no item of an intent
scores above intent_weight * log_sigmoid(intent_query . intents[c]), so intents below the k-th score found need no search.
"""

import json
import re
import sys
from numbers import Integral
from pathlib import Path
from typing import Any

try:
    import numpy as np
    import onnxruntime
    import polars as pl
except ModuleNotFoundError as missing:
    raise ModuleNotFoundError(
        f'serving needs {missing.name}: pip install numpy onnxruntime polars, or "cafe-kernels[export]"'
    ) from None

USAGE = "usage: python serve.py ITEM,ITEM,...   (item ids, oldest first)"


class ExportedModel:
    """The model, its items and its intents.

    Example:
        >>> ExportedModel("serving/cafe").recommend(["i20", "i21", "i22"], k=5)  # doctest: +SKIP
    """

    def __init__(self, folder: str | Path) -> None:
        folder = Path(folder)
        self.meta = json.loads((folder / "export.json").read_text())
        self.session = onnxruntime.InferenceSession(str(folder / "model.onnx"), providers=["CPUExecutionProvider"])
        self.items = np.load(folder / "items.npy", mmap_mode="r", allow_pickle=False)
        table = pl.read_parquet(folder / "items.parquet", columns=["item", "intent", "intent_number"], glob=False)
        self.item_ids, self.intent_ids = table["item"].to_list(), table["intent"].to_list()
        self.item_intent = table["intent_number"].to_numpy()
        self.number = {item: number for number, item in enumerate(self.item_ids)}
        self.intents = np.empty((0, 0))
        if "intents" in self.meta["shapes"]:
            self.intents = np.load(folder / "intents.npy", allow_pickle=False)

    def outputs(self, histories: list[list[int]]) -> dict[str, np.ndarray]:
        """What the model says of histories of item numbers, oldest first, by name: query (B, D), intent_query (B, d), bias (B,).

        A history without items gives NaN, no histories arrays of no rows.
        """
        newest = [history[-self.meta["max_len"] :] for history in histories]
        longest = max([1, *map(len, newest)])
        rows = [[-1] * (longest - len(history)) + history for history in newest]
        names = [output.name for output in self.session.get_outputs()]
        return dict(
            zip(names, self.session.run(names, {"items": np.array(rows, np.int64).reshape(-1, longest)}), strict=True)
        )

    def scores(self, outputs: dict[str, np.ndarray]) -> np.ndarray:
        """The scores of all items, (B, V)."""
        scores = outputs["query"] @ self.items.T
        if self.meta["score_kind"] == "inner_product_and_bias":
            scores += outputs["bias"][:, None]
        elif self.meta["score_kind"] == "log_sigmoid":
            intent = self.meta["intent_weight"] * log_sigmoid(outputs["intent_query"] @ self.intents.T)
            scores = log_sigmoid(scores) + intent[:, self.item_intent]
        return scores

    def recommend(self, history: list[Any], k: int = 10) -> list[tuple[Any, Any, float]]:
        """(item, intent, score) of the k best items that are not in the history; items that the model does not know are skipped."""
        if isinstance(k, bool) or not isinstance(k, Integral) or k < 1:
            raise ValueError(f"k={k!r}: expected a whole number, at least 1")
        numbers = [self.number[item] for item in history if item in self.number]
        if not numbers:
            raise ValueError(f"none of the items {history} is known: recommend popular items instead")
        scores = self.scores(self.outputs([numbers]))[0]
        scores[numbers] = -np.inf
        best = np.argsort(-scores, kind="stable")[: min(k, len(scores) - len(set(numbers)))]
        return [(self.item_ids[i], self.intent_ids[i], float(scores[i])) for i in best]


def log_sigmoid(x: np.ndarray) -> np.ndarray:
    return -np.logaddexp(0, -x)


def main(arguments: list[str]) -> None:
    if len(arguments) != 1 or arguments[0] in ("-h", "--help"):
        sys.exit(USAGE)
    model = ExportedModel(Path(__file__).parent)
    history: list[Any] = [item.strip() for item in arguments[0].split(",")]
    if isinstance(model.item_ids[0], int):
        history = [int(item) if re.fullmatch("-?[0-9]+", item) else item for item in history]
    try:
        best = model.recommend(history)
    except ValueError as error:
        sys.exit(f"error: {error}")
    for row in best:
        print(*row, sep="\t")


if __name__ == "__main__":
    main(sys.argv[1:])
