"""Speed and memory of reading and grouping a log of behaviours, and of cutting samples from it.

    python -m benchmarks.behaviours       # about a minute; writes benchmarks/behaviours.json

Logs in the layout of Taobao with 1 and 8 million random rows over 100,000 items, 250 rows a user.
Each is grouped in a process of its own; its peak memory is the largest resident set (`ru_maxrss`)
less what imports take. Batches are those of the paper: 2048 samples of 200 behaviours. Seconds of
the processor are given besides those of the clock, which other work on the machine lengthens.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

NUM_ITEMS, NUM_CATEGORIES, EVENTS_OF_A_USER = 100_000, 1000, 250
ROWS = (1_000_000, 8_000_000)
NUM_BATCHES = 10


def write_log(path: Path, rows: int) -> None:
    """Random rows in random order of users; times rise."""
    import numpy as np

    rng = np.random.default_rng(0)
    with path.open("w") as file:
        for start in range(0, rows, 100_000):
            user = rng.integers(1, rows // EVENTS_OF_A_USER + 1, 100_000)
            item = rng.integers(1, NUM_ITEMS + 1, 100_000)
            times = 1_511_544_070 + (start + np.arange(100_000)) // 100
            columns = (
                user.tolist(),
                item.tolist(),
                (item % NUM_CATEGORIES).tolist(),
                times.tolist(),
            )
            file.writelines(f"{u},{i},{c},pv,{t}\n" for u, i, c, t in zip(*columns))


def measure(log: str, directory: str) -> dict[str, float]:
    """Group a log in this process, then cut batches."""
    import grain  # noqa: F401  (so that its memory is not counted)

    from jaxheads.data import SampleConfig, group_events, make_samples, open_log

    imported = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start, busy = time.perf_counter(), time.process_time()
    data = group_events(open_log("taobao", log), directory)
    seconds, busy = time.perf_counter() - start, time.process_time() - busy
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    batches = make_samples(data, SampleConfig(prefetch=0))
    next(batches)
    start = time.process_time()
    for _ in range(NUM_BATCHES):
        next(batches)
    return {
        "rows": data.info["num_events"],
        "file_mb": round(os.path.getsize(log) / 1e6, 1),
        "seconds": round(seconds, 2),
        "processor_seconds": round(busy, 2),
        "rows_per_processor_second": round(data.info["num_events"] / busy),
        "peak_mb_above_imports": round((peak - imported) * 1024 / 1e6, 1),
        "processor_seconds_per_batch": round((time.process_time() - start) / NUM_BATCHES, 4),
    }


def main() -> None:
    """Runs the command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--measure", nargs=2, help="LOG DIRECTORY: for the processes it starts.")
    parser.add_argument("--out", default=str(Path(__file__).with_suffix(".json")))
    given = parser.parse_args()
    if given.measure:
        print(json.dumps(measure(*given.measure)))
        return
    found = []
    for rows in ROWS:
        with tempfile.TemporaryDirectory() as folder:
            log = Path(folder) / "UserBehavior.csv"
            write_log(log, rows)
            words = ("-m", "benchmarks.behaviours", "--measure", str(log), f"{folder}/grouped")
            done = subprocess.run(
                [sys.executable, *words], check=True, capture_output=True, text=True
            )
        found.append(json.loads(done.stdout))
        print(found[-1], flush=True)
    content = {
        "command": "python -m benchmarks.behaviours",
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
        "load_average_1_minute": os.getloadavg()[0],
        "results": found,
    }
    Path(given.out).write_text(json.dumps(content, indent=2) + "\n")


if __name__ == "__main__":
    main()
