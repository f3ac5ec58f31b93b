"""Weights of a part's linear layers in 8 bits: ONNX Runtime's block-wise quantiser, activations in 8 bits at run time.

What is not a constant matrix stays as it is: experts, gates and policy parameters (inputs, or baked), norms, attention.
"""

import logging

from onnx import ModelProto

INT8_COMPUTE = 4  # MatMulNBits accuracy_level: int8 products, int32 sums


def quantise_int8(model: ModelProto, *, block: int) -> ModelProto:
    """A model with its constant MatMul weights in 8 bits, symmetric, a scale for each `block` of a column."""
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

    logging.getLogger("onnxruntime.quantization.matmul_nbits_quantizer").setLevel(logging.ERROR)
    quantiser = MatMulNBitsQuantizer(
        model, bits=8, block_size=block, is_symmetric=True, accuracy_level=INT8_COMPUTE,
        nodes_to_exclude=[node.name for node in model.graph.node if node.op_type != "MatMul"],
    )  # fmt: skip
    quantiser.process()
    result: ModelProto = quantiser.model.model
    return result
