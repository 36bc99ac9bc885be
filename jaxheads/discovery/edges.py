"""Edge attribution patching: every edge of the residual graph from a few backward passes.

Nodes that write the residual stream (the embedding, heads, MLPs) are *upstream*, the inputs that
read it (q, k, v of heads, MLPs, the logits) *downstream*. Gradients at q, k, v and the MLP outputs
are pulled back to the residual stream node by node, which is local algebra, not another forward.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxheads.discovery.metrics import Metric, as_metric
from jaxheads.discovery.prompts import Prompts, as_prompts, check_pair
from jaxheads.models import Decoder, ModelConfig
from jaxheads.models.layers import add_bias, apply_mlp, normalize
from jaxheads.taps import Edit, TapContext, TappedForward, Taps, as_tapped, intervene, record
from jaxheads.typing import Array, PyTree

_ALLOWED_EDITS = frozenset({"q_rot", "k_rot", "scores", "pattern", "z", "logits"})


class EdgeScores(NamedTuple):
    """Scores of edges between nodes; 0 where no edge exists.

    The last axis counts the U = 1 + L * (H + 1) upstream nodes: the embedding, then for each layer
    its heads and its MLP (`upstream_names`).
    """

    q: Array
    """[L,H,U] into the query of each head"""
    k: Array
    """[L,K,U] into the key of each key/value head"""
    v: Array
    """[L,K,U]"""
    mlp: Array
    """[L,U]"""
    logits: Array
    """[U]"""

    @property
    def upstream_names(self) -> tuple[str, ...]:
        """Names of the U upstream nodes: ``embed``, ``0.0``, ..., ``mlp0``, ``1.0``, ..."""
        num_layers, num_heads = self.q.shape[:2]
        names = ["embed"]
        for layer in range(num_layers):
            names += [f"{layer}.{head}" for head in range(num_heads)] + [f"mlp{layer}"]
        return tuple(names)

    def heads(self) -> Array:
        """[L,H]: each head's edges summed, its first-order effect on the metric."""
        num_layers, num_heads = self.q.shape[:2]
        out = self._sum_downstream()[1:].reshape(num_layers, num_heads + 1)
        return out[:, :num_heads]

    def embed(self) -> Array:
        """[]: the embedding's edges summed."""
        return self._sum_downstream()[0]

    def _sum_downstream(self) -> Array:
        inner = sum(jnp.sum(x, axis=(0, 1)) for x in (self.q, self.k, self.v))
        return inner + jnp.sum(self.mlp, axis=0) + self.logits

    def top(self, count: int) -> list[tuple[str, str, float]]:
        """(upstream, downstream, score) of the edges with the largest |score|.

        Downstream names: ``2.1.q``, ``2.0.k`` (of key/value head 0), ``mlp2``, ``logits``.
        """
        names = self.upstream_names
        rows: list[tuple[str, np.ndarray]] = []
        for component in ("q", "k", "v"):
            values = np.asarray(getattr(self, component))
            rows += [
                (f"{layer}.{head}.{component}", values[layer, head])
                for layer, head in np.ndindex(*values.shape[:2])
            ]
        rows += [(f"mlp{layer}", row) for layer, row in enumerate(np.asarray(self.mlp))]
        rows.append(("logits", np.asarray(self.logits)))
        scores = np.stack([row for _, row in rows])  # [downstream, U]
        if not 1 <= count <= scores.size:
            raise ValueError(f"count={count} must be from 1 to {scores.size}, the number of pairs.")
        order = np.argsort(-np.abs(scores), axis=None, kind="stable")[:count]
        return [
            (names[up], rows[down][0], float(scores[down, up]))
            for down, up in (divmod(int(n), scores.shape[1]) for n in order)
        ]


