"""Weights of linear layers in 8 bits: ONNX Runtime's block-wise quantiser, activations in 8 bits at run time.

What is not one of these weights stays as it is: experts, gates and policy parameters (inputs, or baked), norms, attention.
"""

import logging
from collections.abc import Collection, Sequence

from onnx import ModelProto

from mosear.recipe import Recipe
from mosear_export.precision.graph import place

INT8_COMPUTE = 4  # MatMulNBits accuracy_level: int8 products, int32 sums


def quantise_linears(model: ModelProto, weights: Sequence[str], recipe: Recipe) -> ModelProto:
    """A model with its linear layers (`graph.linear_weights`) as a recipe for ONNX Runtime in 8 bits wants them."""
    kinds = {weight: place(i, len(weights))[1] for i, weight in enumerate(weights)}
    fine = [weight for weight, kind in kinds.items() if kind in recipe.fine]
    rest = [weight for weight, kind in kinds.items() if kind not in (*recipe.fine, *recipe.wide)]
    model = quantise_int8(model, weights=fine, block=recipe.fine_block) if fine else model
    return quantise_int8(model, weights=rest, block=recipe.block)


def quantise_int8(model: ModelProto, *, weights: Collection[str], block: int) -> ModelProto:
    """A model with these MatMul weights in 8 bits, symmetric, a scale for each `block` of a column."""
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

    logging.getLogger("onnxruntime.quantization.matmul_nbits_quantizer").setLevel(logging.ERROR)
    kept = [node.name for node in model.graph.node if node.op_type != "MatMul" or node.input[1] not in weights]
    quantiser = MatMulNBitsQuantizer(
        model, bits=8, block_size=block, is_symmetric=True, accuracy_level=INT8_COMPUTE, nodes_to_exclude=kept
    )
    quantiser.process()
    result: ModelProto = quantiser.model.model
    return result
