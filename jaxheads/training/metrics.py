"""Model FLOPs, peak FLOP/s, throughput."""

from __future__ import annotations


def flops_per_token(cfg, seq_len: int) -> float:
    """Model FLOPs a trained token costs, forward and backward."""
    raise NotImplementedError


def peak_flops(device=None) -> float | None:
    """Peak dense bfloat16 FLOP/s of one device, None where unknown."""
    raise NotImplementedError


def throughput(cfg, *, tokens, seq_len, seconds, devices=None) -> dict[str, float | None]:
    """tokens_per_second, tokens_per_second_per_device, model_flops_per_second, mfu (or None)."""
    raise NotImplementedError
