"""The models. Each has `config`, `score` (for evaluation and serving), `join` (its joint score) and, if it learns, `loss`."""

from cafe.config import Config
from cafe.data.dataset import Dataset
from cafe.models.base import Model, Scores
from cafe.models.cafe import CAFE
from cafe.models.poprec import PopRec
from cafe.models.sasrec import SASRec

__all__ = ["CAFE", "Model", "PopRec", "SASRec", "Scores", "build"]

MODELS: dict[str, type[Model]] = {"cafe": CAFE, "sasrec": SASRec, "poprec": PopRec}


def build(config: Config, dataset: Dataset) -> Model:
    """The model of `config` for the catalog of `dataset`, freshly initialised (by torch's global generator)."""
    return MODELS[config.model](config, dataset)
