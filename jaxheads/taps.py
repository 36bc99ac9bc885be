"""Reading and changing activations: the intervention core. Read this file first.

A *tap* is a named point of a forward pass (`SITES`). A forward takes ``taps=`` and calls
``tap(site, value)`` at each point: the call applies the edits meant for that site, keeps what was
asked for, and is the identity otherwise. An intervention is data: an `Edit` holds a module-level
function and a payload of arrays with a leading layer axis, which the layer scan slices, so one
compiled program serves every (layer, head) and `jax.vmap`, `jax.grad` and `sweep` act on payloads.

    ablated = intervene(forward, Edit("z", multiply, gates))     # gates [L,1,1,H,1]
    out     = record(ablated, "z")(model, tokens)                # out.seen["z"] [L,B,T,H,D]

Wrapped forwards have the signature of the forward they wrap and are pytrees whose leaves are the
payloads: they nest, and they pass through `jax.jit` as ordinary arguments.

Nothing is ignored in silence: an unknown site, a site the model does not have, a payload without
its layer axis, an edit that changes shape or dtype and a requested site that was never reached
are errors while the program is traced.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from jaxheads.typing import Array, PyTree, is_traced

STACK_SITES: Mapping[str, str] = {
    "resid_pre": "B T M",
    "ln1_scale": "B T 1",
    "ln1_out": "B T M",
    "q": "B T H D",
    "k": "B S K D",
    "v": "B S K D",
    "q_rot": "B T H D",
    "k_rot": "B S K D",
    "scores": "B H T S",
    "pattern": "B H T S",
    "lse": "B H T",
    "attn_argmax": "B H",
    "mem_k": "B T H D",
    "mem_v": "B T H D",
    "mem_q": "B T H D",
    "mem_theta": "B T H",
    "mem_eta": "B T H",
    "mem_alpha": "B T H",
    "mem_surprise": "B T H",
    "mem_out": "B T H D",
    "mem_norm": "B H",
    "active": "B T H",
    "gates": "B T H",
    "z": "B T H D",
    "head_out": "B T H M",
    "attn_out": "B T M",
    "resid_mid": "B T M",
    "ln2_scale": "B T 1",
    "ln2_out": "B T M",
    "mlp_pre": "B T F",
    "mlp_post": "B T F",
    "mlp_out": "B T M",
    "resid_post": "B T M",
}
"""Sites inside the layer stack: payloads and records lead with a layer axis [L]."""

OUTER_SITES: Mapping[str, str] = {
    "embed": "B T M",
    "pos_embed": "T M",
    "final_norm_in": "B T M",
    "final_norm_scale": "B T 1",
    "final_norm_out": "B T M",
    "logits": "B T V",
}
"""Sites outside the stack: no layer axis."""

SITES: Mapping[str, str] = {**STACK_SITES, **OUTER_SITES}
"""Every site and its axes, in the letters of `jaxheads.typing`."""

MEMORY_SITES = frozenset(site for site in STACK_SITES if site.startswith("mem_"))
"""Sites of layers with a neural memory: what it is given, the norm of each token's gradient
(`mem_surprise`), what it reads out, and the norm of its weights after the last token."""

GATE_SITES = frozenset({"active", "gates"})
"""Sites of layers that route tokens to heads: which heads a token activates (1 or 0), and the
factor on what each of them gives."""

MIXER_SITES = MEMORY_SITES | GATE_SITES | {
    "q", "k", "v", "q_rot", "k_rot", "scores", "pattern", "lse", "attn_argmax", "z", "head_out",
}  # fmt: skip
"""Sites of the part of a layer that mixes tokens: an architecture has some of them."""

READ_ONLY = frozenset({"lse", "attn_argmax", "mem_surprise", "mem_norm"})
"""Sites that report a by-product which nothing downstream reads, so an edit could do nothing."""

_ALIASES: Mapping[str, str] = {
    "probs": "pattern",
    "attn.probs": "pattern",
    "hook_embed": "embed",
    "hook_pos_embed": "pos_embed",
    "hook_resid_pre": "resid_pre",
    "hook_resid_mid": "resid_mid",
    "hook_resid_post": "resid_post",
    "hook_attn_out": "attn_out",
    "hook_mlp_out": "mlp_out",
    "ln1.hook_scale": "ln1_scale",
    "ln1.hook_normalized": "ln1_out",
    "ln2.hook_scale": "ln2_scale",
    "ln2.hook_normalized": "ln2_out",
    "attn.hook_q": "q",
    "attn.hook_k": "k",
    "attn.hook_v": "v",
    "attn.hook_rot_q": "q_rot",
    "attn.hook_rot_k": "k_rot",
    "attn.hook_attn_scores": "scores",
    "attn.hook_pattern": "pattern",
    "attn.hook_z": "z",
    "attn.hook_result": "head_out",
    "mlp.hook_pre": "mlp_pre",
    "mlp.hook_post": "mlp_post",
    "ln_final.hook_scale": "final_norm_scale",
    "ln_final.hook_normalized": "final_norm_out",
}
"""Names of TransformerLens (and of papers) for our sites, without the ``blocks.N.`` prefix."""


def resolve_site(name: str) -> tuple[str, int | None]:
    """The site a name means, and its layer when the name carries one.

    ``"z"`` gives ``("z", None)``; ``"blocks.9.attn.hook_z"`` gives ``("z", 9)``.

    Raises:
      ValueError: for an unknown name, with the nearest known one.
    """
    match = re.fullmatch(r"blocks\.(\d+)\.(.+)", name)
    layer, rest = (int(match[1]), match[2]) if match else (None, name)
    site = _ALIASES.get(rest, rest)
    if site in SITES and not (layer is not None and site in OUTER_SITES):
        return site, layer
    known = [*SITES, *_ALIASES]
    near = difflib.get_close_matches(rest, known, n=1, cutoff=0.5)
    hint = f"; did you mean {near[0]!r}?" if near else "."
    raise ValueError(f"unknown site {name!r}{hint} Sites: {', '.join(SITES)}.")


class TapContext(NamedTuple):
    """What an edit may know about the place it acts on. Traced values are fine."""

    layer: Array | None = None
    """int32 scalar inside the stack, None outside."""
    positions: Array | None = None
    """[T] or [B,T] position of each query token."""
    segment_ids: Array | None = None
    """[B,T]; 0 marks padding. None when the batch has a single unpadded segment."""
    slots: Array | None = None
    """[T] the cache slot of each query token. None without a cache: token t is column t."""
    read: Mapping[str, Array] = {}
    """The values, after all edits, of the sites that `Edit.reads` names."""


EditFn = Callable[[Array, PyTree, TapContext], Array]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Edit:
    """A change to one site, as data: ``value <- fn(value, payload, ctx)``.

    Args:
      site: a name of `SITES`, or an alias such as ``"blocks.9.attn.hook_z"``, which confines the
        edit to that layer.
      fn: a module-level function returning a value of the same shape and dtype. A new lambda at
        each call compiles anew at each call.
      payload: arrays. At a site in the stack every leaf leads with the layer axis [L, ...] and
        `fn` sees the slice of its layer, unless `layer` is given: then `fn` sees it whole.
      layer: the one layer (an integer, or an int32 scalar array) the edit acts on.
      reads: sites that the same layer forms earlier and `fn` needs to see, in ``ctx.read``.
    """

    site: str = field(metadata={"static": True})
    fn: EditFn = field(metadata={"static": True})
    payload: PyTree = None
    layer: Any = None
    reads: tuple[str, ...] = field(default=(), metadata={"static": True})

    def __post_init__(self):
        site, layer = resolve_site(self.site)
        if site in READ_ONLY:
            raise ValueError(
                f"site {site!r} is read-only: nothing downstream reads it, so an edit would have "
                "no effect. Edit 'scores' or 'pattern' instead."
            )
        if layer is not None and self.layer is not None:
            raise ValueError(f"{self.site!r} names a layer and layer={self.layer} was given too.")
        object.__setattr__(self, "site", site)
        if layer is not None:
            object.__setattr__(self, "layer", layer)
        reads = tuple(resolve_site(name)[0] for name in self.reads)
        for other in reads:
            if (other in OUTER_SITES) != (site in OUTER_SITES):
                raise ValueError(
                    f"the edit at {site!r} reads {other!r}; an edit inside the layers reads sites "
                    "of its layer, one outside them the sites outside."
                )
        object.__setattr__(self, "reads", reads)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Reduction:
    """A summary of a site's value, as data: ``fn(value)``, or ``fn(value, payload)`` with one.

    Args:
      fn: a module-level function, or another hashable callable.
      payload: arrays, the same for every layer.
      by_row: for ``pattern`` [B,H,T,S]: the result of a query depends on its row alone, and leads
        with [B,H,T]. Then the rows may come in blocks, and no [T,S] map is ever formed
        (`jaxheads.reductions` has the usual ones).
    """

    fn: Callable[..., PyTree] = field(metadata={"static": True})
    payload: PyTree = None
    by_row: bool = field(default=False, metadata={"static": True})

    def __call__(self, value: Array) -> PyTree:
        return self.fn(value) if self.payload is None else self.fn(value, self.payload)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Record:
    """A request to keep a site's value, or ``reduce(value)`` computed inside the layer."""

    name: str = field(metadata={"static": True})
    """The name asked for: the key in `Output.seen`; may be an alias."""
    reduce: Any = None
    """A `Reduction`, or a function of the value (which becomes one)."""

    def __post_init__(self):
        resolve_site(self.name)
        if callable(self.reduce) and not isinstance(self.reduce, Reduction):
            object.__setattr__(self, "reduce", Reduction(self.reduce))

    @property
    def site(self) -> str:
        """The site the name means."""
        return resolve_site(self.name)[0]

    @property
    def layer(self) -> int | None:
        """The one layer the name asks for, if it names one."""
        return resolve_site(self.name)[1]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Taps:
    """The ``taps=`` argument of every forward: edits in the order they apply, then records."""

    edits: tuple[Edit, ...] = ()
    record: tuple[Record, ...] = ()

    def __post_init__(self):
        for name in ("edits", "record"):
            if isinstance(getattr(self, name), list):
                object.__setattr__(self, name, tuple(getattr(self, name)))
        names = [r.name for r in self.record]
        twice = sorted({n for n in names if names.count(n) > 1})
        if twice:
            raise ValueError(
                f"site {twice[0]!r} is recorded twice; record it once (one `reduce` may return a "
                "tuple of several summaries)."
            )

    def __add__(self, other: Taps) -> Taps:
        return Taps(self.edits + other.edits, self.record + other.record)

    def only(self, sites: Iterable[str]) -> Taps:
        """The part of these taps that concerns `sites`."""
        sites = frozenset(sites)
        return Taps(
            tuple(e for e in self.edits if e.site in sites),
            tuple(r for r in self.record if r.site in sites),
        )

    def check(self, sites: Iterable[str], num_layers: int, model: str) -> None:
        """Raise unless a model with these sites and layers can honour every edit and record."""
        sites = list(sites)
        read = [site for edit in self.edits for site in edit.reads]
        for site in (*(r.site for r in (*self.edits, *self.record)), *read):
            if site not in sites:
                raise ValueError(f"{model} has no site {site!r}. Sites of {model}: "
                                 f"{', '.join(sites)}.")  # fmt: skip
        for request in (*self.edits, *self.record):
            layer = request.layer
            if layer is None or is_traced(layer):
                continue
            if not 0 <= int(layer) < num_layers:
                raise ValueError(
                    f"layer {layer} of site {request.site!r} is out of range: {model} has "
                    f"{num_layers} layers, 0 to {num_layers - 1}."
                )
        for edit in self.edits:
            if edit.layer is not None or edit.site in OUTER_SITES:
                continue
            for leaf in jax.tree.leaves(edit.payload):
                if jnp.ndim(leaf) == 0 or jnp.shape(leaf)[0] != num_layers:
                    raise ValueError(
                        f"a payload of the edit at {edit.site!r} has shape {jnp.shape(leaf)}; "
                        f"it must lead with the layer axis, [{num_layers}, ...]: one slice a layer."
                    )

    def layer_payloads(self) -> tuple[PyTree, ...]:
        """What the layer scan slices, one entry an edit; None where the edit names its layer."""
        return tuple(None if e.layer is not None else e.payload for e in self.edits)

    def with_layer_payloads(self, payloads: tuple[PyTree, ...]) -> Taps:
        """These taps with sliced payloads in place of the stacked ones: what one layer sees."""
        edits = tuple(
            e if e.layer is not None else dataclasses.replace(e, payload=p)
            for e, p in zip(self.edits, payloads, strict=True)
        )
        return Taps(edits, self.record)


