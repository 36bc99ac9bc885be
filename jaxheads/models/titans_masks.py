"""Who sees whom in Titans layers: segments with memory tokens, and windows with a prefix.

Both masks are plain boolean arrays over static sizes; rows are queries, True is visible.
"""

from __future__ import annotations

import numpy as np


def mac_mask(
    num_persistent: int, num_memory: int, segment: int, *, mode: str = "causal"
) -> np.ndarray:
    """Memory as context: the rows of one segment S over the keys [P; h; S].

        causal    all of P; S_j for j <= i; h_g when the group of queries it was pooled from ends at
                  or before i: (g + 1) * segment / num_memory - 1 <= i
        literal   all of P and h; S_j for j <= i. h_g depends on tokens up to the end of its group,
                  so token i reads later tokens through it: for encoders and analysis.

    Args:
      num_persistent: N_p, persistent tokens.
      num_memory: N_l, memory tokens of a segment; divides `segment`.
      segment: C, tokens of a segment.
      mode: "causal" or "literal".
    Returns:
      [C, N_p + N_l + C] bool.
    Raises:
      ValueError: for an unknown mode or sizes that do not fit.
    References: Behrouz et al., 2024, arXiv:2501.00663, section 4.1.
    """
    check_groups(num_memory, segment)
    if num_persistent < 0:
        raise ValueError(f"num_persistent={num_persistent} must not be negative.")
    if mode not in ("causal", "literal"):
        raise ValueError(f"mode={mode!r} is neither 'causal' nor 'literal'.")
    i = np.arange(segment)[:, None]
    ends = (np.arange(num_memory) + 1) * (segment // num_memory) - 1
    memory = ends <= i if mode == "causal" else np.ones((segment, num_memory), bool)
    own = np.arange(segment) <= i
    return np.concatenate([np.ones((segment, num_persistent), bool), memory, own], axis=1)


def swa_prefix_mask(length: int, window: int, num_persistent: int) -> np.ndarray:
    """Memory as gate: a sliding window over [P; x], with the prefix visible to all.

    Key j is visible to query i when 0 <= i - j < window, or when j is persistent.

    Args:
      length: T, tokens of x.
      window: keys of the window, the query's own included; at least 1.
      num_persistent: N_p, persistent tokens before x.
    Returns:
      [N_p + T, N_p + T] bool.
    Raises:
      ValueError: for a window below 1 or negative sizes.
    References: Behrouz et al., 2024, arXiv:2501.00663, section 4.2.
    """
    check_window(window)
    if length < 0 or num_persistent < 0:
        raise ValueError(
            f"length={length} and num_persistent={num_persistent} must not be negative."
        )
    index = np.arange(num_persistent + length)
    distance = index[:, None] - index[None, :]
    return ((distance >= 0) & (distance < window)) | (index < num_persistent)[None, :]


def check_window(window: int) -> None:
    """Raise unless the window leaves a visible key."""
    if window < 1:
        raise ValueError(
            f"window={window} leaves no visible key; a window counts the query itself, so it is "
            "at least 1."
        )


def check_groups(num_memory: int, segment: int) -> None:
    """Raise unless the memory tokens divide the segment."""
    if segment < 1 or num_memory < 1 or segment % num_memory:
        raise ValueError(
            f"{num_memory} memory tokens do not divide a segment of {segment}; queries are pooled "
            "in groups of segment / memory_tokens, so choose a divisor."
        )
