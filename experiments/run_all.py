"""RESULTS.md from the claims.json files in experiments/results/, and the runs that write them.

    python -m experiments.run_all                      # RESULTS.md from what is there
    python -m experiments.run_all --run=mixers         # run an experiment again first
    python -m experiments.run_all --run=all

The results of `python -m experiments.NAME` are kept in `experiments/results/NAME/`: claims.json,
table.md, figure.png. The exit code is 1 when a claim fails.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from absl import flags as absl_flags

from experiments import common
from jaxheads.fields import unknown
from launch import flags

_ROOT = Path(__file__).parent.parent
RESULTS = _ROOT / "experiments" / "results"
_HEAD = """# Results

What the experiments claim and measured. Written by `python -m experiments.run_all` from
`experiments/results/*/claims.json`; claims that fail are listed as such, with what is known of why
(`experiments/why.json`).
"""
PAPERS: Mapping[str, str] = {
    "agent_attention": "Agent Attention, arXiv:2312.08874",
    "cca": "CCA-attention, arXiv:2412.12465",
    "circuit_reuse": "Circuit component reuse, arXiv:2310.08744",
    "dare": "DARE, arXiv:2410.02604",
    "dmha_scaling": "Distributed multi-head attention, arXiv:2302.06218",
    "duo": "DuoAttention, arXiv:2410.10819",
    "lab": "the shipped models",
    "lama": "LAMA, arXiv:1912.00835",
    "landmark": "Landmark attention, arXiv:2305.16300",
    "long_context_helps": "Distributed multi-head attention, arXiv:2302.06218",
    "longheads": "LongHeads, arXiv:2402.10685",
    "mixers": "Distributed multi-head attention, arXiv:2302.06218",
    "moh": "MoH, arXiv:2410.11842",
    "moh_lab": "MoH, arXiv:2410.11842",
    "moh_vit": "MoH, arXiv:2410.11842",
    "ph3": "PH3, arXiv:2402.18154",
    "rcmha": "RCMHA, arXiv:2308.03429",
    "recall_mechanisms": "Mechanisms of factual recall, arXiv:2310.15910",
    "retrieval_heads": "Retrieval heads, arXiv:2404.15574",
    "s2_needle": "S2-attention, arXiv:2407.17678",
    "s2_quality": "S2-attention, arXiv:2407.17678",
    "s2_union": "S2-attention, arXiv:2407.17678",
    "titans_ablation": "Titans, arXiv:2501.00663",
    "titans_lm": "Titans, arXiv:2501.00663",
    "titans_needle": "Titans, arXiv:2501.00663",
    "titans_recall": "Titans, arXiv:2501.00663",
    "titans_stability": "Titans, arXiv:2501.00663",
}
"""experiment -> the paper whose claims it tests"""
WHY = _ROOT / "experiments" / "why.json"
"""experiment -> claim -> a sentence on why it fails"""


def read(results: Path) -> dict[str, dict[str, Any]]:
    """name -> the content of its claims.json, in order of name."""
    found = sorted(results.glob("*/claims.json"))
    return {path.parent.name: json.loads(path.read_text(encoding="utf-8")) for path in found}


def report(contents: Mapping[str, Mapping[str, Any]], figures: str = "experiments/results") -> str:
    """RESULTS.md: an overview, then claims and table of every experiment.

    Args:
      contents: name -> content of a claims.json.
      figures: folder of the results, as linked from RESULTS.md.
    """
    rows = [
        {"experiment": name, "paper": PAPERS.get(name, ""), **_count(c["claims"])}
        for name, c in contents.items()
    ]
    parts = [_HEAD, common.markdown(rows)] if rows else [_HEAD]
    why = json.loads(WHY.read_text(encoding="utf-8"))
    parts += [_section(n, content, figures, why.get(n, {})) for n, content in contents.items()]
    return "\n".join(parts)


def _count(claims: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    return {"claims": len(claims), "hold": sum(bool(claim["holds"]) for claim in claims)}


def _section(name: str, content: Mapping[str, Any], figures: str, why: Mapping[str, str]) -> str:
    versions = content.get("versions", {})
    claims = [
        {
            "claim": claim["name"],
            "measured": claim["measured"],
            "needed": claim["needed"],
            "holds": "yes" if claim["holds"] else "**no**",
        }
        for claim in content["claims"]
    ]
    failed = [claim["name"] for claim in content["claims"] if not claim["holds"]]
    reasons = [f"- *{name}* fails: {why[name]}\n" for name in failed if name in why]
    machine = content.get("machine", {})
    lines = [
        f"## {name}\n",
        *([f"{PAPERS[name]}\n"] if name in PAPERS else []),
        f"    {' '.join(content.get('command', []))}\n",
        f"{content.get('seconds', '?')} s on {machine.get('devices', '?')}, "
        f"{machine.get('cores', '?')} cores, {machine.get('system', '?')}; "
        f"jax {versions.get('jax', '?')}, commit {str(content.get('git'))[:12]}.\n",
        common.markdown(claims),
        *reasons,
    ]
    if content.get("table"):
        lines.append(common.markdown(content["table"]))
    if (RESULTS / name / "figure.png").exists():
        lines.append(f"![{name}]({figures}/{name}/figure.png)\n")
    return "\n".join(lines)


def run(name: str) -> int:
    """Runs one experiment; its results replace those kept. The exit code is its own."""
    workdir = (RESULTS / name).relative_to(_ROOT)  # the command is kept: no path of this machine
    command = ["-m", f"experiments.{name}", f"--workdir={workdir}"]
    print("python", *command, flush=True)
    return subprocess.run([sys.executable, *command], cwd=_ROOT).returncode


def define_flags() -> None:
    """Defines the flags of this script."""
    flags.define_common()
    absl_flags.DEFINE_list("run", [], "Experiments to run first: names, or 'all'.")
    absl_flags.DEFINE_string("out", str(_ROOT / "RESULTS.md"), "Where the report goes.")


def main() -> int:
    """Runs what was asked for, then writes the report."""
    given = absl_flags.FLAGS
    known = sorted(path.parent.name for path in RESULTS.glob("*/claims.json"))
    for name in known if given.run == ["all"] else given.run:
        if not (RESULTS.parent / f"{name}.py").exists():
            raise ValueError(unknown("experiment", name, known))
        if run(name) not in (0, common.EXIT_CLAIM_FAILED):
            raise ValueError(f"experiments.{name} did not finish; its own message is above.")
    contents = read(RESULTS)
    Path(given.out).write_text(report(contents), encoding="utf-8")
    claims = [claim for content in contents.values() for claim in content["claims"]]
    print(f"{given.out}: {len(contents)} experiments, {_count(claims)}")
    return 0 if all(claim["holds"] for claim in claims) else common.EXIT_CLAIM_FAILED


if __name__ == "__main__":
    define_flags()
    flags.run(main)
