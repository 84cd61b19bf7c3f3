"""Accept an NVIDIA machine: build engines for its GPU, check parity, measure, run the GPU tests.

    python -m tools.gpu_acceptance -o gpu-acceptance.json

Writes one JSON report to send in; its key `text` is for people. The exit code is 1 if there is no
GPU or a step failed. Later steps still run after a failed one.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fwl_export import __version__
from fwl_export.bundle.manifest import Bundle, read_bundle
from fwl_export.demo import CHECKPOINT, HELD_OUT_PLAY
from fwl_export.engines import VARIANTS, Device, build_engines, probe_variant, query_driver
from fwl_export.errors import DeviceError, FwlError
from fwl_export.files import replaced_file

TOKENS = 2000
DECODE_STEPS, PREFILL_CALLS = 200, 20


@dataclass(frozen=True)
class Step:
    """The outcome of a step.

    Attributes:
      name: Name of the step, such as "build rtx".
      passed: Whether the step did what it should.
      text: Outcome in words, one or more lines.
      data: Outcome as JSON-ready data, or None.
      seconds: Time the step took.
    """

    name: str
    passed: bool
    text: str
    data: Any
    seconds: float


Outcome = tuple[bool, str, Any]


def run_step(name: str, do: Callable[[], Outcome]) -> Step:
    """Run a step. An exception becomes its outcome, so that the next step still runs.

    Args:
      name: Name of the step.
      do: Function that carries it out.
    """
    began = time.perf_counter()
    try:
        passed, text, data = do()
    except FwlError as error:
        passed, text, data = False, f"{type(error).__name__}: {error}", None
    except Exception:  # a bug is what this program is there to find
        passed, text, data = False, traceback.format_exc(), None
    return Step(name, passed, text, data, round(time.perf_counter() - began, 3))


def this_gpu() -> Device:
    """Return the first GPU.

    Raises:
      DeviceError: There is no GPU, or no driver.
    """
    driver = query_driver()
    if not driver.devices:
        raise DeviceError(
            f"the acceptance needs an NVIDIA GPU, but there is no CUDA device: {driver.reason}; "
            "run it on a machine that has one"
        )
    return driver.devices[0]


def usable_variants(sm: int) -> list[str]:
    """Return the TensorRT variants that are installed and can build for a compute capability."""
    return [name for name in VARIANTS if sm in probe_variant(name).sms]


def build(bundle: Bundle, variant: str, sm: int) -> Outcome:
    """Build the bundle's engine for a compute capability."""
    (engine,) = build_engines(bundle, variant, [sm], progress=say)
    return True, f"{engine.name}: {engine.update_path}, {engine.build_seconds} s", engine.to_dict()


def parity(bundle: Bundle, variant: str) -> Outcome:
    """Check a session over the engine against PyTorch in float64."""
    from fwl_export.bundle.tokenizer import read_ids
    from fwl_export.parity import check_bundle, to_text
    from fwl_export.parity.schedule import ROWS
    from fwl_export.runtimes import open_session
    from fwl_export.runtimes.text import bundle_tokenizer

    name = VARIANTS[variant].title
    session = open_session(bundle, "tensorrt", ROWS, variant=variant)
    ids = read_ids(HELD_OUT_PLAY, bundle_tokenizer(bundle))
    report = check_bundle(bundle, ids, TOKENS, candidates={name: session}, text=HELD_OUT_PLAY.name)
    return report.passed, to_text(report), report.to_dict()


def bench(bundle: Bundle, variant: str, cuda_graph: bool) -> Outcome:
    """Measure a session: milliseconds per call of one token, and of the most tokens."""
    import statistics

    import numpy as np

    from fwl_export.runtimes import open_session

    session = open_session(bundle, "tensorrt", variant=variant, cuda_graph=cuda_graph)
    text = np.random.default_rng(0).integers(0, session.vocab_size, session.max_tokens)
    data = {}
    for name, ids, count in (
        ("decode", text[:1], DECODE_STEPS),
        ("prefill", text, PREFILL_CALLS),
    ):
        times = []
        for _ in range(3 + count):  # the first three compile kernels and capture graphs
            began = time.perf_counter()
            session.feed(ids, last_only=True)
            times.append((time.perf_counter() - began) * 1e3)
        p50 = statistics.median(times[3:])
        data[name] = {"tokens": len(ids), "p50_ms": p50, "tokens_per_second": len(ids) / p50 * 1e3}
    text = "; ".join(
        f"{name}: {found['p50_ms']:.3f} ms, {found['tokens_per_second']:.0f} tokens/s"
        for name, found in data.items()
    )
    return True, text, data


