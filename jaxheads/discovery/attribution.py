"""Attribution: what each component adds to a logit difference, exactly or to first order."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxheads.discovery.activation import find_places, values_at
from jaxheads.discovery.edges import EdgeScores, add, edge_attribution
from jaxheads.discovery.metrics import Metric, as_metric, logit_difference
from jaxheads.discovery.passes import take_slots
from jaxheads.discovery.prompts import Prompts, as_prompts
from jaxheads.models import Decoder, ModelConfig, Output
from jaxheads.models.layers import Norm, add_bias
from jaxheads.taps import Edit, TappedForward, Taps, as_tapped, intervene, record
from jaxheads.typing import Array, ArrayLike

__all__ = [
    "EdgeScores",
    "LogitAttribution",
    "attribution_patch",
    "edge_attribution",
    "logit_attribution",
]


class LogitAttribution(NamedTuple):
    """The terms of each prompt's logit difference."""

    heads: Array
    """[L,H,B]"""
    mlps: Array
    """[L,B], output biases included"""
    embed: Array
    """[B], learned positions included"""
    bias: Array
    """[B]: attention output biases, biases of norms, and the unembedding's"""

    @property
    def total(self) -> Array:
        """[B] the sum of all terms."""
        return self.heads.sum((0, 1)) + self.mlps.sum(0) + self.embed + self.bias


def logit_attribution(
    forward: Callable[..., Any],
    model: Decoder,
    prompts: Any,
    answer: ArrayLike,
    wrong: ArrayLike,
    *,
    position: Any = -1,
    norm: str = "frozen",
) -> LogitAttribution:
    """The direct contribution of every head, MLP and embedding to a logit difference.

    The residual stream is a sum, and with the scale sigma of the final norm held at its value a
    norm is linear, so each component c, written as r_c [M], contributes

        r_c . C(gamma * (u_answer - u_wrong)) / sigma,      r_(l,h) = z_(l,h) W_O

    with gain gamma, and C centring for a LayerNorm and the identity for an RMSNorm. The terms add
    up to ``logit[answer] - logit[wrong]`` (before a soft cap on logits, which is not additive).
    Norms of attention outputs (Gemma) and norms after each sum (OPT-350m) are held the same way.

    Args:
      forward: a forward, wrapped or not. Edits of `head_out`, `attn_out` or of the residual stream
        leave terms that no component accounts for.
      model: a `Decoder`.
      prompts: tokens [B,T], or a mapping with `tokens` and optionally `segment_ids`, `positions`.
      answer: [B] token ids.
      wrong: [B] token ids.
      position: the slot read; [B] where prompts are padded.
      norm: what stands for the final norm: ``"frozen"``, as above; ``"gain"``, gamma alone;
        ``"raw"``, nothing. Of these only the first adds up.

    Returns:
      `LogitAttribution`, float32.

    References: Elhage et al., 2021, "A Mathematical Framework for Transformer Circuits"; the raw
    form: Yu et al., 2023, arXiv:2310.15910.
    """
    if norm not in ("frozen", "gain", "raw"):
        raise ValueError(f"norm={norm!r} is not 'frozen', 'gain' or 'raw'.")
    model.cfg.require_transformer("logit attribution")
    batch = as_prompts(prompts, "prompts")
    reads = logit_difference(answer, wrong, positions=position)
    inner = as_tapped(forward)
    bare = TappedForward(inner.forward, Taps(inner.taps.edits))
    return _logit_attribution(bare, model, batch, reads, norm=norm)


@partial(jax.jit, static_argnames=("norm",))
def _logit_attribution(
    forward: TappedForward, model: Decoder, prompts: Prompts, reads: Metric, *, norm: str
) -> LogitAttribution:
    cfg = model.cfg
    is_post = cfg.norm_placement == "post"
    scales = ("ln1_scale", "ln2_scale") if is_post else ("final_norm_scale",)
    learned = ("pos_embed",) if cfg.positions == "learned" else ()
    run = record(forward, "z", "mlp_out", "embed", *learned, *scales)
    seen = run(model, prompts.tokens, **prompts.inputs).seen
    slots = reads.slots(*prompts.tokens.shape)
    outer = lambda x: take_slots(x, slots)[:, 0].astype(jnp.float32)
    layers = jax.vmap(outer)

    direction, bias = _answer_direction(model, reads.entries)  # [B,M], [B]
    if model.final_norm is not None:
        gain, offset = _affine(model.final_norm, cfg)
        if norm != "raw":
            bias = bias + direction @ offset if norm == "frozen" else bias
            direction = direction * gain
        if norm == "frozen":
            direction = _centre(model.final_norm, direction) / outer(seen["final_norm_scale"])

    def layer(carry, xs):
        direction, bias = carry
        block, z, mlp_out, ln_scales = xs
        if is_post:
            direction, more = _pull(block.ln2, cfg, direction, ln_scales[1])
            bias = bias + more
        mlp = jnp.einsum("bm,bm->b", mlp_out, direction)
        if is_post:
            direction, more = _pull(block.ln1, cfg, direction, ln_scales[0])
            bias = bias + more
        into = direction
        wo = block.attention.wo[...].astype(jnp.float32)
        if block.ln1_post is not None:
            written = add_bias(jnp.einsum("bhd,hdm->bm", z, wo), block.attention.bo)
            into, more = _pull(block.ln1_post, cfg, direction, _scale(block.ln1_post, written, cfg))
            bias = bias + more
        heads = jnp.einsum("bhd,hdm,bm->hb", z, wo, into)
        if block.attention.bo is not None:
            bias = bias + into @ block.attention.bo[...].astype(jnp.float32)
        return (direction, bias), (heads, mlp)

    xs = (
        model.layers,
        layers(seen["z"]),
        layers(seen["mlp_out"]),
        [layers(seen[name]) for name in scales] if is_post else None,
    )
    (direction, bias), (heads, mlps) = jax.lax.scan(layer, (direction, bias), xs, reverse=True)
    embed = outer(seen["embed"])
    if learned:
        rows = jnp.broadcast_to(seen["pos_embed"], seen["embed"].shape)
        embed = embed + outer(rows)
    return LogitAttribution(heads, mlps, jnp.einsum("bm,bm->b", embed, direction), bias)


