"""DuoAttention: half of the kv heads may forget all but first and last tokens; which, gates tell.

Gates are learned on texts with pass-keys beside the frozen model; then heads of low gates stream.
Needles have to survive what random patterns break, and the gates have to agree with the retrieval
scores of `experiments.retrieval_heads`. Xiao et al., 2024, arXiv:2410.10819.

    python -m experiments.duo                          # three lab models, minutes on one core
    python -m experiments.duo --mode=train --model=/ckpt/Meta-Llama-3.1-8B-Instruct \\
        --ctx=1000:128000:50 --num_steps=2000 --lr=0.02 --reg=0.05 --sink=128 --recent=256 \\
        --data=booksum.txt --mesh=context:16,model:8 --workdir=gates
    python -m experiments.duo --mode=eval --model=... --pattern=gates --sparsity=0.5 --sink=64 \\
        --recent=256 --prefill_chunk=32000 --needles=needles.json --data=essays.txt
    python -m experiments.duo --mode=bench --model=... --pattern=gates --lengths=100000,1000000

Accuracies of the default mode are under the masks of training (`stream_heads`), in one pass; those
of --mode=eval are of decoding with two caches, and depend on --prefill_chunk.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags as absl_flags

import jaxheads as jh
from experiments import common
from experiments.duo_modes import MODES
from experiments.retrieval_heads import names_of
from experiments.retrieval_tasks import lab_task
from jaxheads.attention import duo_layers, streaming_mask
from jaxheads.data.passkeys import LAB, lab_paragraphs, passkeys
from jaxheads.data.tasks import generate
from jaxheads.discovery import (
    GateConfig,
    TwoStream,
    retrieval_scores,
    sparsify,
    train_gates,
)
from jaxheads.heads import correlation
from jaxheads.models import with_config
from jaxheads.taps import Reduction, record
from jaxheads.viz import head_table
from launch import flags, loading

SPARSITIES = (0.0, 0.25, 0.5, 0.75, 1.0)
HALF = SPARSITIES.index(0.5)
REGS = (0.0, 0.05, 0.2)
"""Weights of the L1 term that are compared."""
NO_RETRIEVAL = ("facts", "refusal")
"""Tasks the models know, of 11 to 15 tokens: more than the window, so that they could lose."""
CONTEXT = 224
"""Tokens of context in the lab language; the shipped models were trained on 256."""
CODE_WORDS = 3


class Plan(NamedTuple):
    """How much of everything."""

    steps: int
    reg_steps: int
    batch_size: int
    needles: int
    others: int
    random: int


PLANS = {"smoke": Plan(4, 2, 1, 4, 4, 2), "default": Plan(500, 200, 2, 100, 50, 10)}


class Study(NamedTuple):
    """What one model showed."""

    alpha: np.ndarray
    """[L,K] gates"""
    retrieval: np.ndarray
    """[L,K] retrieval scores, of the best query head"""
    curves: dict[str, np.ndarray]
    """needles answered at `SPARSITIES`, by how heads are ranked"""
    random: np.ndarray
    """[N] needles answered with random patterns of half the heads"""
    inverted: float
    """needles answered where the heads of the lower gates are kept instead"""
    others: dict[str, np.ndarray]
    """task -> answered with all heads, and with half of them"""
    bytes: tuple[float, float]
    """bytes of two caches over those of one: measured, and the formula"""
    means: np.ndarray
    """mean gate at `REGS`"""


def answered(model: Any, tokens: np.ndarray, at: np.ndarray, patterns: Any, sizes: Any):
    """[N] shares of rows whose marked tokens are all the most likely ones, a pattern [L,K] each."""
    tokens = jnp.asarray(tokens)
    return np.asarray(_answered(model, tokens, jnp.asarray(at), jnp.asarray(patterns), *sizes))


@partial(jax.jit, static_argnames=("sink", "recent"))
def _answered(model, tokens, at, patterns, sink: int, recent: int):
    def share(pattern):
        out = jh.stream_heads(jh.forward, pattern, sink, recent)(model, tokens)
        said = jnp.argmax(out.logits[:, :-1], axis=-1)
        right = (said == tokens[:, 1:]) | ~at[:, 1:]
        return right.all(axis=1).mean()

    return jax.lax.map(share, patterns)


def with_answers(tokenizer: Any, pairs: Sequence[Any]):
    """Prompts and answers padded on the right: ids [N,T], and where answers stand [N,T]."""
    rows = [
        (len(tokenizer.encode(pair.clean)), tokenizer.encode(pair.clean + pair.answer))
        for pair in pairs
    ]
    width = max(len(ids) for _, ids in rows)
    tokens = np.stack([np.pad(ids, (0, width - len(ids))) for _, ids in rows])
    column = np.arange(width)
    at = np.stack([(column >= start) & (column < len(ids)) for start, ids in rows])
    return tokens, at


def profile(model: Any, tokens: np.ndarray, sizes: tuple[int, int]) -> np.ndarray:
    """[L,K] attention outside first and last tokens: a ranking without training."""
    index = jnp.arange(tokens.shape[1])
    inside = Reduction(_mass, streaming_mask(index, index, *sizes).astype(jnp.float32))
    seen = record(jh.forward, "pattern", reduce=inside)(model, tokens).seen["pattern"]
    return by_kv_head(model, 1 - np.asarray(seen))


def _mass(pattern: Any, inside: Any):
    return jnp.einsum("bhts,ts->h", pattern, inside) / (pattern.shape[0] * pattern.shape[2])


def by_kv_head(model: Any, scores: np.ndarray) -> np.ndarray:
    """[L,H] -> [L,K]: of the query heads that share a kv head, the highest."""
    cfg = model.cfg
    return scores.reshape(cfg.num_layers, cfg.num_kv_heads, -1).max(axis=-1)


def random_patterns(shape: tuple[int, int], num: int, sparsity: float, seed: int) -> np.ndarray:
    """[num,L,K] patterns of equal sparsity."""
    rng = np.random.default_rng(seed)
    order = [rng.permutation(np.prod(shape)).reshape(shape) for _ in range(num)]
    return np.stack([sparsify(o / o.size, sparsity).mask for o in order])


def learn(model: Any, tokenizer: Any, plan: Plan, sizes: tuple[int, int], lr: float, reg: float,
          steps: int, people: int, seed: int) -> np.ndarray:  # fmt: skip
    """Gates of a model of the lab language."""
    data = passkeys(
        tokenizer,
        lab_paragraphs(seed=seed),
        LAB,
        lengths=[CONTEXT - 16 * people],
        num_keys=people,
        batch_size=plan.batch_size,
        seed=seed,
    )
    cfg = GateConfig(num_steps=steps, lr=lr, reg=reg)
    return train_gates(TwoStream(*sizes), model, data, cfg).alpha


def study(model: Any, tokenizer: Any, plan: Plan, *, sizes: tuple[int, int], lr: float, reg: float,
          people: int, seed: int) -> Study:  # fmt: skip
    """Learns the gates of a model, and measures what they are worth."""
    shape = (model.cfg.num_layers, model.cfg.num_kv_heads)
    train = partial(learn, model, tokenizer, plan, sizes, lr, people=people, seed=seed)
    alpha = train(reg=reg, steps=plan.steps)
    means = np.array([train(reg=weight, steps=plan.reg_steps).mean() for weight in REGS])

    pairs = generate("needle", tokenizer, plan.needles, seed=seed, split="heldout", length=CONTEXT,
                     code_words=CODE_WORDS, needles=people)  # fmt: skip
    tokens, at = with_answers(tokenizer, pairs)
    ask = partial(answered, model, tokens, at, sizes=sizes)
    masks = lambda gates: np.stack([sparsify(gates, s).mask for s in SPARSITIES])
    rankings = {"gates": alpha, "attention profile": profile(model, tokens[:8], sizes)}
    curves = {name: ask(patterns=masks(gates)) for name, gates in rankings.items()}
    draws = {
        s: random_patterns(shape, plan.random if s == 0.5 else -(-plan.random // 3), s, seed)
        for s in SPARSITIES[1:-1]
    }
    random = ask(patterns=np.concatenate([*draws.values()]))
    random = np.split(random, np.cumsum([len(drawn) for drawn in draws.values()])[:-1])
    ends = curves["gates"][[0, -1]]
    curves["random"] = np.array([ends[0], *(part.mean() for part in random), ends[1]])

    half = sparsify(alpha, 0.5).mask
    others = {}
    for name in NO_RETRIEVAL:
        asked = generate(name, tokenizer, plan.others, seed=seed, split="heldout")
        others[name] = answered(
            model, *with_answers(tokenizer, asked), np.stack([np.ones(shape), half]), sizes
        )
    task = lab_task(tokenizer, [CONTEXT], np.linspace(0, 100, 5).tolist(), people=people,
                    num_needles=max(2, plan.needles // 5), max_new=None, seed=seed)  # fmt: skip
    found = retrieval_scores(jh.forward, model, task.instances, max_new=task.max_new, stop_ids=[],
                             min_recall=-1, batch_size=plan.needles)  # fmt: skip
    return Study(
        alpha,
        by_kv_head(model, found.score),
        curves,
        random[[*draws].index(0.5)],
        float(ask(patterns=(1 - half)[None])[0]),
        others,
        cache_ratio(model, half, sizes, CONTEXT),
        means,
    )


def cache_ratio(model: Any, pattern: np.ndarray, sizes: tuple[int, int], length: int):
    """Bytes of keys and values for `length` tokens, two caches over one: measured, formula."""
    sink, recent = sizes
    duo = with_config(model, attention=duo_layers(pattern, sink=sink, recent=recent))
    one = jh.init_cache(model.cfg, 1, length)
    two = jh.init_cache(duo.cfg, 1, length)
    held = sum(x.nbytes for state in two.states for x in (*state.full, *state.streaming))
    share = float(pattern.mean())
    return held / (one.k.nbytes + one.v.nbytes), share + (1 - share) * sum(sizes) / length


def claims_of(studies: Sequence[Study]) -> list[common.Claim]:
    """What every model has to show."""

    def every(name: str, values: Sequence[float], needed: str, low=-np.inf, high=np.inf):
        values = [round(float(value), 9) for value in values]  # 5 points are exactly 5
        return common.Claim(name, values, needed, all(low <= v <= high for v in values))

    full = [s.curves["gates"][0] for s in studies]
    area = lambda s, name: float(np.trapezoid(s.curves[name], SPARSITIES))
    chance = 0.0  # of guessing all words of a code
    top = [s.alpha[np.unravel_index(s.retrieval.argmax(), s.alpha.shape)] for s in studies]
    quarter = [np.quantile(s.alpha, 0.75) for s in studies]
    steps = [np.diff(s.means).max() for s in studies]
    lost = [max(float(a[0] - a[1]) for a in s.others.values()) for s in studies]
    return [
        every("needles at half the heads, share of all heads'",
              [s.curves["gates"][HALF] / max(f, 1e-9) for s, f in zip(studies, full)],
              ">= 0.95", 0.95),
        every("needles lost by random halves",
              [f - s.random.mean() for s, f in zip(studies, full)], ">= 0.2", 0.2),
        every("needles with the heads of the lower gates", [s.inverted for s in studies],
              "<= 0.1 over chance", high=chance + 0.1),
        every("rank correlation of gates and retrieval scores",
              [_alike(s.alpha, s.retrieval) for s in studies], ">= 0.5", 0.5),
        every("gate of the top retrieval head, over the upper quartile",
              [a - b for a, b in zip(top, quarter)], ">= 0", 0.0),
        every("area under needles against sparsity, gates less the best other ranking",
              [area(s, "gates") - max(area(s, n) for n in s.curves if n != "gates")
               for s in studies], ">= 0", 0.0),
        every("bytes of the caches over the formula", [s.bytes[0] / s.bytes[1] for s in studies],
              "within 2 %", 0.98, 1.02),
        every("most that a task without retrieval loses", lost, "< 0.02",
              high=np.nextafter(0.02, 0)),
        every("mean gate without the L1 term", [s.means[0] for s in studies], "> 0.9",
              np.nextafter(0.9, 1)),
        every("mean gate, largest rise as the L1 term grows", steps, "< 0",
              high=np.nextafter(0, -1)),
    ]  # fmt: skip


def _alike(a: np.ndarray, b: np.ndarray) -> float:
    """Spearman's correlation; NaN, which holds no claim, where a map has one value only."""
    return float("nan") if 0 in (np.ptp(a), np.ptp(b)) else correlation(a, b, method="spearman")


