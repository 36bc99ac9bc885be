"""What `import jaxheads` promises."""

from __future__ import annotations

import subprocess
import sys

import jaxheads as jh

_PROBE = """
import sys
import jaxheads
heavy = {"torch", "transformers", "tokenizers", "grain", "orbax", "matplotlib", "tensorboardX"}
print(sorted(heavy & set(sys.modules)))
import jax
jax.config.update("jax_num_cpu_devices", 3)  # an error once a device has been touched
print(len(jax.devices("cpu")))
"""


def test_import_touches_no_device_and_nothing_heavy():
    environment = {"JAX_PLATFORMS": "cpu", "PATH": ""}
    done = subprocess.run(
        [sys.executable, "-c", _PROBE], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr
    heavy, devices = done.stdout.splitlines()
    assert heavy == "[]"
    assert devices == "3"


def test_every_public_name_exists_and_is_documented():
    for name in jh.__all__:
        assert getattr(jh, name, None) is not None, name
        value = getattr(jh, name)
        if callable(value) or hasattr(value, "__path__"):
            assert value.__doc__, name
