"""What attention is, written to be obvious: loops for masks, float64 and no shift for the rest."""

import jax
import jax.numpy as jnp
import numpy as np


def naive_visible(batch, num_heads, num_queries, num_keys, mask):
    """[B,H,T,S] bool, one entry at a time from the sentence in `Mask`'s docstring."""

    def entry(array, *index):
        array = np.asarray(array)
        index = index[len(index) - array.ndim :]
        return array[tuple(0 if n == 1 else i for i, n in zip(index, array.shape))]

    out = np.zeros((batch, num_heads, num_queries, num_keys), bool)
    for b, h, t, s in np.ndindex(out.shape):
        q = t if mask.q_index is None else entry(mask.q_index, b, t)
        k = s if mask.k_index is None else entry(mask.k_index, b, s)
        sees = True
        if mask.is_causal and k > q:
            sees = False
        if mask.window is not None and abs(int(q) - int(k)) >= mask.window:
            sees = False
        if mask.q_segment_ids is not None:
            keys = mask.q_segment_ids if mask.k_segment_ids is None else mask.k_segment_ids
            a, c = entry(mask.q_segment_ids, b, t), entry(keys, b, s)
            sees = sees and a == c and c != 0
        if mask.key_mask is not None:
            sees = sees and entry(mask.key_mask, b, s)
        if mask.head_mask is not None:
            sees = sees and entry(mask.head_mask, b, h, t, s)
        out[b, h, t, s] = sees
    return out


def naive_attention(arrays, visible, distance, scale, soft_cap):
    """z [B,T,H,W] and lse [B,H,T] from a dict of arrays, differentiable.

    Rows that see nothing: zeros, and lse = -inf (the sink where there is one).
    """
    groups = arrays["q"].shape[2] // arrays["k"].shape[2]
    k = jnp.repeat(arrays["k"], groups, axis=2)
    v = jnp.repeat(arrays["v"], groups, axis=2)
    scores = jnp.einsum("bthd,bshd->bhts", arrays["q"], k) * scale
    if soft_cap is not None:
        scores = soft_cap * jnp.tanh(scores / soft_cap)
    if "bias" in arrays:
        scores = scores + arrays["bias"]
    if "alibi_slopes" in arrays:
        scores = scores - arrays["alibi_slopes"][:, None, None] * distance
    weights = jnp.where(visible, jnp.exp(scores), 0.0)
    total = weights.sum(-1)
    if "sinks" in arrays:
        total = total + jnp.exp(arrays["sinks"])[:, None]
    is_empty = total == 0
    safe = jnp.where(is_empty, 1.0, total)
    z = jnp.einsum("bhts,bshw->bthw", weights / safe[..., None], v)
    return z, jnp.where(is_empty, -jnp.inf, jnp.log(safe))


def value_and_grads(function, arrays, dz, dlse, jit=jax.jit):
    """(z, lse), and the gradient of sum(z dz) + sum(finite lse dlse) for every array."""

    def loss(arrays):
        z, lse = function(arrays)
        total = (z * dz).sum()
        if lse is not None:
            total += (jnp.where(jnp.isneginf(lse), 0.0, lse) * dlse).sum()
        return total, (z, lse)

    (_, out), grads = jit(jax.value_and_grad(loss, has_aux=True))(arrays)
    return out, grads


def naive_value_and_grads(arrays, mask, scale, soft_cap, dz, dlse):
    """The float64 answer to `value_and_grads`, as numpy arrays."""
    batch, num_queries, num_heads, _ = arrays["q"].shape
    num_keys = arrays["k"].shape[1]
    visible = naive_visible(batch, num_heads, num_queries, num_keys, mask)
    q = np.arange(num_queries) if mask.q_index is None else np.asarray(mask.q_index)
    k = np.arange(num_keys) if mask.k_index is None else np.asarray(mask.k_index)
    distance = np.abs(q[..., :, None] - k[..., None, :])
    distance = distance.reshape(-1, 1, num_queries, num_keys)
    with jax.enable_x64(True):
        double = {name: jnp.asarray(np.asarray(x, np.float64)) for name, x in arrays.items()}
        function = lambda arrays: naive_attention(arrays, visible, distance, scale, soft_cap)
        eager = lambda f: f  # compiling each case would cost more than running it
        out = value_and_grads(function, double, np.asarray(dz), np.asarray(dlse), jit=eager)
        return jax.tree.map(np.asarray, out)
