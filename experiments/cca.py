"""A trained model gets CCA-attention: what the swap costs, and what little tuning gives back.

The attention of the shipped lab models is replaced (g = 4, s = 16) and only W_Q, W_K, W_V are
tuned, for 120 steps of the 4,300 of their training, on documents of 4 s = 64 to L = 256 tokens, one
a row. Controls pool otherwise, or see a window of s' = s + L / g = 80 keys (or 43, for the mean of
these lengths). All arms of a model, full attention too, start from the same weights and are tuned
alike on the same rows:

    B1  the swap raises the held-out loss; tuned, it is within 0.05 nats of full attention and 0.05
        below the window; pooling by attention is no worse than by the mean or a random member
    B2  of codes told before every window of the question it finds a share 0.3 above the window's
    B3  cost buys loss over g = 2, 4, 8, 16, in the model tuned at g = 4
    B4  bytes of the cache and FLOPs of a decode step are the formula's

    python -m experiments.cca                # three lab models, minutes on one idle core
    python -m experiments.cca --steps=430    # a tenth of the training's
    python -m experiments.cca --model=DIRECTORY --data=TEXTS --noneedles

The thresholds are the claims' own, met or not. Chen et al., 2024, arXiv:2412.12465 (Llama 2 7B and
others at 32K to 128K tokens). For such a model: `python -m launch.train --model=DIRECTORY
--data=... --steps=1000 --set model.attention="cca(group_size=16,window_size=1024)" --set
train.lr=2e-5 --set train.trainable=*attention.wq,*attention.wk,*attention.wv`.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags as absl_flags

import jaxheads as jh
from experiments import common
from experiments.retrieval_heads import names_of
from jaxheads.attention import CCACache, CCAOptions, Mask, attention, cca_costs, core_tokens
from jaxheads.attention.cca_variant import init_state as init_cache_of
from jaxheads.data import DataConfig, make_dataset
from jaxheads.data.tasks import generate
from jaxheads.evaluation import evaluate_text
from jaxheads.heads import correlation
from jaxheads.models import ModelConfig, with_config
from jaxheads.training import TrainConfig, init_state, make_optimizer, make_train_step
from launch import flags

LENGTH, GROUP, WINDOW = 256, 4, 16
TUNED = ("*attention.wq", "*attention.wk", "*attention.wv")
BATCH, STEPS, LEARNING_RATE = 4, 120, 1e-3  # of the tuning; the training: 4,300 steps, 8 rows
GROUPS = (2, 4, 8, 16)
NEEDLE_LENGTH = 224
AT_ONCE = 32  # rows of an evaluation

Rows = Mapping[str, np.ndarray]
"""tokens, targets and weights [N,LENGTH], padded behind the text, where no token of it looks."""


def cca(group: int, window: int, pool: str = "cca") -> dict[str, Any]:
    """Changes of a configuration that swap the variant in."""
    return {"attention": f"cca(group_size={group},window_size={window},pool_func={pool})"}


KEYS_OF_WINDOW = WINDOW + LENGTH // GROUP
ARMS: dict[str, dict[str, Any]] = {
    "full": {},
    "cca": cca(GROUP, WINDOW),
    "mean pool": cca(GROUP, WINDOW, "mean"),
    "last member": cca(GROUP, WINDOW, "last"),
    "random member": cca(GROUP, WINDOW, "random"),
    "window only": {"window": (KEYS_OF_WINDOW,)},
    # s' at 108 tokens, the mean of the lab documents; no claim reads it
    "shorter window": {"window": (WINDOW + 108 // GROUP,)},
}


class Study(NamedTuple):
    """What one model showed, by arm or by g."""

    swapped: dict[str, float]  # held-out loss before the tuning
    tuned: dict[str, float]
    needles: dict[str, float]  # share found after it
    keys: dict[str, float]  # that a token of the held-out text sees, on average
    by_group: dict[int, float]  # loss of the tuned cca arm
    key_norms: float  # of pooled keys, over that of keys


def define_flags() -> None:
    """Defines the flags of this experiment."""
    common.define_flags("cca")
    text = absl_flags.DEFINE_string
    text("model", "lab", "A shipped name, or a directory with a model and its tokenizer.")
    text("data", "lab", "Text to tune on, of which a part is held out: as launch.train takes it.")
    absl_flags.DEFINE_integer("steps", STEPS, "Of the tuning, of 4 rows each.", lower_bound=1)
    absl_flags.DEFINE_bool("needles", True, "Look needles up too (B2), with a word a token.")


def documents(data: str, tokenizer: jh.Tokenizer, split: str, count: int, seed: int) -> Rows:
    """`Rows` of documents of at least 4 s tokens, cut at LENGTH."""
    layout = dict(seq_len=LENGTH, batch_size=64, pack=False, prefetch=0)
    cfg = DataConfig(path=data, split=split, seed=seed, **layout)
    found: list[Rows] = []
    for batch in itertools.islice(make_dataset(cfg, tokenizer=tokenizer), 10 + count):
        is_long = (batch["segment_ids"] > 0).sum(axis=1) >= 4 * WINDOW
        found.append({name: batch[name][is_long] for name in ("tokens", "targets", "weights")})
        if sum(len(rows["tokens"]) for rows in found) >= count:
            return jax.tree.map(lambda *parts: np.concatenate(parts)[:count], *found)
    raise ValueError(
        f"--data={data}: fewer than {count} documents of {4 * WINDOW} tokens; give longer texts."
    )


def far_needles(tokenizer: jh.Tokenizer, count: int, seed: int) -> Rows:
    """`Rows` with a question about a code before all windows of the question; the answer counts.

    Up to g - 1 tokens of hay are left out in front: sentences have 8 tokens, and every code would
    be the last member of its group.
    """
    options = dict(seed=seed, split="heldout", length=NEEDLE_LENGTH)
    pairs = generate("needle", tokenizer, 2 * count, **options)
    encode = functools.partial(tokenizer.encode, add_bos=tokenizer.adds_bos)
    texts = []
    for pair in pairs:
        hay = encode(pair.clean[: pair.clean.rindex(" Q:")])
        is_far = pair.marks["needle_end"] <= len(hay) - KEYS_OF_WINDOW
        if is_far and pair.marks["needle"] >= GROUP + 3:  # not told by the first words
            texts.append(encode(pair.clean + pair.answer)[len(texts) % GROUP :])
    shape = (min(count, len(texts)), LENGTH)
    tokens, targets = np.zeros((2, *shape), np.int32)
    weights = np.zeros(shape, np.float32)
    for row, ids in enumerate(texts[:count]):
        end = len(ids) - 1
        tokens[row, :end], targets[row, :end] = ids[:-1], ids[1:]
        weights[row, end - 1] = 1
    return {"tokens": tokens, "targets": targets, "weights": weights}


def cut(rows: Rows, size: int) -> list[Rows]:
    """Batches of `size` rows; what is left over is dropped."""
    count = len(rows["tokens"]) // size
    return [{k: x[n * size : (n + 1) * size] for k, x in rows.items()} for n in range(count)]


class Tuning:
    """Tunes W_Q, W_K and W_V; models of one configuration share a program."""

    def __init__(self, steps: int):
        self.steps = steps
        cfg = TrainConfig(steps=steps, lr=LEARNING_RATE, warmup_steps=steps // 10, trainable=TUNED)
        self._optimizer = make_optimizer(cfg)
        self._step = make_train_step(cfg, self._optimizer)

    def __call__(self, model: jh.Decoder, batches: Sequence[Rows]) -> jh.Decoder:
        state = init_state(jax.tree.map(jnp.copy, model), self._optimizer)
        for batch in batches:
            state, _ = self._step(state, batch)
        return state.model


def key_norms(model: jh.Decoder, tokens: np.ndarray) -> float:
    """Mean norm of the pooled keys of full attention over that of its keys."""
    seen = jh.record(jh.forward, "q_rot", "k_rot")(model, tokens).seen
    norm = lambda k: jnp.linalg.norm(k, axis=-1).mean()

    def ratio(q: jax.Array, k: jax.Array) -> jax.Array:  # of a layer
        return norm(core_tokens(q, k, k, group_size=GROUP)[0]) / norm(k)

    return float(jax.vmap(ratio)(seen["q_rot"], seen["k_rot"]).mean())


def keys_seen(rows: Rows) -> dict[str, float]:
    """Keys and core tokens that a token of the text sees in each arm, on average."""
    before = np.nonzero(rows["weights"])[1] + 1  # and itself
    cores = np.maximum(before - WINDOW, 0) // GROUP

    def count(changes: dict[str, Any]) -> np.ndarray:
        if "window" in changes:
            return np.minimum(before, changes["window"][0])
        return before - (GROUP - 1) * cores if changes else before

    return {arm: float(count(changes).mean()) for arm, changes in ARMS.items()}


def study(name: str, seed: int, tune: Tuning, run: common.Options) -> Study:
    """Every arm of one model."""
    given = absl_flags.FLAGS
    model, tokenizer = jh.load(name), jh.Tokenizer.load(name)
    held_out, asked = (1, 1) if run.quick else (8, 4)  # batches
    seen = documents(given.data, tokenizer, "train", tune.steps * BATCH, seed)
    unseen = documents(given.data, tokenizer, "validation", held_out * AT_ONCE, 0)
    needles = far_needles(tokenizer, asked * AT_ONCE, seed) if given.needles else None
    evaluate = lambda model, rows: evaluate_text(jh.forward, model, cut(rows, AT_ONCE))
    loss = lambda model: evaluate(model, unseen)["loss"]
    before, after, found = {}, {}, {}
    models = {arm: with_config(model, **changes) for arm, changes in ARMS.items()}
    for arm, swapped in models.items():
        before[arm] = loss(swapped)
        models[arm] = tuned = tune(swapped, cut(seen, BATCH))
        after[arm] = loss(tuned)
        if needles is not None:
            found[arm] = evaluate(tuned, needles)["accuracy"]
        print(f"{name}, {arm}: {before[arm]:.3f} {after[arm]:.3f} {found.get(arm, '')}", flush=True)
    by_group = {g: loss(with_config(models["cca"], **cca(g, WINDOW))) for g in GROUPS}
    short = unseen["tokens"][:AT_ONCE, : 4 * WINDOW]  # text in every row
    return Study(before, after, found, keys_seen(unseen), by_group, key_norms(model, short))


def shares() -> list[float]:
    """Operations of attention at each of GROUPS, of full attention's."""
    costs = [cca_costs(LENGTH, g, WINDOW) for g in GROUPS]
    return [cost.flops / cost.full_flops for cost in costs]


