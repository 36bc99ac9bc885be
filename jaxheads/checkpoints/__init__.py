"""Models and training runs on disk: Hugging Face directories and Orbax checkpoints."""
