import numpy as np
import numpy.typing as npt

class AliasTable:
    entries: npt.NDArray[np.uint32]
    def __init__(self, probabilities: npt.NDArray[np.float64], isa: str = "auto") -> None: ...
    def sample(self, seed: int, offset: int, out: npt.NDArray[np.int32], threads: int) -> None: ...
    def sample_rows(
        self,
        indptr: npt.NDArray[np.int64],
        indices: npt.NDArray[np.int32],
        rows: npt.NDArray[np.int64],
        distinct: bool,
        seed: int,
        offset: int,
        out: npt.NDArray[np.int32],
        threads: int,
    ) -> None: ...

def philox(seed: int, position: int, attempt: int = 0, stream: int = 0) -> tuple[int, int, int, int]: ...
def philox_bits(
    seed: int, position: int, attempt: int, stream: int, blocks_of_8: int, isa: str = "auto"
) -> npt.NDArray[np.uint64]: ...
def attention_forward(
    q: npt.NDArray[np.float32] | npt.NDArray[np.uint16],
    k: npt.NDArray[np.float32] | npt.NDArray[np.uint16],
    v: npt.NDArray[np.float32] | npt.NDArray[np.uint16],
    log_theta: npt.NDArray[np.float32] | None,
    cu_seqlens: npt.NDArray[np.int32],
    out: npt.NDArray[np.float32] | npt.NDArray[np.uint16],
    lse: npt.NDArray[np.float32],
    scale: float,
    causal: bool,
    window: int,
    dropout_p: float,
    seed: int,
    offset: int,
    threads: int,
    isa: str = "auto",
) -> None: ...
def attention_backward(
    grad_out: npt.NDArray[np.float32] | npt.NDArray[np.uint16],
    q: npt.NDArray[np.float32] | npt.NDArray[np.uint16],
    k: npt.NDArray[np.float32] | npt.NDArray[np.uint16],
    v: npt.NDArray[np.float32] | npt.NDArray[np.uint16],
    log_theta: npt.NDArray[np.float32] | None,
    cu_seqlens: npt.NDArray[np.int32],
    out: npt.NDArray[np.float32] | npt.NDArray[np.uint16],
    lse: npt.NDArray[np.float32],
    dq: npt.NDArray[np.float32] | npt.NDArray[np.uint16],
    dk: npt.NDArray[np.float32] | npt.NDArray[np.uint16],
    dv: npt.NDArray[np.float32] | npt.NDArray[np.uint16],
    dlog_theta: npt.NDArray[np.float32] | None,
    scale: float,
    causal: bool,
    window: int,
    dropout_p: float,
    seed: int,
    offset: int,
    threads: int,
    isa: str = "auto",
) -> None: ...
def sampled_loss(
    h: npt.NDArray[np.float32],
    table: npt.NDArray[np.float32] | npt.NDArray[np.uint16],
    intents: npt.NDArray[np.float32] | npt.NDArray[np.uint16] | None,
    item_intent: npt.NDArray[np.int64] | None,
    positives: npt.NDArray[np.int64],
    negatives: npt.NDArray[np.int64],
    sequence: npt.NDArray[np.int64] | None,
    ignore: npt.NDArray[np.bool_] | None,
    positive_log_q: npt.NDArray[np.float32] | None,
    negative_log_q: npt.NDArray[np.float32] | None,
    weights: npt.NDArray[np.float32] | None,
    losses: npt.NDArray[np.float32],
    dh: npt.NDArray[np.float32] | None,
    coefficients: npt.NDArray[np.float32] | None,
    negative_rows: npt.NDArray[np.float32] | None,
    softmax: bool,
    positive_weight: float,
    negative_weight: float,
    parts: int,
    threads: int,
    isa: str = "auto",
) -> float: ...
def sort_ids(
    ids: npt.NDArray[np.int64],
    limit: int,
    order: npt.NDArray[np.int32],
    distinct: npt.NDArray[np.int64],
    starts: npt.NDArray[np.int64],
) -> int: ...
def sum_segments(
    order: npt.NDArray[np.int32],
    starts: npt.NDArray[np.int64],
    segments: int,
    targets: npt.NDArray[np.int64] | None,
    h: npt.NDArray[np.float32],
    coefficients: npt.NDArray[np.float32],
    rows: npt.NDArray[np.float32],
    scale: float,
    out: npt.NDArray[np.float32],
    threads: int,
    isa: str = "auto",
) -> None: ...
def adam_rows(
    table: npt.NDArray[np.float32] | npt.NDArray[np.uint16],
    exp_avg: npt.NDArray[np.float32] | npt.NDArray[np.uint16],
    exp_avg_sq: npt.NDArray[np.float32] | npt.NDArray[np.uint16],
    last_step: npt.NDArray[np.int32] | None,
    history: npt.NDArray[np.float64] | None,
    rows: npt.NDArray[np.int64] | None,
    values: npt.NDArray[np.float32] | npt.NDArray[np.uint16] | None,
    first: int,
    step: int,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    seed: int | None,
    threads: int,
    isa: str = "auto",
) -> None: ...
def append_step(
    history: npt.NDArray[np.float64],
    powers: npt.NDArray[np.float64],
    first: int,
    block: int,
    step: int,
    c: float,
    weight: float,
    decay: float,
    lr: float,
) -> None: ...
def use_huge_pages(array: npt.NDArray[np.uint8], collapse: bool) -> None: ...
def topk_build(
    table: npt.NDArray[np.float32],
    order: npt.NDArray[np.int32],
    borders: npt.NDArray[np.int64],
    start: npt.NDArray[np.int32],
    centroids: npt.NDArray[np.float32],
    centroid_norm: npt.NDArray[np.float64],
    radius: npt.NDArray[np.float64],
    error: npt.NDArray[np.float64],
    scale: npt.NDArray[np.float32],
    slot_item: npt.NDArray[np.int32],
    codes: npt.NDArray[np.uint8],
    threads: int,
) -> None: ...

class TopKIndex:
    def __init__(
        self,
        table: npt.NDArray[np.float32],
        item_intent: npt.NDArray[np.int32],
        intents: int,
        start: npt.NDArray[np.int32],
        size: npt.NDArray[np.int32],
        first: npt.NDArray[np.int32],
        last: npt.NDArray[np.int32],
        centroids: npt.NDArray[np.float32],
        centroid_norm: npt.NDArray[np.float64],
        radius: npt.NDArray[np.float64],
        error: npt.NDArray[np.float64],
        scale: npt.NDArray[np.float32],
        slot_item: npt.NDArray[np.int32],
        codes: npt.NDArray[np.uint8],
    ) -> None: ...
    def search(
        self,
        user: npt.NDArray[np.float32],
        intent_scores: npt.NDArray[np.float32] | None,
        sigmoid: bool,
        k: int,
        indptr: npt.NDArray[np.int64] | None,
        indices: npt.NDArray[np.int32] | None,
        out_items: npt.NDArray[np.int64],
        out_scores: npt.NDArray[np.float32],
        threads: int,
        isa: str = "auto",
    ) -> tuple[int, int]: ...
    def count_above(
        self,
        user: npt.NDArray[np.float32],
        intent_scores: npt.NDArray[np.float32] | None,
        sigmoid: bool,
        answers: npt.NDArray[np.int64],
        indptr: npt.NDArray[np.int64] | None,
        indices: npt.NDArray[np.int32] | None,
        out: npt.NDArray[np.int64],
        threads: int,
        isa: str = "auto",
    ) -> tuple[int, int]: ...