def edge_attribution(
    forward: Callable[..., Any],
    model: Decoder,
    clean: Any,
    corrupt: Any,
    metric: Metric | Callable[[Array], Array],
    *,
    method: str = "eap",
    num_steps: int = 5,
) -> EdgeScores:
    """A first-order estimate of what corrupting each edge alone does to the metric.

        score(u -> v) = (a_u(corrupt) - a_u(clean)) . d metric / d (input of v)

    summed over slots, where a_u is what u writes into the residual stream and v's input is the
    residual stream before the norm, read by v alone. EAP takes the gradient on the clean run. EAP
    with integrated gradients averages it over runs between the two,

        1/m sum_{k=1..m} gradient at embeddings  e_corrupt + (k/m) (e_clean - e_corrupt),

    which helps where the clean run is flat. Its scores of the embedding's edges then add up to
    metric(corrupt) - metric(clean), with an error that falls as 1/m. A head's edges add up to
    `attribution_patch` of its z. m forwards and backwards give all edges (EAP: one).

    Key and value inputs are those of key/value heads. Where attention outputs pass a norm (Gemma),
    what a head writes is linearised on the clean run.

    Args:
      forward: a forward; edits only within attention (``q_rot`` to ``z``) or of the logits.
      model: a `Decoder` with norms before its parts.
      clean: tokens [B,T], or a mapping with `tokens` and optionally `segment_ids`, `positions`.
      corrupt: prompts that correspond slot by slot.
      metric: a `Metric`, or a function of logits [B,T,V] -> [B]; averaged over prompts.
      method: ``"eap"`` or ``"eap-ig"``.
      num_steps: m, for ``"eap-ig"``.

    Returns:
      `EdgeScores`, float32.

    Raises:
      NotImplementedError: norms after the sum, other attention variants, edits elsewhere.

    References: Syed et al., 2023, arXiv:2310.10348; Hanna et al., 2024, arXiv:2403.17806.
    """
    clean, corrupt = as_prompts(clean, "clean"), as_prompts(corrupt, "corrupt")
    check_pair(clean, corrupt)
    if method not in ("eap", "eap-ig"):
        raise ValueError(f"method={method!r} is not 'eap' or 'eap-ig'.")
    if num_steps < 1:
        raise ValueError(f"num_steps={num_steps} must be at least 1.")
    inner = as_tapped(forward)
    _check_supported(model.cfg, inner.taps)
    bare = TappedForward(inner.forward, Taps(inner.taps.edits))
    steps = 1 if method == "eap" else num_steps
    return _edge_attribution(bare, model, clean, corrupt, as_metric(metric), num_steps=steps)


def _check_supported(cfg: ModelConfig, taps: Taps) -> None:
    cfg.require_transformer("edge attribution")
    if cfg.norm_placement == "post":
        raise NotImplementedError(
            "norm_placement='post' normalises the residual stream after every sum, so what a node "
            "writes does not reach later nodes as written; use attribution_patch."
        )
    other = {spec.attention for spec in cfg.pattern} - {"dense"}
    if other:
        raise NotImplementedError(
            f"attention={sorted(other)[0]!r} may read the residual stream past q, k and v; edges "
            "are attributed for 'dense'. Use attribution_patch."
        )
    for edit in taps.edits:
        if edit.site not in _ALLOWED_EDITS:
            raise NotImplementedError(
                f"the forward edits {edit.site!r}, whose effect on single edges is not known; "
                f"edits may act on {', '.join(sorted(_ALLOWED_EDITS))}. Use attribution_patch."
            )


