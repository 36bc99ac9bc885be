"""Compiled programs kept on disk, so that a run that starts again need not compile again.

JAX keys an entry by the program, the compiler's version and options, and the devices (for CPUs
their instruction sets too), so that different machines can share a directory. The directory's own
path is part of it: entries that are moved are not found. Of several processes only process 0
writes; on CPUs the others do not find its entries, because the key tells processes apart there,
and compile as without a cache.
"""

from __future__ import annotations

import os
from pathlib import Path

FOLDER = "compile_cache"
"""Inside the workdir."""
AUTO, OFF = "auto", "off"


def enable(setting: str, workdir: str | Path) -> Path | None:
    """Has JAX keep compiled programs; call before the first is compiled.

    Args:
      setting: "auto" is JAX's own setting where there is one (JAX_COMPILATION_CACHE_DIR), and
        WORKDIR/compile_cache otherwise; "off"; or a directory.
      workdir: of the run.
    Returns:
      The directory, None for none.
    Raises:
      ValueError: for an empty setting.
    """
    import jax

    if not setting.strip():
        raise ValueError(f"compile_cache={setting!r} is empty; give auto, off or a directory.")
    if setting == OFF:
        jax.config.update("jax_enable_compilation_cache", False)
        return None
    own = jax.config.jax_compilation_cache_dir  # type: ignore[attr-defined]
    if setting == AUTO and own:
        return Path(own)
    path = Path(workdir) / FOLDER if setting == AUTO else Path(setting)
    path = path.expanduser()
    jax.config.update("jax_compilation_cache_dir", str(path))
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        # JAX leaves out what compiles in less than a second; a run has a hundred such programs.
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    return path