NO_TAPS = Taps()


class Tap:
    """Called by a model at each site. Lives as long as the function body that made it.

    Attributes:
      seen: the recorded values, by the name they were asked for.
    """

    def __init__(self, taps: Taps = NO_TAPS, ctx: TapContext = TapContext()):  # noqa: B008
        self._taps = taps
        self._read = {site for edit in taps.edits for site in edit.reads}
        self._held: dict[str, Array] = {}
        self._reached: set[str] = set()
        self.ctx = ctx
        self.seen: dict[str, PyTree] = {}

    def wants(self, site: str) -> bool:
        """Whether anybody edits, reads or records `site`: costly sites are formed only then."""
        asked = (*self._taps.edits, *self._taps.record)
        return site in self._read or any(r.site == site for r in asked)

    def needs_whole(self, site: str) -> bool:
        """Whether an edit, or a record that is not a `Reduction` by row, needs the whole value."""
        reductions = [r.reduce for r in self._taps.record if r.site == site]
        by_row = all(isinstance(r, Reduction) and r.by_row for r in reductions)
        return not by_row or site in self._read or any(e.site == site for e in self._taps.edits)

    def by_row(self, site: str, compute: Callable[[Reduction], PyTree]) -> None:
        """Records of `site` from ``compute(reduction)``, where its value is never formed."""
        self._reached.add(site)
        for item in self._taps.record:
            if item.site == site:
                self.seen[item.name] = compute(item.reduce)

    def __call__(self, site: str, value: Array) -> Array:
        """`value` after the edits meant for `site`; recorded if asked; named for remat policies."""
        self._reached.add(site)
        for edit in self._taps.edits:
            if edit.site == site:
                value = _apply(edit, value, self._context(edit))
        value = checkpoint_name(value, site)
        if site in self._read:
            self._held[site] = value
        for item in self._taps.record:
            if item.site == site:
                self.seen[item.name] = value if item.reduce is None else item.reduce(value)
        return value

    def _context(self, edit: Edit) -> TapContext:
        """`ctx` with what the edit reads."""
        missing = [site for site in edit.reads if site not in self._held]
        if missing:
            raise ValueError(
                f"the edit at {edit.site!r} reads {missing[0]!r}, which is not formed before it in "
                "this layer; read an earlier site."
            )
        return self.ctx._replace(read={site: self._held[site] for site in edit.reads})

    def inside(self, ctx: TapContext) -> Tap:
        """A tap for the body of a loop over parts of the tokens: its edits, and whole records.

        Return what it saw (`seen`, by site) from the body and hand it to `collect`.
        """
        sites = dict.fromkeys(r.site for r in self._taps.record)
        return Tap(Taps(self._taps.edits, tuple(Record(site) for site in sites)), ctx)

    def collect(self, reached: Iterable[str], seen: Mapping[str, Array]) -> None:
        """Records of sites reached in a loop's body, from their values put together."""
        self._reached |= set(reached)
        for item in self._taps.record:
            if item.site in seen:
                value = seen[item.site]
                self.seen[item.name] = value if item.reduce is None else item.reduce(value)

    def finish(self, where: str) -> dict[str, PyTree]:
        """The recorded values; raises when a requested site was never reached in this body."""
        missed = {r.site for r in (*self._taps.edits, *self._taps.record)} - self._reached
        if missed:
            raise NotImplementedError(
                f"{where} never formed the site {sorted(missed)[0]!r} that an edit or a record "
                "asks for; use implementation='dense' or 'auto', or ask for another site ('z' is "
                "formed by every implementation)."
            )
        return self.seen


