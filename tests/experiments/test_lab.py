"""The recipe of the lab models works from scratch, and what is shipped is what it says."""

import json
from pathlib import Path

import pytest

import jaxheads as jh
from experiments import lab
from jaxheads.data.tasks import generate
from jaxheads.data.tasks import lab as language
from jaxheads.evaluation import answers_right
from jaxheads.training.loop import train
from launch.train import resolve

SHIPPED = Path(jh.__file__).parent / "assets"


@pytest.mark.slow
def test_a_small_model_learns_four_tasks_from_scratch(tmp_path, monkeypatch):
    tasks = ("refusal", "role", "greater_than", "facts")
    mixture = tuple(row for row in language.MIXTURE if row[0] in tasks)
    monkeypatch.setitem(language.MIXTURES, "lab", mixture)
    plan = resolve(
        config="lab",
        workdir=str(tmp_path),
        steps="300",
        seq_len="64",
        batch_size="16",
        set=[
            "model.num_layers=2", "model.model_dim=64", "model.num_heads=4", "model.mlp_dim=160",
            "train.lr=4e-3", "train.warmup_steps=30", "train.eval_every=0",
            "train.checkpoint_every=0",
        ],
    )  # fmt: skip
    train(plan.run)
    model, tokenizer = jh.load(tmp_path), jh.Tokenizer.load("lab")
    for task in tasks:
        pairs = generate(task, tokenizer, 60, split="heldout")
        assert answers_right(jh.forward, model, tokenizer, pairs).mean() >= 0.9, task


def test_every_recipe_has_its_model_and_a_second_run():
    assert tuple(lab.RECIPES) == lab.MODELS and lab.SEEDS == ("lab", "lab-1", "lab-2")
    for name in lab.MODELS:
        plan = resolve(config="lab/colors", model=name, workdir="unused")
        assert plan.run.data.path == "lab=0.7,lab-colors=0.3"
        assert (plan.run.model.num_kv_heads, plan.run.train.steps) == (
            2 if "gqa" in name else 8,
            800,
        )


def test_models_say_how_they_were_made_and_what_they_know():
    text = lab.card("lab-1", {"ioi": 0.98, "needle": 0.9333})
    assert "--train=lab-1" in text and "| needle | 0.9333 |" in text
    for name in lab.MODELS:
        told = (SHIPPED / name / "README.md").read_text()
        assert f"--train={name} " in told and "| induction | " in told


def test_the_shipped_model_knows_its_tasks():
    model, tokenizer = jh.load("lab"), jh.Tokenizer.load("lab")
    recipe = json.loads((SHIPPED / "lab" / "training.json").read_text())["model"]
    assert all(getattr(model.cfg, name) == value for name, value in recipe.items())
    pairs = generate("ioi", tokenizer, 64, split="heldout")
    assert answers_right(jh.forward, model, tokenizer, pairs).mean() >= 0.9


def test_unknown_models_are_not_trained():
    with pytest.raises(ValueError, match="unknown model 'lab-3'"):
        lab.train("lab-3")
