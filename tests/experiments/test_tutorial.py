"""The tutorials run as they are written."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BLOCK = re.compile(r"```(python|bash)\n(.*?)```", re.DOTALL)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["find_act_serve"])
def test_the_blocks_run_top_to_bottom(name, tmp_path):
    text = (ROOT / "docs" / "tutorials" / f"{name}.md").read_text()
    blocks = BLOCK.findall(text)
    program = "\n".join(code for kind, code in blocks if kind == "python")
    commands = [shlex.split(code) for kind, code in blocks if kind == "bash"]
    env = os.environ | {"PYTHONPATH": str(ROOT)}

    def run(args):
        done = subprocess.run(
            [sys.executable, *args], cwd=tmp_path, env=env, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout

    (tmp_path / "tutorial.py").write_text(program)
    said = run(["tutorial.py"])
    for command in commands:
        run(command[1:])
    without = {w: int(p) for w, p in re.findall(r"without (.*): (\d+)% answered", said)}
    assert without["none"] >= 90 and without["top 3"] <= without["none"] - 30
    assert without["3 others"] > without["top 3"]
    assert said.count("(right:") == 8
    assert (tmp_path / "evaluation/results.json").exists()
    assert (tmp_path / "lab-gated/model.safetensors").exists()
