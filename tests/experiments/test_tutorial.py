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
    found = re.findall(r"without (\w+): (\d+)% of needles, (\d+)% of facts", said)
    needles, facts = ({name: int(row[n]) for name, *row in found} for n in range(2))
    assert needles["none"] >= 90 and needles["copying"] <= needles["none"] - 30
    assert facts["copying"] >= 50
    assert said.count("(right:") == 8
    assert (tmp_path / "evaluation/results.json").exists()
    assert (tmp_path / "lab-gated/model.safetensors").exists()