@partial(jax.jit, static_argnames=("num_steps",))
def _edge_attribution(
    forward: TappedForward,
    model: Decoder,
    clean: Prompts,
    corrupt: Prompts,
    metric: Metric,
    *,
    num_steps: int,
) -> EdgeScores:
    run = record(forward, "embed", "z", "mlp_out")
    before = run(model, clean.tokens, **clean.inputs).seen
    after = run(model, corrupt.tokens, **corrupt.inputs).seen
    change = jax.tree.map(lambda a, b: (a - b).astype(jnp.float32), after, before)

    def step(total: EdgeScores, k: Array):
        weight = (k / num_steps).astype(before["embed"].dtype)
        start = after["embed"] + weight * (before["embed"] - after["embed"])
        reads = _Gradients.of(forward, model, clean, metric, start)
        more = _score_edges(model, change, before["z"], reads)
        return jax.tree.map(jnp.add, total, more), None

    cfg = model.cfg
    layers, heads, kv = cfg.num_layers, cfg.num_heads, cfg.num_kv_heads
    nodes = 1 + layers * (heads + 1)
    shapes = [(layers, heads, nodes), (layers, kv, nodes), (layers, kv, nodes), (layers, nodes)]
    zero = EdgeScores(*(jnp.zeros(shape) for shape in (*shapes, (nodes,))))
    total, _ = jax.lax.scan(step, zero, jnp.arange(1, num_steps + 1))
    return jax.tree.map(lambda x: x / num_steps, total)


class _Gradients(NamedTuple):
    """Gradients of the mean metric at tap sites of one run, and the residual stream there."""

    sites: dict[str, Array]
    """q [L,B,T,H,D]; k, v [L,B,T,K,D]; mlp_out [L,B,T,M]; final_norm_in [B,T,M]"""
    attention_in: Array
    """[L,B,T,M]"""
    mlp_in: Array
    """[L,B,T,M]"""

    @classmethod
    def of(cls, forward, model: Decoder, prompts: Prompts, metric: Metric, start: Array):
        """Those of the run on embeddings `start` [B,T,M]."""
        cfg = model.cfg
        batch, length = prompts.tokens.shape
        lead, dtype = (cfg.num_layers, batch, length), start.dtype
        shifts = {
            "q": jnp.zeros((*lead, cfg.num_heads, cfg.head_dim), dtype),
            "k": jnp.zeros((*lead, cfg.num_kv_heads, cfg.head_dim), dtype),
            "v": jnp.zeros((*lead, cfg.num_kv_heads, cfg.head_dim), dtype),
            "mlp_out": jnp.zeros((*lead, cfg.model_dim), dtype),
            "final_norm_in": jnp.zeros_like(start),
        }
        into_mlp = "resid_mid" if cfg.residual == "sequential" else "resid_pre"
        names = dict.fromkeys(("resid_pre", into_mlp))

        def value(shifts):
            edits = [Edit(site, add, shift) for site, shift in shifts.items()]
            tapped = record(intervene(forward, *edits), *names)
            out = tapped(model, prompts.tokens, embeddings=start, **prompts.inputs)
            return jnp.mean(metric(out.logits)), out.seen

        gradients, seen = jax.grad(value, has_aux=True)(shifts)
        return cls(gradients, seen["resid_pre"], seen[into_mlp])


def _score_edges(model: Decoder, change: dict, clean_z: Array, reads: _Gradients) -> EdgeScores:
    """Edges of one run: for each downstream layer, all upstream layers in turn."""
    cfg = model.cfg
    heads, kv = cfg.num_heads, cfg.num_kv_heads
    upstream = (model.layers, change["z"], change["mlp_out"], clean_z)
    layers = jnp.arange(cfg.num_layers)

    def score(inputs: Array) -> Array:
        """[G,B,T,M] gradients of downstream inputs -> [G,U] without regard to order."""
        dot = lambda writes: jnp.einsum("ubtm,gbtm->gu", writes, inputs)
        inner = jax.lax.map(lambda xs: dot(_writes(cfg, *xs)), upstream)  # [L,G,H+1]
        inner = jnp.moveaxis(inner, 0, 1).reshape(inputs.shape[0], -1)
        return jnp.concatenate([dot(change["embed"][None]), inner], axis=1)

    def downstream(xs):
        block, gradients, x, x_mlp, layer = xs
        inputs = _reads(cfg, block, gradients, x, x_mlp)  # [H+2K+1,B,T,M]
        return jnp.where(_precedes(cfg, layer), score(inputs), 0)

    per_layer = {name: g for name, g in reads.sites.items() if name != "final_norm_in"}
    xs = (model.layers, per_layer, reads.attention_in, reads.mlp_in, layers)
    inner = jax.lax.map(downstream, xs)  # [L,H+2K+1,U]
    q, k, v, mlp = jnp.split(inner, [heads, heads + kv, heads + 2 * kv], axis=1)
    return EdgeScores(q, k, v, mlp[:, 0], score(reads.sites["final_norm_in"][None])[0])


