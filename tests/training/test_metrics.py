"""Model FLOPs against XLA's count of the products, peaks and throughput."""

import dataclasses

import jax
import numpy as np
import pytest

from jaxheads.models import PRESETS, Decoder, ModelConfig, forward
from jaxheads.training import flops_per_token, peak_flops, throughput


def test_flops_of_a_full_attention_model_by_hand():
    cfg = ModelConfig(
        vocab_size=100, num_layers=3, model_dim=16, num_heads=2, mlp_dim=32, norm="rmsnorm"
    )
    weights = 3 * (4 * 16 * 16 + 3 * 16 * 32 + 2 * 16) + 100 * 16 + 16
    attention = 3 * 3 * 2 * 2 * 16 * (9 / 2)  # 3 passes, L, two products, 2 H D, 4.5 keys of 8
    assert flops_per_token(cfg, 8) == 6 * weights + attention


def test_a_window_counts_what_it_shows():
    cfg = ModelConfig(num_layers=2, window=(3, None))
    both = ModelConfig(num_layers=2)
    seen = np.minimum(np.arange(10) + 1, 3).mean()  # mean visible keys of the first layer
    difference = 12 * cfg.num_heads * cfg.head_dim * (5.5 - seen)
    np.testing.assert_allclose(flops_per_token(both, 10) - flops_per_token(cfg, 10), difference)


def test_tables_that_are_only_looked_up_do_not_count():
    tied = ModelConfig(positions="learned", max_positions=512)
    untied = dataclasses.replace(tied, tie_embeddings=False)
    rotary = ModelConfig()
    assert flops_per_token(tied, 8) == flops_per_token(untied, 8) == flops_per_token(rotary, 8)


def test_formula_is_near_the_compilers_count():
    """Forward FLOPs are a third; XLA adds elementwise work and the masked half of the scores."""
    cfg = ModelConfig(
        vocab_size=256, num_layers=1, model_dim=64, num_heads=4, implementation="dense"
    )
    model = jax.eval_shape(lambda: Decoder(cfg, rngs=__import__("flax").nnx.Rngs(0)))
    tokens = jax.ShapeDtypeStruct((2, 32), "int32")
    run = jax.jit(lambda m, t: forward(m, t).logits)
    counted = run.lower(model, tokens).compile().cost_analysis()["flops"]
    formula = flops_per_token(cfg, 32) / 3 * 64
    assert 1.0 < counted / formula < 1.25


@pytest.mark.parametrize(
    ("kind", "peak"),
    [
        ("TPU v4", 275e12),
        ("TPU v5 lite", 197e12),
        ("TPU v5p", 459e12),
        ("TPU v5", 459e12),
        ("TPU v6 lite", 918e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA B200", 2250e12),
        ("cpu", None),
        ("abacus", None),
    ],
)
def test_peaks_by_device_kind(kind, peak):
    assert peak_flops(kind) == peak


def test_throughput():
    class Chip:
        device_kind = "TPU v5p"

    cfg = PRESETS["llama3-8b"]()
    got = throughput(cfg, tokens=1e6, seq_len=8192, seconds=2.0, devices=[Chip()] * 64)
    assert got["tokens_per_second"] == 5e5
    assert got["tokens_per_second_per_device"] == 5e5 / 64
    want = 5e5 * flops_per_token(cfg, 8192) / (64 * 459e12)
    np.testing.assert_allclose(got["mfu"], want)
    assert 0.5 < want < 1.0
    assert throughput(cfg, tokens=10, seq_len=10, seconds=1.0)["mfu"] is None
