"""A trained model for serving elsewhere: the user tower as ONNX, and the items as vectors to search by inner product.

score(v) = query . items[v]                                                                        one encoder: SASRec and its kin
score(v) = query . items[v] + bias                                                                 CAFE with join log_softmax or sum
score(v) = log sigma(query . items[v]) + w log sigma(intent_query . intents[c(v)])                 CAFE with join log_sigmoid (Eq. 10)

These are the scores of `Recommender` for the whole catalog. Whatever belongs to an item alone is in its vector: composition, shrinkage,
the length that a cosine divides by, and log P(v | c), whose weight is the query's last number (see cafe.models.cafe). The second line
holds since w log P(c) = w R^c . E_c - w log sum_j exp(R^c . E_j): an item's vector goes on with its intent's E_c, the query with w R^c,
and the rest, `bias`, is one number a user, which no ranking sees. The third is no inner product: w is in export.json. `bias` and
`intent_query` are outputs of the model.

A folder holds

    model.onnx          items int64 (B, N) -> query (B, D), for CAFE intent_query (B, d) and bias (B,); float32, B and N of any size
    items.npy           float32 (V, D), the vectors by item number
    items.parquet       item, intent (ids), intent_number, vector; row = item number
    intents.npy, intents.parquet    for CAFE: float32 (C, d), and intent, vector; softmax of intent_query . intents[c] is P(c)
    export.json         what the model is, the formula of its score and its weights
    serve.py            all of it in use, with numpy, onnxruntime and polars (cafe.serve)

A history is one row of item numbers, oldest first, padded with -1 before them. Its newest items count, as many as `max_len` of export.json
says (one less than the model's own where a hidden item is put behind them: BERT4Rec and its kin); one without items gives NaN.
"""

import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

try:
    import polars as pl
except ModuleNotFoundError:
    raise ModuleNotFoundError('cafe.export needs polars: pip install "cafe-kernels[export]"') from None

from cafe.config import Config
from cafe.data.dataset import Dataset
from cafe.data.folders import new_folder, seal
from cafe.models import Model
from cafe.models.base import RANKINGS, Tokens
from cafe.models.blocks import last_tokens
from cafe.models.cafe import CAFE
from cafe.models.sasrec import SASRec
from cafe_kernels import DistanceMaskedAttention

FORMAT, VERSION = "cafe-export", 1
MARKER = "export.json"
FORMULAS = {
    "inner_product": "query . items[v]",
    "inner_product_and_bias": "query . items[v] + bias",
    "log_sigmoid": "log_sigmoid(query . items[v]) + intent_weight * log_sigmoid(intent_query . intents[intent_number[v]])",
}


def export(model: Model, dataset: Dataset, out: str | Path) -> dict[str, Any]:
    """Writes the folder `out` (see the top of this file).

    Args:
        model, dataset: of `cafe.runs.load_run`, or of `fit`.
        out: a folder that is not there yet, or is empty.

    Returns:
        The content of export.json.

    Raises:
        ValueError: a model without a user tower (PopRec), or whose tower reads who the user is (SSE-PT); a missing package.
        FileExistsError: `out` is a file, or holds something.
        OSError: the folder cannot be written; nothing is left of it.

    Example:
        >>> export(*load_run("runs/cafe"), "serving/cafe")["score"]  # doctest: +SKIP
        'query . items[v] + bias'
    """
    out = Path(out)
    if missing := [name for name in ("onnx", "onnxscript") if find_spec(name) is None]:
        raise ValueError(f'export needs {" and ".join(missing)}: pip install "cafe-kernels[export]"')
    if not isinstance(model, SASRec):
        raise ValueError(f"{model.config.model} has no user tower to export: everybody is recommended the same items")
    if model.personal:
        raise ValueError(
            f"{model.config.model} reads who the user is, which the exported tower does not: export another model"
        )
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise FileExistsError(f"{out} is not an empty folder: choose another --out")
    tower = UserTower(model).eval()
    vectors = {"items": tower.item_vectors()}
    if isinstance(model, CAFE):
        vectors["intents"] = model.intent_embedding.detach().numpy(force=True)
    numbers = pl.Series("intent_number", dataset.item_intent)
    tables = {
        "items": [dataset.item_ids.alias("item"), dataset.intent_ids.gather(numbers).alias("intent"), numbers],
        "intents": [dataset.intent_ids.alias("intent")],
    }
    meta = _meta(model.config, tower, dataset, vectors)
    with new_folder(out, MARKER, FORMAT, []) as folder:
        try:
            tower.save(folder / "model.onnx")
            for name, array in vectors.items():
                np.save(folder / f"{name}.npy", array)
                pl.DataFrame([*tables[name], pl.Series("vector", array)]).write_parquet(folder / f"{name}.parquet")
            (folder / "serve.py").write_bytes(Path(__file__).with_name("serve.py").read_bytes())
            (folder / MARKER).write_bytes(seal(meta))
            for file in folder.iterdir():
                _flush(file)
        except (OSError, pl.exceptions.PolarsError) as error:
            raise OSError(
                f"cannot write {out}: {getattr(error, 'strerror', None) or error}; nothing is left of it. Put that right and run it again"
            ) from None
    return meta