def _precedes(cfg: ModelConfig, layer: Array) -> Array:
    """[H+2K+1,U] bool: whether an upstream node writes before an input of this layer reads."""
    heads = cfg.num_heads
    node = jnp.arange(cfg.num_layers * (heads + 1))
    written, part = node // (heads + 1), node % (heads + 1)
    into_attention = written < layer
    into_mlp = into_attention
    if cfg.residual == "sequential":
        into_mlp = into_mlp | ((written == layer) & (part < heads))
    count = heads + 2 * cfg.num_kv_heads
    inner = jnp.concatenate([jnp.broadcast_to(into_attention, (count, node.size)), into_mlp[None]])
    return jnp.pad(inner, ((0, 0), (1, 0)), constant_values=True)


def _writes(cfg: ModelConfig, block, change_z: Array, change_mlp: Array, clean_z: Array) -> Array:
    """[H+1,B,T,M]: what corrupting each head and the MLP of a layer adds to the residual stream."""
    wo = block.attention.wo[...].astype(jnp.float32)
    written = jnp.einsum("bthd,hdm->hbtm", change_z, wo)
    if block.ln1_post is not None:
        clean = jnp.einsum("bthd,hdm->btm", clean_z.astype(jnp.float32), wo)
        clean = add_bias(clean, block.attention.bo)
        _, linear = jax.linearize(lambda y: normalize(block.ln1_post, y, cfg), clean)
        written = jax.vmap(linear)(written)
    return jnp.concatenate([written, change_mlp[None]])


def _reads(cfg: ModelConfig, block, gradients: dict, x: Array, x_mlp: Array) -> Array:
    """[H+2K+1,B,T,M]: gradients of a layer's q, k, v and MLP inputs in the residual stream."""
    x, x_mlp = x.astype(jnp.float32), x_mlp.astype(jnp.float32)
    weights = block.attention
    normed, through_norm = jax.vjp(lambda y: normalize(block.ln1, y, cfg), x)

    def pull(weight, bias, norm, gradient: Array) -> Array:
        def one(w: Array, b: Array, g: Array) -> Array:
            def project(y: Array) -> Array:
                out = jnp.einsum("btm,md->btd", y, w) + b
                return out if norm is None else normalize(norm, out, cfg)

            return through_norm(jax.vjp(project, normed)[1](g)[0])[0]

        w = weight[...].astype(jnp.float32)
        b = jnp.zeros(w.shape[1:]) if bias is None else bias[...].astype(jnp.float32)
        return jax.vmap(one, (1, 0, 2))(w, b, gradient.astype(jnp.float32))

    def mlp(y: Array) -> Array:
        y = normalize(block.ln1 if block.ln2 is None else block.ln2, y, cfg)
        out = apply_mlp(block.mlp, y, cfg)
        return out if block.ln2_post is None else normalize(block.ln2_post, out, cfg)

    into_mlp = jax.vjp(mlp, x_mlp)[1](gradients["mlp_out"].astype(jnp.float32))[0]
    return jnp.concatenate(
        [
            pull(weights.wq, weights.bq, weights.q_norm, gradients["q"]),
            pull(weights.wk, weights.bk, weights.k_norm, gradients["k"]),
            pull(weights.wv, weights.bv, None, gradients["v"]),
            into_mlp[None],
        ]
    )


def add(value: Array, payload: PyTree, ctx: TapContext) -> Array:
    """Edit of any value: the payload added."""
    del ctx
    return value + payload.astype(value.dtype)