def decode_costs() -> dict[str, float]:
    """Cache bytes and FLOPs of a decode step: what is compiled, over the formula."""
    size = dict(num_heads=8, num_kv_heads=8, head_dim=64)
    cfg, length = ModelConfig(**size, model_dim=512), 131072
    state = jax.eval_shape(lambda: init_cache_of(cfg, 1, length, jnp.bfloat16, CCAOptions()))
    held = sum(x.size * x.dtype.itemsize for x in state[:4])
    cost = cca_costs(length, 16, 1024, **size)
    cache = jax.eval_shape(
        lambda: CCACache.init_cache(1, length, 8, 64, group_size=16, window_size=1024)
    )
    one, full = (jax.ShapeDtypeStruct((1, n, 8, 64), jnp.float32) for n in (1, length))
    flops = lambda f, *args: jax.jit(f).lower(*args).compile().cost_analysis()["flops"]
    attend = functools.partial(attention, mask=Mask(), implementation="dense")
    sparse = flops(CCACache.decode_step, cache, one, one, one)
    dense = flops(attend, one, full, full)
    seen = length // 16 + 1024 + 16
    return {
        "cache bytes over formula": held / (2 * cost.cache_elements),
        "cache over full": cost.cache_elements / cost.full_cache_elements,
        "compiled FLOPs of a decode step over full": sparse / dense,
        "the same over the formula": sparse / dense / (seen / length),
    }


