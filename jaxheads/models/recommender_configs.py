"""What a click model over long histories is (`RecommenderConfig`) and the batches it reads.

Feng et al., 2024, arXiv:2410.02604.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import jax.numpy as jnp
import numpy as np
from jax.experimental import checkify

from jaxheads.embeddings.dare import TIME_MODES
from jaxheads.fields import unknown
from jaxheads.typing import is_traced

Batch: TypeAlias = Mapping[str, Any]

_CHOICES: Mapping[str, tuple[str, ...]] = {
    "decoupling": ("dare", "shared", "projection", "four_tables"),
    "scorer": ("dot", "mlp"),
    "search": ("soft", "hard"),
    "time_mode": TIME_MODES,
    "pooling": ("attention", "mean"),
}


@dataclass(frozen=True, kw_only=True)
class RecommenderConfig:
    """One click model; every baseline of the paper is a setting of these fields."""

    num_items: int
    """Ids 1 to num_items; row 0 is padding."""
    num_categories: int
    num_times: int = 2000
    """Rows of the time table; the candidate has 0 and the oldest of T behaviours T."""
    attention_dim: int | None = None
    """Width of each field in the attention tables; `representation_dim` unless given."""
    representation_dim: int = 16
    """Width of each field in the representation tables."""
    top_k: int = 20
    """Behaviours that stage 1 keeps."""
    decoupling: str = "dare"
    """"dare": two sets of tables; "shared": one (TWIN); "projection": one and four linear maps;
    "four_tables": two sets for the history and two for the candidate (TWIN-4E)."""
    scorer: str = "dot"
    """"dot", or "mlp": DIN's network on [q, k, q - k, q k], divided by the width."""
    search: str = "soft"
    """"hard" scores only behaviours of the candidate's category, without the category part."""
    target_aware: bool = True
    """Products with the candidate among the features (TR)."""
    only_product: bool = False
    """The products are the only features."""
    history_mean: bool = False
    """The mean of the whole history as a further feature."""
    aux_loss: bool = True
    """A second head on the full softmax: it trains scores outside the top K."""
    time_mode: str = "concat"
    """"concat", "add" (time rows of twice the width), or "none"."""
    pooling: str = "attention"
    """"mean" pools the whole history with equal weights."""
    approximate_search: bool = False
    """`jax.lax.approx_max_k` in stage 1, for histories of thousands on TPU."""
    head_dims: tuple[int, ...] = (200, 80)
    """Hidden widths of the head; the auxiliary head has the first."""
    scorer_dim: int = 36
    """Hidden width of DIN's scorer."""
    num_logits: int = 1
    """2 keeps one logit per class, class 0 the click, as the released code: logit = z_0 - z_1."""
    weight_decay: float = 1e-6
    """Times the sum of squares of weights, batch norm scales and slopes in the loss."""
    init_std: float = 0.01
    """Of tables and weights."""
    row_multiple: int = 1
    """Rows of every table are rounded up to a multiple, so that a mesh divides them."""

    def __post_init__(self):
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                raise ValueError(unknown(name, str(getattr(self, name)), choices))
        if self.attention_dim is None:
            object.__setattr__(self, "attention_dim", self.representation_dim)
        sizes = ("num_items", "num_categories", "num_times", "attention_dim", "representation_dim")
        for name in (*sizes, "top_k", "scorer_dim", "row_multiple"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1.")
        if self.is_shared and self.attention_dim != self.representation_dim:
            raise ValueError(
                f"attention_dim={self.attention_dim} with decoupling={self.decoupling!r}, where "
                f"attention reads the representation tables of width {self.representation_dim}; "
                "leave attention_dim unset, or use decoupling='dare'."
            )
        if self.search == "hard" and self.time_mode == "add":
            raise ValueError(
                "search='hard' scores the item part alone, which time_mode='add' mixes with time; "
                "use time_mode='concat' or 'none'."
            )
        if self.only_product and not self.target_aware:
            raise ValueError("only_product=True leaves no feature without target_aware=True.")
        if self.num_logits not in (1, 2):
            raise ValueError(f"num_logits={self.num_logits} must be 1, or 2 (one per class).")
        if not self.head_dims:
            raise ValueError("head_dims is empty; the heads need at least one hidden width.")

    @property
    def is_shared(self) -> bool:
        """Whether attention and representation read the same tables."""
        return self.decoupling in ("shared", "projection")

    def width(self, field_dim: int) -> int:
        """Width of a whole vector whose fields have this width."""
        return (3 if self.time_mode == "concat" else 2) * field_dim

    @property
    def num_features(self) -> int:
        """Width of what the head sees."""
        return self._features(2 if self.history_mean else 1)

    @property
    def num_aux_features(self) -> int:
        """Width of what the auxiliary head sees."""
        return self._features(1)

    def _features(self, pooled: int) -> int:
        parts = pooled if self.only_product else 1 + pooled * (2 if self.target_aware else 1)
        return parts * self.width(self.representation_dim)


def _preset(**settings: Any) -> Callable[..., RecommenderConfig]:
    def make(num_items: int, num_categories: int, **changes: Any) -> RecommenderConfig:
        sizes = dict(num_items=num_items, num_categories=num_categories)
        return RecommenderConfig(**sizes, **{**settings, **changes})

    return make


RECOMMENDERS: Mapping[str, Callable[..., RecommenderConfig]] = {
    "dare": _preset(decoupling="dare"),
    "twin": _preset(decoupling="shared"),
    "twin-projection": _preset(decoupling="projection"),
    "twin-4e": _preset(decoupling="four_tables"),
    "twin-hard": _preset(decoupling="shared", search="hard"),
    "twin-no-tr": _preset(decoupling="shared", target_aware=False),
    "din": _preset(decoupling="shared", scorer="mlp", time_mode="none"),
    "mean": _preset(decoupling="shared", pooling="mean"),
}
"""Name -> (num_items, num_categories, **changes) -> `RecommenderConfig`: DARE and its baselines."""


def check_batch(cfg: RecommenderConfig, batch: Batch) -> None:
    """Raise for a batch that the model cannot read.

    Shapes are always checked; ids only where the arrays are known. Inside `jax.jit`, an id that a
    table does not have gives NaN, or an error under `checkify.checkify(fn)`.

    Raises:
      ValueError: for arrays that are missing or whose shapes do not fit each other, histories
        shorter than top_k or not shorter than num_times, and ids outside the tables.
      TypeError: for ids that are no integers.
    """
    names = ("item", "category", "history_item", "history_category")
    for name in names:
        if name not in batch:
            raise ValueError(f"the batch has no {name!r}; it needs {', '.join(names)}.")
        if not jnp.issubdtype(batch[name].dtype, jnp.integer):
            raise TypeError(f"{name} has dtype {batch[name].dtype}; ids are integers (int32).")
    history = batch["history_item"].shape
    if len(history) != 2 or batch["history_category"].shape != history:
        raise ValueError(
            f"history_item {history} and history_category {batch['history_category'].shape} must "
            "both be [B,T]."
        )
    for name in ("item", "category"):
        if batch[name].shape != history[:1]:
            raise ValueError(f"{name} has shape {batch[name].shape}; it must be [{history[0]}].")
    length = history[1]
    if cfg.pooling == "attention" and length < cfg.top_k:
        raise ValueError(
            f"histories of length {length} with top_k={cfg.top_k}: stage 1 cannot keep more "
            "behaviours than there are. Lower top_k, or pad the histories in front with 0."
        )
    if cfg.time_mode != "none" and length >= cfg.num_times:
        raise ValueError(
            f"histories of length {length} need time ids up to {length}, but num_times="
            f"{cfg.num_times}; set num_times to at least {length + 1} or cut the histories."
        )
    for name in names:
        rows = 1 + (cfg.num_items if name.endswith("item") else cfg.num_categories)
        if is_traced(batch[name]):
            inside = jnp.all((batch[name] >= 0) & (batch[name] < rows))
            checkify.debug_check(inside, f"{name} holds an id outside 0 to {rows - 1}.")
        else:
            _check_ids(name, np.asarray(batch[name]), rows)


def _check_ids(name: str, ids: np.ndarray, rows: int) -> None:
    outside = (ids < 0) | (ids >= rows)
    if outside.any():
        raise ValueError(
            f"{name} holds the id {ids[outside][0]}; the table has ids 0 (padding) to {rows - 1}. "
            f"Map ids to 1..{rows - 1} first, or make the table larger."
        )
