"""LongHeads without training: is a needle found far beyond the length a model was trained on?

Every head reads n chunks of w tokens, chosen by score, as if they stood side by side. The shipped
models, trained on texts of up to 240 tokens (T0), are asked for one of four codes in texts of 2 to
16 times that length:

    B1  it finds them (>= 0.8 of the accuracy at T0); full attention, and the first and last chunks
        alone, do not (< 0.5 of it); other chunks drawn at random help little
    B2  the loss on long texts stays within 0.1 of that at T0, and full attention's does not
    B3  in some layer heads choose the needle's chunk at least twice as often as chance, and some
        head does for 90 % of the questions
    B4  together the heads of one token read 80 % of the text, one head at most n w tokens
    B5  FLOPs of a step do not grow with the text but by the scores of its chunks; prefill is linear
    B6  chunk vectors of the paper find at least as much as mean keys

    python -m experiments.longheads                                   # minutes on one core
    python -m experiments.longheads --checkpoint=/ckpt/Llama-2-7b-hf --task=passkey \\
        --window=2048 --chunk=256 --lengths=4k,8k,16k,32k,64k,128k --trials=50 --mesh=model:8

With --checkpoint a model from a directory is asked for pass keys, with and without LongHeads.
Lu et al., 2024, arXiv:2402.10685.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags as absl_flags

import jaxheads as jh
from experiments import common
from experiments.lab import SEEDS
from jaxheads.attention import LongHeadsCache, longheads_attention
from jaxheads.data import make_passkeys
from jaxheads.data.tasks import generate
from jaxheads.interventions import chunks_read
from jaxheads.models import with_config
from jaxheads.parallel import make_mesh
from jaxheads.parallel.program import analyze
from launch import flags

TRAINED = 240
"""T0: the longest needle texts of the lab models' training."""
TIMES = (1, 2, 4, 8, 16)
TEXTS = {1: 16, 2: 8, 4: 8, 8: 4, 16: 4}
"""Texts at each multiple of T0; each is asked for all its codes."""
AT_ONCE = 4  # texts; divides all of TEXTS
READ_AT = 4  # the multiple of T0 at which B3 and B4 look at the chunks
PAPER = (2048, 256)  # window and chunk at which B5 counts FLOPs; nothing of that size is run
LOSS_TOKENS = 128  # at the end of the text


class Texts(NamedTuple):
    """Texts with M needles, and a question for each."""

    hay: np.ndarray
    """[N,T] tokens before the question."""
    questions: np.ndarray
    """[N,M,Q]"""
    answers: np.ndarray
    """[N,M]"""
    places: np.ndarray
    """[N,M] where the answers are told."""


def define_flags() -> None:
    """Defines the flags of this experiment."""
    common.define_flags("longheads")
    absl_flags.DEFINE_list("models", list(SEEDS), "Shipped names or directories, one a seed.")
    absl_flags.DEFINE_integer("window", 128, "A, tokens that a query reads.", lower_bound=1)
    absl_flags.DEFINE_integer("chunk", 16, "w, tokens in a chunk.", lower_bound=1)
    absl_flags.DEFINE_integer("needles", 4, "Codes in a text, up to 4.", lower_bound=1)
    absl_flags.DEFINE_string("checkpoint", "", "A real model, in place of the shipped ones.")
    absl_flags.DEFINE_enum("task", "passkey", ["passkey"], "What --checkpoint is asked.")
    absl_flags.DEFINE_list("lengths", ["4k", "8k"], "Tokens of the pass-key prompts.")
    absl_flags.DEFINE_integer("trials", 50, "Pass-key prompts of each length.", lower_bound=1)
    absl_flags.DEFINE_string("mesh", "", "Mesh of --checkpoint, such as model:8.")


def arms(window: int, chunk: int) -> dict[str, str]:
    """arm -> the attention of its layers."""
    base = f"window={window},chunk={chunk}"
    return {
        "longheads": f"longheads({base})",
        "full": "dense",
        "sink+window": f"longheads({base},num_recent={window // chunk - 1})",
        "random": f"longheads({base},at_random=true)",
        "mean key": f"longheads({base},repr=mean_key)",
    }


