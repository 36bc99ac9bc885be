"""Two sets of tables find the relevant behaviours where one set cannot.

A synthetic click log (`jaxheads.data.clicklog`) in which relevance (category and recency) and
evidence (taste) are separate and known. DARE keeps attention and representation apart; TWIN has to
put both into one dot product. Reported per model: AUC, retrieval NDCG@16 of the scores with the
true weights as gain, and their rank correlation with the true weights.

    python -m experiments.dare                 # about 6 minutes of processor time
    python -m experiments.dare --quick         # seconds; shows nothing
    python -m experiments.dare --dataset=taobao --data_dir=taobao/ --embedding_dim=16 \\
        --seeds=0,1,2,3,4 --mesh=data:8        # a real log instead: see dare_logs.py

All models: Adam 3e-3, batches of 512, 3 epochs over 60,000 samples (or 150,000), 8 numbers a field,
K = 16, without the auxiliary head unless marked "+ aux". Feng et al., 2024, arXiv:2410.02604.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import flags as absl_flags
from flax import nnx
from scipy.stats import rankdata

from experiments import common, dare_logs
from jaxheads.data.clicklog import HALF_LIFE, World, batches, make_click_log, make_world
from jaxheads.embeddings.diagnostics import learned_relevance, retrieval_ndcg
from jaxheads.models.recommender import (
    RECOMMENDERS,
    LongSequenceRecommender,
    RecommenderConfig,
    apply,
    init_stats,
    loss,
)
from jaxheads.models.recommender_gradients import gradient_conflict
from jaxheads.training.ranking import auc
from jaxheads.typing import Array, PyTree
from launch import flags

LR = 3e-3
BATCH_SIZE = 512
EPOCHS = 3
TOP_K = 16
DIM = 8
LENGTH = 64
TEST_SEED = 10_000
CONFLICT_STEPS = 100
MOST_CONTROL_ERROR = 0.02

Batch = Mapping[str, Any]


class Arm(NamedTuple):
    """One model trained on so many samples."""

    model: str
    samples: int
    changes: Mapping[str, Any] = {}

    def config(self, world: World) -> RecommenderConfig:
        """The model of this arm."""
        size = dict(num_times=LENGTH + 1, top_k=TOP_K, representation_dim=DIM, aux_loss=False)
        make = RECOMMENDERS[self.model]
        return make(world.num_items, world.num_categories, **{**size, **self.changes})


SMALL, LARGE = 60_000, 150_000
ARMS: Mapping[str, Arm] = {
    "DARE": Arm("dare", SMALL),
    "TWIN": Arm("twin", SMALL),
    "TWIN w/ projection": Arm("twin-projection", SMALL),
    "DARE, d_A = 4": Arm("dare", SMALL, {"attention_dim": 4}),
    "DARE, 150k": Arm("dare", LARGE),
    "TWIN, 150k": Arm("twin", LARGE),
    "DARE + aux": Arm("dare", SMALL, {"aux_loss": True}),
    "TWIN + aux": Arm("twin", SMALL, {"aux_loss": True}),
    "TWIN-4E": Arm("twin-4e", SMALL),
    "TWIN w/o TR": Arm("twin-no-tr", SMALL),
    "TWIN hard search": Arm("twin-hard", SMALL),
    "DIN": Arm("din", SMALL),
    "mean pooling": Arm("mean", SMALL),
}


class Trained(NamedTuple):
    """A model after training."""

    model: LongSequenceRecommender
    stats: PyTree
    losses: np.ndarray


@functools.partial(jax.jit, static_argnums=0, donate_argnums=(1, 2, 3))
def train_step(optimizer: optax.GradientTransformation, model, stats, state, batch):
    """One update; compiled once per configuration, for all seeds."""
    (value, out), grads = jax.value_and_grad(loss, has_aux=True)(model, stats, batch)
    updates, state = optimizer.update(grads, state, model)
    return optax.apply_updates(model, updates), out.stats, state, value


def train(
    cfg: RecommenderConfig,
    stream: Iterable[Batch],
    *,
    seed: int,
    optimizer: optax.GradientTransformation,
) -> Trained:
    """Trains one model on a stream of batches, wherever they come from.

    Args:
      cfg: the model.
      stream: batches as `models.recommender` reads them, all of one shape.
      seed: of the initialisation.
      optimizer: one object for all seeds, or each compiles its own step.
    """
    model, stats, state = _start(cfg, seed, optimizer)
    losses = []
    for batch in stream:
        model, stats, state, value = train_step(optimizer, model, stats, state, batch)
        losses.append(value)
    return Trained(model, stats, np.asarray(losses))


def _start(cfg: RecommenderConfig, seed: int, optimizer: optax.GradientTransformation):
    model = LongSequenceRecommender(cfg, rngs=nnx.Rngs(seed))
    return model, init_stats(cfg), optimizer.init(model)


@jax.jit
def _predict(model: LongSequenceRecommender, stats: PyTree, batch: Batch) -> tuple[Array, Array]:
    out = apply(model, stats, batch, train=False)
    return out.logit, out.scores


def predict(trained: Trained, stream: Iterable[Batch]) -> tuple[np.ndarray, np.ndarray]:
    """Log odds [N] and scores [N,T] over a stream of batches."""
    pairs = [_predict(trained.model, trained.stats, batch) for batch in stream]
    logits, scores = (np.concatenate([np.asarray(x) for x in xs]) for xs in zip(*pairs))
    return logits, scores


def inputs(log: Mapping[str, np.ndarray], batch_size: int, **order: Any) -> Iterable[Batch]:
    """Batches of what a model reads: without the truth."""
    read = ("item", "category", "history_item", "history_category", "label")
    return batches({name: log[name] for name in read}, batch_size, **order)


def rank_correlation(scores: np.ndarray, weights: np.ndarray) -> float:
    """Mean over samples of Spearman's correlation along the history (average ranks).

    NaN entries of `weights` are left out; so are samples in which nothing varies.
    """
    used = ~np.isnan(weights)
    # Those left out share the lowest rank: the others' ranks move by a constant.
    ranks = (rankdata(np.where(used, x, -np.inf), axis=1) for x in (scores, weights))
    mean = lambda x: (x * used).sum(axis=1, keepdims=True) / used.sum(axis=1, keepdims=True)
    a, b = (np.where(used, x - mean(x), 0) for x in ranks)
    scale = np.sqrt((a * a).sum(axis=1) * (b * b).sum(axis=1))
    varies = scale > 0
    return float(((a * b).sum(axis=1)[varies] / scale[varies]).mean()) if varies.any() else 0.0


class Score(NamedTuple):
    """What one trained model reaches on the test log."""

    auc: float
    ndcg: float
    correlation: float
    """`rank_correlation` over the whole history, most of which has weight 0."""
    correlation_among_relevant: float
    """The same over the behaviours of positive weight."""


def measure(trained: Trained, test: Mapping[str, np.ndarray], batch_size: int) -> Score:
    """Scores on the test log."""
    used = len(test["label"]) // batch_size * batch_size
    logits, scores = predict(trained, inputs(test, batch_size))
    weights = test["true_weights"][:used]
    relevant = weights[weights.any(axis=1)]  # of samples with any
    relevant = np.where(relevant > 0, relevant, np.nan)
    return Score(
        auc(logits, test["label"][:used]),
        retrieval_ndcg(scores, weights, TOP_K),
        rank_correlation(scores, weights),
        rank_correlation(scores[weights.any(axis=1)], relevant),
    )


def controls(test: Mapping[str, np.ndarray]) -> dict[str, float]:
    """NDCG of random scores, and of the newest first."""
    weights = test["true_weights"]
    random = np.random.default_rng(0).random(weights.shape)
    recency = np.broadcast_to(np.arange(weights.shape[1], dtype=np.float32), weights.shape)
    ndcg = lambda scores: retrieval_ndcg(scores, weights, TOP_K)
    return {"random": ndcg(random), "recency": ndcg(recency)}


class Fight(NamedTuple):
    """Gradients of the category table over the first steps of TWIN."""

    norm_ratio: float
    """Row norms of representation over those of attention, each averaged over rows and steps."""
    conflict: float
    """Share of steps whose mean row cosine is negative."""


@functools.partial(jax.jit, static_argnums=0)
def _conflict_step(optimizer, model, stats, state, batch):
    found = gradient_conflict(model, stats, batch)
    updates, state = optimizer.update(found.grads, state, model)
    model = optax.apply_updates(model, updates)
    return model, found.out.stats, state, found.by_field["category"]


def fight(
    cfg: RecommenderConfig,
    stream: Iterable[Batch],
    *,
    seed: int,
    optimizer: optax.GradientTransformation,
) -> Fight:
    """Trains a shared model as two tied copies and compares their gradients at each step."""
    model, stats, state = _start(cfg, seed, optimizer)
    found = []
    for batch in stream:
        model, stats, state, conflict = _conflict_step(optimizer, model, stats, state, batch)
        found.append(conflict)
    attention, representation, cosine = (np.array(x) for x in zip(*found))
    return Fight(float(representation.mean() / attention.mean()), float((cosine < 0).mean()))


def decide(
    scores: Mapping[str, Sequence[Score]],
    control: Mapping[str, float],
    fights: Sequence[Fight],
) -> list[common.Claim]:
    """The claims, from a score per arm and seed."""
    of = lambda arm, field: np.array([getattr(s, field) for s in scores[arm]])
    gap = lambda field, a, b="TWIN": of(a, field) - of(b, field)
    auc_gap = gap("auc", "DARE")
    small = "DARE, d_A = 4"
    ndcg, correlation = "ndcg", "correlation"
    among = "correlation_among_relevant"
    distance = lambda name, expected: abs(control[name] - expected)
    above = {
        "AUC of DARE over TWIN with 150,000 samples": (
            gap("auc", "DARE, 150k", "TWIN, 150k"),
            0.03,
        ),
        "retrieval NDCG@16 of DARE": (of("DARE", ndcg), 0.65),
        "retrieval NDCG@16 of DARE over TWIN": (gap(ndcg, "DARE"), 0.2),
        "rank correlation with the true weights, DARE over TWIN": (gap(correlation, "DARE"), 0.2),
        "the same among relevant behaviours, DARE over TWIN": (gap(among, "DARE"), 0.2),
        "NDCG@16 of DARE over the newest first": (of("DARE", ndcg) - control["recency"], 0.15),
        "NDCG@16 of TWIN over TWIN with projections": (gap(ndcg, "TWIN", "TWIN w/ projection"), 0),
        "d_A halved: NDCG@16 over TWIN": (gap(ndcg, small), 0),
        "d_A halved: AUC over TWIN": (gap("auc", small), 0),
        "TWIN: row gradients of representation over attention": ([f.norm_ratio for f in fights], 5),
    }
    below = {
        f"{name} control: distance of its NDCG@16 from {expected}": (
            distance(name, expected),
            MOST_CONTROL_ERROR,
        )
        for name, expected in (("random", 0.17), ("recency", 0.46))
    }
    name, bound = "AUC of DARE over TWIN, every seed", 0.005
    holds = bool((auc_gap >= bound).all())
    return [
        common.Claim(name, auc_gap.tolist(), f">= {bound:g} each", holds),
        *(common.at_least(name, *needed) for name, needed in above.items()),
        *(common.at_most(name, *needed) for name, needed in below.items()),
    ]


def table(scores: Mapping[str, Sequence[Score]]) -> list[dict[str, Any]]:
    """A row per arm: means over seeds, and the AUC of each seed."""
    rows = []
    for name, found in scores.items():
        mean = Score(*np.mean(found, axis=0))
        rows.append(
            {
                "model": name,
                "samples": ARMS[name].samples,
                "AUC": round(mean.auc, 4),
                "AUC of each seed": [round(s.auc, 4) for s in found],
                "NDCG@16": round(mean.ndcg, 3),
                "NDCG@16 of each seed": [round(s.ndcg, 3) for s in found],
                "rank correlation": round(mean.correlation, 3),
                "among relevant": round(mean.correlation_among_relevant, 3),
            }
        )
    return rows


def correlation_maps(world: World, trained: Mapping[str, Trained]) -> dict[str, np.ndarray]:
    """[categories, positions] for one candidate category: the truth and what models learned.

    Softmax over the map for models, so that all panels are positive.
    """
    candidate, shown = 1, 12
    other = np.argsort(-world.relevance[candidate, 1:], kind="stable")[:10] + 1
    recency = 0.5 ** (np.arange(shown) / HALF_LIFE)
    maps = {"true": world.relevance[candidate, other][:, None] * recency}
    for name, found in trained.items():
        history = np.repeat(other[:, None], shown, axis=1)  # oldest first
        tables = found.model.tables("attention")
        scores = learned_relevance(tables, np.full(len(other), candidate), history)
        maps[name] = np.asarray(jax.nn.softmax(jnp.ravel(scores)).reshape(scores.shape))[:, ::-1]
    return maps


def draw(maps: Mapping[str, np.ndarray]) -> Callable[[Any], None]:
    """A panel per map: categories down, places before the candidate across."""

    def figure(page: Any) -> None:
        for axes, (name, values) in zip(page.subplots(1, len(maps), sharey=True), maps.items()):
            axes.imshow(values, aspect="auto", cmap="Blues", extent=(0.5, 12.5, 10.5, 0.5))
            axes.set_title(name)
            axes.set_xlabel("places before the candidate")
        page.axes[0].set_ylabel("category (own, partners, unrelated)")

    return figure


def define_flags() -> None:
    """Defines the flags of this experiment."""
    common.define_flags("dare")
    dare_logs.define_flags()


def main() -> int:
    """Trains every arm on every seed, then decides the claims."""
    run = common.options()
    if absl_flags.FLAGS.dataset:
        return dare_logs.main(run, absl_flags.FLAGS)
    world = make_world()
    shrink = 100 if run.quick else 1
    test, world = make_click_log(TEST_SEED, 20_000 // shrink, world, length=LENGTH)
    test_batch = 2000 // shrink
    optimizer = optax.adam(LR)
    order = lambda seed: dict(epochs=EPOCHS, seed=seed)
    logs = {
        (n, seed): make_click_log(seed, n // shrink, world, length=LENGTH)[0]
        for n in (SMALL, LARGE)
        for seed in run.seeds
    }
    scores: dict[str, list[Score]] = {}
    first: dict[str, Trained] = {}
    for name, arm in ARMS.items():
        for seed in run.seeds:
            stream = inputs(logs[arm.samples, seed], BATCH_SIZE, **order(seed))
            trained = train(arm.config(world), stream, seed=seed, optimizer=optimizer)
            first.setdefault(name, trained)
            scores.setdefault(name, []).append(measure(trained, test, test_batch))
        print(f"{name:20} {[tuple(round(x, 4) for x in s) for s in scores[name]]}", flush=True)
    fights = []
    for seed in run.seeds:
        steps = inputs(logs[SMALL, seed], BATCH_SIZE, **order(seed))
        some = [batch for _, batch in zip(range(CONFLICT_STEPS), steps)]
        fights.append(fight(ARMS["TWIN"].config(world), some, seed=seed, optimizer=optimizer))
    control = controls(test)
    shown = {name: first[name] for name in ("DARE", "TWIN")}
    return common.finish(
        decide(scores, control, fights),
        run.workdir,
        table=table(scores),
        figure=draw(correlation_maps(world, shown)),
        data={
            "seeds": run.seeds,
            "controls": control,
            "bayes_auc": world.bayes_auc,
            "gradient_norm_ratio": [f.norm_ratio for f in fights],
            "conflict_fraction": [f.conflict for f in fights],
        },
    )


if __name__ == "__main__":
    define_flags()
    flags.run(main)
