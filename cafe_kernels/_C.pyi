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
    window: int,
    dropout_p: float,
    seed: int,
    offset: int,
    threads: int,
    isa: str = "auto",
) -> None: ...
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
