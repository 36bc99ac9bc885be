"""Batch scripts for GPU nodes under Slurm."""
