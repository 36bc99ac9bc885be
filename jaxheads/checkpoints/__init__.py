"""Models and training runs on disk: Hugging Face directories and Orbax checkpoints."""

from jaxheads.checkpoints.huggingface import load, save

__all__ = ["load", "save"]
