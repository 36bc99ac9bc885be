"""Bad input: every case raises the named exception with a message that names value and rule.

All cases run in process and stop before anything is compiled; `test_train.py` checks that the
command prints such an error as one message and exits with 2.
"""

import dataclasses
import json
import re
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from flax import nnx

from jaxheads import parallel
from jaxheads.checkpoints import orbax
from jaxheads.data import Tokenizer
from jaxheads.fields import to_json
from jaxheads.models import Decoder
from jaxheads.parallel import multihost
from jaxheads.training import feed, loop
from launch import flags
from launch.train import resolve


@pytest.fixture(autouse=True)
def corpus(tmp_path):
    (tmp_path / "text.txt").write_text("".join(f"line {i} of a text\n\n" for i in range(400)))
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "folder").mkdir()
    (tmp_path / "broken.json").write_text("{")
    (tmp_path / "rows.jsonl").write_text('{"body": "no field text"}\n')


def flag(**given):
    """The flags as on the command line, with `{tmp}` for the test's directory."""

    def case(tmp):
        fill = lambda v: v.replace("{tmp}", str(tmp)) if isinstance(v, str) else v
        filled = {n: [fill(t) for t in v] if n == "set" else fill(v) for n, v in given.items()}
        filled.setdefault("workdir", str(tmp / "run"))
        filled.setdefault("data", str(tmp / "text.txt"))
        small = ["model.num_layers=1", "model.model_dim=16"]
        ours = {t.partition("=")[0] for t in filled.get("set", ())}
        if filled.get("model") is None:
            filled["set"] = [
                *(s for s in small if s.partition("=")[0] not in ours), *filled.get("set", ())
            ]  # fmt: skip
        filled.setdefault("seq_len", "16")
        filled.setdefault("batch_size", "8")
        return resolve(**filled)

    return case


def start(**given):
    """The same, and the run begins: what needs the mesh, the data or the workdir."""

    def case(tmp):
        plan = flag(**given)(tmp)
        loop.train(plan.run, model=plan.load)

    return case


def setting(*texts):
    return flag(set=list(texts))


def config(content):
    def case(tmp):
        (tmp / "given.json").write_text(json.dumps(content))
        return flag(config="{tmp}/given.json")(tmp)

    return case


def with_checkpoint(*texts, steps="10"):
    """Start in a workdir that holds a checkpoint of step 5."""

    def case(tmp):
        run = flag(set=["model.num_heads=8"])(tmp).run
        with orbax.Checkpoints(tmp / "run" / orbax.CHECKPOINTS) as checkpoints:
            checkpoints.save(
                5,
                model=Decoder(run.model, rngs=nnx.Rngs(0)),
                training={"step": np.asarray(5)},
                config=to_json(run),
                data_state={},
            )
        plan = flag(set=list(texts), steps=steps)(tmp)
        loop.train(plan.run)

    return case


def token(value):
    """A batch with a token id that the model has no embedding for."""

    def case(tmp):
        rows = {
            name: np.zeros((2, 4), np.int32)
            for name in ("tokens", "targets", "segment_ids", "positions", "weights")
        }
        rows["targets"][1, 2] = value
        data = iter([rows])
        next(feed.Feed(data, parallel.make_mesh(""), (2, 4), 32))

    return case


def field(name):
    return lambda tmp: dataclasses.replace(flag()(tmp).run, **name)


def simulate(tmp):
    jax.device_count()
    flags.simulate_devices(3)


def damaged_model(tmp):
    (tmp / "model").mkdir()
    (tmp / "model/config.json").write_text('{"model_type": "mamba"}')
    return flag(model="{tmp}/model")(tmp)


def other_parameters(tmp):
    run = flag(set=["model.num_heads=8"])(tmp).run
    with orbax.Checkpoints(tmp / "old" / orbax.CHECKPOINTS) as checkpoints:
        checkpoints.save(
            1,
            model=Decoder(run.model, rngs=nnx.Rngs(0)),
            training={"step": np.asarray(1)},
            config=to_json(run),
            data_state={},
        )
    return flag(model="{tmp}/old", set=["model.mlp_dim=20"])(tmp)


