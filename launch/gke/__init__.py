"""Manifests for TPU slices on Google Kubernetes Engine."""
