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
