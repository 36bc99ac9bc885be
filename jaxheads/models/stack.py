"""The stack of layers: one `lax.scan` over the repeating block, whatever a layer is made of."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxheads.attention.contract import is_count
from jaxheads.attention.host_memory import HostBlocks, is_host_blocks
from jaxheads.models.architectures import ARCHITECTURES, own_state
from jaxheads.models.attend import Mixed
from jaxheads.models.configs import LayerSpec, ModelConfig, parse_remat
from jaxheads.models.layers import apply_mlp, normalize
from jaxheads.models.run import Rows, Run
from jaxheads.parallel import constrain
from jaxheads.taps import Tap, TapContext, Taps
from jaxheads.typing import Array, PyTree

if TYPE_CHECKING:
    from jaxheads.models.decoder import Block, Decoder

RESIDUAL = ("batch", "length", "act_embed")


class Held(NamedTuple):
    """What the layers keep between calls, as the layer scan carries it."""

    k: Array
    """[R,B,S,K,D] for the R layers that keep keys and values."""
    v: Array
    states: tuple[PyTree, ...]
    """For each place of the pattern the states of its layers, stacked over the repeats; None
    where they keep keys and values."""

    def of_layer(self, cfg: ModelConfig, place: int, layer: Array) -> PyTree:
        """What layer `layer`, at `place` of the pattern, keeps."""
        repeat = layer // len(cfg.pattern)
        if self.states[place] is not None:

            def part(a: Array | HostBlocks) -> Array | HostBlocks:
                if isinstance(a, HostBlocks):
                    return a.of_layer(repeat)
                return jax.lax.dynamic_index_in_dim(a, repeat, keepdims=False)

            return jax.tree.map(part, self.states[place], is_leaf=is_host_blocks)
        plain = [n for n, spec in enumerate(cfg.pattern) if own_state(cfg, spec) is None]
        return Rows(self.k, self.v, repeat * len(plain) + plain.index(place))

    def with_layer(self, cfg: ModelConfig, place: int, layer: Array, new: PyTree) -> Held:
        """The same with what layer `layer` keeps replaced."""
        if isinstance(new, Rows):
            return self._replace(k=new.k, v=new.v)
        repeat = layer // len(cfg.pattern)

        def put(a: Array | HostBlocks, b: Any) -> Array | HostBlocks:
            if isinstance(a, HostBlocks):
                return b.of_layer(None)
            return jax.lax.dynamic_update_index_in_dim(a, b.astype(a.dtype), repeat, 0)

        states = list(self.states)
        states[place] = jax.tree.map(put, states[place], new, is_leaf=is_host_blocks)
        return self._replace(states=tuple(states))


class Stacked(NamedTuple):
    """What a run of layers returns."""

    x: Array
    """[B,T,M]"""
    held: Held | None
    seen: dict[str, PyTree]
    """Recorded values; leaves lead with the layers run."""
    aux: dict[str, Array]
    """Losses, each a mean over the layers that have it; counts (`is_count`), summed."""


def run_stack(
    model: Decoder,
    x: Array,
    held: Held | None,
    run: Run,
    taps: Taps,
    start: int = 0,
    stop: int | None = None,
) -> Stacked:
    """Layers `start` to `stop`: a scan over repeats of the layer pattern, then a cut last repeat.

    With `held` (a cache), all layers are run.
    """
    cfg = model.cfg
    stop = cfg.num_layers if stop is None else stop
    period = len(cfg.pattern)
    repeats, rest = divmod(stop - start, period)
    # A stack that starts inside the pattern is a stack of the pattern turned around.
    turned = [(start + i) % period for i in range(period)]
    pattern = [cfg.pattern[place] for place in turned]
    variants = [
        jax.tree.map(lambda a, n=(start + i) // period: a[n:], model.variants[place])
        for i, place in enumerate(turned)
    ]
    layers = jnp.arange(cfg.num_layers, dtype=jnp.int32)
    per_layer = (_castable(model.layers, x.dtype), taps.layer_payloads(), layers)
    if (start, stop) != (0, cfg.num_layers):
        per_layer = jax.tree.map(lambda a: a[start:stop], per_layer)

    def place_step(place: int, carry, stacked, variant_params):
        # Slicing and casting are recomputed too: what the backward pass keeps of the weights is
        # the stack itself, not a copy of it.
        weights, payloads, layer = jax.tree.map(lambda a: a[place], stacked)
        block = _cast(weights)
        x, held = carry
        state = None if held is None else held.of_layer(cfg, place, layer)
        x, state, seen, aux = run_block(
            pattern[place], run, taps, x, state, block, variant_params, payloads, layer
        )
        held = None if held is None else held.with_layer(cfg, place, layer, state)
        aux = {name: jnp.stack([value, jnp.ones_like(value)]) for name, value in aux.items()}
        return (x, held), (seen, aux)

    def places(num_places: int):
        def body(carry, xs):
            stacked, variant_params = xs
            seen, total = [], {}
            for place in range(num_places):
                step = rematerialize(partial(place_step, place), cfg.remat)
                carry, (recorded, aux) = step(carry, stacked, variant_params[place])
                seen.append(recorded)
                total = _add(total, aux)  # not every kind of layer has the same
            return carry, (jax.tree.map(lambda *a: jnp.stack(a), *seen), total)

        return body

    def grouped(first: int, groups: int, size: int):
        cut = lambda a: a[first : first + groups * size].reshape(groups, size, *a.shape[1:])
        return jax.tree.map(cut, per_layer)

    carry = (x, held)
    xs = (grouped(0, repeats, period), [jax.tree.map(lambda a: a[:repeats], v) for v in variants])
    carry, (seen, aux) = jax.lax.scan(places(period), carry, xs, unroll=cfg.scan_unroll)
    seen = jax.tree.map(lambda a: a.reshape(repeats * period, *a.shape[2:]), seen)
    aux = jax.tree.map(lambda a: jnp.sum(a, axis=0), aux)
    if rest:
        last = jax.tree.map(lambda a: a[0], grouped(repeats * period, 1, rest))
        tail = [jax.tree.map(lambda a: a[repeats], v) for v in variants[:rest]]
        carry, (more, extra) = places(rest)(carry, (last, tail))
        seen = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), seen, more)
        aux = _add(aux, extra)
    for item in taps.record:
        if item.layer is not None:
            index = item.layer - start
            seen[item.name] = jax.tree.map(lambda a, n=index: a[n], seen[item.name])
    x, held = carry
    aux = {name: a[0] if is_count(name) else a[0] / a[1] for name, a in aux.items()}
    return Stacked(x, held, seen, aux)


def _add(a: dict[str, Array], b: dict[str, Array]) -> dict[str, Array]:
    return a | {name: a[name] + value if name in a else value for name, value in b.items()}


class _Castable(NamedTuple):
    """A stack of weights that every layer casts for itself."""

    stack: Array
    """In the dtype of the parameters; carries no gradient."""
    gradient: Array
    """Zeros in the dtype of the activations, which compilers leave out; its cotangent is the
    gradient of the stack, in the precision in which it was computed."""


def _castable(block: Block, dtype: jnp.dtype) -> Block:
    """`block` with its matrices as `_Castable`, where they are wider than the activations.

    Were the layers' gradients taken with respect to the float32 stack, the backward scan would
    collect bfloat16 values in a float32 array twice their size.
    """

    def of(leaf: Array):  # [L] + the shape in one layer
        is_matrix = leaf.ndim > 2  # smaller ones are norms, which are applied in float32
        if not is_matrix or leaf.dtype == dtype:
            return leaf
        return _Castable(jax.lax.stop_gradient(leaf), _gradient_of(leaf, dtype))

    return jax.tree.map(of, block)


def _cast(block: Block) -> Block:
    """The block of one layer with its `_Castable` leaves cast."""
    is_castable = lambda x: isinstance(x, _Castable)
    return jax.tree.map(
        lambda x: x.stack.astype(x.gradient.dtype) + x.gradient if is_castable(x) else x,
        block,
        is_leaf=is_castable,
    )


@partial(jax.custom_jvp, nondiff_argnums=(1,))
def _gradient_of(stack: Array, dtype: jnp.dtype) -> Array:
    return jnp.zeros(stack.shape, dtype)


@_gradient_of.defjvp
def _gradient_of_jvp(dtype, primals, tangents):
    return _gradient_of(*primals, dtype), tangents[0].astype(dtype)


def rematerialize(step: Callable, remat: str) -> Callable:
    """`step` with what its backward pass keeps decided by the policy's text."""
    kind, names = parse_remat(remat)
    policies = jax.checkpoint_policies
    if kind == "none":
        return step
    policy = {
        "full": policies.nothing_saveable,
        "dots": policies.dots_with_no_batch_dims_saveable,
        "names": policies.save_only_these_names(*names),
        "offload": policies.save_and_offload_only_these_names(
            names_which_can_be_saved=[],
            names_which_can_be_offloaded=list(names),
            offload_src="device",
            offload_dst="pinned_host",
        ),
    }[kind]
    # Inside a scan the compiler cannot merge the recomputation with the first computation.
    return jax.checkpoint(step, policy=policy, prevent_cse=False)