def _answer_direction(model: Decoder, entries: Array) -> tuple[Array, Array]:
    """``u_answer - u_wrong`` [B,M] in terms of `final_norm_out`, and the biases' difference [B]."""
    if model.unembed.kernel is None:
        rows = jnp.take(model.embed.table[...], entries, axis=0)  # [B,2,E]
    else:
        rows = jnp.moveaxis(jnp.take(model.unembed.kernel[...], entries, axis=1), 0, -1)
    rows = rows.astype(jnp.float32)
    direction = rows[:, 0] - rows[:, 1]
    if model.project_out is not None:
        direction = jnp.einsum("be,me->bm", direction, model.project_out[...].astype(jnp.float32))
    bias = jnp.zeros(entries.shape[0], jnp.float32)
    if model.unembed.bias is not None:
        pair = jnp.take(model.unembed.bias[...], entries).astype(jnp.float32)
        bias = pair[:, 0] - pair[:, 1]
    return direction, bias


def _affine(norm: Norm, cfg: ModelConfig) -> tuple[Array, Array]:
    """Gain and bias [M] of a norm."""
    gain = cfg.norm_offset + norm.weight[...].astype(jnp.float32)
    return gain, jnp.zeros_like(gain) if norm.bias is None else norm.bias[...].astype(jnp.float32)


def _centre(norm: Norm, direction: Array) -> Array:
    """What centring the input of a LayerNorm does to a direction of its output."""
    if norm.bias is None:
        return direction
    return direction - jnp.mean(direction, axis=-1, keepdims=True)


def _scale(norm: Norm, x: Array, cfg: ModelConfig) -> Array:
    """[B,1]: what the norm divides x [B,M] by."""
    y = _centre(norm, x)
    return jnp.sqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + cfg.norm_eps)


def _pull(norm: Norm, cfg: ModelConfig, direction: Array, scale: Array) -> tuple[Array, Array]:
    """A direction [B,M] of a norm's output as one of its input, scale held; its bias' part [B]."""
    gain, offset = _affine(norm, cfg)
    return _centre(norm, direction * gain) / scale, direction @ offset


def attribution_patch(
    forward: Callable[..., Any],
    model: Decoder,
    run_on: Any,
    source_cache: Output | Mapping[str, Array] | Array,
    site: str = "z",
    *,
    positions: Any = None,
    metric: Metric | Callable[[Array], Array],
) -> Array:
    """A first-order estimate of what `activation_patch` would change, for all places at once.

        score = sum (source - value) * d metric / d value

    over the slots and dimensions of a place, with gradients of the run on `run_on`: one forward
    and one backward for every layer and head. Arguments as `activation_patch`; the estimate is
    that of ``activation_patch(...) - metric(run_on)``.

    Returns:
      float32 [L,H] ([L,K] at sites of key/value heads), or [L,T]: the mean over prompts.

    References: Nanda, 2023, "Attribution Patching"; Syed et al., 2023, arXiv:2310.10348.
    """
    prompts = as_prompts(run_on, "run_on")
    places = find_places(site, positions, prompts)
    source = values_at(source_cache, places.site, model.cfg.num_layers, prompts)
    inner = as_tapped(forward)
    bare = TappedForward(inner.forward, Taps(inner.taps.edits))
    products = _products(bare, model, prompts, source, as_metric(metric), site=places.site)
    if places.kind == "T":
        return jnp.sum(products, axis=(1, *range(3, products.ndim)))
    axes = (1, 2) if places.kind == "BTH" else (1, 3)
    where = jnp.expand_dims(places.where, 2 if places.kind == "BTH" else 1)
    where = where.reshape(1, *where.shape, *(1,) * (products.ndim - 4))
    return jnp.sum(jnp.where(where, products, 0), axis=(*axes, *range(4, products.ndim)))


@partial(jax.jit, static_argnames=("site",))
def _products(
    forward: TappedForward,
    model: Decoder,
    prompts: Prompts,
    source: Array,
    metric: Metric,
    *,
    site: str,
) -> Array:
    """``(source - value) * d metric / d value``, float32 in the shape of the site."""

    def value(shift: Array):
        run = record(intervene(forward, Edit(site, add, shift)), site)
        out = run(model, prompts.tokens, **prompts.inputs)
        return jnp.mean(metric(out.logits)), out.seen[site]

    gradient, held = jax.grad(value, has_aux=True)(jnp.zeros_like(source))
    return (source - held).astype(jnp.float32) * gradient.astype(jnp.float32)
