"""The models of this library where RecTools' are expected: pandas in, pandas out, with its column names and meanings.

RecTools (its `ModelBase`) has `fit(dataset)` and `recommend(users, dataset, k, filter_viewed, ...)`, as has this class, so that its
metrics and `cross_validate` take it. Interactions are a DataFrame of user_id, item_id and datetime (a weight is not read), or a
rectools.dataset.Dataset, which is known by what it has: RecTools need not be installed.
"""

import warnings
from collections.abc import Iterable
from dataclasses import fields
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

try:
    import pandas as pd
    import polars as pl

    from cafe.config import Config
    from cafe.data.dataset import Dataset, Holdout, Sequences
    from cafe.data.prepare import prepare
    from cafe.models import Model
    from cafe.recommend import Recommender
    from cafe.train import Interrupted, fit
except ModuleNotFoundError as missing:
    raise ModuleNotFoundError(f'cafe.adapter needs {missing.name}: pip install "cafe-kernels[pandas]"') from None

COLUMNS = ["user_id", "item_id", "datetime"]
UNSUPPORTED = ("raise", "warn", "ignore")


class LastValidates(Dataset):
    """Every user's last item is for validation and the rest for training: whoever splits the data kept the test answers."""

    @classmethod
    def of(cls, dataset: Dataset) -> "LastValidates":
        return cls(**{field.name: getattr(dataset, field.name) for field in fields(dataset)})

    def train(self) -> Sequences:
        start, stop = self.sequences.indptr[:-1], self.sequences.indptr[1:]
        return self.sequences._gather(start, np.where(stop - start < 3, stop, stop - 1))

    def holdout(self, split: str) -> Holdout:
        if split != "valid":
            raise ValueError(f"split {split!r}: these interactions have validation answers only")
        users = np.flatnonzero(self.sequences.lengths >= 3)
        answer = self.sequences.indptr[users + 1] - 1
        histories = self.sequences._gather(self.sequences.indptr[users], answer)
        return Holdout(users, histories, self.sequences.items[answer])


class CAFEModel:
    """CAFE, or another model of `cafe.models`, as a model of RecTools.

    Args:
        model, preset, **options: as for `Config.make`.
        intent_feature: which categorical item feature of a RecTools dataset is the intent; by default the only one.
        device: torch device of the training.

    After `fit`: `model`, `dataset` (to be used with `cafe.export`) and `recommender`.

    Raises:
        ValueError: options that do not exist or are out of range.

    Example:
        >>> days = pd.date_range("2024-01-01", periods=12)
        >>> buys = pd.DataFrame({"user_id": [1, 2, 3] * 4, "item_id": [*"abcbcdcdedef"], "datetime": days})
        >>> model = CAFEModel("sasrec", "paper", dim=8, epochs=1).fit(buys)
        >>> model.recommend([1, 2], k=2).columns.tolist()
        ['user_id', 'item_id', 'score', 'rank']
    """

    require_recommend_context = False

    def __init__(
        self,
        model: str = "cafe",
        preset: str = "best",
        *,
        intent_feature: str | None = None,
        device: str = "cpu",
        **options: Any,
    ) -> None:
        self.config = Config.make(model, preset, **options)
        self.intent_feature, self.device = intent_feature, device
        self.recommender: Recommender | None = None

    @property
    def is_fitted(self) -> bool:
        return self.recommender is not None

    @property
    def model(self) -> Model:
        return self._fitted().model

    @property
    def dataset(self) -> Dataset:
        return self._fitted().dataset

    def fit(self, dataset: Any, item_features: pd.DataFrame | None = None) -> "CAFEModel":
        """Trains anew; the last item of every user with three or more stops the training early and is not trained on.

        Args:
            dataset: interactions, a DataFrame of user_id, item_id, datetime, or a RecTools Dataset. Ids are text or whole numbers.
            item_features: a DataFrame of item_id and intent; of several rows of an item the first counts. By default the RecTools
                dataset's `intent_feature`. Without, all items have one intent.

        Returns:
            The model itself.

        Raises:
            ValueError: missing columns or values, ids of another kind, nothing to train or validate on, or no such device.
            Interrupted: Ctrl-C; the model is as it was before.
        """
        interactions = _interactions(dataset)
        if item_features is None and getattr(dataset, "item_features", None) is not None:
            item_features = _intents_of(dataset, self.intent_feature)
        with TemporaryDirectory() as name:
            folder = Path(name)
            interactions.write_parquet(folder / "interactions.parquet")
            items = None
            if item_features is not None:
                items = folder / "item_features.parquet"
                _columns(item_features, ["item_id", "intent"], "item_features").write_parquet(items)
            try:
                prepared = prepare(
                    folder / "interactions.parquet", items, user_col="user_id", item_col="item_id", time_col="datetime"
                )
            except ValueError as error:
                raise ValueError(str(error).replace(f"{folder}/", "")) from None
            try:
                model = fit(self.config, LastValidates.of(prepared), folder / "run", device=self.device)
            except Interrupted:  # its text speaks of a folder that will be gone
                raise Interrupted("interrupted; nothing of this training is kept: call fit again") from None
        self.recommender = Recommender(model.cpu(), prepared)
        self._interactions = interactions
        return self

    def recommend(
        self,
        users: Iterable[Any],
        dataset: Any = None,
        k: int = 10,
        filter_viewed: bool = True,
        items_to_recommend: Any = None,
        add_rank_col: bool = True,
        on_unsupported_targets: str = "raise",
        context: Any = None,
    ) -> pd.DataFrame:
        """The k best items of each user, best first: user_id, item_id, score (float32), rank (from 1).

        Args:
            users: ids.
            dataset: where their histories are, as for `fit`; by default what the model was fitted on. Items that it was not fitted
                on (cold ones) are passed over.
            filter_viewed: leave out what is in the history.
            items_to_recommend: not supported; filter what comes back.
            on_unsupported_targets: "raise" refuses users without an item that is known, "warn" and "ignore" leave them out.

        Raises:
            ValueError: as said, a wrong option, or a model that is not fitted.
        """
        recommender = self._fitted()
        if items_to_recommend is not None:
            raise ValueError("items_to_recommend is not supported: ask for more items and filter them")
        if on_unsupported_targets not in UNSUPPORTED:
            raise ValueError(f"on_unsupported_targets={on_unsupported_targets!r}: expected {', '.join(UNSUPPORTED)}")
        interactions, known = self._interactions if dataset is None else _interactions(dataset), recommender.dataset
        for column, ids in (("user_id", known.user_ids), ("item_id", known.item_ids)):
            if interactions[column].dtype.is_integer() != ids.dtype.is_integer():
                raise ValueError(
                    f"{column} is of type {interactions[column].dtype}; the model was fitted on ids of type {ids.dtype}"
                )
        wanted = list(dict.fromkeys(pd.Series(users).tolist()))
        histories = dict(
            interactions.filter(pl.col("item_id").is_in(known.item_ids.implode()))
            .sort("user_id", "datetime", maintain_order=True)
            .group_by("user_id")
            .agg("item_id")
            .iter_rows()
        )
        supported = [user for user in wanted if user in histories]
        if len(supported) < len(wanted) and on_unsupported_targets != "ignore":
            missing = [user for user in wanted if user not in histories]
            text = f"{len(missing)} users have no interaction with a known item, the first is {missing[0]!r}"
            if on_unsupported_targets == "raise":
                raise ValueError(f'{text}: leave them out, or give on_unsupported_targets="warn"')
            warnings.warn(f"{text}: they get no recommendations", stacklevel=2)
        answers = recommender.recommend(
            [histories[user] for user in supported], k, users=supported, filter_viewed=filter_viewed
        )
        found = {
            "user_id": [user for user, answer in zip(supported, answers, strict=True) for _ in answer.items],
            "item_id": [item for answer in answers for item in answer.items],
            "score": np.array([score for answer in answers for score in answer.scores], np.float32),
            "rank": [rank for answer in answers for rank in range(1, len(answer.items) + 1)],
        }
        return pd.DataFrame({name: column for name, column in found.items() if name != "rank" or add_rank_col})

    def _fitted(self) -> Recommender:
        if self.recommender is None:
            raise ValueError("this model is not fitted: call fit first")
        return self.recommender