def needle_texts(
    tokenizer: jh.Tokenizer, count: int, length: int, needles: int, seed: int
) -> Texts:
    """`count` texts of one length, each with codes of one word."""
    options = {"length": length, "needles": needles}
    pairs = generate("needle", tokenizer, count, seed=seed, split="heldout", **options)
    rows = []
    for pair in pairs:
        hay, question = pair.clean.split(" Q: ")
        told = re.findall(r"Codes: (\w+) (\w+)\.", hay)
        asked = re.findall(r"of (\w+)\?", question)[0]
        ask = lambda who, q=question, asked=asked: tokenizer.encode(f"Q: {q.replace(asked, who)}")
        places = [
            len(tokenizer.encode(hay[: hay.index(f"Codes: {who} {code}.")] + f"Codes: {who}"))
            for who, code in told
        ]
        codes = [tokenizer.encode(code)[-1] for _, code in told]
        rows.append((tokenizer.encode(hay), [ask(who) for who, _ in told], codes, places))
    return Texts(*(np.array(column, np.int32) for column in zip(*rows, strict=True)))


@jax.jit
def _read(model: jh.Decoder, cache: Any, piece: jax.Array, ids: jax.Array) -> tuple[Any, jax.Array]:
    """The cache with a piece [N,P] of each text, and the loss of its last tokens."""
    out = jh.forward(model, piece, segment_ids=ids, cache=cache)
    log_probs = jax.nn.log_softmax(out.logits[:, -LOSS_TOKENS - 1 : -1])
    said = piece[:, -LOSS_TOKENS:, None]
    return out.cache, -jnp.take_along_axis(log_probs, said, axis=-1).mean()


@jax.jit
def _ask(model: jh.Decoder, cache: Any, questions: jax.Array) -> jax.Array:
    """What each text [N] says to its questions [N,M,Q]: [N,M]."""

    def ask(question: jax.Array) -> jax.Array:  # [N,Q]
        return jh.forward(model, question, cache=cache).logits[:, -1].argmax(axis=-1)

    return jax.lax.map(ask, jnp.swapaxes(questions, 0, 1)).T


