"""Landmark attention: trained on short texts, does it find a needle in long ones, reading little?

Texts tell the values of keys, a token for each key and value, among filler, and ask for them: after
the token that asks for a key comes its value, which whoever finds where it was told can say. A
landmark model (4 layers, blocks of 8, T = 64 tokens of text and 8 landmarks) and a plain one are
trained alike. Then a text of up to 8 T asks for keys told once, anywhere before: the landmark model
reads 2 blocks of the past, the plain one everything, or a window of as many tokens:

    B1  at T its loss is within 0.05 nats of the plain model's
    B2  it finds them at 8 T (>= 0.9 of its accuracy at T), the others do not (< 0.5 of the plain
        model's at T); random blocks are no better than the window (+ 10 points); some head reads
        the needle's block for 80 % of the questions
    B3  its loss falls with the length of the text
    B4  blocks for every token and head cost least loss, before blocks shared by heads or tokens
    B5  tokens read and FLOPs of a query do not grow with the text but by the scores of landmarks

    python -m experiments.landmark --workdir=runs/landmark    # minutes on one idle core

Mohtashami and Jaggi, 2023, arXiv:2305.16300 (PG-19 and arXiv math, blocks of 50, 512 tokens). For
that: `python -m launch.train --data=pg19/ --seq_len=510 --mesh=data:32 --set
model.attention="landmark(block=50)" --set data.landmark_block=50`, and `python -m launch.evaluate`.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import jaxheads as jh
from experiments import common
from experiments.cca import rank_correlation
from jaxheads.attention import RopeConfig, insert_landmarks, inverse_frequencies, rotate
from jaxheads.attention.landmark_cache import POLICIES, attend_chunk, init, retrieve
from jaxheads.interventions import place_landmarks
from jaxheads.models import Decoder, ModelConfig, forward, init_cache, with_config
from jaxheads.parallel.program import analyze
from jaxheads.typing import Array, PyTree
from launch import flags

TEXT, BLOCK = 64, 8
"""T and l, in tokens of text."""
NUM_KEYS, NUM_VALUES, NUM_FILLER, NUM_ASKED = 16, 8, 8, 8
ASK = NUM_KEYS * NUM_VALUES  # told: key * NUM_VALUES + value; asked: ASK + key
VALUE = ASK + NUM_KEYS
FILL = VALUE + NUM_VALUES
MARK = FILL + NUM_FILLER  # the landmark's
PERIOD, TOP_K = BLOCK + 1, 2
CHUNK = 2 * PERIOD
QUESTIONS = 2 * NUM_ASKED  # tokens at the end of a text: one chunk with its landmarks
TIMES = (1, 2, 4, 8)
BATCH, STEPS, LEARNING_RATE = 32, 1200, 3e-3
TOLD, ASKED = 0.4, 0.3  # shares of pairs that tell a value, and that ask for one
OTHERS = 0.02
"""Weight in training of all other tokens."""
READ = TOP_K * PERIOD + BLOCK + CHUNK
"""Tokens that a query reads at most: blocks, the running block, the chunk."""


def landmark(**options: Any) -> str:
    """The attention of a landmark model."""
    given = {"block": BLOCK, "top_k": TOP_K, "chunk": CHUNK} | options
    return f"landmark({','.join(f'{name}={value}' for name, value in given.items())})"


def config(attention: str) -> ModelConfig:
    """The four-layer decoder of every arm."""
    length = TEXT // BLOCK * PERIOD
    return common.small_config(
        num_layers=4, vocab_size=MARK + 1, max_positions=length, attention=attention
    )


class Texts(NamedTuple):
    """Texts that end in questions."""

    tokens: Array
    """[B,N], landmarks not among them."""
    places: Array
    """[B,M] where the values that are asked for at the end are told."""


def pairs_of(kind: Array, keys: Array, code: Array, filler: Array) -> Array:
    """[2 N] tokens of N pairs.

    Args:
      kind: [N] 0: a key's value is told, 1: it is asked for and given, 2: filler.
      keys: [N]; code: [NUM_KEYS] their values; filler: [N,2].
    """
    told = jnp.stack([keys * NUM_VALUES + code[keys], filler[:, 1]], axis=-1)
    asked = jnp.stack([ASK + keys, VALUE + code[keys]], axis=-1)
    kind = kind[:, None]
    return jnp.where(kind == 0, told, jnp.where(kind == 1, asked, filler)).reshape(-1)


def stream(times: int, key: Array, num_keys: int | None = None) -> Array:
    """[BATCH, times * TEXT] tokens of text.

    Args:
      num_keys: keys that a text draws from; None: 4, 8 or all 16, a draw for each text.
    """

    def one(key: Array) -> Array:
        many, which, pick, values, kinds, fill = jax.random.split(key, 6)
        size = 4 * 2 ** jax.random.randint(many, (), 0, 3) if num_keys is None else num_keys
        own = jax.random.permutation(which, NUM_KEYS)
        count = times * TEXT // 2
        keys = own[jax.random.randint(pick, (count,), 0, size)]
        code = jax.random.randint(values, (NUM_KEYS,), 0, NUM_VALUES)
        drawn = jax.random.uniform(kinds, (count,))
        kind = (drawn >= TOLD).astype(jnp.int32) + (drawn >= TOLD + ASKED)
        return pairs_of(kind, keys, code, jax.random.randint(fill, (count, 2), FILL, MARK))

    return jax.vmap(one)(jax.random.split(key, BATCH))


def needles(times: int, key: Array) -> Texts:
    """Texts that tell NUM_ASKED values once, and ask for them at the end."""

    def one(key: Array) -> Texts:
        which, pick, values, kinds, fill, where = jax.random.split(key, 6)
        own = jax.random.permutation(which, NUM_KEYS)
        asked, others = own[:NUM_ASKED], own[NUM_ASKED:]
        count = times * TEXT // 2 - NUM_ASKED
        keys = others[jax.random.randint(pick, (count,), 0, NUM_KEYS - NUM_ASKED)]
        code = jax.random.randint(values, (NUM_KEYS,), 0, NUM_VALUES)
        places = jax.random.permutation(where, count)[:NUM_ASKED]
        kind = jnp.where(jax.random.bernoulli(kinds, TOLD, (count,)), 0, 2).at[places].set(0)
        filler = jax.random.randint(fill, (count, 2), FILL, MARK)
        hay = pairs_of(kind, keys.at[places].set(asked), code, filler)
        ask = pairs_of(jnp.ones(NUM_ASKED), asked, code, filler[:NUM_ASKED])
        return Texts(jnp.concatenate([hay, ask]), 2 * places)

    return jax.vmap(one)(jax.random.split(key, BATCH))


def with_marks(tokens: Array) -> Array:
    """The text with its landmarks."""
    return jnp.asarray(insert_landmarks(tokens, BLOCK, MARK))


def train_loss(has_marks: bool, model: Decoder, tokens: Array) -> Array:
    """Next-token cross-entropy over the text, and over landmarks where there are any.

    Values that were told before count most: nothing else can be known, and a small model would be
    long in noticing.
    """
    tokens = with_marks(tokens) if has_marks else tokens
    logits, targets = forward(model, tokens).logits[:, :-1], tokens[:, 1:]
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
    told = jnp.where(tokens < ASK, tokens // NUM_VALUES, NUM_KEYS)[:, None, :-1]
    asked = tokens[:, :-1] - ASK
    is_known = jnp.tril(told == asked[..., None]).any(-1) & (asked < NUM_KEYS)  # [B,N]
    weights = jnp.where(is_known, 1.0, OTHERS)
    return (weights * losses).sum() / weights.sum()


def text_loss(changes: dict[str, Any], model: Decoder, tokens: Array) -> Array:
    """Nats per token of text, landmarks out of question.

    Args:
      changes: of the configuration; ``cached`` reads the text in chunks through a cache.
    """
    changes = dict(changes)
    is_cached = changes.pop("cached", False)
    model = with_config(model, **changes)
    if model.cfg.attention == "dense":
        logits, targets = forward(model, tokens).logits[:, :-1], tokens[:, 1:]
        return optax.softmax_cross_entropy_with_integer_labels(logits, targets).mean()
    marked = with_marks(tokens)
    cache = init_cache(model.cfg, *marked.shape) if is_cached else None
    logits = place_landmarks(forward, MARK)(model, marked, cache=cache).logits
    # Every token of text but the first is a target once; a landmark tells what follows it.
    columns = np.arange(marked.shape[1] - 1)
    columns = columns[(columns + 2) % PERIOD != 0]
    losses = optax.softmax_cross_entropy_with_integer_labels(
        logits[:, columns], marked[:, columns + 1]
    )
    return losses.mean()


def answers(changes: dict[str, Any], model: Decoder, texts: Texts) -> dict[str, Array]:
    """Share of right answers and, with a cache, of needles whose block each head [L,H] reads."""
    changes = dict(changes)
    is_cached = changes.pop("cached", False)
    model = with_config(model, **changes)
    right = texts.tokens[:, -QUESTIONS + 1 :: 2]
    hay, ask = texts.tokens[:, :-QUESTIONS], texts.tokens[:, -QUESTIONS:]
    if model.cfg.attention == "dense":
        logits = forward(model, texts.tokens).logits[:, -QUESTIONS::2]
        return {"right": (logits.argmax(-1) == right).mean()}
    hay, ask = with_marks(hay), with_marks(ask)
    said = np.arange(0, QUESTIONS, 2) + np.arange(0, QUESTIONS, 2) // BLOCK  # the keys asked for
    quiet = place_landmarks(forward, MARK)
    if not is_cached:
        logits = quiet(model, jnp.concatenate([hay, ask], axis=1)).logits[:, -CHUNK:][:, said]
        return {"right": (logits.argmax(-1) == right).mean()}
    cache = init_cache(model.cfg, BATCH, hay.shape[1] + CHUNK)
    cache = forward(model, hay, cache=cache).cache
    out = jh.record(quiet, "q")(model, ask, cache=cache)
    read = functools.partial(retrieve, top_k=TOP_K, policy=POLICIES[0], rotate=turn(model.cfg))
    blocks = jax.vmap(read)(cache.states[0], out.seen["q"])[:, :, :, said]  # [L,B,H,M,k]
    needle = (texts.places // BLOCK)[:, None, :, None]
    hits = (blocks == needle).any(-1).mean((1, 3))  # [L,H]
    right = out.logits[:, said].argmax(-1) == right
    return {"right": right.mean(), "hits": hits}


def turn(cfg: ModelConfig) -> Any:
    """The rotation of a model's heads."""
    inv_freq, _ = inverse_frequencies(cfg.rope, cfg.head_dim)
    return functools.partial(rotate, inv_freq=jnp.asarray(inv_freq), interleaved=False)