NO_TAP = Tap()


def _apply(edit: Edit, value: Array, ctx: TapContext) -> Array:
    new = edit.fn(value, edit.payload, ctx)
    if jnp.shape(new) != value.shape or jnp.result_type(new) != value.dtype:
        raise ValueError(
            f"the edit {getattr(edit.fn, '__name__', edit.fn)!r} at site {edit.site!r} returned "
            f"{jnp.result_type(new)}{list(jnp.shape(new))} for {value.dtype}{list(value.shape)}; "
            "it must keep shape and dtype. Check the payload's axes "
            f"({SITES[edit.site]}, without the layer axis)."
        )
    return new if edit.layer is None else jnp.where(ctx.layer == edit.layer, new, value)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TappedForward:
    """A forward under taps: same signature, and a pytree whose leaves are the payloads."""

    forward: Callable[..., Any] = field(metadata={"static": True})
    taps: Taps = NO_TAPS

    def __call__(self, model, tokens, *, taps: Taps = NO_TAPS, **kwargs):
        """The wrapped forward; `taps` given here apply after (outside) the wrapped ones."""
        return self.forward(model, tokens, taps=self.taps + taps, **kwargs)


def as_tapped(forward: Callable[..., Any]) -> TappedForward:
    """`forward` as a pytree, so that a jitted function can take it as an argument.

    The function itself is static; payloads are traced. A plain closure over arrays is compiled
    anew for each closure: write interventions with `intervene`.
    """
    return forward if isinstance(forward, TappedForward) else TappedForward(forward)


