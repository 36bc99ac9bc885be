"""Continue a prompt with a trained model, as a stream in the terminal.

    python -m launch.generate --model=runs/tiny --prompt="def " --temperature=0.8
    python -m launch.generate --model=/path/to/Llama --mesh=model:8 --prompt="The capital of" \\
        --max_new_tokens=200 --temperature=0.7 --top_p=0.9
    python -m launch.generate --model=runs/tiny --prompt="def " --heads=0.1,2.3 --edit=ablate

The same --seed writes the same text.
"""

from __future__ import annotations

import io
import sys
from typing import Any, TextIO

from absl import flags as absl_flags

from launch import flags, loading


class TextStream:
    """Writes the text of ids as they come; a character split over tokens waits until it is whole.

    Args:
      tokenizer: with a method ``decode(ids)``.
      ids: the prompt, written at once.
      out: where the text goes.
    """

    def __init__(self, tokenizer: Any, ids: list[int], out: TextIO):
        self._tokenizer, self._ids, self._out = tokenizer, list(ids), out
        self._written = ""
        self.flush()

    def add(self, token: int) -> None:
        """One more id."""
        self._ids.append(token)
        text = self._tokenizer.decode(self._ids)
        if not text.endswith("\ufffd"):
            self._write(text)

    def flush(self) -> None:
        """Writes what is left, whole or not."""
        self._write(self._tokenizer.decode(self._ids))

    def _write(self, text: str) -> None:
        # A decoder may change its mind about the end of the text, never about its beginning.
        self._out.write(text[len(self._written) :])
        self._out.flush()
        self._written = text


def define_flags() -> None:
    """Defines the flags of this launcher."""
    flags.define_common()
    loading.define_flags()
    absl_flags.DEFINE_string("prompt", "", "Text to continue.")
    absl_flags.DEFINE_integer("max_new_tokens", 100, "Longest continuation, in tokens.")
    absl_flags.DEFINE_float("temperature", 0.0, "0 takes the likeliest token every time.")
    absl_flags.DEFINE_integer("top_k", None, "Draw from this many of the likeliest tokens.")
    absl_flags.DEFINE_float("top_p", None, "Draw from the likeliest tokens of this total mass.")
    absl_flags.DEFINE_integer("seed", 0, "Of the random draws.")
    absl_flags.DEFINE_bool("stop_at_eos", True, "End at the tokenizer's end of text.")


def main() -> int:
    """Runs the command; returns the exit code."""
    import jax

    from jaxheads.attention import insert_landmarks, landmarks_of
    from jaxheads.generation import generate
    from jaxheads.interventions import for_text
    from jaxheads.parallel.multihost import is_main_process

    given = absl_flags.FLAGS
    if given.set:
        raise ValueError("launch.generate has no sections for --set; its settings are flags.")
    model, tokenizer, mesh = loading.load(
        given.model, given.tokenizer, given.mesh, given.dtype, given.dcn_mesh
    )
    forward, _ = loading.edited_forward(
        model, given.heads, edit=given.edit, top_heads=given.top_heads, factor=given.factor
    )
    ids = tokenizer.encode(given.prompt)
    if not len(ids):
        raise ValueError("--prompt is empty and the tokenizer has no BOS; give some text.")
    marks = landmarks_of(model.cfg)
    shown = ids.tolist()
    if marks is not None:  # they go in here, and not out into the text
        ids = insert_landmarks(ids, marks.block_size, marks.token)
    stop = () if tokenizer.eos_id is None or not given.stop_at_eos else (tokenizer.eos_id,)
    out = sys.stdout if is_main_process() else io.StringIO()
    stream = TextStream(tokenizer, shown, out)

    def write(_: int, new: Any) -> None:
        if marks is None or int(new[0]) != marks.token:
            stream.add(int(new[0]))

    with jax.set_mesh(mesh):
        generate(
            model,
            ids[None],
            max_new_tokens=given.max_new_tokens,
            key=jax.random.key(given.seed),
            temperature=given.temperature,
            top_k=given.top_k,
            top_p=given.top_p,
            stop_tokens=stop,
            forward=for_text(forward, model.cfg, tokenizer.vocab_size),
            callback=write,
        )
    stream.flush()
    print(file=out, flush=True)
    return 0


if __name__ == "__main__":
    define_flags()
    flags.run(main)