def fit(attention: str, run: common.Options) -> PyTree:
    """Models [N] with this attention."""
    return common.fit(
        functools.partial(train_loss, attention != "dense"),
        lambda key: Decoder(config(attention), rngs=nnx.Rngs(key)),
        functools.partial(stream, 1),
        steps=5 if run.quick else STEPS,
        seeds=run.seeds,
        lr=LEARNING_RATE,
    ).params


class Arm(NamedTuple):
    """A way to read a text."""

    is_landmark: bool
    changes: dict[str, Any]


ARMS = {
    "landmark": Arm(True, {"attention": landmark(), "cached": True}),
    "random blocks": Arm(True, {"attention": landmark(at_random="true"), "cached": True}),
    "landmark, all": Arm(True, {}),
    "full": Arm(False, {}),
    "window": Arm(False, {"window": (READ,)}),
}
ONLY_AT_ONE = ("landmark, all",)  # its positions would exceed those it was trained on


def costs(num_heads: int = 4, head_dim: int = 16) -> float:
    """B5: growth of one query's FLOPs over that of its scores of landmarks."""
    rope = turn(ModelConfig(head_dim=head_dim, rope=RopeConfig()))
    x = jax.ShapeDtypeStruct((1, 1, num_heads, head_dim), jnp.float32)

    def counted(num_blocks: int) -> float:
        cache = jax.eval_shape(lambda: init(1, num_blocks, num_heads, head_dim, block_size=BLOCK))
        step = lambda cache, q, k, v: attend_chunk(
            cache, q, k, v, None, TOP_K, POLICIES[0], rotate=rope
        )[0]
        return analyze(jax.jit(step).lower(cache, x, x, x).compile().as_text()).flops

    few, many = 128, 4096
    return (counted(many) - counted(few)) / (2 * head_dim * num_heads * (many - few))


