"""Training of image classifiers: sharded steps, test accuracy, and the model on disk.

    fitted = fit(ViTConfig(...), open_images("digits"), ClassifierTraining(steps=600),
                 mesh=make_mesh("data:8"), workdir="runs/digits")
    model = jh.load("runs/digits/model")

Images are split over the mesh axes data and fsdp, parameters by their names.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxheads.checkpoints import save
from jaxheads.data.images import ImageData, Images, eval_image_batches, image_batches
from jaxheads.models import vit
from jaxheads.models.vit import ViT, ViTConfig
from jaxheads.parallel.multihost import is_main_process
from jaxheads.taps import TappedForward, as_tapped
from jaxheads.training.configs import TrainConfig
from jaxheads.training.feed import local_block
from jaxheads.training.loss import auxiliary_loss
from jaxheads.training.optimizers import learning_rate, make_optimizer
from jaxheads.training.step import TrainState, global_norm, init_state, state_shardings
from jaxheads.training.writers import RunWriter
from jaxheads.typing import Array

MODEL = "model"
"""The directory, inside a workdir, of the trained model."""


@dataclass(frozen=True, kw_only=True)
class ClassifierTraining:
    """How to train: AdamW with a warm-up, then a cosine to a tenth of the learning rate.

    Raises:
      ValueError, TypeError: for a value that breaks its rule.
    """

    steps: int = 1000
    batch_size: int = 128  # images, over all devices
    lr: float = 1e-3
    warmup_steps: int = 50
    weight_decay: float = 0.05  # not of norms, biases, class and distillation token
    grad_clip: float = 1.0  # largest global gradient norm; 0 = no clipping
    label_smoothing: float = 0.0  # share of the target spread evenly over all classes
    aux_weight: float = 0.01  # weight of the attention's auxiliary losses
    seed: int = 0  # of the initial parameters and the order of images
    log_every: int = 20
    eval_every: int = 0  # steps between tests; 0 = only at the end

    def __post_init__(self):
        _ = self.optimization
        for name, least in (("batch_size", 1), ("eval_every", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}={getattr(self, name)} must be at least {least}.")
        if not 0 <= self.label_smoothing < 1:
            raise ValueError(f"label_smoothing={self.label_smoothing} must be at least 0, below 1.")

    @property
    def optimization(self) -> TrainConfig:
        """The same for `make_optimizer`."""
        return TrainConfig(
            steps=self.steps,
            lr=self.lr,
            warmup_steps=self.warmup_steps,
            weight_decay=self.weight_decay,
            b2=0.999,
            grad_clip=self.grad_clip,
            aux_weight=self.aux_weight,
            seed=self.seed,
            log_every=self.log_every,
        )


class Scores(NamedTuple):
    """Of a model on images."""

    accuracy: float
    loss: float
    """Mean cross-entropy."""


class Fitted(NamedTuple):
    """What `fit` returns."""

    model: ViT
    test: Scores
    losses: np.ndarray
    """[steps] of the training batches."""
    seconds: float


def classification_loss(logits: Array, labels: Array, smoothing: float = 0.0) -> Array:
    """Mean cross-entropy with targets ``(1 - s) [label] + s / V`` of float32 logits [B,V]."""
    targets = optax.smooth_labels(jax.nn.one_hot(labels, logits.shape[-1]), smoothing)
    return jnp.mean(optax.softmax_cross_entropy(logits, targets))


def train_step(
    state: TrainState,
    batch: dict[str, Array],
    *,
    settings: ClassifierTraining,
    optimizer: optax.GradientTransformation,
    forward: Callable[..., Any] = vit.forward,
) -> tuple[TrainState, dict[str, Array]]:
    """One optimiser step on {"image" [B,H,W,C], "label" [B]}; pure.

        minimised: cross-entropy + aux_weight * aux      aux: the losses in `Output.aux`

    Returns:
      (state, metrics): float32 scalars loss (cross-entropy), accuracy, aux, grad_norm (before
      clipping) and lr.
    """

    def objective(model: ViT):
        out = forward(model, batch["image"])
        correct = jnp.mean(jnp.argmax(out.logits, axis=-1) == batch["label"], dtype=jnp.float32)
        loss = classification_loss(out.logits, batch["label"], settings.label_smoothing)
        aux = auxiliary_loss(out.aux)
        return loss + settings.aux_weight * aux, (loss, correct, aux)

    (_, (loss, accuracy, aux)), grads = jax.value_and_grad(objective, has_aux=True)(state.model)
    updates, opt_state = optimizer.update(grads, state.opt_state, state.model)
    metrics = {
        "loss": loss,
        "accuracy": accuracy,
        "aux": aux,
        "grad_norm": global_norm(grads),
        "lr": learning_rate(settings.optimization)(state.step),
    }
    model = optax.apply_updates(state.model, updates)
    return TrainState(state.step + 1, model, opt_state), metrics


def _make_step(settings: ClassifierTraining, optimizer, mesh: Mesh, forward) -> Callable:
    def step(state, batch, forward):
        new, metrics = train_step(
            state, batch, settings=settings, optimizer=optimizer, forward=forward
        )
        keep = jax.lax.with_sharding_constraint
        return keep(new, state_shardings(new, mesh)), keep(metrics, NamedSharding(mesh, P()))

    jitted, forward = jax.jit(step, donate_argnums=0), as_tapped(forward)
    return lambda state, batch: jitted(state, batch, forward)


def _image_sharding(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, P(("data", "fsdp")))


def _process(mesh: Mesh, batch_size: int) -> tuple[int, int]:
    """(index, count) of this process among those that read different images."""
    ways = mesh.shape["data"] * mesh.shape["fsdp"]
    if batch_size % ways:
        raise ValueError(
            f"batch_size={batch_size} is not divisible by {ways}, the mesh's data and fsdp axes."
        )
    rows = local_block(_image_sharding(mesh), (batch_size, 1))[0]
    size = rows.stop - rows.start
    return rows.start // size, batch_size // size


def _put(batch: dict[str, np.ndarray], mesh: Mesh, count: int) -> dict[str, Array]:
    """This process's images, one of `count` parts, as a global batch on the devices."""
    sharding = _image_sharding(mesh)
    return {
        name: jax.make_array_from_process_local_data(
            sharding, value, (len(value) * count, *value.shape[1:])
        )
        for name, value in batch.items()
    }


