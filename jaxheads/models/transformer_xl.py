"""A decoder that reads a text segment by segment, with relative convolutional attention.

    x <- x + attention(LN(x), LN(memory + x)),   x <- x + W_2 relu(W_1 LN(x))
    memory of a layer <- the last mem_len inputs of the layer, without gradient

`TransformerXLConfig.variant` picks the attention: mha, mdha (convolved), rmha (relative positions)
or rcmha (both). Those without relative positions add absolute ones, counted within the segment, to
the embedding. Training tends to carry the memory from one segment to the next of the same stream:

    logits, memory = model(tokens, memory)

References: Sugiharto et al., 2023, arXiv:2308.03429; Dai et al., 2019, arXiv:1901.02860. The
published dropout is 0, so there is none here. Checkpoints of the release: `relative_table`.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from jaxheads.attention.relative_conv import (
    QUERY_CONVS,
    TERMS,
    RelConvParams,
    check_sizes,
    convolve,
    init_rel_conv,
    rcmha,
    relative_score_terms,
)
from jaxheads.fields import unknown
from jaxheads.models.layers import fan_in, normal, ones, param, stack_layers, zeros
from jaxheads.taps import NO_TAPS, Tap, TapContext, Taps
from jaxheads.typing import Array, PyTree

VARIANTS = {  # name -> (convolution, relative positions)
    "mha": (False, False),
    "mdha": (True, False),
    "rmha": (False, True),
    "rcmha": (True, True),
}
ABS_POS = ("learned", "sinusoid")
_AXES: dict[str, tuple[str | None, ...]] = {
    "rel_key": (None, "heads", "head_dim"),
    "rel_bias": (None, "heads"),
    "query_bias": ("heads", "head_dim"),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class TransformerXLConfig:
    """Sizes; the defaults are the release's for characters of Tiny Shakespeare."""

    variant: str = "rcmha"  # mha | mdha | rmha | rcmha
    vocab_size: int = 65
    num_layers: int = 6
    model_dim: int = 128
    num_heads: int = 8
    mlp_dim: int = 256
    mem_len: int = 32  # M, positions of earlier segments that a layer sees
    max_distance: int = 4096  # P, distances with a row of their own
    kernel_width: int = 3  # W, tokens that a convolution sees
    per_head_kernel: bool = False  # a kernel per head (Primer) rather than one for all
    query_conv: str = "segment"  # segment: queries are convolved within it; carry: across
    abs_pos: str = "learned"  # learned | sinusoid, of mha and mdha
    max_positions: int = 1024  # longest segment under learned positions
    squared_relu: bool = False  # Primer's activation
    norm_eps: float = 1e-5

    def __post_init__(self):
        for name, choices in (
            ("variant", tuple(VARIANTS)), ("query_conv", QUERY_CONVS), ("abs_pos", ABS_POS)
        ):  # fmt: skip
            if getattr(self, name) not in choices:
                raise ValueError(unknown(name, getattr(self, name), choices))
        if self.num_heads < 1 or self.model_dim % self.num_heads:
            raise ValueError(
                f"model_dim={self.model_dim} is not divisible by num_heads={self.num_heads}; heads "
                "share the width evenly."
            )
        check_sizes(self.kernel_width, self.max_distance)
        if self.mem_len < 0:
            raise ValueError(f"mem_len={self.mem_len} must be 0 or more.")
        if self.query_conv == "carry" and self.use_conv and self.mem_len < self.kernel_width - 1:
            raise ValueError(
                f"query_conv='carry' reads the {self.kernel_width - 1} queries before a segment "
                f"from the memory; mem_len={self.mem_len} is too short."
            )

    @property
    def head_dim(self) -> int:
        """D."""
        return self.model_dim // self.num_heads

    @property
    def use_conv(self) -> bool:
        """Whether queries, keys and values are convolved."""
        return VARIANTS[self.variant][0]

    @property
    def use_relative(self) -> bool:
        """Whether positions are in the score."""
        return VARIANTS[self.variant][1]