def main() -> int:
    run = common.options()
    models = {True: fit(landmark(), run), False: fit("dense", run)}
    batches = 2 if run.quick else 8
    times = TIMES[:2] if run.quick else TIMES
    evaluate = functools.partial(common.evaluate, seeds=run.seeds, num_batches=batches)
    found: dict[str, Any] = {}
    for name, arm in ARMS.items():
        for n in times[:1] if name in ONLY_AT_ONE else times:
            measured = evaluate(
                functools.partial(answers, arm.changes),
                models[arm.is_landmark],
                functools.partial(needles, n),
            )
            found[f"{name} {n}"] = measured
            print(name, n, measured["right"], flush=True)

    def loss_at(is_landmark: bool, changes: dict[str, Any], n: int, num_keys: int | None):
        measure = functools.partial(text_loss, changes)
        return evaluate(
            measure, models[is_landmark], functools.partial(stream, n, num_keys=num_keys)
        )

    at_once = {is_landmark: loss_at(is_landmark, {}, 1, None) for is_landmark in (True, False)}
    cached = {"cached": True}
    by_length = {n: loss_at(True, cached, n, NUM_KEYS) for n in times}
    by_policy = {
        policy: loss_at(True, {"attention": landmark(policy=policy), **cached}, times[-2], NUM_KEYS)
        for policy in POLICIES
    }
    print(at_once, by_length, by_policy, flush=True)
    claims = claims_of(found, at_once, by_length, by_policy, costs())
    table = [
        {"arm": name}
        | {f"{n} T": float(found[f"{name} {n}"]["right"].mean()) for n in times
           if f"{name} {n}" in found}
        for name in ARMS
    ]  # fmt: skip
    table = [{key: row.get(key, "") for key in table[0]} for row in table]
    data = {
        "answers": {name: x["right"] for name, x in found.items()},
        "heads": {name: x["hits"] for name, x in found.items() if "hits" in x},
        "loss at T": {"landmark": at_once[True], "plain": at_once[False]},
        "loss by length": by_length,
        "loss by policy": by_policy,
        "tokens read at most": READ,
    }
    draw_it = functools.partial(draw, table, by_length)
    return common.finish(claims, run.workdir, table=table, figure=draw_it, data=data)


