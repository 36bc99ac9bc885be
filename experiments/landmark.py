"""Landmark attention: tuned on short texts, are needles found in long ones, reading little?

The shipped lab models know texts of up to T = 240 tokens. Each is tuned with landmarks after every
8 tokens and, as its control, alike without. Then texts of up to 8 T are asked for codes told in
them: the landmark model reads 2 blocks of the past, the plain one everything, or a window of as
many tokens as the other reads.

    B1  at T its loss is within 0.05 nats of the plain model's
    B2  it finds codes at 8 T (>= 0.9 of its accuracy at T), the others do not (< 0.5 of the plain
        model's at T); random blocks are no better than the window (+ 10 points); some head reads
        the needle's block for 80 % of the questions
    B3  the loss of its answers falls with how much of the text stays before the questions
    B4  blocks for every token and head cost least loss, before blocks shared by heads or tokens
    B5  tokens read and FLOPs of a query do not grow with the text but by the scores of landmarks

    python -m experiments.landmark --workdir=runs/landmark    # about 40 minutes on one idle core

Mohtashami and Jaggi, 2023, arXiv:2305.16300 (PG-19 and arXiv math, blocks of 50, 512 tokens; LLaMA
7B, tuned). For those: `python -m launch.train --data=pg19/ --seq_len=510 --mesh=data:32 --set
model.attention="landmark(block=50)" --set data.landmark_block=50`, with `--model=DIRECTORY` to
tune, and `python -m launch.evaluate`.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags as absl_flags

import jaxheads as jh
from experiments import common
from experiments.lab import SEEDS
from experiments.longheads import TRAINED, Texts, needle_texts
from jaxheads.attention import RopeConfig, insert_landmarks, inverse_frequencies, rotate
from jaxheads.attention.landmark_cache import POLICIES, attend_chunk, init, retrieve
from jaxheads.data import DataConfig, eval_batches, make_dataset
from jaxheads.evaluation import evaluate_text
from jaxheads.heads import correlation
from jaxheads.interventions import place_landmarks
from jaxheads.models import ModelConfig, with_config
from jaxheads.parallel.program import analyze
from jaxheads.training import TrainConfig, init_state, make_optimizer, make_train_step
from jaxheads.typing import Array
from launch import flags

BLOCK, TOP_K = 8, 2
PERIOD, MARK = BLOCK + 1, 480  # the id after the tokenizer's last
CHUNK = 5 * PERIOD
READ = TOP_K * PERIOD + BLOCK + CHUNK
"""Tokens that a query reads at most: blocks, the running block, the chunk."""
ROWS, STEPS, LEARNING_RATE = 8, 500, 1e-3
TEXT = "lab"
TIMES = (1, 2, 4, 8)
POLICIES_AT = 4  # the multiple of T at which B4 compares
AT_ONCE, CODES = 4, 4  # texts read at once; codes told in each


def landmark(**options: Any) -> str:
    """The attention of a landmark model."""
    given = {"block": BLOCK, "top_k": TOP_K, "chunk": CHUNK, "token": MARK} | options
    return f"landmark({','.join(f'{name}={value}' for name, value in given.items())})"


class Arm(NamedTuple):
    """A way to read a text."""

    is_landmark: bool
    changes: dict[str, Any]


ARMS = {
    "landmark": Arm(True, {"attention": landmark()}),
    "random blocks": Arm(True, {"attention": landmark(at_random="true")}),
    "landmark, all": Arm(True, {"attention": landmark(top_k=TRAINED // BLOCK, force="true")}),
    "full": Arm(False, {}),
    "window": Arm(False, {"window": (READ,)}),
}
ONLY_AT_ONE = ("landmark, all",)  # its positions would exceed those it was trained on


class Asked(NamedTuple):
    """What a model says to the questions about its texts."""

    right: float
    """Share of right answers."""
    loss: float
    """Nats of the answers."""
    hits: np.ndarray | None
    """[L,H] share of questions whose last token reads the needle's block, with landmarks."""


def data_config(is_landmark: bool, split: str, seed: int) -> DataConfig:
    """Rows of 256 tokens of the lab language, with landmarks or without."""
    marks = dict(landmark_block=BLOCK, landmark_id=MARK) if is_landmark else {}
    if is_landmark and split == "validation":
        marks["landmark_targets"] = False
    length = 256 // BLOCK * PERIOD if is_landmark else 256
    return DataConfig(path=TEXT, split=split, seed=seed, seq_len=length, batch_size=ROWS, **marks)