def rows_of(studies: Sequence[Study]) -> list[dict[str, Any]]:
    """A row for each ranking and sparsity: needles answered, a number for each model."""
    return [
        {"ranking": name, "sparsity": sparsity,
         "needles": np.array([s.curves[name][n] for s in studies]).round(3)}
        for name in studies[0].curves
        for n, sparsity in enumerate(SPARSITIES)
    ]  # fmt: skip


def figure_of(studies: Sequence[Study]) -> Any:
    """The gates of the first model, and needles against sparsity."""

    def draw(page: Any) -> None:
        left, right = page.subplots(1, 2)
        image = left.imshow(studies[0].alpha, vmin=0, vmax=1, aspect="auto")
        left.set(xlabel="kv head", ylabel="layer", title="gates")
        page.colorbar(image, ax=left, shrink=0.8)
        for name in studies[0].curves:
            line = np.mean([s.curves[name] for s in studies], axis=0)
            right.plot(SPARSITIES, line, "o-", label=name)
        right.set(xlabel="share of streaming heads", ylabel="needles answered", ylim=(-0.02, 1.02))
        right.legend(fontsize=7)

    return draw


def define_flags() -> None:
    """Defines the flags of this script."""
    common.define_flags("duo")
    loading.define_model_flags()
    absl_flags.FLAGS.set_default("model", "lab")
    text, number, real = (absl_flags.DEFINE_string, absl_flags.DEFINE_integer,
                          absl_flags.DEFINE_float)  # fmt: skip
    absl_flags.DEFINE_enum("mode", "claims", ["claims", *MODES], "What to do.")
    number("sink", 2, "First tokens that streaming heads see.", lower_bound=0)
    number("recent", 8, "Last tokens that they see.", lower_bound=1)
    number("people", 3, "Lab language: people with a code in a text.", lower_bound=1)
    number("num_steps", None, "Steps of training; default: of --size, 2000 in --mode=train.")
    real("lr", 0.02, "Highest learning rate of the gates.")
    real("reg", 0.05, "Weight of the L1 term.")
    text("ctx", "1000:32000:50", "train: tokens of context, START:END:COUNT or a list.")
    text("data", None, "train, eval: text files around keys and needles.")
    text("pattern", None, "eval, bench: directory of learned gates.")
    real("sparsity", 0.5, "eval, bench: share of streaming heads.")
    number("prefill_chunk", None, "eval, bench: tokens of the prompt read at once; default: all.")
    text("needles", None, "eval: JSON list of needle, question, answer.")
    text("lengths", "1000:32000:8", "eval, bench: tokens of context.")
    number("batch_size", 1, "train: texts at once.", lower_bound=1)


