"""Small ONNX stand-ins for the speaker model and the speech tokenizer.

In: a file name and a seed. Out: graphs with the inputs, outputs and value ranges of the published
ones (docs/spec/checkpoint.md section 6) and random weights. Needs the package `onnx`, an extra.
It knows nothing of the networks that use what these graphs make.
"""

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from cosyvoice.config import EMBEDDING_SIZE
from cosyvoice.errors import ModelFilesError

from .weights import Draw

if TYPE_CHECKING:
    from onnx import GraphProto

IR_VERSION = 8  # readable by every onnxruntime we support
OPSET = 13
N_FBANK_BINS = 80
N_SPEAKER_CHANNELS = 64
N_WHISPER_BINS = 128
N_FRAMES = 4  # of a token: 100 Whisper frames and 25 tokens a second
N_CODES = 8  # of three levels each: 3 ** 8 = 6561 tokens
N_LEVELS = 3

Constants = dict[str, np.ndarray]


def require_onnx() -> None:
    """Fail before anything is written, not after gigabytes."""
    if importlib.util.find_spec("onnx") is None:
        raise ModelFilesError(
            "init-model writes ONNX files and needs the package onnx: pip install 'cosyvoice[onnx]'"
        )


def write_speaker_model(file: Path, seed: int) -> None:
    """Fbank [1, N, 80] -> embedding [1, 192]: the mean over time of a small MLP."""
    from onnx import TensorProto, helper

    draw = Draw(f"{seed}/{file.name}")
    inner = draw.uniform("inner", (N_FBANK_BINS, N_SPEAKER_CHANNELS), std=N_FBANK_BINS**-0.5)
    outer = draw.uniform("outer", (N_SPEAKER_CHANNELS, EMBEDDING_SIZE), std=1.0)
    constants = {"inner": inner.numpy(), "outer": outer.numpy()}
    nodes = [
        helper.make_node("MatMul", ["input", "inner"], ["projected"]),
        helper.make_node("Tanh", ["projected"], ["bent"]),
        # Absolute values, since the input has no mean and neither has anything odd of it.
        helper.make_node("Abs", ["bent"], ["sizes"]),
        helper.make_node("ReduceMean", ["sizes"], ["mean"], axes=[1], keepdims=0),
        helper.make_node("MatMul", ["mean", "outer"], ["output"]),
    ]
    fbank = helper.make_tensor_value_info("input", TensorProto.FLOAT, ["B", "T", N_FBANK_BINS])
    output = helper.make_tensor_value_info("output", TensorProto.FLOAT, ["B", EMBEDDING_SIZE])
    _save(file, helper.make_graph(nodes, "speaker", [fbank], [output]), constants)


def write_speech_tokenizer(file: Path, seed: int) -> None:
    """Log-mel [1, 128, N] and N -> ceil(N / 4) ids: eight rounded numbers read in base three."""
    from onnx import TensorProto, helper

    nodes = [
        helper.make_node("Cast", ["feats_length"], ["stop"], to=TensorProto.INT64),
        helper.make_node("Slice", ["feats", "start", "stop", "time"], ["heard"]),
        # Zeros on the right complete the last token.
        helper.make_node(
            "Conv", ["heard", "kernel"], ["codes"], strides=[N_FRAMES], pads=[0, N_FRAMES - 1]
        ),
        helper.make_node("Clip", ["codes", "lowest", "highest"], ["clipped"]),
        helper.make_node("Round", ["clipped"], ["rounded"]),
        helper.make_node("Add", ["rounded", "highest"], ["levels"]),
        helper.make_node("Mul", ["levels", "powers"], ["digits"]),
        helper.make_node("ReduceSum", ["digits", "channels"], ["sum"], keepdims=0),
        helper.make_node("Cast", ["sum"], ["indices"], to=TensorProto.INT32),
    ]
    feats = helper.make_tensor_value_info("feats", TensorProto.FLOAT, [1, N_WHISPER_BINS, "T"])
    length = helper.make_tensor_value_info("feats_length", TensorProto.INT32, [1])
    indices = helper.make_tensor_value_info("indices", TensorProto.INT32, [1, "L"])
    graph = helper.make_graph(nodes, "speech_tokenizer", [feats, length], [indices])
    _save(file, graph, _tokenizer_constants(Draw(f"{seed}/{file.name}")))


def _tokenizer_constants(draw: Draw) -> Constants:
    # A gain of two spreads log-mels, which lie around -0.5 to 1.5, over all three levels.
    std = 2 * (N_WHISPER_BINS * N_FRAMES) ** -0.5
    kernel = draw.uniform("kernel", (N_CODES, N_WHISPER_BINS, N_FRAMES), std=std)
    highest = (N_LEVELS - 1) // 2
    powers = [[N_LEVELS**i] for i in range(N_CODES)]
    return {
        "kernel": kernel.numpy(),
        "powers": np.array(powers, np.float32),  # [8, 1], over [1, 8, L]
        "lowest": np.array(-highest, np.float32),
        "highest": np.array(highest, np.float32),
        "start": np.array([0], np.int64),
        "time": np.array([2], np.int64),
        "channels": np.array([1], np.int64),
    }


def _save(file: Path, graph: "GraphProto", constants: Constants) -> None:
    import onnx
    from onnx import helper, numpy_helper

    graph.initializer.extend(numpy_helper.from_array(a, name) for name, a in constants.items())
    opset = [helper.make_opsetid("", OPSET)]
    model = helper.make_model(graph, opset_imports=opset, ir_version=IR_VERSION)
    onnx.checker.check_model(model)
    onnx.save(model, file)
