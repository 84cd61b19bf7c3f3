"""Compile the GPU kernels ahead of time, to PTX and cubin, on a machine without a GPU.

python -m plugins.kernels.gpu.compile -o build/gpu_kernels

Writes `sm<NN>/<variant>.ptx` and `.cubin`, and `kernels.json`. The latter has one entry per variant
with what a launcher needs (symbol, parameters in order, threads, shared memory) and with the
resources that the compiled code uses (registers, spills).
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from fwl_export.errors import FwlError, MissingDependencyError, OutputExistsError
from fwl_export.files import replaced_folder

from .plan import MULTIPROCESSORS, SIGNATURES, Variant, variants

MANIFEST = "kernels.json"
SCHEMA = 1

_POINTERS = {"float32": "*fp32", "float16": "*fp16", "bfloat16": "*bf16"}
_ALIGNMENT = [["tt.divisibility", 16]]
_TARGET = r"^\.target (\w+)"


def compile_variant(chosen: Variant) -> tuple[str, bytes, dict[str, Any]]:
    """Compile one variant for its compute capability.

    Args:
      chosen: Variant to compile.

    Returns:
      The PTX, the cubin, and the variant's entry in the manifest.

    Raises:
      MissingDependencyError: Triton is not installed.
    """
    triton = _triton()
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from . import linear_attention

    kinds = SIGNATURES[chosen.kernel]
    signature = {name: _type(kind, chosen.dtype) for name, kind in kinds.items()}
    constants = dict(chosen.constants)
    source = ASTSource(
        fn=getattr(linear_attention, chosen.kernel),
        signature={**signature, **dict.fromkeys(constants, "constexpr")},
        constexprs=constants,
        attrs={
            (place,): _ALIGNMENT
            for place, (name, kind) in enumerate(kinds.items())
            if chosen.aligned and (kind != "i32" or name in {"size_k", "size_v"})
        },
    )
    # Line information contains absolute paths and is needed by debuggers only.
    with triton.knobs.compilation.scope():
        triton.knobs.compilation.disable_line_info = True
        compiled = triton.compile(
            source,
            target=GPUTarget("cuda", chosen.sm, 32),
            options={"num_warps": chosen.warps, "num_stages": chosen.stages},
        )
    ptx: str = compiled.asm["ptx"]
    cubin: bytes = compiled.asm["cubin"]
    entry = {
        "name": chosen.name,
        "sm": chosen.sm,
        "kernel": chosen.kernel,
        "dtype": chosen.dtype,
        "aligned": chosen.aligned,
        "symbol": compiled.metadata.name,
        "target": _found(_TARGET, ptx),
        "parameters": [{"name": name, "type": kind} for name, kind in signature.items()],
        # Triton appends pointers to scratch memory, which these kernels do not use: pass null.
        "null_parameters": len(re.findall(r"\.param [^%\n]*_param_\d+", ptx)) - len(signature),
        "constants": constants,
        "warps": chosen.warps,
        "threads": 32 * chosen.warps,
        "stages": chosen.stages,
        "shared_bytes": compiled.metadata.shared,
        **_resources(ptx, chosen.sm),
    }
    return ptx, cubin, entry


def compile_all(
    output: Path, chosen: Iterable[Variant], progress: Callable[[str], None] = lambda line: None
) -> dict[str, Any]:
    """Compile variants into a folder, which appears once all of them are compiled.

    Args:
      output: Folder to write. A folder that this tool wrote before is replaced.
      chosen: Variants to compile.
      progress: Function that is called with one line of text per variant.

    Returns:
      The manifest, which is also written to `output / MANIFEST`.

    Raises:
      OutputExistsError: If `output` exists and this tool did not write it.
      MissingDependencyError: If Triton is not installed.
    """
    triton = _triton()
    if output.exists() and not (output / MANIFEST).is_file() and _is_used(output):
        raise OutputExistsError(
            f"{output} exists but holds no {MANIFEST}, so this tool did not write it; "
            "choose another folder with -o, or remove this one"
        )
    work = list(chosen)
    entries = []
    with replaced_folder(output) as folder:
        for count, each in enumerate(work, 1):
            started = time.perf_counter()
            ptx, cubin, entry = compile_variant(each)
            for suffix, content in ((".ptx", ptx.encode()), (".cubin", cubin)):
                path = folder / f"sm{each.sm}" / f"{each.name}{suffix}"
                path.parent.mkdir(exist_ok=True)
                path.write_bytes(content)
                kind = suffix.removeprefix(".")
                entry[kind] = path.relative_to(folder).as_posix()
                entry[f"{kind}_sha256"] = hashlib.sha256(content).hexdigest()
            entries.append(entry)
            seconds = time.perf_counter() - started
            progress(f"[{count}/{len(work)}] sm{each.sm} {each.name}: {seconds:.1f} s")
        manifest = {"schema": SCHEMA, "triton": triton.__version__, "kernels": entries}
        (folder / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
    return manifest


def _resources(ptx: str, sm: int) -> dict[str, int]:
    """Assemble the PTX for its target and return the resources that the assembler reports."""
    from triton.backends.nvidia.compiler import get_ptxas

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.ptx")
        path.write_text(ptx, encoding="utf-8")
        target = _found(_TARGET, ptx)
        # --regAllocOptLevel=2 like Triton, so that the numbers are those of its cubin.
        command = [get_ptxas(sm).path, "-v", "--regAllocOptLevel=2", f"--gpu-name={target}"]
        command += [str(path), "-o", f"{path}.cubin"]
        log = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    return {
        "registers": int(_found(r"Used (\d+) registers", log)),
        "stack_bytes": int(_found(r"(\d+) bytes stack frame", log)),
        "spill_store_bytes": int(_found(r"(\d+) bytes spill stores", log)),
        "spill_load_bytes": int(_found(r"(\d+) bytes spill loads", log)),
    }


def _found(pattern: str, text: str) -> str:
    match = re.search(pattern, text, re.MULTILINE)
    if match is None:
        raise ValueError(f"the compiler's output does not contain {pattern!r}: {text[:500]}")
    return match[1]


def _type(kind: str, dtype: str) -> str:
    """Return Triton's name for the type of a parameter."""
    return {"T": _POINTERS[dtype], "f32": "*fp32", "i32": "i32"}[kind]


