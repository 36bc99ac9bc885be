"""What a training step costs and how fast it runs: model FLOPs, peaks, throughput."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax

from jaxheads.attention import VARIANTS
from jaxheads.models import ARCHITECTURES, ModelConfig
from jaxheads.models.configs import LayerSpec

# Dense bfloat16 FLOP/s of one device as JAX counts devices, from the vendors' data sheets. The
# first entry contained in the device kind counts. A v4 or v5p device is a chip (two cores);
# Ironwood shows its two chiplets as two devices.
_PEAKS: Mapping[str, float] = {
    "TPU v4 lite": 138e12,
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5p": 459e12,
    "TPU v5": 459e12,
    "TPU v6 lite": 918e12,
    "TPU v6e": 918e12,
    "TPU7x": 1153.5e12,
    "TPU v7x": 1153.5e12,
    "A100": 312e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "H200": 989e12,
    "B200": 2250e12,
}


def flops_per_token(cfg: ModelConfig, seq_len: int) -> float:
    """Model FLOPs a trained token costs, forward and backward.

        6 N + 6 sum_layers 2 H D s,    s = (mean number of visible keys)

    N counts the parameters that multiply activations: all but position tables and, when the
    output projection is separate, the token table that is only looked up. Each of ``q k^T`` and
    ``p v`` costs 2 H D per visible key forward, and twice that backward. Causality and sliding
    windows are counted (s = (T+1)/2 for full attention), recomputation is not: FLOPs the model
    needs, not FLOPs the machine spends. A sparse variant's own cost says how many keys it sees;
    what an architecture does besides (`Architecture.work`) counts three times its forward FLOPs.
    """
    table = cfg.vocab_size * cfg.embed_dim
    params = cfg.num_params - (0 if cfg.tie_embeddings else table)
    if cfg.positions == "learned":
        params -= (cfg.max_positions + cfg.position_offset) * cfg.model_dim
    own = ARCHITECTURES[cfg.mixer.name].work
    if own is not None:
        visible, flops = own(cfg, seq_len)
        heads = 12.0 * cfg.num_heads * cfg.head_dim * visible
        return 6.0 * params + cfg.num_layers * (heads + 3.0 * flops)
    visible = 0.0
    by_kind = {spec: _visible_keys(cfg, spec, seq_len) for spec in set(cfg.pattern)}
    for layer in range(cfg.num_layers):
        visible += by_kind[cfg.pattern[layer % len(cfg.pattern)]]
    return 6.0 * params + 12.0 * cfg.num_heads * cfg.head_dim * visible


def _visible_keys(cfg: ModelConfig, spec: LayerSpec, seq_len: int) -> float:
    """The mean number of keys that a query of a layer sees, over its heads."""
    w = min(spec.window or seq_len, seq_len)
    mean = w - w * (w - 1) / (2 * seq_len)
    cost = lambda name, options: VARIANTS[name].cost(cfg, seq_len, seq_len, options=options).flops
    sparse, dense = cost(spec.attention, spec.options), cost("dense", None)
    per_key = 4.0 * cfg.num_heads * cfg.head_dim * seq_len
    return min(mean, sparse / per_key) if sparse < dense else mean


def peak_flops(device: Any = None) -> float | None:
    """Peak dense bfloat16 FLOP/s of a device or a device kind (default: here), None if unknown."""
    device = jax.devices()[0] if device is None else device
    kind = device if isinstance(device, str) else device.device_kind
    return next((peak for name, peak in _PEAKS.items() if name.lower() in kind.lower()), None)


def throughput(
    cfg: ModelConfig,
    *,
    tokens: float,
    seq_len: int,
    seconds: float,
    devices: Sequence[Any] | None = None,
) -> dict[str, float | None]:
    """Speed of a run that trained on `tokens` tokens in `seconds`.

    Returns:
      tokens_per_second, tokens_per_second_per_device, model_flops_per_second, and mfu: the share
      of the devices' peak, None where the peak is unknown.
    """
    devices = jax.devices() if devices is None else list(devices)
    rate = tokens / seconds
    flops = rate * flops_per_token(cfg, seq_len)
    peak = peak_flops(devices[0])
    return {
        "tokens_per_second": rate,
        "tokens_per_second_per_device": rate / len(devices),
        "model_flops_per_second": flops,
        "mfu": None if peak is None else flops / (peak * len(devices)),
    }
