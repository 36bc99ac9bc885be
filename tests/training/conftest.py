"""Programs compiled by one run of a test module are reused by the next."""

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache

# setting -> (value here, JAX's default)
_SETTINGS = {
    "jax_persistent_cache_min_compile_time_secs": (0, 1.0),
    "jax_persistent_cache_min_entry_size_bytes": (-1, 0),
    "jax_disable_most_optimizations": (True, False),  # these programs run for milliseconds
}


@pytest.fixture(scope="module")
def compile_once(tmp_path_factory):
    """A compilation cache for the tests of one module; runs build their step functions anew."""
    before = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", str(tmp_path_factory.mktemp("compiled")))
    for name, (value, _) in _SETTINGS.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()
    yield
    jax.config.update("jax_compilation_cache_dir", before)
    for name, (_, default) in _SETTINGS.items():
        jax.config.update(name, default)
    compilation_cache.reset_cache()