def command(*arguments: str) -> Outcome:
    """Run a Python program; the last 40 lines it prints are the outcome's text."""
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, check=False)
    text = "\n".join((done.stdout + done.stderr).splitlines()[-40:])
    return done.returncode == 0, text, {"exit_code": done.returncode}


def steps_of(bundle: Bundle, gpu: Device, variants: list[str]) -> dict[str, Callable[[], Outcome]]:
    """Return the steps by name, in the order in which they run."""
    steps: dict[str, Callable[[], Outcome]] = {}
    for name in variants:
        steps[f"build {name}"] = lambda name=name: build(bundle, name, gpu.sm)
        # A process per variant: two cannot be loaded together. It reads the bundle with its engine.
        again = [__file__, "--in", str(bundle.folder), "--variant", name, "--step"]
        for kind in ("parity", "bench-graph", "bench"):
            steps[f"{kind} {name}"] = lambda again=again, kind=kind: child(*again, kind)
    # The op on the CPU for comparison; on the GPU the sessions' figures include it.
    cli = "from fwl_export.cli.main import main; main()"
    steps["bench op"] = lambda: command("-c", cli, "bench", "op", "--tokens", "1,256")
    steps["gpu tests"] = lambda: command("-m", "pytest", "-m", "gpu", "-q", "tests/gpu")
    if not variants:
        steps["build"] = lambda: (False, f"no installed variant builds for SM{gpu.sm}", None)
    return steps


def child(*arguments: str) -> Outcome:
    """Run a step of this program in a separate process."""
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        return False, "\n".join(done.stderr.splitlines()[-40:]), None
    passed, text, data = json.loads(done.stdout.splitlines()[-1])
    return passed, text, data


def assemble(gpu: Device, steps: list[Step]) -> dict[str, Any]:
    """Return the report as JSON-ready data."""
    passed = bool(steps) and all(step.passed for step in steps)
    lines = [f"{gpu.name}, SM{gpu.sm}, fwl-export {__version__}"]
    for step in steps:
        lines.append(f"\n{'ok' if step.passed else 'FAILED'}  {step.name}, {step.seconds:.0f} s")
        lines += [f"    {line}" for line in step.text.splitlines()]
    lines.append(f"\n{'accepted' if passed else 'not accepted'}")
    return {
        "schema_version": 1,
        "passed": passed,
        "gpu": asdict(gpu),
        "driver": query_driver().version,
        "fwl_export": __version__,
        "steps": [asdict(step) for step in steps],
        "text": "\n".join(lines),
    }


def say(message: str) -> None:
    """Print a line of progress to standard error."""
    print(message, file=sys.stderr, flush=True)


def accept(output: Path) -> int:
    """Run all steps and write the report; return the exit code."""
    gpu = this_gpu()
    with tempfile.TemporaryDirectory() as folder:
        bundle = export(Path(folder) / "bundle")
        done = []
        for name, do in steps_of(bundle, gpu, usable_variants(gpu.sm)).items():
            say(name)
            done.append(run_step(name, do))
    report = assemble(gpu, done)
    with replaced_file(output) as path:
        path.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(report["text"])
    print(f"report: {output}")
    return 0 if report["passed"] else 1


def export(folder: Path) -> Bundle:
    """Export the demo model to a folder and return its bundle."""
    from fwl_export.export import export_bundle

    say("export")
    export_bundle(CHECKPOINT, folder)
    return read_bundle(folder)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "-o", "--output", type=Path, default=Path("gpu-acceptance.json"), help="report to write"
    )
    parser.add_argument("--in", dest="bundle", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--variant", help=argparse.SUPPRESS)
    parser.add_argument("--step", help=argparse.SUPPRESS)
    options = parser.parse_args()
    try:
        if options.step is None:
            return accept(options.output)
        bundle = read_bundle(options.bundle)
        if options.step == "parity":
            outcome = parity(bundle, options.variant)
        else:
            outcome = bench(bundle, options.variant, options.step == "bench-graph")
        print(json.dumps(outcome))
        return 0
    except FwlError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