class Memory(NamedTuple):
    """What a model keeps of earlier segments; of fixed size."""

    hidden: Array
    """[L,B,M,model_dim] inputs of each layer, oldest first."""
    length: Array
    """[B] int32, how many of the M positions, the last ones, hold a token; 0 forgets a stream."""


class XLOutput(NamedTuple):
    """What `TransformerXL.run` returns."""

    logits: Array
    """[B,T,V] float32"""
    memory: Memory
    seen: dict[str, PyTree]
    """Recorded values by name, [L,...]."""


class XLBlock(nnx.Module):
    """Parameters of one layer."""

    def __init__(self, cfg: TransformerXLConfig, *, rngs: nnx.Rngs):
        m, h, d, f = cfg.model_dim, cfg.num_heads, cfg.head_dim, cfg.mlp_dim
        project = lambda: param(rngs, (m, h, d), ("embed", "heads", "head_dim"), fan_in(1))
        bias = lambda *shape, axes: param(rngs, shape, axes, zeros)
        by_head = lambda: bias(h, d, axes=("heads", "head_dim"))
        self.ln1, self.ln2 = _Norm(m, rngs=rngs), _Norm(m, rngs=rngs)
        self.wq, self.wk, self.wv = project(), project(), project()
        has_bias = not cfg.use_relative
        self.bq = by_head() if has_bias else None
        self.bk = by_head() if has_bias else None
        self.bv = by_head()
        out = ("heads", "head_dim", "embed")
        self.wo, self.bo = param(rngs, (h, d, m), out, fan_in(2)), bias(m, axes=("act_embed",))
        self.w_in, self.b_in = (
            param(rngs, (m, f), ("embed", "mlp"), fan_in(1)), bias(f, axes=("mlp",))
        )  # fmt: skip
        self.w_out, self.b_out = (
            param(rngs, (f, m), ("mlp", "embed"), fan_in(1)), bias(m, axes=("act_embed",))
        )  # fmt: skip
        own = init_rel_conv(
            rngs.params(), h, d, use_conv=cfg.use_conv, use_relative=cfg.use_relative,
            width=cfg.kernel_width, max_distance=cfg.max_distance,
            per_head_kernel=cfg.per_head_kernel,
        )  # fmt: skip
        for name, value in own._asdict().items():
            tail = ("heads", "head_dim") if cfg.per_head_kernel else ("head_dim",)
            axes = _AXES.get(name, tail if name.endswith("bias") else (None, *tail))
            setattr(self, name, None if value is None else nnx.Param(value, axes=axes))

    def variant_params(self) -> RelConvParams:
        """The kernels and tables as the pure functions take them."""
        values = {name: getattr(self, name) for name in RelConvParams._fields}
        return RelConvParams(**{n: None if v is None else v[...] for n, v in values.items()})


class _Norm(nnx.Module):
    def __init__(self, size: int, *, rngs: nnx.Rngs):
        self.weight = param(rngs, (size,), ("act_embed",), ones)
        self.bias = param(rngs, (size,), ("act_embed",), zeros)

    def __call__(self, x: Array, eps: float) -> Array:
        y = x.astype(jnp.float32)
        y = y - jnp.mean(y, axis=-1, keepdims=True)
        y = y * jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + eps)
        return (y * self.weight[...] + self.bias[...]).astype(x.dtype)


