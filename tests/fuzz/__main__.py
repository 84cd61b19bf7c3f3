"""The long fuzz: `python -m tests.fuzz --seed N --inputs 1000000`, or `--minutes 60`.

Prints a table: target, inputs, and how many were refused, accepted, ended in a traceback, hung, or
reserved more than 1 GB. The exit code is 1 if any of the last three is not 0; what went wrong is
printed first, with the seed and the number of the input, which make it again.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

import torch

from attacks.common import _tiny_bundle
from tests.fuzz.run import Result, fuzz, table
from tests.fuzz.targets import targets

_ROUND = 2000  # inputs over all targets between two looks at the clock


def main() -> None:
    """Run the fuzz as the command line says."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--seed", type=int, default=1, help="seed of all changes")
    parser.add_argument("--inputs", type=int, default=100_000, help="number of inputs in all")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="longest duration")
    parser.add_argument("--only", default="", help="fuzz targets whose name contains this text")
    options = parser.parse_args()
    torch.set_num_threads(1)
    deadline = time.monotonic() + 60 * options.minutes
    with tempfile.TemporaryDirectory() as folder:
        found = [t for t in targets(_tiny_bundle(), Path(folder)) if options.only in t.name]
        whole = sum(target.share for target in found)
        results = {target.name: Result(target.name) for target in found}
        done = 0
        while done < options.inputs and time.monotonic() < deadline:
            for target in found:
                first = int(done * target.share / whole)
                last = int(min(done + _ROUND, options.inputs) * target.share / whole)
                part, result = fuzz(target, options.seed, range(first, last)), results[target.name]
                result.counts += part.counts
                result.bad += part.bad
                result.seconds += part.seconds
                for line in part.bad:
                    print(line, file=sys.stderr, flush=True)
            done += _ROUND
    print(table(list(results.values())))
    sys.exit(any(result.bad for result in results.values()))


if __name__ == "__main__":
    main()
