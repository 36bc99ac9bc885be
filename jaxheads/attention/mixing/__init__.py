"""Token mixing: fourteen ways to mix a sequence behind one template, ``Y = M(X) V(X)``.

        mixer = mixing.get("linear", model_dim=64, num_heads=4)
        params = mixer.init(key)
        y = mixer.apply(params, x, causal=True)                     # [B,T,M]
        m = mixer.matrix(params, x, causal=True)                    # [B,H,T,T], an oracle
        flops, bytes = mixer.cost(1_048_576, causal=True)

    softmax kernel sparse          densities over tokens, all pairs or a pattern
    linear performer               kernels that are products of features: linear time, recurrent
    linformer nystrom              low rank
    long_conv s4d                  causal convolutions
    fnet mlp_mixer gmlp pooling identity    fixed or learned matrices

References: Hè and Kabić, 2023, arXiv:2302.06218 (the template).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from jaxheads.attention.mixing.convolution import S4D, LongConvolution, fft_convolve, toeplitz
from jaxheads.attention.mixing.features import FeatureState, LinearAttention, Performer
from jaxheads.attention.mixing.fixed import GMLP, FNet, Identity, MLPMixer, Pooling
from jaxheads.attention.mixing.lowrank import Linformer, Nystrom
from jaxheads.attention.mixing.protocol import Mixer, MixerCost, combine
from jaxheads.attention.mixing.smoothers import KernelSmoother, Softmax, Sparse
from jaxheads.fields import unknown

_CLASSES = (
    Softmax,
    KernelSmoother,
    LinearAttention,
    Performer,
    Linformer,
    Nystrom,
    Sparse,
    FNet,
    MLPMixer,
    GMLP,
    LongConvolution,
    S4D,
    Pooling,
    Identity,
)
MIXERS: Mapping[str, type[Mixer]] = {mixer.name: mixer for mixer in _CLASSES}
"""Every mixer. A new one is a class in a file of this package and a row here."""


def get(name: str, **options: Any) -> Mixer:
    """A mixer by name.

    Args:
      name: a key of `MIXERS`.
      **options: fields of the mixer: model_dim, num_heads, length, and its own.
    Raises:
      ValueError: for a name or an option that does not exist, naming the nearest.
    Example:
      >>> get("performer", model_dim=32, num_features=64).num_features
      64
    """
    if name not in MIXERS:
        raise ValueError(unknown("mixer", name, MIXERS))
    fields = [field.name for field in dataclasses.fields(MIXERS[name])]
    for option in options:
        if option not in fields:
            raise ValueError(f"mixer {name!r}: {unknown('option', option, fields)}")
    return MIXERS[name](**options)


__all__ = [
    "GMLP",
    "MIXERS",
    "S4D",
    "FNet",
    "FeatureState",
    "Identity",
    "KernelSmoother",
    "LinearAttention",
    "Linformer",
    "LongConvolution",
    "MLPMixer",
    "Mixer",
    "MixerCost",
    "Nystrom",
    "Performer",
    "Pooling",
    "Softmax",
    "Sparse",
    "combine",
    "fft_convolve",
    "get",
    "toeplitz",
]
