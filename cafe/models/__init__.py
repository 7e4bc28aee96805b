"""The models. Each has `config`, `score` (for evaluation and serving), `join` (its joint score) and, if it learns, `loss`."""

from cafe.config import Config
from cafe.data.dataset import Dataset
from cafe.models.base import Model, Scores
from cafe.models.bert4rec import BERT4Rec
from cafe.models.cafe import CAFE
from cafe.models.fdsa import BERTF, FDSA, LOCKERF
from cafe.models.locker import LOCKER
from cafe.models.nova import NOVA
from cafe.models.poprec import PopRec
from cafe.models.sasrec import SASRec
from cafe.models.ssept import SSEPT

__all__ = ["MODELS", "Model", "SASRec", "Scores", "build"]

MODELS: dict[str, type[Model]] = {
    "poprec": PopRec,
    "sasrec": SASRec,
    "bert4rec": BERT4Rec,
    "ssept": SSEPT,
    "locker": LOCKER,
    "nova": NOVA,
    "fdsa": FDSA,
    "bertf": BERTF,
    "lockerf": LOCKERF,
    "cafe": CAFE,
}


def build(config: Config, dataset: Dataset) -> Model:
    """The model of `config` for the catalog of `dataset`, freshly initialised (by torch's global generator)."""
    return MODELS[config.model](config, dataset)
