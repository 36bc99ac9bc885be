"""What the launchers that use a trained model share: the model, its tokenizer, its mesh, its edit.

--model --tokenizer --mesh --dcn_mesh --dtype    `load`
--heads --edit --top_heads --factor              `edited_forward`
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from absl import flags as absl_flags

EDITS = ("ablate", "scale")


class Loaded(NamedTuple):
    """A model ready to run under ``jax.set_mesh(mesh)``."""

    model: Any
    tokenizer: Any
    mesh: Any


def define_flags() -> None:
    """Defines the flags that `load` and `edited_forward` read."""
    define_model_flags()
    absl_flags.DEFINE_string("heads", None, "heads.json, or heads such as 0.1,2.3 (layer.head).")
    absl_flags.DEFINE_enum("edit", "ablate", EDITS, "What happens to the heads.")
    absl_flags.DEFINE_integer("top_heads", None, "Take the heads of the N highest scores.")
    absl_flags.DEFINE_float("factor", None, "--edit=scale multiplies the listed heads by this.")


def define_model_flags(into: absl_flags.FlagValues = absl_flags.FLAGS) -> None:
    """Defines the flags that `load` reads."""
    text = partial(absl_flags.DEFINE_string, flag_values=into)
    text("model", None, "Hugging Face directory or hub id, workdir of a run, or a shipped name.")
    text("tokenizer", None, "'bytes' or a tokenizer.json; default: the one beside the model.")
    text("mesh", "", "Device mesh, such as data:2,model:4; one axis may be -1.")
    text("dcn_mesh", "", "Axes over slices, such as data:4; --mesh is then of one slice.")
    text("dtype", None, "float32, bfloat16 or float16; default: as stored.")


def load(
    model: str | None, tokenizer: str | None, mesh: str, dtype: str | None, dcn_mesh: str = ""
) -> Loaded:
    """Model, tokenizer and mesh of the flags of these names.

    Raises:
      ValueError: for anything that cannot be read, or a tokenizer of another model.
    """
    from jaxheads import parallel
    from jaxheads.checkpoints import huggingface
    from jaxheads.checkpoints.directory import locate

    if not model:
        raise ValueError("--model is missing; give a directory with config.json, or a workdir.")
    directory = locate(model)
    reader = find_tokenizer(directory, tokenizer)
    made = parallel.make_mesh(mesh, dcn=dcn_mesh)
    loaded = huggingface.load(directory, dtype=dtype, mesh=made)
    if reader.vocab_size > loaded.cfg.vocab_size:
        raise ValueError(
            f"tokenizer {reader.name!r} has {reader.vocab_size} ids but the model's vocab_size is "
            f"{loaded.cfg.vocab_size}; give the model's own with --tokenizer."
        )
    return Loaded(loaded, reader, made)


def find_tokenizer(directory: Path, tokenizer: str | None) -> Any:
    """The tokenizer asked for, or the one of a model directory or training run."""
    from jaxheads.checkpoints import orbax
    from jaxheads.data import Tokenizer

    if tokenizer:
        return Tokenizer.load(tokenizer)
    for place in (directory, *directory.parents[:2]):  # WORKDIR of WORKDIR/checkpoints/STEP
        if (place / "tokenizer.json").is_file():
            return Tokenizer.load(place)
        if not orbax.is_checkpoint(place):
            break
    raise ValueError(
        f"{directory} holds no tokenizer.json; give one with --tokenizer ('bytes' for a model of "
        "bytes)."
    )


def edited_forward(
    model: Any,
    heads: str | None,
    *,
    edit: str = "ablate",
    top_heads: int | None = None,
    factor: float | None = None,
) -> tuple[Callable[..., Any], list[list[int]] | None]:
    """The forward that --heads and --edit ask for, and the heads it acts on (None: no edit).

    Heads to ablate are a list, or with --top_heads the highest scores. To scale, a list takes
    --factor, and scores without --top_heads are the gates themselves.

    Raises:
      ValueError: for heads that cannot be read, do not fit the model or the edit.
    """
    import numpy as np

    from jaxheads import models
    from jaxheads.heads import HeadsFile, check_range, from_json, mask, parse_heads, top_k
    from jaxheads.interventions import ablate, scale_heads

    size = (model.cfg.num_layers, model.cfg.num_heads)
    if heads is None:
        if top_heads is not None or factor is not None:
            raise ValueError("--top_heads and --factor say how to edit heads; give --heads too.")
        return models.forward, None
    if re.fullmatch(r"\s*\d+\.\d+\s*(,\s*\d+\.\d+\s*)*", heads):
        file = HeadsFile(num_layers=size[0], num_heads=size[1], heads=parse_heads(heads))
        check_range(file.heads or (), *size)
    else:
        file = from_json(heads)
        file.check(*size)
    if edit == "ablate" and factor is not None:
        raise ValueError(f"--factor={factor} goes with --edit=scale.")
    chosen = file.heads
    if top_heads is not None:
        if file.scores is None:
            raise ValueError(f"--top_heads={top_heads} needs scores; {heads} lists heads.")
        chosen = tuple(top_k(file.scores, top_heads))
    if chosen is None and edit == "ablate":
        raise ValueError(f"{heads} holds scores; say how many heads to ablate with --top_heads.")
    if chosen is None:
        if factor is not None:
            raise ValueError("--factor scales listed heads; scores are the gates themselves.")
        changed = np.argwhere(file.gates() != 1).tolist()
        return scale_heads(models.forward, file.gates()), changed
    where = mask(chosen, *size)
    if edit == "ablate":
        return ablate(models.forward, where.astype(np.float32)), [list(h) for h in chosen]
    if factor is None:
        raise ValueError("--edit=scale needs --factor for listed heads, for example --factor=0.5.")
    gates = np.where(where, np.float32(factor), np.float32(1))
    return scale_heads(models.forward, gates), [list(h) for h in chosen]