def _meta(config: Config, tower: "UserTower", dataset: Dataset, vectors: dict[str, np.ndarray]) -> dict[str, Any]:
    """export.json."""
    return {
        "format": FORMAT,
        "version": VERSION,
        "model": config.model,
        "preset": config.preset,
        "fingerprint": dataset.fingerprint,
        "max_len": config.max_len - tower.model.cloze,
        "score_kind": tower.kind,
        "score": FORMULAS[tower.kind],
        "intent_weight": tower.intent_weight,
        "prior_weight": float(tower.model.prior_weight),
        "outputs": tower.outputs,
        "shapes": {name: list(array.shape) for name, array in vectors.items()},
    }


def _flush(file: Path) -> None:
    with file.open("rb") as opened:
        os.fsync(opened.fileno())


@dataclass(kw_only=True)
class Padded(Tokens):
    """Rows of one length, which packed sequences of that length are too, but for what is padding: real, bool (B, N)."""

    real: Tensor

    def attend(self, attention: DistanceMaskedAttention, x: Tensor, **options: Any) -> Tensor:
        options = {name: options[name] for name in ("key_value", "value", "positions")}
        return attention.dense(x, self.real, **options)


class UserTower(nn.Module):
    """The part of a model that reads a history, on padded rows and in operations of plain PyTorch: what ONNX gets.

    Attributes:
        kind: which of FORMULAS the score is.
        outputs: the names of what `forward` returns.
    """

    def __init__(self, model: SASRec) -> None:
        super().__init__()
        self.model = model
        self.intent_weight = float(model.intent_weight[RANKINGS.index("full")])
        self.outputs = ["query", "intent_query"] if isinstance(model, CAFE) else ["query"]
        self.kind = "inner_product"
        if isinstance(model, CAFE) and model.config.join != "item":
            self.kind = "log_sigmoid" if model.config.join == "log_sigmoid" else "inner_product_and_bias"
        if self.kind == "inner_product_and_bias":
            self.outputs.append("bias")

    def forward(self, items: Tensor) -> tuple[Tensor, ...]:
        """items: int64 (B, N), a row the numbers of a history's items, oldest first, after padding by negative numbers."""
        model, cloze = self.model, self.model.cloze
        length, known = items.shape[1], (items >= 0).any(1, keepdim=True)
        keep = torch.sym_min(length, model.config.max_len - cloze)  # a slice would make the exporter take N for short
        items = items.narrow(1, length - keep, keep)
        real = items >= 0
        if cloze:  # a hidden item behind each row; it reads any
            items, real = (
                torch.cat([items, torch.zeros_like(known, dtype=items.dtype)], 1),
                torch.cat([real, torch.ones_like(known)], 1),
            )
        batch, length = items.shape
        ends = torch.arange(batch + 1, device=items.device) * length
        tokens = Padded(
            items=items.clamp(min=0).flatten(),
            cu_seqlens=ends,
            max_seqlen=length,
            sequence=torch.arange(batch, device=items.device)[:, None].expand(batch, length).flatten(),
            targets=last_tokens(ends) if cloze else None,
            real=real,
        )
        state, coarse = (None if x is None else x[last_tokens(ends)] for x in model.encode(tokens))
        assert state is not None
        found = [model.index_query(model.query(state))]
        if coarse is not None:
            found.append(coarse)
        if self.kind == "inner_product_and_bias":
            assert coarse is not None
            assert isinstance(model, CAFE)
            found[0] = torch.cat([found[0], self.intent_weight * coarse], 1)
            bias = model.intent_logits(coarse)[:, 0] - coarse @ model.intent_embedding[0]  # of any intent
            found.append(self.intent_weight * bias)
        return tuple(x.masked_fill(~known if x.dim() == 2 else ~known[:, 0], torch.nan) for x in found)

    @torch.no_grad()
    def item_vectors(self) -> np.ndarray:
        """float32 (V, D): what `query` is multiplied by."""
        table = self.model.index().table
        if self.kind == "inner_product_and_bias":
            assert isinstance(self.model, CAFE)
            table = torch.cat([table, self.model.intent_embedding[self.model.item_intent]], 1)
        return table.numpy(force=True)

    def save(self, path: Path) -> None:
        """As ONNX; weights beyond 2 GB, the limit of its format, go to a file beside it."""
        any_size = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
        example = torch.zeros(2, 3, dtype=torch.int64, device=self.model.item_embedding.device)
        with _quiet():
            exported = torch.export.export(self, (example,), dynamic_shapes=(any_size,))
            program = torch.onnx.export(
                exported, dynamo=True, verbose=False, input_names=["items"], output_names=self.outputs
            )
            assert program is not None
            program.save(path)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what the exporter says of packages and deprecations of its own."""
    former = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(former)