class Ran(NamedTuple):
    """What one layer returns."""

    x: Array
    """[B,T,M]"""
    state: PyTree
    """What the layer keeps for the next call."""
    seen: dict[str, PyTree]
    aux: dict[str, Array]


def run_block(
    spec: LayerSpec,
    run: Run,
    taps: Taps,
    x: Array,
    state: PyTree,
    block: Block,
    variant_params: PyTree,
    payloads: Any,
    layer: Array,
) -> Ran:
    """One layer on the residual stream [B,T,M], with its parameters and its own payloads."""
    cfg = run.cfg
    ctx = TapContext(layer, run.positions, run.segment_ids, run.slots)
    tap = Tap(taps.with_layer_payloads(payloads), ctx)
    mix = ARCHITECTURES[cfg.mixer.name].mix
    norm = lambda which, y, site="": normalize(which, y, cfg, tap, site)

    def attend(h: Array) -> Mixed:
        return mix(spec, run, block.attention, variant_params, h, state, layer, tap)

    x = tap("resid_pre", x)
    if cfg.norm_placement == "post":
        mixed = attend(x)
        x = run.at_reads(x)
        x = norm(block.ln1, tap("resid_mid", x + tap("attn_out", mixed.y)), "ln1")
        x = norm(block.ln2, x + tap("mlp_out", apply_mlp(block.mlp, x, cfg, tap)), "ln2")
    else:
        normed = norm(block.ln1, x, "ln1")
        mixed = attend(normed)
        x, normed = run.at_reads(x), run.at_reads(normed)
        y = mixed.y if block.ln1_post is None else norm(block.ln1_post, mixed.y)
        y = tap("attn_out", y)
        if cfg.residual == "sequential":
            x, y = tap("resid_mid", x + y), 0
        into_mlp = normed if block.ln2 is None else norm(block.ln2, x, "ln2")
        out = apply_mlp(block.mlp, into_mlp, cfg, tap)
        out = out if block.ln2_post is None else norm(block.ln2_post, out)
        x = x + y + tap("mlp_out", out)
    x = constrain(tap("resid_post", x), RESIDUAL)
    name = spec.attention if cfg.mixer.name == "transformer" else cfg.mixer.name
    return Ran(x, mixed.state, tap.finish(f"attention variant {name!r}"), mixed.aux)
