"""What each attention head of a decoder does, as four maps of layers x heads.

    previous token   mean attention from a token to the one before it
    first token      mean attention to the first token (a resting place)
    induction        attention from the second half of a random sequence repeated twice to the token
                     that followed the same token in the first half (Olsson et al., 2022,
                     arXiv:2209.11895)
    loss increase    loss on held-out text with the head's output set to zero, minus the loss
                     without an edit, in nats per token

Offline, after `make demo` has trained a model (about 20 seconds on two cores):

    python -m experiments.head_map --model=runs/demo

At real scale, on any Hugging Face directory and any mesh:

    python -m experiments.head_map --model=/path/to/Llama-3.1-8B --data=corpus.jsonl --mesh=model:8

It writes head_map.json (scores), head_map.png and heads.json (the heads whose loss increase is
largest, which `launch.evaluate --heads` reads) to --workdir.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags as absl_flags

import jaxheads as jh
from jaxheads.data import DataConfig, eval_batches
from jaxheads.typing import Array
from jaxheads.viz import head_map, head_table
from launch import flags, loading


def attention_at_offset(pattern: Array, *, offset: int, first: int) -> Array:
    """[B,H,T,S] -> [B,H,T - first]: attention from query t >= first to key t - offset."""
    t = jnp.arange(first, pattern.shape[2])
    return pattern[:, :, t, t - offset]


def _text_maps(pattern: Array) -> tuple[Array, Array]:
    """Attention of queries t >= 1 to the token before and to the first token, [B,H,T-1] each."""
    return attention_at_offset(pattern, offset=1, first=1), pattern[:, :, 1:, 0]


def induction_scores(model: jh.Decoder, *, length: int, batch_size: int, seed: int) -> Array:
    """[L,H] induction score on random tokens [B, 2 * length] that repeat after `length`."""
    half = np.random.default_rng(seed).integers(0, model.cfg.vocab_size, (batch_size, length))
    reduce = partial(attention_at_offset, offset=length - 1, first=length)
    fwd = jh.record(jh.forward, "pattern", reduce=reduce)
    seen = jax.jit(fwd)(model, np.tile(half, 2).astype(np.int32)).seen["pattern"]  # [L,B,H,T]
    return jnp.mean(seen, axis=(1, 3))


def batch_loss(gates: Array, model: jh.Decoder, batch: dict[str, Array]) -> Array:
    """Mean cross-entropy, nats per token, with heads scaled by gates [L,H]."""
    out = jh.scale_heads(jh.forward, gates)(
        model, batch["tokens"], positions=batch["positions"], segment_ids=batch["segment_ids"]
    )
    log_probs = jax.nn.log_softmax(out.logits)
    taken = jnp.take_along_axis(log_probs, batch["targets"][..., None], axis=-1)[..., 0]
    return -jnp.sum(taken * batch["weights"]) / jnp.sum(batch["weights"])


def head_maps(model: jh.Decoder, batch: dict[str, Array], *, seed: int = 0) -> dict[str, Array]:
    """The four maps [L,H] of the module's docstring.

    Args:
      batch: one document a row (segment id 1, padding 0): tokens, targets, segment_ids,
        positions, weights, all [B,T].
    """
    num_layers, num_heads = model.cfg.num_layers, model.cfg.num_heads
    fwd = jh.record(jh.forward, "pattern", reduce=_text_maps)
    seen = jax.jit(fwd)(
        model,
        batch["tokens"],
        positions=batch["positions"],
        segment_ids=batch["segment_ids"],
    ).seen["pattern"]
    is_text = (batch["segment_ids"][:, 1:] != 0).astype(jnp.float32)
    mean = lambda x: jnp.einsum("lbht,bt->lh", x, is_text) / jnp.sum(is_text)
    previous, first = (mean(x) for x in seen)
    batch_size, length = batch["tokens"].shape
    induction = induction_scores(model, length=length // 2, batch_size=batch_size, seed=seed)

    @jax.jit
    def increases(model, batch, gates):
        baseline = batch_loss(jnp.ones((num_layers, num_heads)), model, batch)
        return jh.sweep(lambda g: batch_loss(g, model, batch), gates, batch_size=4) - baseline

    increase = increases(model, batch, jh.heads.leave_one_out(num_layers, num_heads))
    return {
        "previous token": previous,
        "first token": first,
        "induction": induction,
        "loss increase": increase.reshape(num_layers, num_heads),
    }


def define_flags() -> None:
    """Defines the flags of this script."""
    flags.define_common()
    text, number = absl_flags.DEFINE_string, absl_flags.DEFINE_integer
    text("model", "runs/demo", "Model directory or training workdir.")
    text("tokenizer", None, "'bytes' or a tokenizer.json; default: the one beside the model.")
    text("data", None, "Text for the maps; default: the held-out part of stdlib.")
    text("workdir", None, "Where results go; default: MODEL/head_map.")
    text("mesh", "", "Device mesh, such as data:2,model:4.")
    number("batch_size", 8, "Sequences.", lower_bound=1)
    number("seq_len", 128, "Tokens a sequence.", lower_bound=4)
    number("top", 4, "Heads written to heads.json.", lower_bound=1)
    number("seed", 0, "Seed of the random repeated sequence.")


def main() -> None:
    """Compute the maps, print them, and write them to the workdir."""
    given = absl_flags.FLAGS
    model, tokenizer, mesh = loading.load(given.model, given.tokenizer, given.mesh, None)
    data = DataConfig(
        path=given.data or "stdlib",
        tokenizer=tokenizer.spec,
        split="all" if given.data else "validation",  # a run trains on the rest of the default
        batch_size=given.batch_size,
        seq_len=given.seq_len,
        pack=False,  # a row is one document, so that its first token is the document's
    )
    batch = {k: jnp.asarray(v) for k, v in next(iter(eval_batches(data, limit=1))).items()}
    with jax.set_mesh(mesh):
        maps = {k: np.asarray(v) for k, v in head_maps(model, batch, seed=given.seed).items()}

    workdir = Path(given.workdir or Path(given.model) / "head_map")
    workdir.mkdir(parents=True, exist_ok=True)
    for name, values in maps.items():
        print(f"\n{name}\n{head_table(values)}")
    flags.write_json(
        workdir / "head_map.json",
        {**flags.provenance(), "maps": {name: values.tolist() for name, values in maps.items()}},
    )
    increase = maps["loss increase"]
    heads = jh.heads.top_k(increase, min(given.top, increase.size))
    jh.heads.to_json(
        workdir / "heads.json",
        num_layers=model.cfg.num_layers,
        num_heads=model.cfg.num_heads,
        heads=heads,
        model=given.model,
        meta={"method": "loss increase under zero ablation", "data": data.path},
    )
    head_map(increase, workdir / "head_map.png", title="loss increase (nats)")
    print(
        f"\nThe {len(heads)} heads the model needs most: "
        f"{', '.join(jh.heads.label(h) for h in heads)} (layer.head). To evaluate without them:\n"
        f"  python -m launch.evaluate --model={given.model} "
        f"--heads={workdir / 'heads.json'} --edit=ablate"
    )


if __name__ == "__main__":
    define_flags()
    flags.run(main)