@jax.jit
def _score(
    model: ViT, image: Array, label: Array, forward: TappedForward
) -> tuple[Array, Array, Array]:
    """Sums over the images with a label: correct, cross-entropy, count."""
    logits = forward(model, image).logits
    is_real = label >= 0
    cross = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.maximum(label, 0))
    correct = jnp.argmax(logits, axis=-1) == label
    return jnp.sum(correct), jnp.sum(jnp.where(is_real, cross, 0)), jnp.sum(is_real)


def evaluate(
    model: ViT,
    images: Images,
    *,
    mesh: Mesh,
    batch_size: int = 256,
    forward: Callable[..., Any] = vit.forward,
) -> Scores:
    """Accuracy and mean cross-entropy over all images.

    Args:
      model: on the mesh.
      images: the same on every process.
      batch_size: at a time; rounded up to what the mesh divides.
      forward: a forward, wrapped or not.
    """
    ways = mesh.shape["data"] * mesh.shape["fsdp"]
    batch_size = -(-batch_size // ways) * ways
    index, count = _process(mesh, batch_size)
    size = batch_size // count
    total = np.zeros(3)
    with jax.set_mesh(mesh):
        for batch in eval_image_batches(images, batch_size):
            own = {name: x[index * size : (index + 1) * size] for name, x in batch.items()}
            placed = _put(own, mesh, count)
            sums = _score(model, placed["image"], placed["label"], as_tapped(forward))
            total += np.asarray(jax.device_get(sums), np.float64)
    return Scores(float(total[0] / total[2]), float(total[1] / total[2]))


def fit(
    source: ViTConfig | ViT,
    data: ImageData,
    settings: ClassifierTraining,
    *,
    mesh: Mesh,
    workdir: str | Path | None = None,
    forward: Callable[..., Any] = vit.forward,
) -> Fitted:
    """Trains a classifier on `data.train` and tests it on `data.test`.

    Args:
      source: the configuration of a new model, or a model to train on (its buffers are used up).
      data: of `open_images`.
      settings: how to train.
      mesh: of all devices.
      workdir: gets metrics.jsonl and, at the end, model/ (`jh.load` reads it); None: nothing.
      forward: a forward, wrapped or not, to train under.
    Raises:
      ValueError: for images that do not fit the model, or a batch that the mesh does not divide.
      FloatingPointError: when the loss is no longer finite.
    """
    start = time.perf_counter()
    cfg = source if isinstance(source, ViTConfig) else source.cfg
    _check_fit(cfg, data)
    index, count = _process(mesh, settings.batch_size)
    optimizer = make_optimizer(settings.optimization)
    build: Any = source
    if isinstance(source, ViTConfig):
        build = lambda: ViT(cfg, rngs=nnx.Rngs(settings.seed))
    state = init_state(build, optimizer, mesh)
    step = _make_step(settings, optimizer, mesh, forward)
    batches = image_batches(
        data.train,
        settings.batch_size,
        seed=settings.seed,
        process_index=index,
        process_count=count,
    )
    writer = None
    if workdir is not None:
        if is_main_process():
            Path(workdir).mkdir(parents=True, exist_ok=True)
        writer = RunWriter(
            Path(workdir), first_step=1, total_steps=settings.steps, active=is_main_process()
        )
    score = lambda model: evaluate(model, data.test, mesh=mesh, forward=forward)
    try:
        state, losses, test = _loop(state, step, batches, score, settings, mesh, count, writer)
    finally:
        if writer is not None:
            writer.close()
    if workdir is not None:
        save(state.model, Path(workdir) / MODEL)
    return Fitted(state.model, test, losses, time.perf_counter() - start)


def _loop(
    state: TrainState,
    step: Callable,
    batches: Iterator[dict[str, np.ndarray]],
    score: Callable[[ViT], Scores],
    settings: ClassifierTraining,
    mesh: Mesh,
    count: int,
    writer: RunWriter | None,
) -> tuple[TrainState, np.ndarray, Scores]:
    """All steps: the last state, the losses [steps], and the scores of the last model."""
    losses: list[Any] = []
    test = Scores(math.nan, math.nan)
    for number in range(1, settings.steps + 1):
        with jax.set_mesh(mesh):
            state, metrics = step(state, _put(next(batches), mesh, count))
        losses.append(metrics["loss"])
        is_last = number == settings.steps
        line: dict[str, float] = {}
        if is_last or number % settings.log_every == 0:
            line = {name: float(value) for name, value in jax.device_get(metrics).items()}
            if not math.isfinite(line["loss"]):
                raise FloatingPointError(f"the loss is {line['loss']} at step {number}; lower lr.")
        if is_last or (settings.eval_every and number % settings.eval_every == 0):
            test = score(state.model)
            line |= {f"test/{name}": value for name, value in test._asdict().items()}
        if writer is not None and line:
            writer.write(number, line)
            writer.progress(number, line)
    return state, np.asarray(jax.device_get(losses)), test


def _check_fit(cfg: ViTConfig, data: ImageData) -> None:
    """Raise unless a model takes these images and knows their classes."""
    given = (data.train.side, data.train.pixels.shape[-1], data.num_classes)
    needed = (cfg.image_size, cfg.channels, cfg.num_classes)
    for name, have, want in zip(("image_size", "channels", "num_classes"), given, needed):
        if have != want:
            raise ValueError(
                f"the data have {name}={have}, the model {name}={want}; build the model for the "
                "data (`for_data`)."
            )


def for_data(cfg: ViTConfig, data: ImageData) -> ViTConfig:
    """`cfg` with the image size, channels and classes of a data set.

    A patch size that does not divide the image gives way to the largest one that does and leaves
    at least four patches a side.
    """
    side = data.train.side
    patch = cfg.patch_size
    if side % patch or side == patch:
        patch = max(p for p in range(1, side + 1) if side % p == 0 and side // p >= min(4, side))
    return dataclasses.replace(
        cfg,
        image_size=side,
        patch_size=patch,
        channels=data.train.pixels.shape[-1],
        num_classes=data.num_classes,
    )
