"""Titans' recurrence token by token in float64 numpy, gradients written out by hand.

Shares nothing with the library: it is what the library is checked against.
"""

from __future__ import annotations

import math

import numpy as np


def erf(x):
    return np.vectorize(math.erf, otypes=[float])(x)


def gelu(x):
    return 0.5 * x * (1 + erf(x / math.sqrt(2)))


def gelu_slope(x):
    density = np.exp(-0.5 * x * x) / math.sqrt(2 * math.pi)
    return 0.5 * (1 + erf(x / math.sqrt(2))) + x * density


def layer_norm(h):
    return (h - h.mean()) / np.sqrt(h.var() + 1e-5)


def network(weights, x, residual_norm):
    h = x
    for layer, w in enumerate(weights):
        h = (gelu(h) if layer else h) @ w
    return x + layer_norm(h) if residual_norm else h


def gradient(weights, k, v, residual_norm, loss):
    """Backpropagation of one token, matrix by matrix."""
    pre, acts, h = [], [], k
    for layer, w in enumerate(weights):
        a = gelu(h) if layer else h
        acts.append(a)
        h = a @ w
        pre.append(h)
    factor = {"half": 1.0, "sum": 2.0, "mean": 2.0 / len(k)}[loss]
    if residual_norm:
        d = len(h)
        sigma = np.sqrt(h.var() + 1e-5)
        normal = (h - h.mean()) / sigma
        error = factor * (k + normal - v)
        jacobian = (np.eye(d) - 1.0 / d - np.outer(normal, normal) / d) / sigma
        delta = error @ jacobian
    else:
        delta = factor * (h - v)
    grads = [None] * len(weights)
    for layer in reversed(range(len(weights))):
        grads[layer] = np.outer(acts[layer], delta)
        if layer:
            delta = (weights[layer] @ delta) * gelu_slope(pre[layer - 1])
    return grads


def titans(
    k, v, q, theta, eta, alpha, params, *, chunk, loss="half", residual_norm=True, read="post"
):
    """[B,T,H,D] arrays, gates [B,T,H] or [B,T,H,L]; returns y and the final W, S, W_ref."""
    arrays = [np.asarray(x, np.float64) for x in (k, v, q, theta, eta, alpha)]
    k, v, q = arrays[:3]
    depth = len(params)
    theta, eta, alpha = (
        x if x.ndim == 4 else np.repeat(x[..., None], depth, -1) for x in arrays[3:]
    )
    batch, length, heads, _ = k.shape
    y = np.zeros_like(k)
    ends = [[np.zeros((batch, *p.shape)) for p in params] for _ in range(3)]
    for b in range(batch):
        for h in range(heads):
            w = [np.asarray(p[h], np.float64) for p in params]
            s = [np.zeros_like(p) for p in w]
            ref = w
            for t in range(length):
                if t % chunk == 0:
                    ref = w
                u = gradient(ref, k[b, t, h], v[b, t, h], residual_norm, loss)
                if read == "pre":
                    y[b, t, h] = network(w, q[b, t, h], residual_norm)
                s = [e * x - th * g for e, x, th, g in zip(eta[b, t, h], s, theta[b, t, h], u)]
                w = [(1 - a) * x + z for a, x, z in zip(alpha[b, t, h], w, s)]
                if read == "post":
                    y[b, t, h] = network(w, q[b, t, h], residual_norm)
            if length % chunk == 0:
                ref = w
            for place, value in zip(ends, (w, s, ref)):
                for layer in range(depth):
                    place[layer][b, h] = value[layer]
    return y, ends