def retrieve(model: jh.Decoder, texts: Texts) -> tuple[float, float]:
    """(share of right answers, loss at the end of the texts).

    Texts are padded in front and read a piece at a time, so that all lengths are one program.
    """
    right, losses = [], []
    more = -texts.hay.shape[1] % TRAINED
    hay = np.pad(texts.hay, ((0, 0), (more, 0)))
    ids = np.pad(np.ones_like(texts.hay), ((0, 0), (more, 0)))
    num_slots = TIMES[-1] * TRAINED + texts.questions.shape[-1]
    for start in range(0, len(hay), AT_ONCE):
        rows, loss = slice(start, start + AT_ONCE), 0.0
        cache = jh.init_cache(model.cfg, AT_ONCE, num_slots)
        for piece in np.split(np.arange(hay.shape[1]), hay.shape[1] // TRAINED):
            cache, loss = _read(model, cache, hay[rows, piece], ids[rows, piece])
        said = _ask(model, cache, texts.questions[rows])
        right.append(np.asarray(said) == texts.answers[rows])
        losses.append(float(loss))
    return float(np.mean(right)), float(np.mean(losses))


def reading(model: jh.Decoder, texts: Texts) -> dict[str, Any]:
    """B3 and B4: which chunks the last tokens of the questions read."""
    (options,) = {spec.options for spec in model.cfg.pattern}
    hits, covered, n = [], [], options.num_chunks
    for hay, questions, places in zip(texts.hay, texts.questions, texts.places, strict=True):
        rows = np.stack([np.concatenate([hay, question]) for question in questions])
        chunks = np.asarray(chunks_read(model, rows)[:, :, -1])  # [L,M,H,n]
        last = (rows.shape[1] - 1) // options.chunk
        for m, place in enumerate(places):
            needle = place // options.chunk
            read = chunks[:, m]  # [L,H,n]
            if 0 < needle < last - 1:  # neither sink nor recent
                hits.append((read == needle).any(axis=-1))
            covered.append(len(np.unique(read[read >= 0])) / (last + 1))
    hits = np.array(hits)  # [questions,L,H]
    chance = (n - 3) / (last - 2)
    return {
        "by_layer": (hits.mean(axis=(0, 2)) / chance).tolist(),
        "union": float(hits.any(axis=(1, 2)).mean()),
        "chance_union": 1 - (1 - chance) ** (hits.shape[1] * hits.shape[2]),
        "covered": float(np.mean(covered)),
        "one_head": options.window / rows.shape[1],
    }


def flops(window: int, chunk: int, num_heads: int = 8, head_dim: int = 16) -> dict[str, float]:
    """B5: growth of a decode step in units of the scores of its chunks, and of prefill."""
    turn = functools.partial(
        jh.attention.rotate,
        inv_freq=jh.attention.inverse_frequencies(jh.attention.RopeConfig(), head_dim)[0],
        interleaved=False,
    )
    struct = lambda length: jax.ShapeDtypeStruct((1, length, num_heads, head_dim), jnp.float32)

    def counted(fn: Any, *args: Any) -> float:
        return analyze(jax.jit(fn).lower(*args).compile().as_text()).flops

    def step(length: int) -> float:
        cache = jax.eval_shape(
            lambda: LongHeadsCache.init(
                1, length, num_heads, head_dim, chunk_size=chunk, window=window
            )
        )
        x = struct(1)
        return counted(lambda c, *qkv: c.decode_step(*qkv, turn)[0], cache, x, x, x)

    def prefill(length: int) -> float:
        x = struct(length)
        run = lambda *qkv: longheads_attention(*qkv, turn, chunk_size=chunk, window=window)[0]
        return counted(run, x, x, x)

    low, high = 8 * window, 32 * window
    scores = 2 * head_dim * num_heads * (high - low) / chunk
    return {
        "step growth / scores": (step(high) - step(low)) / scores,
        "prefill at twice the length": prefill(16 * window) / prefill(8 * window),
    }


def study(name: str, seed: int, quick: bool) -> dict[str, Any]:
    """Everything about one model."""
    given = absl_flags.FLAGS
    model, tokenizer = jh.load(name), jh.Tokenizer.load(name)
    found: dict[str, Any] = {"model": name}
    kinds = arms(given.window, given.chunk)
    for times in TIMES[:2] if quick else TIMES:
        count = AT_ONCE if quick else TEXTS[times]
        texts = needle_texts(tokenizer, count, times * TRAINED, given.needles, seed)
        for arm, attention in kinds.items():
            found[f"{arm} {times}"] = retrieve(with_config(model, attention=attention), texts)
        print(name, times, {arm: found[f"{arm} {times}"] for arm in kinds}, flush=True)
    count = 2 if quick else 8
    texts = needle_texts(tokenizer, count, READ_AT * TRAINED, given.needles, seed + 1000)
    long = with_config(model, attention=kinds["longheads"])
    return found | {"reading": reading(long, texts)}


def claims_of(results: Sequence[dict[str, Any]], costs: dict[str, float]) -> list[common.Claim]:
    """The claims, over the models."""
    times = [t for t in TIMES[1:] if f"full {t}" in results[0]]
    base = np.array([r["full 1"] for r in results])  # [models, (accuracy, loss)]
    ratio = lambda arm, t: np.array([r[f"{arm} {t}"][0] for r in results]) / base[:, 0]
    rise = lambda arm, t: np.array([r[f"{arm} {t}"][1] for r in results]) - base[:, 1]
    read = lambda what: [r["reading"][what] for r in results]
    points = lambda arm, t: 100 * np.array([r[f"{arm} {t}"][0] for r in results])
    mean = lambda arm: float(np.mean([r[f"{arm} {t}"][0] for r in results for t in times]))
    claims = []
    for t in times:
        claims += [
            common.at_least(f"B1: longheads at {t} T0 / full at T0", ratio("longheads", t), 0.8),
            common.at_most(f"B1: full attention at {t} T0 / at T0", ratio("full", t), 0.5),
            common.at_most(f"B1: sink and window at {t} T0", ratio("sink+window", t), 0.5),
            common.at_most(
                f"B1: points of random chunks above sink and window at {t} T0",
                points("random", t) - points("sink+window", t),
                15,
            ),
            common.at_most(f"B2: longheads' loss at {t} T0 - at T0", rise("longheads", t), 0.1),
            common.at_least(
                f"B2: full attention's rise of loss - longheads' at {t} T0",
                rise("full", t) - rise("longheads", t),
                0.0,
            ),
        ]
    step, prefill = costs["step growth / scores"], costs["prefill at twice the length"]
    return [
        *claims,
        common.at_least("B3: hits of the best layer / chance", np.max(read("by_layer"), 1), 2),
        common.at_least("B3: questions whose needle some head reads", read("union"), 0.9),
        common.at_least("B4: share of the text that the heads read", read("covered"), 0.8),
        common.Claim(
            "B5: growth of a step's FLOPs, 64k tokens - 16k / the scores of its chunks",
            step,
            "0.95 to 1.05",
            0.95 <= step <= 1.05,
        ),
        common.Claim(
            "B5: FLOPs of prefill, 32k tokens / 16k", prefill, "1.9 to 2.2", 1.9 <= prefill <= 2.2
        ),
        common.at_least("B6: longheads - mean key", mean("longheads") - mean("mean key"), 0.0),
    ]


def passkeys(checkpoint: str, lengths: Sequence[int], trials: int, seed: int) -> list[common.Row]:
    """Share of pass keys that a model finds, with LongHeads and as it is."""
    given = absl_flags.FLAGS
    mesh = make_mesh(given.mesh)
    model, tokenizer = jh.load(checkpoint, mesh=mesh), jh.Tokenizer.load(checkpoint)
    kinds = arms(given.window, given.chunk)
    rows = []
    for length in lengths:
        told = make_passkeys(tokenizer, trials, length=length, seed=seed)
        row: dict[str, Any] = {"tokens": length}
        for arm in ("longheads", "full"):
            long = with_config(model, attention=kinds[arm])
            right = []
            for one in told:  # padded, so that all are one program
                size = len(one.tokens)
                with jax.set_mesh(mesh):
                    out = jh.generate(
                        long,
                        np.pad(one.tokens, (length - size, 0))[None],
                        lengths=np.array([size]),
                        max_new_tokens=len(one.answer),
                    )
                right.append(np.array_equal(out[0, length:], one.answer))
            row[arm] = float(np.mean(right))
        print(row, flush=True)
        rows.append(row)
    return rows


def parse_length(text: str) -> int:
    """``"4k"`` is 4096."""
    match = re.fullmatch(r"(\d+)(k?)", text.strip())
    if not match:
        raise ValueError(f"--lengths: {text!r} is no number of tokens, such as 4096 or 4k.")
    return int(match[1]) * (1024 if match[2] else 1)


def main() -> int:
    """Runs the experiment; returns its exit code."""
    run, given = common.options(), absl_flags.FLAGS
    if given.checkpoint:
        lengths = [parse_length(text) for text in given.lengths]
        rows = passkeys(given.checkpoint, lengths, given.trials, run.seeds[0])
        claims = [
            common.at_least(f"pass keys found at {row['tokens']} tokens", row["longheads"], 0.95)
            for row in rows
        ]
        return common.finish(claims, run.workdir, table=rows)
    names = given.models[:1] if run.quick else given.models
    results = [study(name, seed, run.quick) for seed, name in enumerate(names)]
    costs = flops(*PAPER)
    kinds = arms(given.window, given.chunk)
    table = [
        {
            "model": r["model"],
            "length": f"{t} x {TRAINED}",
            **{arm: r[f"{arm} {t}"][0] for arm in kinds},
            "loss": r[f"longheads {t}"][1],
            "loss, full": r[f"full {t}"][1],
        }
        for r in results
        for t in TIMES
        if f"full {t}" in r
    ]

    def draw(figure: Any) -> None:
        axes = figure.subplots()
        for arm in kinds:
            times = [t for t in TIMES if f"{arm} {t}" in results[0]]
            found = [np.mean([r[f"{arm} {t}"][0] for r in results]) for t in times]
            axes.plot([t * TRAINED for t in times], found, marker="o", label=arm)
        axes.set(xscale="log", xlabel="tokens", ylabel="needles found", ylim=(0, 1.02))
        axes.legend(fontsize="small")

    data = {"reading": {r["model"]: r["reading"] for r in results}, "flops": costs}
    return common.finish(
        claims_of(results, costs), run.workdir, table=table, figure=draw, data=data
    )


if __name__ == "__main__":
    define_flags()
    flags.run(main)
