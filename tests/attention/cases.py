"""The feature combinations that every implementation is compared on."""

import jax.numpy as jnp
import numpy as np

from jaxheads.attention import Mask, alibi_slopes

BATCH, NUM_QUERIES, HEAD_DIM = 2, 19, 8
SEGMENTS = np.array([[1] * 7 + [2] * 9 + [0] * 3, [3] * 19])
LEFT_PADDING = np.array([[False] * 5 + [True] * 14, [True] * 19])


def _head_mask(rng, num_heads, num_keys):
    visible = rng.random((BATCH, num_heads, NUM_QUERIES, num_keys)) < 0.6
    visible[0, 0, 3] = False  # a row of one head that sees nothing
    return visible


# name -> (H, K, S, mask(rng) fields, options): "bias", "sinks" and "alibi" name arrays.
CASES = {
    "bidirectional": (2, 2, 19, {}, {}),
    "causal gqa": (4, 2, 19, {"is_causal": True}, {}),
    "causal mqa": (4, 1, 19, {"is_causal": True}, {}),
    "window": (4, 2, 19, {"is_causal": True, "window": 5}, {}),
    "two-sided window": (2, 1, 19, {"window": 4}, {}),
    "cross": (2, 1, 11, {}, {}),
    "segments": (4, 2, 19, {"is_causal": True, "q_segment_ids": SEGMENTS}, {}),
    "left padding": (4, 2, 19, {"is_causal": True, "key_mask": LEFT_PADDING}, {}),
    "head mask": (4, 2, 19, {"head_mask": _head_mask}, {}),
    "bias per head": (4, 2, 19, {"is_causal": True}, {"bias": (1, 4, 19, 19)}),
    "bias per key": (4, 2, 19, {"is_causal": True}, {"bias": (2, 1, 1, 19)}),
    "soft cap": (4, 2, 19, {"is_causal": True}, {"soft_cap": 1.5}),
    "sinks": (4, 2, 19, {"is_causal": True, "key_mask": LEFT_PADDING}, {"sinks": True}),
    "alibi": (4, 2, 19, {"is_causal": True}, {"alibi": True}),
    "cache": (
        4,
        2,
        24,
        {
            "is_causal": True,
            "window": 8,
            "q_index": np.arange(5, 24)[None] - np.array([[0], [2]]),
            "key_mask": np.arange(24)[None] < np.array([[24], [20]]),
        },
        {},
    ),
    "ring cache": (2, 1, 24, {"is_causal": True, "k_index": np.roll(np.arange(24), 5)}, {}),
    "everything": (
        4,
        2,
        19,
        {
            "is_causal": True,
            "window": 6,
            "q_segment_ids": SEGMENTS,
            "k_segment_ids": SEGMENTS,
            "key_mask": LEFT_PADDING,
            "head_mask": _head_mask,
        },
        {"bias": (1, 4, 19, 19), "soft_cap": 2.0, "sinks": True, "alibi": True, "scale": 0.7},
    ),
}


def make_case(name, seed=0):
    """(arrays by name, mask, scale, soft_cap, dz, dlse) for a row of `CASES`."""
    num_heads, num_kv_heads, num_keys, fields, options = CASES[name]
    rng = np.random.default_rng(seed)
    normal = lambda *shape: rng.normal(size=shape).astype(np.float32)
    arrays = {
        "q": normal(BATCH, NUM_QUERIES, num_heads, HEAD_DIM),
        "k": normal(BATCH, num_keys, num_kv_heads, HEAD_DIM),
        "v": normal(BATCH, num_keys, num_kv_heads, HEAD_DIM),
    }
    if "bias" in options:
        arrays["bias"] = normal(*options["bias"])
    if options.get("sinks"):
        arrays["sinks"] = normal(num_heads)
    if options.get("alibi"):
        arrays["alibi_slopes"] = alibi_slopes(num_heads)
    fields = {
        key: value(rng, num_heads, num_keys) if callable(value) else value
        for key, value in fields.items()
    }
    fields = {
        key: jnp.asarray(value) if isinstance(value, np.ndarray) else value
        for key, value in fields.items()
    }
    scale = options.get("scale", HEAD_DIM**-0.5)
    dz, dlse = normal(*arrays["q"].shape), normal(BATCH, num_heads, NUM_QUERIES)
    return arrays, Mask(**fields), scale, options.get("soft_cap"), dz, dlse
