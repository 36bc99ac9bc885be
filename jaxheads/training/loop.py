"""The training run: data, mesh, state, steps, evaluation, checkpoints.

    train(RunConfig(model=ModelConfig(...), workdir="runs/x"))

While step n runs on the devices, the host prepares batch n + 1 and sends it; the numbers of a step
are read when two later steps have been started, so the devices never wait for the host to look.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from jaxheads import parallel
from jaxheads.attention import Landmarks, insert_landmarks, landmarks_of, strip_landmarks
from jaxheads.checkpoints import orbax
from jaxheads.data import DataConfig, Tokenizer, eval_batches, make_dataset
from jaxheads.data.pipeline import landmark_token
from jaxheads.fields import to_json
from jaxheads.generation import generate
from jaxheads.interventions import for_text
from jaxheads.models import Decoder, ModelConfig, forward
from jaxheads.parallel.multihost import is_main_process
from jaxheads.training.configs import TrainConfig
from jaxheads.training.feed import Batch, Feed, batch_sharding, data_process, put
from jaxheads.training.optimizers import make_optimizer
from jaxheads.training.step import TrainState, init_state, make_eval_step, make_train_step
from jaxheads.training.watch import Profile, Stop, Window, stop_on_signals
from jaxheads.training.writers import METRICS, TENSORBOARD, RunWriter

_IN_FLIGHT = 2  # steps started before the numbers of an earlier one are read


@dataclass(frozen=True, kw_only=True)
class SampleConfig:
    """The text that a trained model writes at the end of a run."""

    tokens: int = 200  # its length; 0: none
    prompt: str = "def "  # what it begins with
    temperature: float = 0.8  # 0 takes the likeliest token

    def __post_init__(self):
        for name in ("tokens", "temperature"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name}={getattr(self, name)!r} must be at least 0.")


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """A whole training run."""

    model: ModelConfig
    data: DataConfig = DataConfig()
    train: TrainConfig = TrainConfig()
    sample: SampleConfig = SampleConfig()
    mesh: str = ""  # "data:2,model:4"; of one slice, where there are several
    dcn_mesh: str = ""  # "data:4": axes over slices
    workdir: str = "runs/default"

    def __post_init__(self):
        if not self.workdir.strip():
            raise ValueError("workdir='' is empty; give a directory for checkpoints and metrics.")
        for spec in (self.mesh, self.dcn_mesh):
            parallel.parse_mesh(spec)


class Result(NamedTuple):
    """What a run ended with."""

    step: int
    """Steps done in all."""
    state: TrainState
    metrics: dict[str, float]
    """The last training and evaluation numbers."""
    stopped_by: str | None
    """The signal that ended the run early, None when it is finished."""


def check_run(run: RunConfig, mesh: Mesh) -> None:
    """Raise for settings that do not fit each other or the mesh, before anything is allocated."""
    rows, length = run.data.batch_size, run.data.seq_len
    ways = mesh.shape["data"] * mesh.shape["fsdp"]
    parts = run.train.grad_accum
    if rows % (ways * parts):
        raise ValueError(
            f"batch_size={rows} is not divisible by {ways * parts}: the mesh splits it over "
            f"data x fsdp = {ways} devices"
            + (f", in {parts} accumulated parts." if parts > 1 else ".")
        )
    if length % mesh.shape["context"]:
        raise ValueError(
            f"seq_len={length} is not divisible by the mesh axis context:{mesh.shape['context']}."
        )
    if run.model.positions == "learned" and length > run.model.max_positions:
        raise ValueError(
            f"seq_len={length} exceeds the {run.model.max_positions} learned positions of the "
            "model; shorten it, or raise model.max_positions."
        )


def check_landmarks(run: RunConfig, tokenizer: Tokenizer) -> None:
    """Raise for a model whose landmarks stand elsewhere than those of its data."""
    wanted, block = landmarks_of(run.model), run.data.landmark_block
    if wanted is None:
        return
    found = Landmarks(block, landmark_token(run.data, tokenizer)) if block else None
    if wanted != found:
        has = "none" if found is None else f"id {found.token} after every {found.block_size} tokens"
        raise ValueError(
            f"attention={run.model.attention!r} takes id {wanted.token} after every "
            f"{wanted.block_size} tokens for a landmark, and the data have {has}; set "
            f"data.landmark_block={wanted.block_size} and data.landmark_id={wanted.token}."
        )


def check_vocabulary(tokenizer: Tokenizer, cfg: ModelConfig) -> None:
    """Raise when the tokenizer has ids that the model has no embedding for."""
    if tokenizer.vocab_size > cfg.vocab_size:
        raise ValueError(
            f"tokenizer {tokenizer.name!r} has {tokenizer.vocab_size} ids but the model's "
            f"vocab_size={cfg.vocab_size}; use the model's own tokenizer (--set data.tokenizer=...)"
            ", or a larger model.vocab_size."
        )


def prepare_workdir(workdir: str | Path) -> Path:
    """Make the directory and see that it can be written."""
    path = Path(workdir).expanduser()
    probe = path / f".writable-{jax.process_index()}-{os.getpid()}"
    try:
        path.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise ValueError(
            f"workdir={str(workdir)!r} cannot be written ({error.strerror}); give a directory of "
            "your own."
        ) from error
    return path


def set_aside(workdir: Path) -> None:
    """Move the results of an earlier run to ``earlier-N`` inside the workdir."""
    names = (orbax.CHECKPOINTS, METRICS, TENSORBOARD)
    present = [workdir / name for name in names if (workdir / name).exists()]
    if present:
        number = 1 + len(list(workdir.glob("earlier-*")))
        folder = workdir / f"earlier-{number}"
        folder.mkdir()
        for path in present:
            path.rename(folder / path.name)


def train(
    run: RunConfig,
    *,
    model: Callable[[], Decoder] | None = None,
    forward: Callable[..., Any] = forward,
    resume: bool = True,
    provenance: Mapping[str, Any] | None = None,
) -> Result:
    """Train until `run.train.steps`, a signal, or a loss that is not finite.

    Args:
      model: gives the parameters to start from, placed on the mesh of `run`; not called when the
        workdir holds a checkpoint. Default: new parameters from `run.train.seed`.
      forward: what is trained under; wrap it to train with interventions.
      resume: go on from the newest complete checkpoint of the workdir. False starts anew, and
        moves what an earlier run left in the workdir to WORKDIR/earlier-N.
      provenance: JSON values written to WORKDIR/config.json beside the settings.

    Raises:
      ValueError: for settings that do not fit together, and checkpoints that do not fit them.
      NonFiniteLossError: the batch is saved in the workdir, the last checkpoint stays as it is.
    """
    mesh = parallel.make_mesh(run.mesh, dcn=run.dcn_mesh)
    check_run(run, mesh)
    tokenizer = Tokenizer.load(run.data.tokenizer)
    check_vocabulary(tokenizer, run.model)
    check_landmarks(run, tokenizer)
    workdir = prepare_workdir(run.workdir)
    shape = (run.data.batch_size, run.data.seq_len)
    index, count = data_process(mesh, shape)
    data = make_dataset(run.data, tokenizer=tokenizer, process_index=index, process_count=count)
    with contextlib.ExitStack() as stack:
        stack.callback(data.close)
        stack.enter_context(jax.set_mesh(mesh))
        if not resume and is_main_process():
            set_aside(workdir)
        checkpoints = stack.enter_context(
            orbax.Checkpoints(
                workdir / orbax.CHECKPOINTS,
                keep_last=run.train.keep_last,
                keep_best=run.train.keep_best,
            )
        )
        trainer = _Trainer(run, mesh, checkpoints, data, tokenizer, workdir, forward)
        trainer.start(model)
        if is_main_process():
            content = to_json(run) | dict(provenance or {})
            (workdir / "config.json").write_text(json.dumps(content, indent=2) + "\n")
            tokenizer.save(workdir)  # the workdir can be loaded on its own
        stop = stack.enter_context(stop_on_signals())
        with trainer.open_writer():
            return trainer.run_steps(stop)


class _Trainer:
    """One run of `train`: its parts, and the loop over steps."""

    def __init__(self, run: RunConfig, mesh, checkpoints, data, tokenizer, workdir, forward):
        self.run, self.mesh, self.workdir = run, mesh, workdir
        self.checkpoints, self.data, self.tokenizer = checkpoints, data, tokenizer
        self.forward = forward
        self.shape = (run.data.batch_size, run.data.seq_len)
        self.optimizer = make_optimizer(run.train)
        self.train_step = make_train_step(run.train, self.optimizer, mesh, forward=forward)
        self.eval_step = make_eval_step(run.train, mesh, forward=forward)
        self.writer: RunWriter
        self.key = jax.random.key(run.train.seed)
        self.numbers: dict[str, float] = {}
        self.step = 0
        self.data_state: dict[str, Any] = {}
        self.held_out: list[Batch] = []

    def constructor(self) -> Decoder:
        return Decoder(self.run.model, rngs=nnx.Rngs(self.run.train.seed))

    def start(self, model: Callable[[], Decoder] | None) -> None:
        """The state to go on from: the newest checkpoint, `model`, or new parameters."""
        if not self.checkpoints.steps:
            source = self.constructor if model is None else model()
            self.state = init_state(source, self.optimizer, self.mesh)
            self.data_state = self.data.get_state()
            return
        like = orbax.abstract(
            lambda: init_state(self.constructor, self.optimizer, self.mesh), self.mesh
        )
        newest = self.checkpoints.steps[-1]
        if newest > self.run.train.steps:
            raise ValueError(
                f"workdir={self.run.workdir!r} holds step {newest}, but steps="
                f"{self.run.train.steps}; give at least as many steps, or another workdir."
            )
        key = orbax.abstract(lambda: self.key, self.mesh)
        rest = {"step": like.step, "opt_state": like.opt_state, "key": key}
        read = self.checkpoints.restore(like.model, rest)
        rest = read.training
        self.state = TrainState(step=rest["step"], model=read.model, opt_state=rest["opt_state"])
        self.key, self.step, self.data_state = rest["key"], read.step, read.data_state
        self.data.set_state(read.data_state)

    def read_held_out(self) -> None:
        """The batches of every evaluation; kept, so that large corpora are indexed only once."""
        data = dataclasses.replace(self.run.data, split="validation")
        if not data.validation_fraction or self.run.data.split == "all":
            return
        index, count = data_process(self.mesh, self.shape)
        try:
            batches = eval_batches(
                data,
                self.run.train.eval_batches,
                tokenizer=self.tokenizer,
                process_index=index,
                process_count=count,
            )
        except ValueError as error:  # a corpus of a few documents may have none to hold out
            self.writer.say(f"no evaluation: {error}")
            return
        self.held_out = list(batches)

    @contextlib.contextmanager
    def open_writer(self) -> Iterator[None]:
        cfg = self.run.train
        self.writer = RunWriter(
            self.workdir,
            first_step=self.step + 1,
            total_steps=cfg.steps,
            active=is_main_process(),
        )
        try:
            begin = f"resuming after step {self.step}" if self.step else "starting"
            self.writer.say(
                f"{begin} of {cfg.steps}: {self.run.model.num_params:,} parameters on mesh "
                f"{_describe(self.mesh)}, workdir {self.run.workdir}"
            )
            yield
        finally:
            self.writer.close()

    def run_steps(self, stop: Stop) -> Result:
        """The loop."""
        cfg = self.run.train
        if self.step == cfg.steps:
            self.writer.say(f"all {cfg.steps} steps are done already; raise steps to go on.")
            return Result(self.step, self.state, self.numbers, None)
        self.read_held_out()
        feed = Feed(self.data, self.mesh, self.shape, self.run.model.vocab_size)
        window = Window(
            self.run.model,
            self.run.data,
            cfg,
            feed=feed,
            writer=self.writer,
            workdir=self.workdir,
            step=self.step,
        )
        profile = Profile(cfg, self.workdir, self.step)
        batch = None
        try:
            while self.step < cfg.steps and not self._should_stop(stop):
                step = self.step + 1
                batch = next(feed) if batch is None else batch
                profile.before(step)
                with jax.profiler.StepTraceAnnotation("train", step_num=step):
                    self.state, metrics = self.train_step(self.state, batch.arrays)
                self.step, self.data_state = step, batch.data_state
                self.checkpoints.check()
                window.add(step, metrics, batch.rows)
                batch = feed.after(metrics) if step < cfg.steps else None
                window.read(_IN_FLIGHT)
                if profile.ends_at(step):
                    window.read(0)
                    profile.stop()
                evaluates = bool(cfg.eval_every) and step % cfg.eval_every == 0
                saves = bool(cfg.checkpoint_every) and step % cfg.checkpoint_every == 0
                if (evaluates or saves) and step < cfg.steps:
                    window.read(0)  # nothing is saved after a step that went wrong
                    with window.pause():
                        loss = self.evaluate() if evaluates else None
                        if saves:
                            self.save(loss)
            window.finish()
        finally:
            profile.stop()
        self.numbers |= window.last
        if self.step < cfg.steps:
            self.save(None)
            self.checkpoints.wait()
            self.writer.say(
                f"stopped by {stop.name or 'preemption'} after step {self.step}; the checkpoint is "
                "saved: run the same command to go on."
            )
            return Result(self.step, self.state, self.numbers, stop.name or "preemption")
        self.save(self.evaluate())
        self.sample()
        self.checkpoints.wait()
        return Result(self.step, self.state, self.numbers, None)

    def _should_stop(self, stop: Stop) -> bool:
        """Whether a signal asks all processes to stop before the next step."""
        if jax.process_count() > 1:
            return self.checkpoints.reached_preemption(self.step)
        return stop.name is not None

    def evaluate(self) -> float | None:
        """Mean cross-entropy on held-out text, written down; None without such text."""
        sharding = batch_sharding(self.mesh, self.shape)
        sums = None
        for rows in self.held_out:
            new = self.eval_step(self.state.model, put(rows, sharding, self.shape))
            sums = new if sums is None else jax.tree.map(jnp.add, sums, new)
        if sums is None:
            return None
        total = {name: float(value) for name, value in sums._asdict().items()}
        loss = (total["loss_sum"] - self.run.train.z_loss * total["z_sum"]) / total["weight_sum"]
        numbers = {
            "eval/loss": loss,
            "eval/perplexity": math.exp(min(loss, 700.0)),
            "eval/accuracy": total["correct_sum"] / total["weight_sum"],
        }
        self.writer.write(self.step, numbers)
        self.writer.say(
            f"evaluation after step {self.step}: loss {loss:.4f}, perplexity "
            f"{numbers['eval/perplexity']:.2f}, accuracy {100 * numbers['eval/accuracy']:.1f}%"
        )
        self.numbers |= numbers
        return loss

    def save(self, eval_loss: float | None) -> None:
        """Start to write a checkpoint of the current step."""
        self.checkpoints.save(
            self.step,
            model=self.state.model,
            training={
                "step": self.state.step,
                "opt_state": self.state.opt_state,
                "key": self.key,
            },
            config=to_json(self.run),
            data_state=self.data_state,
            eval_loss=eval_loss,
        )

    def sample(self) -> None:
        """Show a text that the trained model writes, and keep it in sample.txt."""
        cfg = self.run.sample
        prompt = self.tokenizer.encode(cfg.prompt)
        length = cfg.tokens
        if self.run.model.positions == "learned":
            length = min(length, self.run.model.max_positions - len(prompt))
        if length < 1 or not len(prompt):
            return
        marks = landmarks_of(self.run.model)
        if marks is not None:
            prompt = insert_landmarks(prompt, marks.block_size, marks.token)
        try:
            tokens = generate(
                self.state.model,
                prompt[None],
                max_new_tokens=length,
                key=jax.random.fold_in(self.key, self.step),
                temperature=cfg.temperature,
                forward=for_text(self.forward, self.run.model, self.tokenizer.vocab_size),
            )
        except NotImplementedError as error:  # an attention variant without cached decoding
            self.writer.say(f"no text is sampled: {error}")
            return
        if jax.process_count() > 1:
            tokens = multihost_utils.process_allgather(tokens, tiled=True)
        ids = np.asarray(tokens)[0]
        ids = ids if marks is None else strip_landmarks(ids, marks.token)
        text = self.tokenizer.decode(ids)
        if is_main_process():
            (self.workdir / "sample.txt").write_text(text + "\n", encoding="utf-8")
        self.writer.say(f"sampled text:\n{text}")


def _describe(mesh: Mesh) -> str:
    axes = ",".join(f"{name}:{size}" for name, size in mesh.shape.items() if size > 1)
    return f"{axes or 'of one device'} ({mesh.devices.flat[0].device_kind})"
