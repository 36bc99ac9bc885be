"""Small logs in the layouts of the real ones, with everything that real ones have wrong."""

import numpy as np

from jaxheads.data.behaviour_logs import LAYOUTS


def random_events(seed, *, users, items, categories, rows):
    """[rows,4] user, item, category, time: unsorted times, repeats, a category for each item."""
    rng = np.random.default_rng(seed)
    user = rng.integers(0, users, rows) * 7 + 3
    item = rng.zipf(1.3, rows) % items * 11 + 5
    return np.stack([user, item, item % categories + 100, rng.integers(0, rows // 4, rows)], 1)


def taobao_lines(events, action="pv"):
    return [f"{u},{i},{c},{action},{t}" for u, i, c, t in events.tolist()]


def tmall_lines(events, action="0"):
    header = ",".join(LAYOUTS["tmall"].columns)
    return [header, *(f"{u},{i},{c},12,,{t:04d},{action}" for u, i, c, t in events.tolist())]


def movielens_lines(events, stars="4.5"):
    return ["userId,movieId,rating,timestamp", *(f"{u},{i},{stars},{t}" for u, i, _, t in events)]


def write(path, lines, end="\n"):
    path.write_bytes("".join(line + end for line in lines).encode())
    return path
