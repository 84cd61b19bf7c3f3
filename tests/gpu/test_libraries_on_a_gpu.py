"""libfwl_ort and libfwl_trt on a real GPU: the op's cases in ONNX Runtime and in an engine."""

from __future__ import annotations

import importlib
import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch

from fwl_export.op.cases import CASES, Case
from fwl_export.op.spec import INPUTS, OUTPUTS
from tests.op.helpers import assert_matches_reference, one_node_model, rounded_inputs
from tests.plugins.conftest import builds, libraries, ort_library, trt_library  # noqa: F401

pytestmark = pytest.mark.gpu

TYPES = ("float32", "float16")


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_onnxruntime(ort_library: Path, case: Case, dtype: str) -> None:  # noqa: F811
    if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        pytest.skip("this ONNX Runtime has no CUDA provider; pip install onnxruntime-gpu")
    options = onnxruntime.SessionOptions()
    options.register_custom_ops_library(str(ort_library))
    model = one_node_model(dtype, 20)
    del model.functions[:]  # so that the function body cannot run instead of the kernel
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CUDAExecutionProvider"]
    )
    inputs = rounded_inputs(case, dtype)
    output, state = session.run([a.name for a in OUTPUTS], inputs)
    assert_matches_reference(dtype, inputs, output.astype(np.float64), state)


@pytest.mark.parametrize("variant", ["tensorrt_rtx", "tensorrt"])
@pytest.mark.parametrize("dtype", TYPES)
def test_engine(trt_library: Path, dtype: str, variant: str) -> None:  # noqa: F811
    if not torch.cuda.is_available():
        pytest.skip(f"torch {torch.__version__} was built without CUDA")
    if importlib.util.find_spec(variant) is None:
        pytest.skip(f"{variant} is not installed")
    trt = importlib.import_module(variant)
    assert trt.get_plugin_registry().load_library(str(trt_library)) is not None
    runtime, context = _opened(trt, one_node_model(dtype, 20))
    for case in CASES:
        inputs = rounded_inputs(case, dtype)
        tensors = {name: torch.from_numpy(array).cuda() for name, array in inputs.items()}
        for name, tensor in tensors.items():
            assert context.set_input_shape(name, tuple(tensor.shape))
        tensors["output"] = torch.full_like(tensors["value"], torch.nan, dtype=torch.float32)
        tensors["present_state"] = torch.full_like(tensors["past_state"], torch.nan)
        for name, tensor in tensors.items():
            assert context.set_tensor_address(name, tensor.data_ptr())
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        assert context.execute_async_v3(stream.cuda_stream), case.name
        stream.synchronize()
        output, state = tensors["output"].double().cpu(), tensors["present_state"].cpu()
        assert_matches_reference(dtype, inputs, output, state)
    del context, runtime


def _opened(trt: Any, model: Any) -> tuple[Any, Any]:
    """Build a model for this GPU and return a context, with the runtime that must outlive it."""
    logger = trt.Logger(trt.Logger.WARNING)
    builder = trt.Builder(logger)
    typed = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    network = builder.create_network(0 if typed is None else 1 << int(typed))
    parser = trt.OnnxParser(network, logger)
    assert parser.parse(model.SerializeToString()), parser.get_error(0)
    kinds = [network.get_layer(i).type for i in range(network.num_layers)]
    assert kinds.count(trt.LayerType.PLUGIN_V3) == 1
    config = builder.create_builder_config()
    profile = builder.create_optimization_profile()
    for argument in INPUTS:
        smallest, usual, largest = ([size] * len(argument.shape) for size in (1, 64, 512))
        profile.set_shape(argument.name, smallest, usual, largest)
    config.add_optimization_profile(profile)
    engine = builder.build_serialized_network(network, config)
    runtime = trt.Runtime(logger)
    return runtime, runtime.deserialize_cuda_engine(engine).create_execution_context()