class TransformerXL(nnx.Module):
    """The model: parameters and a configuration."""

    def __init__(self, cfg: TransformerXLConfig, *, rngs: nnx.Rngs):
        self.cfg = cfg
        m, v = cfg.model_dim, cfg.vocab_size
        self.embed = param(rngs, (v, m), ("vocab", "embed"), normal(1.0))
        is_learned = not cfg.use_relative and cfg.abs_pos == "learned"
        positions = (cfg.max_positions, m)
        self.position = (
            param(rngs, positions, ("positions", "embed"), normal(0.02)) if is_learned else None
        )
        self.layers = stack_layers(lambda r: XLBlock(cfg, rngs=r), cfg.num_layers, rngs)
        self.final_norm = _Norm(m, rngs=rngs)
        self.unembed = param(rngs, (m, v), ("embed", "vocab"), fan_in(1))
        self.unembed_bias = param(rngs, (v,), ("vocab",), zeros)

    def __call__(self, tokens: Array, memory: Memory | None = None) -> tuple[Array, Memory]:
        """Logits [B,T,V] of a segment [B,T], and the memory with it."""
        out = self.run(tokens, memory)
        return out.logits, out.memory

    def init_memory(self, batch_size: int) -> Memory:
        """The memory before the first segment: nothing."""
        cfg = self.cfg
        shape = (cfg.num_layers, batch_size, cfg.mem_len, cfg.model_dim)
        return Memory(jnp.zeros(shape, self.embed.dtype), jnp.zeros(batch_size, jnp.int32))

    def run(self, tokens: Array, memory: Memory | None = None, taps: Taps = NO_TAPS) -> XLOutput:
        """`__call__` with edits and records.

        Sites: q, k, v (before convolutions, k and v of memory and segment), scores, pattern, lse,
        z, attn_out, mlp_out. `score_terms` takes the scores apart.

        Args:
          tokens: [B,T] ids.
          memory: of the segment before, or None for none.
          taps: what to edit and record, payloads [L,...].
        Raises:
          ValueError: for a memory of another batch, size or dtype, or a segment too long.
        """
        memory = self.init_memory(tokens.shape[0]) if memory is None else memory
        self._check(tokens, memory)
        x = jnp.take(self.embed[...], tokens, axis=0, mode="fill")
        if self.position is not None:
            x = x + self.position[: tokens.shape[1]]
        elif not self.cfg.use_relative:
            x = x + sinusoid(tokens.shape[1], self.cfg.model_dim).astype(x.dtype)

        def body(x: Array, xs):
            block, hidden, payloads, layer = xs
            tap = Tap(taps.with_layer_payloads(payloads), TapContext(layer))
            kept = jnp.concatenate([hidden, jax.lax.stop_gradient(x)], axis=1)
            x = self._layer(block, x, hidden, memory.length, tap)
            return x, (kept[:, x.shape[1] :], tap.finish(f"variant {self.cfg.variant!r}"))

        index = jnp.arange(self.cfg.num_layers, dtype=jnp.int32)
        xs = (self.layers, memory.hidden, taps.layer_payloads(), index)
        x, (hidden, seen) = jax.lax.scan(body, x, xs)
        x = self.final_norm(x, self.cfg.norm_eps)
        logits = jnp.einsum("btm,mv->btv", x, self.unembed[...]).astype(jnp.float32)
        length = jnp.minimum(memory.length + tokens.shape[1], self.cfg.mem_len)
        return XLOutput(logits + self.unembed_bias[...], Memory(hidden, length), seen)

    def score_terms(self, tokens: Array, memory: Memory | None = None) -> dict[str, Array]:
        """content, key_bias, position and position_bias of a relative variant, [L,B,H,T,M+T].

        They add up to the scores before the mask.
        """
        if not self.cfg.use_relative:
            raise ValueError(f"variant={self.cfg.variant!r} has no relative positions to tell.")
        memory = self.init_memory(tokens.shape[0]) if memory is None else memory
        self._check(tokens, memory)
        x = jnp.take(self.embed[...], tokens, axis=0, mode="fill")

        def body(x: Array, xs):
            block, hidden = xs
            q, k, v, past = self._project(block, x, hidden, memory.length, Tap())
            own = block.variant_params()
            if self.cfg.use_conv:
                q, k, _ = convolve(own, q, k, v, past)
            tables: Any = {name: getattr(own, name) for name in _AXES}
            terms = relative_score_terms(q, k, q_offset=hidden.shape[1], **tables)
            return self._layer(block, x, hidden, memory.length, Tap()), terms

        found = jax.lax.scan(body, x, (self.layers, memory.hidden))[1]
        return {term: found[term] for term in TERMS}

    def _project(self, block: XLBlock, x: Array, hidden: Array, length: Array, tap: Tap):
        """q [B,T,H,D], k and v [B,M+T,H,D], and under "carry" the queries before the segment.

        What memory does not hold yet is zero, as before the start of a sequence.
        """
        num_past = hidden.shape[1]
        normed = block.ln1(jnp.concatenate([hidden.astype(x.dtype), x], axis=1), self.cfg.norm_eps)
        is_there = self._is_there(num_past, x.shape[1], length)[..., None, None]

        def heads(name: str, w: nnx.Param, bias: nnx.Param | None, normed: Array, valid: Array):
            y = jnp.einsum("btm,mhd->bthd", normed, w[...])
            y = y if bias is None else y + bias[...]
            return jnp.where(valid, y, 0) if name == "past" else tap(name, jnp.where(valid, y, 0))

        carries = self.cfg.use_conv and self.cfg.query_conv == "carry"
        start = num_past - (self.cfg.kernel_width - 1)
        span = lambda a, first, last: a[:, first:last]
        q = heads("q", block.wq, block.bq, span(normed, num_past, None), jnp.bool_(True))
        k = heads("k", block.wk, block.bk, normed, is_there)
        v = heads("v", block.wv, block.bv, normed, is_there)
        past = None
        if carries:
            known = span(normed, start, num_past), span(is_there, start, num_past)
            past = heads("past", block.wq, block.bq, *known)
        return q, k, v, past

    def _layer(self, block: XLBlock, x: Array, hidden: Array, length: Array, tap: Tap) -> Array:
        cfg, num_past = self.cfg, hidden.shape[1]
        q, k, v, past = self._project(block, x, hidden, length, tap)
        visible = self._is_there(num_past, x.shape[1], length)
        z = rcmha(
            q, k, v, block.variant_params(), use_conv=cfg.use_conv, use_relative=cfg.use_relative,
            q_offset=num_past, conv_state=past, mask=visible[:, None, None], tap=tap,
        )  # fmt: skip
        assert isinstance(z, jax.Array)
        y = jnp.einsum("bthd,hdm->btm", tap("z", z), block.wo[...]) + block.bo[...]
        x = x + tap("attn_out", y)
        up = jnp.einsum("btm,mf->btf", block.ln2(x, cfg.norm_eps), block.w_in[...])
        hidden_units = jax.nn.relu(up + block.b_in[...])
        hidden_units = jnp.square(hidden_units) if cfg.squared_relu else hidden_units
        y = jnp.einsum("btf,fm->btm", hidden_units, block.w_out[...]) + block.b_out[...]
        return x + tap("mlp_out", y)

    def _is_there(self, num_past: int, num_new: int, length: Array) -> Array:
        """[B,M+T] bool: memory that holds a token, and every new token."""
        return jnp.arange(num_past + num_new) >= num_past - length[:, None]

    def _check(self, tokens: Array, memory: Memory) -> None:
        cfg = self.cfg
        wanted = (cfg.num_layers, tokens.shape[0], cfg.mem_len, cfg.model_dim)
        if memory.hidden.shape != wanted or memory.length.shape != wanted[1:2]:
            raise ValueError(
                f"memory is {memory.hidden.shape} with length {memory.length.shape}; for tokens "
                f"{tokens.shape} it must be [L,B,M,model_dim] = {wanted} with length [B]. Start "
                "one with init_memory(batch_size)."
            )
        if memory.hidden.dtype != self.embed.dtype:
            raise ValueError(
                f"memory is {memory.hidden.dtype}; the model computes in {self.embed.dtype}. Cast "
                "it, or start one with init_memory(batch_size)."
            )
        if self.position is not None and tokens.shape[1] > cfg.max_positions:
            raise ValueError(
                f"tokens has {tokens.shape[1]} positions, more than "
                f"max_positions={cfg.max_positions}."
            )


def sinusoid(length: int, width: int) -> Array:
    """[T,M] sines of position / 10000^(2n / M), and cosines, in turn."""
    rate = 10_000.0 ** (-jnp.arange(0, width, 2) / width)
    angle = jnp.arange(length)[:, None] * rate
    waves = jnp.stack([jnp.sin(angle), jnp.cos(angle)], axis=-1)
    return waves.reshape(length, -1)[:, :width]
