"""The GPU kernels match the reference in Triton's interpreter, and compile for all GPUs."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from fwl_export.errors import MissingDependencyError, OutputExistsError
from fwl_export.op.cases import BEYOND_HALF, CASES, Case
from fwl_export.op.reference import linear_attention_update
from fwl_export.op.spec import ACTIVATION_TYPES
from plugins.kernels.gpu import compile as compile_module
from plugins.kernels.gpu.compile import MANIFEST, compile_all, compile_variant
from plugins.kernels.gpu.plan import MULTIPROCESSORS, SIGNATURES, Variant, variants
from plugins.kernels.gpu.plan import variant as variant_of
from tests.plugins.interpreter import interpreter, run
from tests.tolerances import assert_close

Array = npt.NDArray[np.generic]
Run = Callable[..., tuple[Array, Array, list[str]]]

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed; `pip install triton`", allow_module_level=True)

_SPILLED_BY_3_7 = ("prefill_state_bf16_any", "prefill_state_fp16_any")  # 36 bytes each on SM 90

# A compute capability without tensor cores (for Triton) and one with them.
SMS = (75, 90)

EXTRA = (
    Case("two_shares", (1, 1, 33, 130), "constant"),
    Case("many_shares", (2, 1, 1100, 7), "mixed"),
    Case("tiles_and_one", (2, 65, 65, 129), "mixed"),
    Case("one_below_the_tiles", (1, 63, 63, 127), "reset"),
    Case("aligned_tiles_and_some", (1, 80, 144, 160), "mixed"),
    Case("narrow", (5, 3, 1, 1), "mixed"),
    Case("all_kinds_of_resets", (1, 130, 16, 16), "mixed"),
)


@pytest.fixture(scope="module")
def interpreted() -> Iterator[Run]:
    with interpreter() as executor:
        yield lambda *args, **options: executor.submit(run, *args, **options).result()


@pytest.mark.parametrize("dtype", ACTIVATION_TYPES)
@pytest.mark.parametrize("sm", SMS)
@pytest.mark.parametrize("case", [*CASES, *EXTRA], ids=lambda case: case.name)
def test_matches_reference(interpreted: Run, case: Case, sm: int, dtype: str) -> None:
    inputs = case.arrays()
    if case.name == "all_kinds_of_resets":
        inputs["decay"][:, [0, 31, 32, 63, 64, 65, 129]] = 0
        inputs["decay"][:, 66:96] = 1
    output, state, _ = interpreted(inputs, dtype, sm)
    _assert_matches(inputs, dtype, output, state)


@pytest.mark.parametrize("dtype", ACTIVATION_TYPES)
@pytest.mark.parametrize("length", [1, 65])
def test_past_and_present_state_may_be_the_same_memory(
    interpreted: Run, dtype: str, length: int
) -> None:
    inputs = Case("in_place", (2, length, 80, 144), "constant").arrays()
    apart = interpreted(inputs, dtype, 90)
    same = interpreted(inputs, dtype, 90, in_place=True)
    for one, other in zip(apart[:2], same[:2], strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("length", [1, 40])
@pytest.mark.parametrize("sm", SMS)
def test_tokens_without_weight_leave_every_bit(interpreted: Run, sm: int, length: int) -> None:
    inputs = Case("silent", (2, length, 48, 40), silent=1.0).arrays()
    for dtype in ACTIVATION_TYPES:
        _, state, _ = interpreted(inputs, dtype, sm)
        np.testing.assert_array_equal(state, inputs["past_state"])


@pytest.mark.parametrize("dtype", ACTIVATION_TYPES)
@pytest.mark.parametrize("length", [3, 40])
def test_nothing_passes_a_reset(interpreted: Run, dtype: str, length: int) -> None:
    inputs = Case("reset", (1, length, 24, 24), "mixed").arrays()
    inputs["decay"][:, -1] = 0
    _, state, _ = interpreted(inputs, dtype, 90)
    key, value = (
        torch.from_numpy(inputs[name][0, -1]).to(getattr(torch, dtype)).float().numpy()
        for name in ("key", "value")
    )
    assert_close("op.state.float32", state[0], np.outer(key, value))
    unread = inputs["past_state"] + 1e20
    _, again, _ = interpreted({**inputs, "past_state": unread}, dtype, 90)
    np.testing.assert_array_equal(state, again)


def test_segments_give_the_same_bits(interpreted: Run) -> None:
    inputs = Case("segments", (2, 200, 16, 24), "constant").arrays()
    whole = interpreted(inputs, "float16", 90)
    parts = interpreted(inputs, "float16", 90, workspace_bytes=1)
    assert len(whole[2]) == 2
    assert len(parts[2]) == 2 * 2
    for one, other in zip(whole[:2], parts[:2], strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ACTIVATION_TYPES)
@pytest.mark.parametrize("length", [1, BEYOND_HALF.sizes[1]])
def test_sums_beyond_half_precision(interpreted: Run, dtype: str, length: int) -> None:
    inputs = BEYOND_HALF.arrays()
    inputs |= {name: inputs[name][:, :length] for name in ("query", "key", "value", "decay")}
    output, state, _ = interpreted(inputs, dtype, 90)
    _assert_matches(inputs, dtype, output, state, "beyond_half")


@pytest.mark.parametrize("dtype", ACTIVATION_TYPES)
def test_ten_thousand_tokens(interpreted: Run, dtype: str) -> None:
    inputs = Case("book", (1, 10_000, 8, 8), "constant").arrays()
    output, state, _ = interpreted(inputs, dtype, 90)
    _assert_matches(inputs, dtype, output, state)


def test_a_wrong_result_is_noticed(interpreted: Run) -> None:
    inputs = CASES[1].arrays()
    output, state, _ = interpreted(inputs, "float32", 90)
    with pytest.raises(AssertionError, match=r"op\.state\.float32"):
        _assert_matches(inputs, "float32", output, state + 1e-4)


def test_the_cases_run_every_kind_of_kernel(interpreted: Run) -> None:
    names = {
        name
        for case in (CASES[0], CASES[-1], EXTRA[1])
        for name in interpreted(case.arrays(), "float16", 90)[2]
    }
    kinds = {variant.kernel for variant in variants(90)}
    assert kinds == set(SIGNATURES)
    assert {name.partition("_fp16")[0] for name in names} == {*kinds, "decode_split"}


def test_signatures_and_constants_are_those_of_the_kernels() -> None:
    from plugins.kernels.gpu import linear_attention

    for sm in MULTIPROCESSORS:
        for each in variants(sm):
            names = getattr(linear_attention, each.kernel).arg_names
            assert names == [*SIGNATURES[each.kernel], *dict(each.constants)]


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("sm", MULTIPROCESSORS)
def test_every_variant_compiles_without_spills(tmp_path: Path, sm: int) -> None:
    manifest = compile_all(tmp_path / "kernels", variants(sm))
    entries = manifest["kernels"]
    assert [e["name"] for e in entries] == [v.name for v in variants(sm)]
    spilled = {e["name"]: e["spill_store_bytes"] for e in entries if e["spill_store_bytes"]}
    # The libraries are compiled with 3.8; 3.7 comes with CUDA builds of torch 2.13.
    older = sm == 90 and manifest["triton"].startswith("3.7.")
    assert spilled == (dict.fromkeys(_SPILLED_BY_3_7, 36) if older else {})
    for entry in entries:
        _check_entry(tmp_path / "kernels", entry)
    assert json.loads((tmp_path / "kernels" / MANIFEST).read_text()) == manifest


@pytest.mark.parametrize("kernel", SIGNATURES)
def test_a_variant_compiles(tmp_path: Path, kernel: str) -> None:
    chosen = variant_of(kernel, "float16", 80, aligned=kernel != "sum_partials")
    manifest = compile_all(tmp_path / "kernels", [chosen])
    _check_entry(tmp_path / "kernels", manifest["kernels"][0])
    ptx = (tmp_path / "kernels" / manifest["kernels"][0]["ptx"]).read_text()
    assert ("mma.sync" in ptx) == kernel.startswith("prefill")
    assert ".file" not in ptx


@pytest.mark.parametrize("size", [None, 1])
@pytest.mark.parametrize("kernel", SIGNATURES)
def test_forms_that_the_launcher_specializes_compile(kernel: str, size: int | None) -> None:
    # With PyTorch on CUDA, Triton compiles at the first call, with sizes of 1 as constants. Whether
    # these forms compile can be tested without a GPU.
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from plugins.kernels.gpu import linear_attention

    function = getattr(linear_attention, kernel)
    chosen = variant_of(kernel, "float16", 80, aligned=False)
    free = [p.name for p in function.params if not p.do_not_specialize and not p.is_constexpr]
    sizes = {name: size for name in ("size_k", "size_v") if size and name in free}
    assert {n for n, kind in SIGNATURES[kernel].items() if kind == "i32" and n in free} <= {
        "size_k",
        "size_v",
    }
    types = {"T": "*fp16", "f32": "*fp32", "i32": "i32"}
    signature = {name: types[kind] for name, kind in SIGNATURES[kernel].items()}
    constants = {**dict(chosen.constants), **sizes}
    source = ASTSource(
        fn=function,
        signature={**signature, **dict.fromkeys(constants, "constexpr")},
        constexprs=constants,
    )
    options = {"num_warps": chosen.warps, "num_stages": chosen.stages}
    assert triton.compile(source, target=GPUTarget("cuda", 80, 32), options=options).asm["cubin"]


def test_a_kernel_that_spills_would_be_found() -> None:
    constants = (("chunk", 32), ("block_k", 64), ("block_v", 64), ("split_tf32", False))
    _, _, entry = compile_variant(Variant("prefill_state", "float32", 80, True, constants, 4, 1))
    assert entry["spill_store_bytes"] > 100


def test_other_folders_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(OutputExistsError, match=r"holds no kernels\.json"):
        compile_all(tmp_path, [])
    assert (tmp_path / "thesis.txt").read_text() == "mine"


def test_an_interrupted_compilation_leaves_the_old_folder(tmp_path: Path) -> None:
    output = tmp_path / "kernels"
    compile_all(output, [variant_of("sum_partials", "float32", 80, aligned=False)])
    before = sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*"))

    def interrupt(_: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compile_all(output, variants(80), interrupt)
    assert sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*")) == before


def test_the_command_line_shows_progress(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    few = [variant_of("sum_partials", dtype, 80, aligned=False) for dtype in ACTIVATION_TYPES]
    monkeypatch.setattr(compile_module, "variants", lambda sm: few)
    assert compile_module.main(["-o", str(tmp_path / "kernels"), "--sm", "80"]) == 0
    shown = capsys.readouterr()
    assert "3 kernels in" in shown.out
    assert "[1/3] sm80 sum_partials_fp32_any: " in shown.err
    with pytest.raises(SystemExit):
        compile_module.main(["-o", str(tmp_path / "kernels"), "--sm", "80,70"])
    assert "--sm: no kernels for 70; expected some of 75, 80, 86" in capsys.readouterr().err
    (tmp_path / "thesis.txt").write_text("mine")
    assert compile_module.main(["-o", str(tmp_path), "--sm", "80"]) == 1
    assert "choose another folder" in capsys.readouterr().err


def test_without_triton_the_compiler_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingDependencyError, match="pip install triton"):
        compile_all(tmp_path / "kernels", [])


def _assert_matches(
    inputs: dict[str, Array], dtype: str, output: Array, state: Array, rows: str = "op"
) -> None:
    """Compare with the reference on the rounded inputs that the kernel got."""
    rounded = {
        name: torch.from_numpy(array).to(getattr(torch, dtype)).double().numpy()
        if name in {"query", "key", "value"}
        else array.astype(np.float64)
        for name, array in inputs.items()
    }
    expected_output, expected_state = linear_attention_update(**rounded)
    assert_close(f"{rows}.output.float32", output, expected_output, "output")
    assert_close(f"{rows}.state.float32", state, expected_state, "present_state")


def _check_entry(folder: Path, entry: dict[str, Any]) -> None:
    ptx = (folder / entry["ptx"]).read_text()
    assert f".visible .entry {entry['symbol']}(" in ptx
    assert entry["target"].startswith(f"sm_{entry['sm']}")
    assert entry["null_parameters"] == 2
    assert (folder / entry["cubin"]).read_bytes()[:4] == b"\x7fELF"
    assert 0 < entry["registers"] <= 255
    # Every GPU allows 48 KiB by default; the launcher raises the limit.
    assert entry["shared_bytes"] <= {75: 64, 80: 163, 90: 227, 100: 227}.get(entry["sm"], 99) << 10
