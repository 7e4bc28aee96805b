"""Validation: NDCG@10 on the validation answers, and the fit of the joint score's two weights on them (DESIGN 1, Eq. 8)."""

from typing import Any

from cafe.data.dataset import Dataset
from cafe.evaluate import evaluate, joint_name
from cafe.evaluation import Evaluation
from cafe.models import Model
from cafe.models.base import RANKINGS, Weights

JOINT_WEIGHTS = (  # that calibration tries: of the intent, and of the item's prior
    (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.8, 1.0, 1.25, 1.5, 2.0),
    (0.0, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.7),
)
SCORES_TO_CALIBRATE = 10**8  # scores (users times items) that fitting the weight for the whole catalog may compute


def validate(model: Model, dataset: Dataset, protocol: str | None = None, users: int | None = None) -> dict[str, float]:
    """NDCG@10 on the validation answers; where the configuration says so, the joint score's weights are fitted first."""
    config = model.config
    protocol = protocol or config.valid_protocol

    def ranked(tried: list[Weights]) -> Evaluation:
        return evaluate(
            model,
            dataset,
            "valid",
            protocol,
            max_users=users or config.valid_users,
            tried=tried,
            # Of many users at once: the index reads the catalog once for them; of few: candidates take memory.
            batch_size=1024 if protocol == "full" else 256,
        )

    if not config.calibrates:
        result = ranked([])
        return {metric: result.mean(metric) for metric in ("ndcg@10", "hr@10")}
    best = 0.0, 0.0
    for axis in (0, 1, 0) if protocol == "full" else (0,):  # one weight after the other
        tried = [(value, best[1]) if axis == 0 else (best[0], value) for value in JOINT_WEIGHTS[axis]]
        result = ranked(tried)
        best = max(tried, key=lambda weights: result.mean("ndcg@10", joint_name(weights)))
    model.intent_weight[RANKINGS.index(protocol)] = best[0]
    if protocol == "full":
        model.prior_weight.fill_(best[1])
    found = {metric: result.mean(metric, joint_name(best)) for metric in ("ndcg@10", "hr@10")}
    return found | {"intent_weight": best[0], "prior_weight": best[1]}


def calibrate(model: Model, dataset: Dataset, state: dict[str, Any]) -> bool:
    """Fits the weights of the rankings that validation did not fit, on as many users as is cheap, and notes it in the checkpoint's
    `state`; False where there is nothing to do."""
    config = model.config
    if not config.calibrates or "calibrated" in state:
        return False
    users = max(200, min(config.valid_users, SCORES_TO_CALIBRATE // dataset.num_items))
    for protocol in set(RANKINGS) - {config.valid_protocol}:
        state["calibrated"] = {protocol: validate(model, dataset, protocol, users)}
    return True