V, T, N = ValueError, TypeError, NotImplementedError
CASES = {
    # mesh strings
    "mesh: unknown axis": (flag(mesh="rows:2"), V, "unknown axis 'rows'; axes are data"),
    "mesh: no size": (flag(mesh="data"), V, "axis 'data' needs an integer size"),
    "mesh: size is text": (flag(mesh="data:two"), V, "'data' needs an integer size"),
    "mesh: zero": (flag(mesh="data:0"), V, "'data' has size 0; a size is positive"),
    "mesh: twice": (flag(mesh="data:2,data:4"), V, "'data' is given twice"),
    "mesh: two -1": (flag(mesh="data:-1,model:-1"), V, "at most one axis may be -1"),
    "mesh: too many": (start(mesh="data:16"), V, "needs 16 devices but there are 8"),
    "mesh: no whole -1": (start(mesh="data:3,model:-1"), V, "8 devices are not a multiple of 3"),
    # --set
    "set: no value": (setting("train.lr"), V, "'train.lr' cannot be read; write SECTION.FIELD"),
    "set: no section": (setting("lr=1"), V, "'lr=1' cannot be read; write SECTION.FIELD=VALUE"),
    "set: section": (setting("trian.lr=1"), V, "unknown section 'trian'; did you mean 'train'?"),
    "set: field": (setting("train.warmup=1"), V, "unknown field of train 'warmup'; did you mean"),
    "set: nested": (setting("model.rope.tetha=1"), V, "'tetha'; did you mean 'theta'?"),
    "set: no fields": (setting("model.norm.eps=1"), V, "model.norm.eps: 'norm' has no fields"),
    "set: int": (setting("train.grad_accum=1.5"), V, "train.grad_accum='1.5' is not an integer"),
    "set: float": (setting("train.lr=fast"), V, "train.lr='fast' is not a number"),
    "set: bool": (setting("model.qk_norm=maybe"), V, "model.qk_norm='maybe' is not true or false"),
    "set: optional": (setting("model.attn_scale=x"), V, "model.attn_scale='x' is not a number or"),
    "set: tuple": (setting("model.window=8,x"), V, "model.window='8,x' is not a comma-separated"),
    "set: whole": (setting("model.rope=5"), V, "model.rope='5' is not settable as text"),
    "set: twice": (setting("train.lr=1", "train.lr=2"), V, "--set train.lr is given twice"),
    "set: flag too": (flag(steps="9", set=["train.steps=8"]), V, "--steps and --set train.steps"),
    # model
    "model: preset": (flag(model="tinny"), V, "unknown preset 'tinny'; did you mean 'tiny'?"),
    "model: empty folder": (flag(model="{tmp}/folder"), V, "folder' holds neither config.json"),
    "model: family": (damaged_model, (V, N), "mamba"),
    "model: other parameters": (other_parameters, V, "change its parameters (layers.mlp.w_gate"),
    "model: heads": (setting("model.num_heads=3"), V, "model_dim=16 is not divisible by num_heads"),
    "model: kv heads": (
        setting("model.num_kv_heads=3"),
        V,
        "num_heads=8 is not divisible by num_k",
    ),
    "model: no layer": (setting("model.num_layers=0"), V, "num_layers=0 must be a positive"),
    "model: choice": (setting("model.norm=batch"), V, "norm='batch' is not one of"),
    "model: activation": (setting("model.activation=gelo"), V, "activation='gelo' is not one of"),
    "model: positions": (setting("model.positions=sine"), V, "positions='sine' is not one of"),
    "model: variant": (setting("model.attention=dence"), V, "did you mean 'dense'"),
    "model: variant text": (setting("model.attention=dense*"), V, "cannot read 'dense*'; write"),
    "model: window": (setting("model.window=0"), V, "window=(0,) must hold positive widths"),
    "model: remat": (setting("model.remat=half"), V, "remat='half' is not one of none, full"),
    "model: remat site": (setting("model.remat=names:zz"), V, "unknown site 'zz'"),
    "model: theta": (setting("model.rope.theta=-1"), V, "theta=-1.0 must be positive"),
    "model: rope": (setting("model.rope.scaling=ntk"), V, "unknown scaling 'ntk'; known: none"),
    "model: dtype": (flag(dtype="float8"), V, "compute_dtype='float8' is not one of auto"),
    # data
    "data: missing": (start(data="{tmp}/none.txt"), (V, OSError), "none.txt"),
    "data: empty file": (start(data="{tmp}/empty.txt"), V, "empty.txt"),
    "data: empty folder": (start(data="{tmp}/folder"), V, "folder"),
    "data: empty": (flag(data=" "), V, "path='' is empty; give a file"),
    "data: field": (start(data="{tmp}/rows.jsonl"), V, "has no field 'text'; its fields are"),
    "data: mixture": (flag(data="a.txt=0.5,b.txt"), V, "but not to b.txt; give every entry"),
    "data: seq_len": (flag(seq_len="0"), V, "seq_len=0 must be at least 1"),
    "data: batch_size": (flag(batch_size="-8"), V, "batch_size=-8 must be at least 1"),
    "data: text for int": (flag(batch_size="many"), V, "data.batch_size='many' is not an integer"),
    "data: split": (setting("data.split=test"), V, "split='test' is not one of train, validation"),
    "data: fraction": (setting("data.validation_fraction=1.5"), V, "validation_fraction=1.5 must"),
    "data: tokenizer": (
        start(set=["data.tokenizer=/no/tokenizer.json"]),
        V,
        "does not exist; give",
    ),
    "data: pickle": (start(set=["data.tokenizer=vocab.pkl"]), V, "is a pickle"),
    "data: seed": (flag(seed="-1"), V, "seed=-1 must be at least 0"),
    # training
    "train: steps": (flag(steps="0"), V, "steps=0 must be at least 1"),
    "train: steps text": (flag(steps="ten"), V, "train.steps='ten' is not an integer"),
    "train: optimizer": (setting("train.optimizer=adamz"), V, "'adamz'; did you mean"),
    "train: schedule": (setting("train.schedule=cosin"), V, "'cosin'; did you mean 'cosine'?"),
    "train: lr": (setting("train.lr=-1"), V, "lr=-1.0 must be at least 0"),
    "train: nan": (setting("train.lr=nan"), V, "lr=nan must be at least 0"),
    "train: warmup": (flag(steps="5", set=["train.warmup_steps=9"]), V, "warmup_steps=9 is more"),
    "train: momentum": (setting("train.b2=1.5"), V, "b2=1.5 must be below 1"),
    "train: globs": (start(set=["train.trainable=layer.q"]), V, "layer.q"),
    "train: log": (setting("train.log_every=0"), V, "log_every=0 must be at least 1"),
    "train: keep": (setting("train.keep_last=0"), V, "keep_last=0 must be at least 1"),
    "sample: tokens": (setting("sample.tokens=-1"), V, "tokens=-1 must be at least 0"),
    "profile: one number": (flag(profile="5"), V, "profile='5' cannot be read; write START:STOP"),
    "profile: backwards": (flag(profile="9:3"), V, "1 <= START < STOP"),
    # what must fit together
    "fit: rows": (start(mesh="data:4", batch_size="6"), V, "batch_size=6 is not divisible by 4"),
    "fit: parts": (start(set=["train.grad_accum=3"]), V, "batch_size=8 is not divisible by 3"),
    "fit: columns": (
        start(mesh="context:4", seq_len="18"),
        V,
        "seq_len=18 is not divisible by the",
    ),
    "fit: heads": (start(mesh="model:3"), V, "mesh axes ('model',) of size 3 do not divide"),
    "fit: positions": (
        start(seq_len="64", set=["model.positions=learned", "model.max_positions=32"]),
        V,
        "seq_len=64 exceeds the 32 learned positions",
    ),
    "fit: vocabulary": (start(set=["model.vocab_size=200"]), V, "384 ids but the model's vocab"),
    "token: too large": (token(32), V, "token id 32 is outside the vocabulary of 32"),
    "token: negative": (token(-2), V, "token id -2 is outside the vocabulary of 32"),
    # workdir, config, checkpoints
    "workdir: empty": (flag(workdir=""), V, "workdir='' is empty"),
    "workdir: a file": (start(workdir="{tmp}/text.txt"), V, "text.txt' cannot be written"),
    "workdir: below a file": (start(workdir="{tmp}/text.txt/x"), V, "cannot be written"),
    "workdir: not allowed": (
        start(workdir="/proc/run"),
        V,
        "workdir='/proc/run' cannot be written",
    ),
    "config: missing": (flag(config="{tmp}/none.json"), V, "none.json' cannot be read"),
    "config: not JSON": (flag(config="{tmp}/broken.json"), V, "broken.json' is not JSON"),
    "config: not an object": (config([1]), V, "must hold a JSON object"),
    "config: section": (config({"trian": {}}), V, "unknown section 'trian'; did you mean 'train'?"),
    "config: field": (config({"train": {"lrr": 1}}), V, "field of train 'lrr'; did you mean 'lr'?"),
    "config: type": (config({"train": {"steps": "9"}}), T, "train.steps='9' is not an integer"),
    "config: null": (config({"data": {"path": None}}), T, "data.path=None is not text"),
    "checkpoint: other model": (
        with_checkpoint("model.num_heads=4"),
        V,
        "of another model: num_heads: 8 -> 4",
    ),
    "checkpoint: other optimizer": (with_checkpoint(), V, "does not fit this run: its training"),
    "checkpoint: fewer steps": (with_checkpoint(steps="3"), V, "holds step 5, but steps=3"),
    "checkpoint: none": (lambda tmp: orbax.load_model(tmp), V, "holds no complete checkpoint"),
    "devices: too late": (simulate, V, "simulated_devices=3 comes too late"),
    "processes": (
        lambda tmp: multihost.parse_processes("host,0,2"),
        V,
        "processes='host,0,2' cannot",
    ),
    "processes: index": (lambda tmp: multihost.parse_processes("h:1,2,2"), V, "INDEX below COUNT"),
    "tokenizer: id": (
        lambda tmp: Tokenizer.load("bytes").decode([999]),
        V,
        "token id 999 is outsi",
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_bad_input(name, tmp_path):
    case, kind, fragment = CASES[name]
    with pytest.raises(kind, match=re.escape(fragment)) as error:
        case(tmp_path)
    assert len(str(error.value)) < 900  # a message, not a dump


def test_there_are_enough_cases():
    assert len(CASES) >= 40


def test_the_defaults_are_good_input(tmp_path):
    run = flag()(tmp_path).run
    loop.check_run(run, parallel.make_mesh(run.mesh))
    loop.check_vocabulary(SimpleNamespace(name="bytes", vocab_size=384), run.model)