def claims_of(studies: Sequence[Study], costs: Mapping[str, float]) -> list[common.Claim]:
    """The claims, over the models."""
    of = lambda what, arm: np.array([getattr(study, what)[arm] for study in studies])
    over = lambda a, b, what="tuned": of(what, a) - of(what, b)
    spearman = [
        correlation(shares(), [*one.by_group.values()], method="spearman") for one in studies
    ]
    claims = [
        common.at_least("B1: the swap raises the loss", over("cca", "full", "swapped"), 1e-3),
        common.at_most("B1: tuned, over full attention", over("cca", "full"), 0.05),
        common.at_least("B1: window only, over cca", over("window only", "cca"), 0.05),
        common.at_most("B1: cca, over mean pooling", over("cca", "mean pool"), 0.0),
        common.at_most("B1: cca, over random members", over("cca", "random member"), 0.0),
        common.at_most("B3: rank correlation of cost and loss over g", spearman, -0.8),
        common.at_most("B4: cache bytes, off the formula",
                       abs(costs["cache bytes over formula"] - 1), 1e-6),
        common.at_most("B4: cache at 131,072 tokens, of full", costs["cache over full"], 0.075),
        common.at_most("B4: compiled FLOPs of decoding, off the formula",
                       abs(costs["the same over the formula"] - 1), 0.1),
    ]  # fmt: skip
    if studies[0].needles:
        gain = over("cca", "window only", "needles")
        claims.append(common.at_least("B2: needles before the window, over window only", gain, 0.3))
    return claims


def main() -> int:
    """Runs the experiment; returns its exit code."""
    run, given = common.options(), absl_flags.FLAGS
    tune = Tuning(2 if run.quick else given.steps)
    names = names_of(given.model, run.seeds)
    studies = [study(name, seed, tune, run) for name, seed in zip(names, run.seeds)]
    mean = lambda what, arm: float(np.mean([getattr(study, what)[arm] for study in studies]))
    columns = ("keys", "swapped", "tuned", *(["needles"] if given.needles else []))
    table = [{"arm": arm, **{what: mean(what, arm) for what in columns}} for arm in ARMS]
    curve = [
        {"g": g, "s": WINDOW, "share of full FLOPs": share, "loss": mean("by_group", g)}
        for g, share in zip(GROUPS, shares(), strict=True)
    ]
    costs = decode_costs()
    by_model = [{"model": n, **one._asdict()} for n, one in zip(names, studies, strict=True)]
    data = {"models": by_model, "g and s": curve, "decoding": costs}
    claims, figure = claims_of(studies, costs), functools.partial(draw, curve)
    return common.finish(claims, run.workdir, table=table, figure=figure, data=data)


def draw(curve: list[dict[str, Any]], page: Any) -> None:
    """Loss over the share of full attention's operations."""
    axes = page.subplots()
    for row in curve:
        axes.plot(row["share of full FLOPs"], row["loss"], "o")
        axes.annotate(f"g={row['g']}, s={row['s']}", (row["share of full FLOPs"], row["loss"]))
    axes.set(xlabel="operations, of full attention's", ylabel="held-out loss (nats)")


if __name__ == "__main__":
    define_flags()
    flags.run(main)
