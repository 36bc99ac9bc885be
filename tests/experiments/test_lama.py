"""The keywords are where the texts say, and the claims can fail."""

import gzip

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from experiments import lama


def test_keywords_make_the_class():
    texts = jax.tree.map(np.asarray, lama.needle_texts(jax.random.key(0), 40))
    assert (texts.needles.sum(1) == 2).all()
    for tokens, length, label, needles in zip(*texts, strict=True):
        one, two = sorted(tokens[needles])
        assert label == 4 * (one - 1) + (two - 5) and 1 <= one <= 4 < two <= 8
        assert (tokens[:length][~needles[:length]] > 8).all() and (tokens[length:] == 0).all()


def test_uniform_attention_has_ratio_one():
    model = lama.PoolingClassifier(lama.config("mean"), rngs=nnx.Rngs(0))
    texts = lama.needle_texts(jax.random.key(0), 8)
    np.testing.assert_allclose(lama.needle_ratio(model, texts), 1, rtol=1e-5)
    grads = jax.jit(jax.grad(lambda m: lama.loss("frozen", m, texts)))(
        lama.PoolingClassifier(lama.config("frozen"), rngs=nnx.Rngs(0))
    )
    for part in ("P", "Q", "context", "w_word"):
        assert (getattr(grads, part)[...] == 0).all()
    assert (grads.log_scale[...] != 0).all() and (grads.gru.forth.w_in[...] != 0).any()


def test_claims_follow_the_numbers():
    result = lambda accuracy, ratio: {"accuracy": np.full(3, accuracy), "ratio": np.full(3, ratio)}
    found = {"mean": result(0.8, 1), "structured": result(1, 20), "scaled": result(0.99, 20),
             "frozen": result(0.99, 9)}  # fmt: skip
    assert all(claim.holds for claim in lama.needle_claims(found))
    found |= {"scaled": result(0.96, 10), "mean": result(0.95, 1)}
    holds = [claim.holds for claim in lama.needle_claims(found)]
    assert holds == [False, False, False, True, True, False]


def test_tables_are_read(tmp_path):
    path = tmp_path / "a.tsv.gz"
    with gzip.open(path, "wt", encoding="utf-8") as out:
        out.write("label5\tsentence\n4\tA fine film\n2\tso so\n0\tbad\n")
    words, labels = lama.read_texts(path)
    assert words == [["a", "fine", "film"], ["bad"]] and labels.tolist() == [1, 0]
    assert jnp.asarray(labels).dtype == jnp.int32