def tune(model: jh.Decoder, tokenizer: jh.Tokenizer, is_landmark: bool, steps: int, seed: int):
    """The model after `steps` updates, as `launch.train` would make them."""
    if is_landmark:
        model = with_config(model, attention=landmark(force="true"))
    cfg = TrainConfig(steps=steps, lr=LEARNING_RATE, warmup_steps=steps // 10)
    optimizer, copy = make_optimizer(cfg), jax.tree.map(jnp.copy, model)  # a step gives it away
    step, state = make_train_step(cfg, optimizer), init_state(copy, optimizer)
    batches = make_dataset(data_config(is_landmark, "train", seed), tokenizer=tokenizer)
    metrics: dict[str, Any] = {}
    for batch in itertools.islice(batches, steps):
        state, metrics = step(state, batch)
    print(f"landmarks {is_landmark}: loss {float(metrics['loss']):.3f}", flush=True)
    return state.model


def text_loss(model: jh.Decoder, tokenizer: jh.Tokenizer, is_landmark: bool, count: int) -> float:
    """B1: nats per held-out token, landmarks out of question."""
    batches = eval_batches(data_config(is_landmark, "validation", 0), count, tokenizer=tokenizer)
    return evaluate_text(quiet(is_landmark), model, batches)["loss"]


def quiet(is_landmark: bool) -> Callable[..., Any]:
    """The forward of an arm, landmarks out of question."""
    return place_landmarks(jh.forward, MARK) if is_landmark else jh.forward


def turn(cfg: ModelConfig) -> Any:
    """The rotation of a model's heads."""
    inv_freq, _ = inverse_frequencies(cfg.rope, cfg.head_dim)
    return functools.partial(rotate, inv_freq=jnp.asarray(inv_freq), interleaved=False)


@jax.jit
def _read(model: jh.Decoder, cache: Any, piece: Array) -> Any:
    """The cache with a piece [N,P] of each text."""
    return jh.forward(model, piece, cache=cache).cache


@functools.partial(jax.jit, static_argnames="is_landmark")
def _ask(model: jh.Decoder, cache: Any, questions: Array, is_landmark: bool) -> tuple[Any, Any]:
    """Log-probabilities [M,N,V] after questions [M,N,Q], and the blocks [M,L,N,H,k] then read."""
    forward = jh.record(quiet(True), "q") if is_landmark else quiet(False)

    def ask(question: Array) -> tuple[Array, Any]:
        out = forward(model, question, cache=cache)
        log_probs = jax.nn.log_softmax(out.logits[:, -1])
        if not is_landmark:
            return log_probs, None
        read = functools.partial(retrieve, top_k=TOP_K, policy=POLICIES[0], rotate=turn(model.cfg))
        return log_probs, jax.vmap(read)(cache.states[0], out.seen["q"])[:, :, :, -1]

    return jax.lax.map(ask, questions)


def ask(model: jh.Decoder, arm: Arm, texts: Texts, visible: int | None = None) -> Asked:
    """The answers to all questions of all texts.

    Args:
      visible: times T tokens before the questions that are read; None: the whole text.
    """
    model = with_config(model, **arm.changes)
    mark = (lambda x: np.asarray(insert_landmarks(x, BLOCK, MARK))) if arm.is_landmark else np.array
    size = texts.hay.shape[1] // BLOCK * BLOCK  # the rest goes with the questions
    begin = 0 if visible is None else max(0, size - visible * TRAINED)
    hay, rest = mark(texts.hay[:, begin:size]), texts.hay[:, size:]
    questions = np.stack(
        [mark(np.concatenate([rest, texts.questions[:, m]], axis=1)) for m in range(CODES)]
    )  # [M,N,Q]
    piece = TRAINED // BLOCK * PERIOD if arm.is_landmark else TRAINED
    pieces = range(hay.shape[1] % piece or piece, hay.shape[1], piece)
    num_slots = TIMES[-1] * piece + PERIOD * -(-questions.shape[-1] // PERIOD)
    found = []
    for start in range(0, len(hay), AT_ONCE):
        rows = slice(start, start + AT_ONCE)
        cache = jh.init_cache(model.cfg, AT_ONCE, num_slots)
        for text in np.split(hay[rows], pieces, axis=1):
            cache = _read(model, cache, text)
        log_probs, blocks = jax.device_get(_ask(model, cache, questions[:, rows], arm.is_landmark))
        answers = texts.answers[rows].T  # [M,N]
        said = np.take_along_axis(log_probs, answers[..., None], axis=-1)[..., 0]
        hits = None
        if blocks is not None:
            needle = (texts.places[rows].T // BLOCK)[:, None, :, None, None]
            hits = (blocks == needle).any(-1).mean((0, 2))  # [L,H]
        found.append((np.mean(log_probs.argmax(-1) == answers), -said.mean(), hits))
    right, loss, hits = zip(*found, strict=True)
    return Asked(
        float(np.mean(right)),
        float(np.mean(loss)),
        None if hits[0] is None else np.mean(hits, axis=0),
    )


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


class Study(NamedTuple):
    """What one model showed."""

    at_once: list[float]
    """B1: loss with landmarks, and without."""
    asked: dict[str, dict[int, Asked]]
    """arm -> multiple of T -> answers."""
    by_length: dict[int, float]
    """B3: loss of answers by how many times T of the text are read."""
    by_policy: dict[str, float]
    """B4: loss of answers."""


def study(name: str, seed: int, run: common.Options) -> Study:
    """Tunes and asks one model."""
    model, tokenizer = jh.load(name), jh.Tokenizer.load(name)
    steps = 2 if run.quick else absl_flags.FLAGS.steps
    models = {is_landmark: tune(model, tokenizer, is_landmark, steps, seed)
              for is_landmark in (True, False)}  # fmt: skip
    count = AT_ONCE if run.quick else 3 * AT_ONCE
    times = TIMES[:2] if run.quick else TIMES
    texts = {n: needle_texts(tokenizer, count, n * TRAINED, CODES, seed) for n in times}
    asked: dict[str, dict[int, Asked]] = {}
    for arm, way in ARMS.items():
        lengths = times[:1] if arm in ONLY_AT_ONE else times
        asked[arm] = {n: ask(models[way.is_landmark], way, texts[n]) for n in lengths}
        print(name, arm, {n: round(found.right, 3) for n, found in asked[arm].items()}, flush=True)
    ours, longest = models[True], texts[times[-1]]
    batches = 1 if run.quick else 32
    policy_at = min(POLICIES_AT, times[-1])
    at_once = [text_loss(models[kind], tokenizer, kind, batches) for kind in (True, False)]
    return Study(
        at_once,
        asked,
        {n: ask(ours, ARMS["landmark"], longest, n).loss for n in times},
        {policy: ask(ours, Arm(True, {"attention": landmark(policy=policy)}), texts[policy_at]).loss
         for policy in POLICIES},
    )  # fmt: skip


def claims_of(studies: Sequence[Study], growth: float) -> list[common.Claim]:
    """The claims, over the models."""
    far = max(studies[0].asked["landmark"])
    right = lambda arm, n: np.array([s.asked[arm][n].right for s in studies])
    base, own = (np.maximum(right(arm, 1), 1e-9) for arm in ("full", "landmark, all"))
    at_once = np.array([s.at_once for s in studies])  # [models,2]
    # The head is chosen at half the length, and judged at the whole one.
    hits = lambda s, n: s.asked["landmark"][n].hits.reshape(-1)
    best = [hits(s, far)[hits(s, far // 2).argmax()] for s in studies]
    order = lambda losses: correlation([*losses], [*losses.values()], method="spearman")
    ours = np.array([s.by_policy[POLICIES[0]] for s in studies])
    cost = lambda policy: ours - np.array([s.by_policy[policy] for s in studies])
    return [
        common.at_most("B1: loss at T, landmark - plain", at_once[:, 0] - at_once[:, 1], 0.05),
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
        common.at_most(
            "B3: rank correlation of text read and loss",
            [order(s.by_length) for s in studies],
            -0.9,
        ),
        *(
            common.at_most(f"B4: loss of per_token_and_head - {policy}", cost(policy), 0.0)
            for policy in POLICIES[1:]
        ),
        common.Claim(
            "B5: growth of a query's FLOPs, 4,096 blocks - 128 / the scores of its landmarks",
            growth,
            "0.95 to 1.05",
            0.95 <= growth <= 1.05,
        ),
    ]


def define_flags() -> None:
    """Defines the flags of this experiment."""
    common.define_flags("landmark")
    absl_flags.DEFINE_list("models", list(SEEDS), "Shipped names, one a seed.")
    absl_flags.DEFINE_integer("steps", STEPS, "Updates of each model.", lower_bound=1)


def main() -> int:
    """Runs the experiment; returns its exit code."""
    run, names = common.options(), absl_flags.FLAGS.models
    names = names[:1] if run.quick else names
    studies = [study(name, seed, run) for seed, name in enumerate(names)]
    table = [
        {"model": name, "arm": arm}
        | {f"{n} T": s.asked[arm][n].right if n in s.asked[arm] else "" for n in s.by_length}
        for name, s in zip(names, studies, strict=True)
        for arm in ARMS
    ]
    data = {
        "models": names,
        "loss at T, landmark and plain": [s.at_once for s in studies],
        "heads that read the needle": [
            {n: found.hits for n, found in s.asked["landmark"].items()} for s in studies
        ],
        "loss of answers by times T of text read": [s.by_length for s in studies],
        "loss of answers by policy": [s.by_policy for s in studies],
        "tokens read at most": READ,
    }
    claims = claims_of(studies, costs())
    figure = functools.partial(draw, studies)
    return common.finish(claims, run.workdir, table=table, figure=figure, data=data)


def draw(studies: Sequence[Study], page: Any) -> None:
    """Answers over the length of the text, and their loss over how much of it is read."""
    left, right = page.subplots(1, 2)
    for arm, way in studies[0].asked.items():
        found = [np.mean([s.asked[arm][n].right for s in studies]) for n in way]
        left.plot(list(way), found, marker="o", label=arm)
    left.set_ylabel("codes found")
    left.legend(fontsize="small")
    lengths = list(studies[0].by_length)
    right.plot(lengths, [np.mean([s.by_length[n] for s in studies]) for n in lengths], "o-")
    right.set_ylabel("landmark model's loss of answers (nats)")
    for axes in (left, right):
        axes.set_xscale("log", base=2)
        axes.set_xlabel("length of the text, of that trained on")


if __name__ == "__main__":
    define_flags()
    flags.run(main)
