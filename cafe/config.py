"""One typed, validated set of choices per run: the model, its objective and its training. Stored with the run as config.json.

Where the paper and its released code differ, the field's default is the paper's reading and the other value is the code's.
"""

from dataclasses import dataclass, fields, replace
from typing import Any, Literal, get_args, get_origin

Model = Literal[
    "poprec", "sasrec", "bert4rec", "ssept", "locker", "nova", "fdsa", "bertf", "lockerf", "cafe"
]  # Table 2, in its order

LARGEST = 1e6  # of `shrinkage` and `cosine`: beyond all sense, and long before float32 overflows


@dataclass(frozen=True, kw_only=True)
class Config:
    """Every choice of a run. `Config.make("cafe", "best", epochs=10)` starts from a preset."""

    model: Model = "cafe"
    preset: str = "paper"
    # Encoders
    dim: int = 128  # d, width of embeddings and encoders
    heads: int = 1  # M
    layers: int = 2
    max_len: int = 50  # n, how many of the newest items of a history are read
    dropout: float = 0.3
    block: Literal["pre_norm", "query_norm"] = "pre_norm"  # code: LayerNorm and residual on the query only
    attention_bias: bool = False  # code: True. Eq. 3 has matrices only
    score_scale: Literal["sqrt_d", "sqrt_head_dim"] = "sqrt_d"  # Eq. 5; code: sqrt(d / M)
    # Embeddings times sqrt(d) at the input, as SASRec's code and the paper's have it. Eq. 1 does not print it, but the paper trains "as
    # SASRec", and without it SASRec is a weak baseline (validation NDCG@5 .101 against .123 on beauty-sparse).
    scale_embeddings: bool = True
    init_std: float = 0.02  # of embeddings and positions
    # The distance mask of the item encoder
    distance_mask: bool = True  # code: its training script runs with the local heads off (theta = 1)
    mask_reads: Literal["keys", "values"] = "keys"  # Eq. 6; code: values
    qk_positions: bool = False  # code: position embeddings are added to queries and keys again
    # Items and intents
    compose_items: bool = False  # item embedding = its own + one of its intent
    # An item's own embedding times n / (n + shrinkage), n: how often training has it. So a rare, composed item is near its intent
    shrinkage: float = 0.0
    # Items are scored by R_t . E_v (Eq. 8), or, if positive, by their cosine times a learned scale that begins at this value
    cosine: float = 0.0
    # Eq. 10; code: sum of raw logits; item: no joint inference, r^v alone (Table 3)
    join: Literal["log_sigmoid", "log_softmax", "sum", "item"] = "log_sigmoid"
    # Weights of the intent and of P(v | c) in the joint score, fitted on validation (1 and 0 otherwise): see cafe.models.cafe
    calibrate: bool = False
    # Objective
    loss: Literal["bce", "softmax", "full"] = (
        "bce"  # Eq. 9, sampled softmax with log-Q correction, or softmax over all items
    )
    negatives: int = 1
    negatives_shared: Literal["token", "batch"] = "token"  # who shares a draw of negatives
    negatives_alpha: float = 0.0  # negatives are drawn by popularity^alpha; 0 is uniform
    intent_loss: Literal["bce", "softmax"] = "bce"  # Eq. 9 with one negative, or the full softmax over intents
    # Of single systems
    mask_prob: float = 0.2  # BERT4Rec and its kin: share of items hidden from a training sequence
    mask_last: float = 0.1  # share of sequences of which only the last item is hidden, as when recommending
    user_dim: int = 32  # SSE-PT: width of a user's embedding, beside the item's
    sse_user: float = 0.9  # SSE-PT: chance that a user is replaced by a random one in training
    sse_item: float = 0.1  # SSE-PT: the same of an item read
    local: Literal["adapt", "initial", "window"] = "adapt"  # LOCKER: what its local heads learn
    local_heads: int = 1  # LOCKER: of `heads`
    local_width: int = 3  # LOCKER: half the window; standard deviation of `initial`'s first Gaussian
    # Training
    batch_size: int = 64  # sequences a step
    lr: float = 1e-3
    weight_decay: float = 0.0  # decoupled
    precision: Literal["fp32", "bf16"] = "fp32"  # of training's products; weights, moments, sums and losses are float32
    epochs: int = 100
    patience: int = 10  # validations without a better one before stopping
    valid_every: int = 1  # epochs between validations
    valid_protocol: Literal["aligned", "full"] = "aligned"
    valid_users: int = 10_000  # validate on at most so many users
    seed: int = 0

    def __post_init__(self) -> None:
        for field in fields(self):
            value, kind = getattr(self, field.name), field.type
            if kind is float and type(value) is int and abs(value) < 2**53:
                object.__setattr__(self, field.name, float(value))
                continue
            if get_origin(kind) is Literal:
                if value not in get_args(kind):
                    raise ValueError(f"{field.name}={value!r}: expected one of {', '.join(map(repr, get_args(kind)))}")
            elif type(value) is not kind or (kind is int and abs(value) >= 2**31):
                limit = " below 2^31" if kind is int else ""
                raise ValueError(f"{field.name}={value!r}: expected a value of type {kind.__name__}{limit}")  # type: ignore[union-attr]
        positive = (
            "dim",
            "heads",
            "layers",
            "max_len",
            "negatives",
            "batch_size",
            "epochs",
            "patience",
            "valid_every",
            "valid_users",
            "user_dim",
            "local_width",
        )
        for name in positive:
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: expected at least 1")
        if self.dim % self.heads:
            raise ValueError(f"dim={self.dim} must be a multiple of heads={self.heads}")
        if self.model == "ssept" and (self.dim + self.user_dim) % self.heads:
            raise ValueError(
                f"dim={self.dim} plus user_dim={self.user_dim}, SSE-PT's width, must be a multiple of heads={self.heads}"
            )
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout={self.dropout}: expected a share in [0, 1)")
        for name in ("lr", "init_std"):
            if not 0 < getattr(self, name) < float("inf"):
                raise ValueError(f"{name}={getattr(self, name)}: expected a positive, finite number")
        for name in ("weight_decay", "negatives_alpha", "shrinkage", "cosine"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ValueError(f"{name}={getattr(self, name)}: expected a finite number, not negative")
        for name in ("shrinkage", "cosine"):
            if getattr(self, name) > LARGEST:
                raise ValueError(f"{name}={getattr(self, name):g}: expected at most {LARGEST:g}")
        if self.shrinkage and not self.compose_items:
            raise ValueError("shrinkage draws an item to its intent: set compose_items=true, too")
        for name in ("mask_prob", "mask_last", "sse_user", "sse_item"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}={getattr(self, name)}: expected a share in [0, 1]")
        if self.model in ("locker", "lockerf") and not 1 <= self.local_heads <= self.heads:
            raise ValueError(f"local_heads={self.local_heads}: expected 1 to heads={self.heads}")
        if self.preset not in PRESETS:
            raise ValueError(f"preset={self.preset!r}: expected one of {', '.join(map(repr, PRESETS))}")
        if not 0 <= self.seed < 2**31:
            raise ValueError(f"seed={self.seed}: expected 0 to 2^31 - 1")

    @property
    def calibrates(self) -> bool:
        """Whether the joint score has weights and they are fitted (cafe.validate)."""
        return self.calibrate and self.model == "cafe"

    @classmethod
    def make(cls, model: str, preset: str = "paper", **overrides: Any) -> "Config":
        """The preset of a model with some fields changed.

        >>> Config.make("sasrec", "best", epochs=3).loss
        'softmax'
        """
        if preset not in PRESETS:
            raise ValueError(f"preset {preset!r}: expected one of {', '.join(PRESETS)}")
        names = {field.name for field in fields(cls)}
        if unknown := overrides.keys() - names:
            raise ValueError(f"no such option: {', '.join(sorted(unknown))}; there are {', '.join(sorted(names))}")
        base = cls(model=model, preset=preset)  # type: ignore[arg-type]
        return replace(base, **{**PRESETS[preset], **OVERRIDES.get((model, preset), {}), **overrides})


PRESETS: dict[str, dict[str, Any]] = {
    "paper": {},
    "best": {
        "dim": 64,
        "loss": "softmax",
        "negatives": 2048,
        "negatives_shared": "batch",
        "negatives_alpha": 0.5,
        "intent_loss": "softmax",
        "join": "log_softmax",
        "calibrate": True,
        "dropout": 0.5,
        "batch_size": 128,
    },
}
# BERT4Rec and its kin; its paper hides 0.6 of Beauty, which is also the best of .2, .4 and .6 on validation of beauty-sparse.
CLOZE = {"loss": "full", "heads": 2, "attention_bias": True, "score_scale": "sqrt_head_dim", "mask_prob": 0.6}
# Where a model's preset is not that of the others: `paper` is each model's own paper; SASRec's `best` is SASRec trained with the better
# loss, and no more.
OVERRIDES: dict[tuple[str, str], dict[str, Any]] = {
    ("cafe", "best"): {"compose_items": True, "shrinkage": 0.5, "cosine": 10.0},
    **{(model, "paper"): CLOZE for model in ("bert4rec", "locker", "nova", "bertf", "lockerf")},
    **{(model, "best"): {"heads": 2} for model in ("locker", "lockerf")},
}
