"""ONNX Runtime's MatMulNBits: block-wise 4- or 8-bit weights, float32 in and out."""

from __future__ import annotations

import functools
from typing import Any

import torch

from bench.peers.common import PeerUnavailable, Side, peers_dir
from bench.peers.lowbit_case import Case


@functools.cache
def _runtime(threads: int) -> tuple[Any, Any]:
    """onnx and onnxruntime, with one pool of `threads` for all sessions of the process."""
    peers_dir()
    try:
        import onnx
        import onnxruntime
    except ImportError as error:
        raise PeerUnavailable(f"onnxruntime or onnx does not import: {error}") from error
    onnxruntime.set_default_logger_severity(3)
    onnxruntime.set_global_thread_pool_sizes(threads, 1)
    return onnx, onnxruntime


def _model(onnx: Any, case: Case, tensors: dict[str, torch.Tensor], **attributes: int) -> bytes:
    helper, numpy_helper = onnx.helper, onnx.numpy_helper
    node = helper.make_node(
        "MatMulNBits",
        ["x", *tensors],
        ["y"],
        domain="com.microsoft",
        K=case.inputs,
        N=case.outputs,
        **attributes,
    )
    floats = onnx.TensorProto.FLOAT
    graph = helper.make_graph(
        [node],
        "product",
        [helper.make_tensor_value_info("x", floats, [case.rows, case.inputs])],
        [helper.make_tensor_value_info("y", floats, [case.rows, case.outputs])],
        [numpy_helper.from_array(values.numpy(), name) for name, values in tensors.items()],
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    return bytes(model.SerializeToString())


def side(case: Case, *, bits: int = 4, accuracy: int, block: int = 128) -> Side:
    """accuracy_level 4 computes with int8 activations, 0 or 1 in float32."""
    onnx, runtime = _runtime(case.threads)
    x, w = case.x(), case.weight()
    grouped = w.view(case.outputs, -1, block)
    middle = 1 << (bits - 1)
    scale = grouped.abs().amax(2) / (middle - 0.5)
    codes = ((grouped / scale[..., None]).round() + middle).clamp(0, 2 * middle - 1)
    dequantized = ((codes - middle) * scale[..., None]).view_as(w)
    packed = codes.to(torch.uint8)
    if bits == 4:
        packed = packed[..., ::2] | packed[..., 1::2] << 4
    tensors = {"codes": packed.contiguous(), "scales": scale.flatten().contiguous()}
    attributes = {"bits": bits, "block_size": block, "accuracy_level": accuracy}
    model = _model(onnx, case, tensors, **attributes)
    y = torch.empty(case.rows, case.outputs)

    def session(_: Any = None) -> Any:
        options = runtime.SessionOptions()
        options.use_per_session_threads = False
        made = runtime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        bound = made.io_binding()
        bound.bind_cpu_input("x", x.numpy())
        bound.bind_output("y", "cpu", 0, "float32", list(y.shape), y.data_ptr())
        return made, bound

    read = sum(values.nbytes for values in tensors.values())
    turn = case.turns(session(), read, session)

    def run() -> torch.Tensor:
        made, bound = turn()
        made.run_with_iobinding(bound)
        return y

    return Side(run, None, case.truth(dequantized), read)