def claims_of(
    found: dict[str, Any],
    at_once: dict[bool, np.ndarray],
    by_length: dict[int, np.ndarray],
    by_policy: dict[str, np.ndarray],
    growth: float,
) -> list[common.Claim]:
    """The claims, over the seeds."""
    far = max(by_length)
    right = lambda arm, n: found[f"{arm} {n}"]["right"]
    base = np.maximum(right("full", 1), 1e-9)
    own = np.maximum(right("landmark, all", 1), 1e-9)
    # The head is chosen at half the length, and judged at the whole one.
    seeds = range(len(base))
    judge, other = (found[f"landmark {n}"]["hits"] for n in (far // 2, far))
    best = [other[s].reshape(-1)[judge[s].argmax()] for s in seeds]
    spearman = [
        rank_correlation(np.array(list(by_length)), np.array([x[s] for x in by_length.values()]))
        for s in seeds
    ]
    ours = by_policy["per_token_and_head"]
    return [
        common.at_most("B1: loss at T, landmark - plain", at_once[True] - at_once[False], 0.05),
        common.at_least(
            f"B2: landmark at {far} T / its own at T", right("landmark", far) / own, 0.9
        ),
        common.at_most(f"B2: full attention at {far} T / at T", right("full", far) / base, 0.5),
        common.at_most(f"B2: a window at {far} T / full at T", right("window", far) / base, 0.5),
        common.at_most(
            f"B2: points of random blocks above the window at {far} T",
            100 * (right("random blocks", far) - right("window", far)),
            10,
        ),
        common.at_least(f"B2: needles whose block the best head reads at {far} T", best, 0.8),
        common.at_most("B3: rank correlation of length and loss", spearman, -0.9),
        *(
            common.at_most(f"B4: loss of per_token_and_head - {policy}", ours - loss, 0.0)
            for policy, loss in by_policy.items()
            if policy != "per_token_and_head"
        ),
        common.Claim(
            "B5: growth of a query's FLOPs, 4,096 blocks - 128 / the scores of its landmarks",
            growth,
            "0.95 to 1.05",
            0.95 <= growth <= 1.05,
        ),
    ]


def draw(table: list[dict[str, Any]], by_length: dict[int, np.ndarray], page: Any) -> None:
    """Answers and loss over the length of the text."""
    left, right = page.subplots(1, 2)
    for row in table:
        points = [(int(name[:-2]), x) for name, x in row.items() if name != "arm" and x != ""]
        left.plot(*zip(*points), marker="o", label=row["arm"])
    left.set_ylabel("right answers")
    left.legend()
    right.plot(list(by_length), [x.mean() for x in by_length.values()], "o-")
    right.set_ylabel("landmark model's loss (nats)")
    for axes in (left, right):
        axes.set_xscale("log", base=2)
        axes.set_xlabel("length of the text, of that trained on")


if __name__ == "__main__":
    common.define_flags("landmark")
    flags.run(main)
