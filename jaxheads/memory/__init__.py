"""Memories that learn at test time: pure functions over lists of arrays."""

from jaxheads.memory.titans import (
    MemoryOut,
    MemoryState,
    init_memory,
    init_state,
    memory_read,
    memory_step,
    neural_memory,
    run_memory,
)

__all__ = [
    "MemoryOut",
    "MemoryState",
    "init_memory",
    "init_state",
    "memory_read",
    "memory_step",
    "neural_memory",
    "run_memory",
]
