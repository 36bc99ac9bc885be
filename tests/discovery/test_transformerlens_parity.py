"""Finders against TransformerLens on the same Hugging Face models.

`make_transformerlens_arrays.py` recorded its results, and the weights, in `transformerlens/`.
"""

import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import safetensors.numpy

from jaxheads import load
from jaxheads.discovery import logit_difference, path_patch, sweep_heads
from jaxheads.interventions import ablate
from jaxheads.models import Decoder, forward

HERE = Path(__file__).parent / "transformerlens"


class Case(NamedTuple):
    """A model and what TransformerLens made of it."""

    model: Decoder
    held: dict[str, np.ndarray]
    about: dict[str, Any]

    @property
    def metric(self):
        return logit_difference(self.held["answer"], self.held["wrong"])

    def close(self, got, name: str) -> None:
        """Within 1e-4, and within a hundredth of the spread where effects are small."""
        needed = self.held[name]
        assert needed.std() > 0
        atol = min(1e-4, 0.01 * float(needed.std()))
        np.testing.assert_allclose(np.asarray(got), needed, rtol=0, atol=atol)


@pytest.fixture(scope="module", params=["gpt2", "gpt_neox", "llama"])
def case(request, tmp_path_factory) -> Case:
    with np.load(HERE / f"{request.param}.npz", allow_pickle=False) as file:
        held = {name: file[name] for name in file.files}
    directory = tmp_path_factory.mktemp(request.param)
    weights = {
        name.removeprefix("weights/"): held.pop(name).astype(np.float32)
        for name in [n for n in held if n.startswith("weights/")]
    }
    if request.param == "gpt2":
        weights.pop("lm_head.weight")  # tied
    safetensors.numpy.save_file(weights, directory / "model.safetensors")
    (directory / "config.json").write_text(str(held.pop("config")))
    about = json.loads(str(held.pop("about")))
    return Case(load(directory), held, about)


def test_logits(case):
    case.close(forward(case.model, case.held["tokens"]).logits, "logits")


def test_ablation(case):
    ablated = ablate(forward, [tuple(head) for head in case.about["ablated"]])
    case.close(ablated(case.model, case.held["tokens"]).logits, "ablated")


@pytest.mark.parametrize(("name", "positions"), [("patched", "all"), ("patched_last", "last")])
def test_activation_patching_of_every_head(case, name, positions):
    scores = sweep_heads(
        forward,
        case.model,
        case.held["tokens"],
        edit="patch",
        donor=case.held["corrupt"],
        metric=case.metric,
        positions=positions,
    )
    case.close(scores, name)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("path_logits", {}),
        ("path_logits_frozen_mlps", {"freeze_mlps": True}),
        ("path_q", {"receivers": "q"}),
        ("path_k", {"receivers": "k", "positions": "all"}),
        ("path_v", {"receivers": "v", "positions": "all"}),
    ],
)
def test_path_patching(case, name, options):
    if part := options.get("receivers"):
        layer, head = case.about["receivers"][part]
        if part != "q" and case.model.cfg.num_groups > 1:
            assert head < case.model.cfg.num_kv_heads
        options = options | {"receivers": [(layer, head, part)]}
    tokens, corrupt = case.held["tokens"], case.held["corrupt"]
    case.close(path_patch(forward, case.model, tokens, corrupt, case.metric, **options), name)


def test_direct_logit_attribution(case):
    discovery = pytest.importorskip("jaxheads.discovery.attribution")
    terms = discovery.logit_attribution(
        forward, case.model, case.held["tokens"], case.held["answer"], case.held["wrong"]
    )
    case.close(terms.heads.mean(-1), "attribution")
