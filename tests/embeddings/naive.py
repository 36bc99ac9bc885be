"""The click model written out one sample and one behaviour at a time, in float64."""

from __future__ import annotations

import math

import numpy as np

from jaxheads.models.recommender import LongSequenceRecommender, RecommenderConfig


def f64(tree):
    """NumPy arrays of a dict of tables."""
    return {name: np.asarray(x, np.float64) for name, x in tree.items()}


def vector(tables, item, category, time, mode):
    """One vector from three ids."""
    semantic = [*tables["item"][item], *tables["category"][category]]
    if mode == "concat":
        return np.array([*semantic, *tables["time"][time]])
    return np.array(semantic) + (tables["time"][time] if mode == "add" else 0.0)


def linear(layer, x):
    """x W + b."""
    return x @ np.asarray(layer.weight[...], np.float64) + np.asarray(layer.bias[...], np.float64)


def mlp(module, x):
    """Linear layers with PReLUs between them."""
    for layer, slope in zip(module.layers, module.slopes):
        y = linear(layer, x)
        x = np.array([v if v >= 0 else float(slope[...]) * v for v in y])
    return linear(module.layers[-1], x)


def score(cfg: RecommenderConfig, model, q, k, same_category):
    """One score; None for a behaviour that hard search leaves out."""
    d = cfg.attention_dim
    if cfg.search == "hard" and not same_category:
        return None
    if cfg.pooling == "mean":
        return 0.0
    if cfg.scorer == "mlp":
        return mlp(model.scorer, np.concatenate([q, k, q - k, q * k]))[0] / len(q)
    if cfg.search == "hard":
        s = sum(q[i] * k[i] for i in range(d)) / math.sqrt(d)
    else:
        s = sum(q[i] * k[i] for i in range(2 * d)) / math.sqrt(2 * d)
    if cfg.time_mode == "concat":
        s += sum(q[i] * k[i] for i in range(2 * d, 3 * d)) / math.sqrt(d)
    return s


def softmax_pool(chosen, values, width):
    """sum_p softmax(s)_p r_p over (position, score) pairs."""
    total = sum(math.exp(s) for _, s in chosen)
    h = np.zeros(width)
    for p, s in chosen:
        h += math.exp(s) / total * values[p]
    return h


def features_of(cfg, r, *pooled):
    """The head's input."""
    products = [h * r for h in pooled]
    if cfg.only_product:
        return np.concatenate(products)
    return np.concatenate([r, *pooled, *(products if cfg.target_aware else [])])


def sample(model: LongSequenceRecommender, batch, b):
    """(scores by position, positions kept, main features, auxiliary features) of sample b."""
    cfg = model.cfg
    tables = {
        (use, of): f64(model.tables(use, of_candidate=of == "candidate"))
        for use in ("attention", "representation")
        for of in ("candidate", "history")
    }
    items, categories = batch["history_item"][b], batch["history_category"][b]
    length = len(items)
    ahead = (batch["item"][b], batch["category"][b], 0, cfg.time_mode)
    q = vector(tables["attention", "candidate"], *ahead)
    r = vector(tables["representation", "candidate"], *ahead)
    if model.projections is not None:
        q, r = linear(model.projections.query, q), linear(model.projections.candidate, r)
    scores, values = {}, {}
    for p in range(length):
        if items[p] == 0:
            continue
        past = (items[p], categories[p], length - p, cfg.time_mode)
        k = vector(tables["attention", "history"], *past)
        values[p] = vector(tables["representation", "history"], *past)
        if model.projections is not None:
            k = linear(model.projections.key, k)
            values[p] = linear(model.projections.value, values[p])
        s = score(cfg, model, q, k, categories[p] == batch["category"][b])
        if s is not None:
            scores[p] = s
    ranked = sorted(scores.items(), key=lambda x: -x[1])
    kept = ranked if cfg.pooling == "mean" else ranked[: cfg.top_k]
    pooled = [softmax_pool(kept, values, len(r))]
    if cfg.history_mean:
        pooled.append(sum(values.values(), np.zeros(len(r))) / (len(values) + 1))
    aux = features_of(cfg, r, softmax_pool(ranked, values, len(r)))
    return scores, [p for p, _ in kept], features_of(cfg, r, *pooled), aux


def head(module, features):
    """(logits [B], mean, var over n) with the statistics of these samples."""
    mean, var = features.mean(axis=0), features.var(axis=0)
    scale, bias = (np.asarray(x[...], np.float64) for x in (module.norm.scale, module.norm.bias))
    x = (features - mean) / np.sqrt(var + 1e-5) * scale + bias
    z = np.array([mlp(module.mlp, row) for row in x])
    return (z[:, 0] if z.shape[1] == 1 else z[:, 0] - z[:, 1]), mean, var


def penalty(model):
    """Sum of squares of weights, batch norm scales and slopes."""
    heads = [m for m in (model.main, model.aux) if m is not None]
    mlps = [h.mlp for h in heads] + [m for m in (model.scorer,) if m is not None]
    parts = [h.norm.scale for h in heads]
    parts += [x for m in mlps for x in (*(layer.weight for layer in m.layers), *m.slopes)]
    if model.projections is not None:
        maps = model.projections
        parts += [m.weight for m in (maps.query, maps.key, maps.candidate, maps.value)]
    return sum((np.asarray(x[...], np.float64) ** 2).sum() for x in parts)


def cross_entropy(logits, labels):
    """-mean log(p(label) + 1e-8)."""
    p = 1 / (1 + np.exp(-logits))
    return -np.mean(np.log(np.where(labels == 1, p, 1 - p) + 1e-8))
