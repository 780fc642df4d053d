import numpy as np

def build_layout(
    kinds: np.ndarray,
    lengths: np.ndarray,
    documents: np.ndarray,
    frozen_text: bool,
    cached_lengths: np.ndarray | None,
    cache_starts: np.ndarray | None,
    cache_slots: int,
    segments: np.ndarray | None = None,
    modes: np.ndarray | None = None,
) -> tuple[dict[str, np.ndarray], dict[str, int]]: ...
def pack(lengths: np.ndarray, capacity: int, window: int) -> list[np.ndarray]: ...
def instruction_set() -> str: ...