def _wrap(forward: Callable[..., Any], taps: Taps) -> TappedForward:
    inner = as_tapped(forward)
    return TappedForward(inner.forward, inner.taps + taps)


def intervene(forward: Callable[..., Any], *edits: Edit) -> TappedForward:
    """A forward with `edits` applied. Nests: inner edits apply first.

    Example:
      >>> import jax.numpy as jnp
      >>> def double(value, payload, ctx):
      ...     return value * payload
      >>> fwd = intervene(lambda model, tokens, *, taps: taps, Edit("z", double, jnp.ones((4, 1))))
      >>> len(fwd(None, None).edits)
      1
    """
    return _wrap(forward, Taps(edits=tuple(edits)))


def record(
    forward: Callable[..., Any],
    *sites: str,
    reduce: Callable[[Array], PyTree] | Mapping[str, Callable[[Array], PyTree]] | None = None,
) -> TappedForward:
    """A forward whose `Output.seen` holds the value of each site after all edits.

    Args:
      forward: a forward, wrapped or not.
      *sites: names or aliases. A site in the stack comes with a leading [L]; an alias that names a
        layer (``"blocks.3.hook_resid_post"``) comes without it.
      reduce: applied inside the layer, so that ``[B,H,T,S]`` maps need never be stacked; one
        function or `Reduction` for all sites, or a mapping from site to those. Those of
        `jaxheads.reductions` for ``pattern`` need no [T,S] map even inside the layer.
    """
    if not sites:
        raise ValueError("record needs at least one site, for example record(forward, 'z').")
    pick = reduce.get if isinstance(reduce, Mapping) else lambda _: reduce
    return _wrap(forward, Taps(record=tuple(Record(s, pick(s)) for s in sites)))


def sweep(fn: Callable[[PyTree], PyTree], payloads: PyTree, *, batch_size: int | None = None):
    """``fn`` over a batch of payloads in one program: a loop over vmapped chunks.

    Args:
      fn: maps one payload (the leaves without their leading axis) to a tree of arrays.
      payloads: a tree of arrays sharing their leading axis N.
      batch_size: how many payloads one step evaluates at once; None means one.

    Returns:
      The results stacked on a leading axis N.
    """
    sizes = {jnp.shape(leaf)[:1] for leaf in jax.tree.leaves(payloads)}
    if len(sizes) != 1 or () in sizes:
        raise ValueError(
            f"payloads must be arrays sharing their leading axis; leading axes: {sorted(sizes)}."
        )
    if batch_size is not None and batch_size < 1:
        raise ValueError(f"batch_size={batch_size} must be at least 1, or None.")
    return jax.lax.map(fn, payloads, batch_size=batch_size)
