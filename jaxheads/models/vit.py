"""The vision transformer: images [B,H,W,C] -> patches -> layers -> logits of classes.

    model = ViT(ViTConfig(image_size=28, patch_size=7), rngs=nnx.Rngs(0))
    logits = forward(model, images).logits                   # [B,V]
    quiet = jh.ablate(forward, [(1, 2)])(model, images)      # a head silenced

The sites of taps are the decoder's, with tokens in place of text: class token, distillation token
where there is one, then the patches row by row. Layers are pre-norm and look in both directions;
what mixes tokens is a row of `vit_attention.VISION_ATTENTIONS`.

Dosovitskiy et al., 2021, arXiv:2010.11929; Touvron et al., 2021, arXiv:2012.12877 (DeiT).
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxheads.attention.contract import is_count
from jaxheads.models.decoder import Output, compute_dtype
from jaxheads.models.layers import (
    MLP,
    add_bias,
    apply_mlp,
    fan_in,
    layer_norm,
    normal,
    normalize,
    param,
    stack_layers,
    zeros,
)
from jaxheads.models.stack import RESIDUAL, rematerialize
from jaxheads.models.vit_attention import VISION_ATTENTIONS
from jaxheads.models.vit_configs import VIT_PRESETS, ViTConfig
from jaxheads.parallel import constrain
from jaxheads.taps import (
    MIXER_SITES,
    NO_TAPS,
    OUTER_SITES,
    SITES,
    STACK_SITES,
    Tap,
    TapContext,
    Taps,
)
from jaxheads.typing import Array, ArrayLike, PyTree

__all__ = [
    "VISION_ATTENTIONS",
    "VIT_PRESETS",
    "ViT",
    "ViTConfig",
    "forward",
    "sites",
    "with_config",
]


class PatchEmbed(nnx.Module):
    """The linear map of a patch, the tokens beside the patches, and the positions of all."""

    def __init__(self, cfg: ViTConfig, *, rngs: nnx.Rngs):
        p, m, dtype = cfg.patch_size, cfg.model_dim, cfg.param_dtype
        axes = (None, None, None, "embed")
        self.kernel = param(rngs, (p, p, cfg.channels, m), axes, fan_in(3), dtype)
        self.bias = param(rngs, (m,), ("act_embed",), zeros, dtype)
        token = lambda: param(rngs, (m,), ("act_embed",), normal(0.02), dtype)
        self.class_token = token()
        self.distillation_token = token() if cfg.distilled else None
        shape, axes = (cfg.num_tokens, m), ("positions", "embed")
        self.positions = param(rngs, shape, axes, normal(0.02), dtype)


class Block(nnx.Module):
    """Parameters of one layer."""

    def __init__(self, cfg: ViTConfig, *, rngs: nnx.Rngs):
        self.ln1 = layer_norm(cfg.block, rngs=rngs)
        self.attention = VISION_ATTENTIONS[cfg.mixer.name].module(cfg, rngs=rngs)
        self.ln2 = layer_norm(cfg.block, rngs=rngs)
        self.mlp = MLP(cfg.block, rngs=rngs)


class Classifier(nnx.Module):
    """A linear map to classes."""

    def __init__(self, cfg: ViTConfig, *, rngs: nnx.Rngs):
        shape, axes = (cfg.model_dim, cfg.num_classes), ("embed", "vocab")
        self.kernel = param(rngs, shape, axes, normal(0.02), cfg.param_dtype)
        self.bias = param(rngs, (cfg.num_classes,), ("vocab",), zeros, cfg.param_dtype)


class ViT(nnx.Module):
    """A vision transformer: parameters and a configuration, nothing else. `forward` runs it."""

    def __init__(self, cfg: ViTConfig, *, rngs: nnx.Rngs):
        self.cfg = cfg
        self.embed = PatchEmbed(cfg, rngs=rngs)
        self.layers = stack_layers(lambda r: Block(cfg, rngs=r), cfg.num_layers, rngs)
        self.final_norm = layer_norm(cfg.block, rngs=rngs)
        self.classifier = Classifier(cfg, rngs=rngs)
        self.teacher_classifier = Classifier(cfg, rngs=rngs) if cfg.teacher_head else None

    def __repr__(self) -> str:
        count = sum(leaf.size for leaf in jax.tree.leaves(self))
        return f"ViT({self.cfg.family}, {count:,} parameters, {self.cfg})"


def with_config(model: ViT, **changes: Any) -> ViT:
    """The same parameters under a changed configuration (``remat="full"``).

    Raises:
      ValueError: for a change that changes the parameters.
    """
    cfg = dataclasses.replace(model.cfg, **changes)
    shapes = lambda cfg: jax.tree.map(
        lambda leaf: leaf.shape, jax.tree.leaves(jax.eval_shape(lambda: ViT(cfg, rngs=nnx.Rngs(0))))
    )
    if shapes(cfg) != shapes(model.cfg):
        raise ValueError(
            f"{', '.join(sorted(changes))}: a model of this configuration has other parameters; "
            "build a ViT and copy the weights."
        )
    new = jax.tree.map(lambda leaf: leaf, model)  # of this trace, where NNX allows to set fields
    new.cfg = cfg
    return new


def sites(cfg: ViTConfig) -> tuple[str, ...]:
    """The tap sites a model of this configuration has."""
    missing = MIXER_SITES - VISION_ATTENTIONS[cfg.mixer.name].sites
    return tuple(s for s in SITES if s not in missing)


def forward(model: ViT, images: ArrayLike, *, taps: Taps = NO_TAPS) -> Output:
    """Run the model on a batch of images.

    Args:
      model: a `ViT`.
      images: [B,H,W,C] floats, normalised as the model was trained.
      taps: edits and records (`jaxheads.taps`). `embed` is [B,T,M], the class token, the
        distillation token and the patches before positions are added; `pos_embed` [T,M];
        `logits` [B,R,V] are those of the R classifiers (2 with `teacher_head`) before their mean.
    Returns:
      `Output` with logits [B,V] float32, the mean over classifiers, hidden [B,T,M], and `aux`
      where the attention has losses (``attention="moh"``).
    Raises:
      ValueError, TypeError: for images that do not fit the model, and taps it cannot honour.
    """
    cfg = model.cfg
    _check_images(cfg, images)
    taps.check(sites(cfg), cfg.num_layers, f"{cfg.family} vision transformer")
    return _forward(model, images, taps)


@jax.jit  # so that a call outside any jit is one program too, not an op at a time
def _forward(model: ViT, images: Array, taps: Taps) -> Output:
    cfg = model.cfg
    positions = jnp.arange(cfg.num_tokens, dtype=jnp.int32)
    tap = Tap(taps.only(OUTER_SITES), TapContext(None, positions))
    x = tap("embed", embed_patches(model, images))
    x = x + tap("pos_embed", model.embed.positions[...].astype(x.dtype))
    x, seen, aux = _run_layers(model, constrain(x, RESIDUAL), taps.only(STACK_SITES), positions)
    x = normalize(model.final_norm, tap("final_norm_in", x), cfg.block, tap, "final_norm")
    classifiers = [model.classifier]
    if model.teacher_classifier is not None:
        classifiers.append(model.teacher_classifier)
    logits = jnp.stack([_classify(c, x[:, i]) for i, c in enumerate(classifiers)], axis=1)
    logits = jnp.mean(tap("logits", logits), axis=1)
    seen = seen | tap.finish(f"the {cfg.family} vision transformer")
    return Output(logits, None, seen, x, aux)


def embed_patches(model: ViT, images: Array) -> Array:
    """[B,H,W,C] -> [B,T,M], the value of the site `embed` before edits.

    A patch is a linear map of its pixels: a convolution whose stride is its width.
    """
    cfg, weights = model.cfg, model.embed
    dtype = compute_dtype(cfg.block)
    (rows, columns), p = cfg.grid, cfg.patch_size
    images = constrain(jnp.asarray(images, dtype), ("batch", None, None, None))
    cut = images.reshape(-1, rows, p, columns, p, cfg.channels)
    patches = jnp.einsum("byixjc,ijcm->byxm", cut, weights.kernel[...].astype(dtype))
    patches = add_bias(patches.reshape(-1, rows * columns, cfg.model_dim), weights.bias)
    tokens = [weights.class_token, weights.distillation_token]
    extra = jnp.stack([token[...].astype(dtype) for token in tokens if token is not None])
    extra = jnp.broadcast_to(extra, (len(patches), *extra.shape))
    return jnp.concatenate([extra, patches], axis=1)


def _run_layers(
    model: ViT, x: Array, taps: Taps, positions: Array
) -> tuple[Array, dict[str, PyTree], dict[str, Array]]:
    """The residual stream [B,T,M] after all layers, what was recorded in them, and `Output.aux`."""
    cfg, block = model.cfg, model.cfg.block
    row = VISION_ATTENTIONS[cfg.mixer.name]

    def layer(x: Array, inputs) -> tuple[Array, tuple[dict[str, PyTree], dict[str, Array]]]:
        weights, payloads, index = inputs
        tap = Tap(taps.with_layer_payloads(payloads), TapContext(index, positions))
        x = tap("resid_pre", x)
        normed = normalize(weights.ln1, x, block, tap, "ln1")
        mixed = row.attend(weights.attention, normed, cfg, tap)
        y, aux = mixed if row.has_aux else (mixed, {})
        x = tap("resid_mid", x + tap("attn_out", y))
        normed = normalize(weights.ln2, x, block, tap, "ln2")
        x = tap("resid_post", x + tap("mlp_out", apply_mlp(weights.mlp, normed, block, tap)))
        return constrain(x, RESIDUAL), (tap.finish(f"attention {cfg.mixer.name!r}"), aux)

    indices = jnp.arange(cfg.num_layers, dtype=jnp.int32)
    step = rematerialize(layer, cfg.remat)
    x, (seen, aux) = jax.lax.scan(step, x, (model.layers, taps.layer_payloads(), indices))
    for item in taps.record:
        if item.layer is not None:
            seen[item.name] = jax.tree.map(lambda a, n=item.layer: a[n], seen[item.name])
    total = lambda name, a: jnp.sum(a) if is_count(name) else jnp.mean(a)
    return x, seen, {name: total(name, a) for name, a in aux.items()}


def _classify(classifier: Classifier, x: Array) -> Array:
    """[B,M] -> [B,V] float32."""
    kernel = classifier.kernel[...].astype(x.dtype)
    logits = jnp.einsum("bm,mv->bv", x, kernel, preferred_element_type=jnp.float32)
    return constrain(add_bias(logits, classifier.bias), ("batch", "act_vocab"))


def _check_images(cfg: ViTConfig, images: ArrayLike) -> None:
    shape, side = jnp.shape(images), cfg.image_size
    if len(shape) != 4 or shape[1:] != (side, side, cfg.channels) or shape[0] == 0:
        raise ValueError(
            f"images have shape {shape}; this model needs [B,H,W,C] = [B,{side},{side},"
            f"{cfg.channels}] (channels last, a batch axis even for one image)."
        )
    dtype = jnp.result_type(images)
    if not jnp.issubdtype(dtype, jnp.floating):
        raise TypeError(
            f"images have dtype {dtype}; needed floats, normalised as in training "
            "(data.images.normalize)."
        )