def main() -> int:
    """Runs the experiment; returns its exit code."""
    given, run = absl_flags.FLAGS, common.options()
    if given.mode != "claims":
        model, tokenizer, mesh = loading.load(
            given.model, given.tokenizer, given.mesh, given.dtype, given.dcn_mesh
        )
        with jax.set_mesh(mesh):
            MODES[given.mode](given, model, tokenizer, run.workdir)
        return 0
    plan = PLANS[run.size]
    if given.num_steps:
        plan = plan._replace(steps=given.num_steps)
    studies = []
    for name, seed in zip(names_of(given.model, run.seeds), run.seeds):
        model, tokenizer, mesh = loading.load(
            name, given.tokenizer, given.mesh, given.dtype, given.dcn_mesh
        )
        with jax.set_mesh(mesh):
            studies.append(
                study(model, tokenizer, plan, sizes=(given.sink, given.recent), lr=given.lr,
                      reg=given.reg, people=given.people, seed=seed)
            )  # fmt: skip
        print(head_table(studies[-1].alpha, title=f"\n{name}: gates"), flush=True)
    return common.finish(
        claims_of(studies),
        run.workdir,
        table=rows_of(studies),
        figure=figure_of(studies),
        data={
            "models": names_of(given.model, run.seeds),
            "gates": [s.alpha for s in studies],
            "retrieval": [s.retrieval for s in studies],
            "random": [s.random for s in studies],
            "others": [s.others for s in studies],
            "mean_gate": [dict(zip(map(str, REGS), s.means)) for s in studies],
        },
    )


if __name__ == "__main__":
    define_flags()
    flags.run(main)
