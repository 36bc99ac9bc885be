"""The scaling experiment in its quick size, as a command."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from experiments import dmha_scaling


@pytest.mark.slow
def test_the_quick_run_decides_its_claims(tmp_path):
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    command = [sys.executable, "-m", "experiments.dmha_scaling", "--quick", f"--workdir={tmp_path}"]
    subprocess.run(command, env=environment, check=True, cwd=Path(__file__).parents[2])
    claims = json.loads((tmp_path / "claims.json").read_text())["claims"]
    assert len(claims) == 12 and all(claim["holds"] for claim in claims)


def test_a_chip_that_is_faster_needs_longer_blocks():
    limits = {row["chip"]: row for row in dmha_scaling.ring_limits()}
    # e F K / (2 H W) with e = 2 and K = H; 197 TFLOP/s over 50 GB/s.
    assert limits["v5e"]["K = H"] == round(197e12 / 50e9)
    assert limits["v5e"]["K = H/4"] == round(197e12 / 50e9 / 4)


def test_four_devices_are_faster_by_the_roofline():
    one, four = (dmha_scaling.roofline(131072, n, "h200") for n in (1, 4))
    assert 3 < one / four <= 4.1
