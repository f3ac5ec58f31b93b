"""Weights of a part's linear layers in 8 bits: ONNX Runtime's block-wise quantiser, activations in 8 bits at run time.

What is not a constant matrix stays as it is: experts, gates and policy parameters (inputs, or baked), norms, attention.
"""

from pathlib import Path

import onnx

INT8_COMPUTE = 4  # MatMulNBits accuracy_level: int8 products, int32 sums


def quantise_int8(source: Path, target: Path, *, block: int) -> int:
    """Write `source` with its constant MatMul weights in 8 bits, symmetric, a scale for each `block`; how many there were."""
    import logging

    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

    logging.getLogger("onnxruntime.quantization.matmul_nbits_quantizer").setLevel(logging.ERROR)
    model = onnx.load(source)
    quantiser = MatMulNBitsQuantizer(
        model, bits=8, block_size=block, is_symmetric=True, accuracy_level=INT8_COMPUTE,
        nodes_to_exclude=[node.name for node in model.graph.node if node.op_type != "MatMul"],
    )  # fmt: skip
    quantiser.process()
    result = quantiser.model.model
    onnx.save_model(result, target, save_as_external_data=True, location=f"{target.name}.data", size_threshold=1024)
    return sum(node.op_type == "MatMulNBits" for node in result.graph.node)


def bake(source: Path, target: Path, heads: dict[str, onnx.TensorProto]) -> None:
    """Write `source` with the inputs named in `heads` as constants."""
    model = onnx.load(source)
    kept = [value for value in model.graph.input if value.name not in heads]
    del model.graph.input[:]
    model.graph.input.extend(kept)
    model.graph.initializer.extend(heads.values())
    onnx.save_model(model, target, save_as_external_data=True, location=f"{target.name}.data", size_threshold=1024)