def _is_used(path: Path) -> bool:
    return not path.is_dir() or any(path.iterdir())


def _triton() -> Any:
    if importlib.util.find_spec("triton") is None:
        raise MissingDependencyError(
            "compiling the GPU kernels needs the package 'triton', which is not installed; "
            "run `pip install triton`"
        )
    import triton

    return triton


def main(arguments: list[str] | None = None) -> int:
    """Compile what the command line asks for; returns the exit status."""
    parser = argparse.ArgumentParser(prog="compile_kernels", description=__doc__.partition("\n")[0])
    parser.add_argument("-o", "--output", type=Path, required=True, help="folder to write")
    parser.add_argument(
        "--sm",
        default=",".join(map(str, MULTIPROCESSORS)),
        help="compute capabilities without dots, separated by commas (default: %(default)s)",
    )
    parser.add_argument("-q", "--quiet", action="store_true", help="show no progress")
    options = parser.parse_args(arguments)
    known = {str(sm) for sm in MULTIPROCESSORS}
    wanted = options.sm.split(",")
    if unknown := [sm for sm in wanted if sm not in known]:
        choices = ", ".join(sorted(known, key=int))
        parser.error(f"--sm: no kernels for {', '.join(unknown)}; expected some of {choices}")
    chosen = [variant for sm in wanted for variant in variants(int(sm))]

    def show(line: str) -> None:
        if not options.quiet:
            print(line, file=sys.stderr, flush=True)

    try:
        manifest = compile_all(options.output, chosen, show)
    except FwlError as error:
        print(error, file=sys.stderr)
        return 1
    print(f"{len(manifest['kernels'])} kernels in {options.output}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
