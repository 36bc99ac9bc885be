"""jaxheads: attention heads as first-class, editable, shardable objects in JAX."""

__version__ = "0.1.0"