def _interactions(dataset: Any) -> pl.DataFrame:
    """user_id, item_id and datetime, in the order of the rows."""
    if hasattr(dataset, "get_raw_interactions"):
        dataset = dataset.get_raw_interactions()
    return _columns(dataset, COLUMNS, "the interactions")


def _columns(frame: Any, names: list[str], what: str) -> pl.DataFrame:
    """Columns of a pandas DataFrame as polars has them; without pyarrow, which polars.from_pandas needs for text."""
    if not isinstance(frame, pd.DataFrame):
        raise ValueError(f"{what} must be a pandas DataFrame or a RecTools Dataset, got {type(frame).__name__}")
    if missing := [name for name in names if name not in frame.columns]:
        raise ValueError(
            f"{what} have no column {missing[0]!r}; their columns are {', '.join(map(str, frame.columns))}"
        )
    columns = []
    for name in names:
        given, absent = frame[name].notna(), np.flatnonzero(frame[name].isna())
        if len(absent) and name != "intent":
            raise ValueError(
                f"column {name!r} of {what} has no value in {len(absent)} rows, the first at index "
                f"{frame.index[absent[0]]!r}: drop them"
            )
        try:
            values = frame[name].to_numpy()
            if values.dtype.kind not in "iufM":
                values = frame[name].astype(object).where(given, None).tolist()
            columns.append(pl.Series(name, values))
        except (TypeError, OverflowError) as error:
            raise ValueError(
                f"column {name!r} of {what} has values of several types ({error}): make them one"
            ) from None
    return pl.DataFrame(columns)


def _intents_of(dataset: Any, feature: str | None) -> pd.DataFrame:
    """item_id and intent, by a categorical feature of a RecTools Dataset's items."""
    names = getattr(dataset.item_features, "names", ())
    categorical = {name[0] for name in names if isinstance(name, tuple) and name[1] != "__is_direct_feature"}
    if feature is None and len(categorical) == 1:
        feature = next(iter(categorical))
    if feature not in categorical:
        raise ValueError(
            f"intent_feature={feature!r}: expected one of the items' categorical features, {sorted(map(str, categorical))}"
        )
    own = [number for number, name in enumerate(names) if isinstance(name, tuple) and name[0] == feature]
    values = dataset.item_features.get_sparse()[:, own].tocoo()
    order = np.lexsort([values.col, values.row])
    ids = dataset.item_id_map.external_ids[values.row[order]]
    return pd.DataFrame({"item_id": ids, "intent": [str(names[own[column]][1]) for column in values.col[order]]})
