"""`config.pbtxt` of every model, made from the contract as Triton's own protobuf message.

The models `voice`, `face_detector`, `face` and `scene` are the contract's parts of these names; `mosear`, `mosear_unary` and
`decoder` are its served models, in Python. `PARAMETERS` says what each of their parameters means.
"""

import enum
from collections.abc import Mapping
from dataclasses import dataclass

from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2 as pb
from tritonclient.utils import np_to_triton_dtype

from mosear.config import ModelConfig
from mosear.contract import DECODER, ENCODERS, DType, Part, Served, TensorSpec, parts, served
from mosear.errors import ConfigError
from mosear.recipe import ON_TENSORRT, Recipe

BATCH = 8  # samples of one execution of an encoder
NO_OPTIMISATION = 2  # the onnxruntime backend's graph level for "run it as it is"
PYTHON, ONNX, TENSORRT = "python", "onnxruntime", "tensorrt"
PLAN_PLATFORM, PLAN_FILE = "tensorrt_plan", "model.plan"
CHECK_ONLY = "check_only"  # a parameter
PLAN_NOTES = "plan.json"  # beside a plan: what its manifest says of it
ENGINE = "engine"  # folder in a Python model's version directory
PARAMETERS = {
    "engine": "folder of the engine's files, relative to the version directory",
    "slots": "sequences in the decoder's cache at once; a conflict report takes three",
    "queue": "requests that may wait for slots; one more is refused as busy",
    "prefill_rows": "prompt rows that are read at most between two decode steps",
    "threads": "of the decoder; 0: as many as its process may use",
    "workers": "requests answered at once; as many again may wait, one more is refused as busy",
    "clip_bytes": "largest video_bytes and largest audio_bytes",
    "intra_op_thread_count": "threads of one execution; 0: ONNX Runtime's choice",
}
Shapes = Mapping[str, Mapping[str, tuple[int, ...]]]  # part -> input -> shape of one sample, without the batch axis


class Device(enum.StrEnum):
    """Where encoders run."""

    CPU = "cpu"
    GPU = "gpu"


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """How much is served at once."""

    slots: int = 8
    queue: int = 32
    prefill_rows: int = 64
    workers: int = 16

    def __post_init__(self) -> None:
        for name in self.__slots__:
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}: it must be at least 1 ({PARAMETERS[name]})")


def model_configs(
    config: ModelConfig, recipe: Recipe, *, device: Device, settings: Settings, warm: Shapes
) -> dict[str, pb.ModelConfig]:
    """A configuration for each model by name; encoders whose sample `warm` has are warmed up with it."""
    asked = {
        "engine": ENGINE,
        "workers": settings.workers,
        "clip_bytes": recipe.limits.clip_bytes,
    }
    decoder = {
        "engine": ENGINE,
        "slots": settings.slots,
        "queue": settings.queue,
        "prefill_rows": settings.prefill_rows,
        "threads": recipe.threads,
    }
    models = {
        name: _python_model(model, decoder if name == DECODER else asked) for name, model in served(config).items()
    }
    table = parts(config)
    for name in ENCODERS:
        models[name] = _encoder(table[name], config, recipe, device, warm.get(name, {}))
    return models


def _python_model(model: Served, parameters: Mapping[str, object]) -> pb.ModelConfig:
    made = pb.ModelConfig(name=model.name, backend=PYTHON, max_batch_size=0)
    made.input.extend(pb.ModelInput(**_tensor(spec, spec.axes), optional=spec.optional) for spec in model.inputs)
    made.output.extend(pb.ModelOutput(**_tensor(spec, spec.axes)) for spec in model.outputs)
    # One process, whatever it runs on: KIND_GPU would make one for each GPU, with a scheduler and weights of its own.
    made.instance_group.add(count=1, kind=pb.ModelInstanceGroup.KIND_CPU)
    made.model_transaction_policy.decoupled = model.decoupled
    _set_parameters(made, parameters)
    return made


def _encoder(
    part: Part, config: ModelConfig, recipe: Recipe, device: Device, sample: Mapping[str, tuple[int, ...]]
) -> pb.ModelConfig:
    # A request holds the pictures of one clip on the axis N.
    per_request = config.face.frames if part.inputs[0].axes[0] == "N" else 1
    planned = recipe.target in ON_TENSORRT
    made = pb.ModelConfig(name=part.name, backend=TENSORRT if planned else ONNX)
    made.max_batch_size = max(BATCH, per_request)
    if planned:
        made.platform, made.default_model_filename = PLAN_PLATFORM, PLAN_FILE
        made.max_batch_size = per_request if per_request > 1 else recipe.plans.decode_batch  # what the profile takes
    made.input.extend(pb.ModelInput(**_batched(spec)) for spec in part.inputs)
    made.output.extend(pb.ModelOutput(**_batched(spec)) for spec in part.outputs)
    made.dynamic_batching.SetInParent()  # what waits goes together, nothing waits for more
    group = pb.ModelInstanceGroup
    where = made.instance_group.add(count=1, kind=group.KIND_CPU if device is Device.CPU else group.KIND_GPU)
    if planned:
        where.profile.append("0")  # an encoder's plan has one
    if device is Device.CPU:
        made.optimization.graph.level = NO_OPTIMISATION  # the engine's graph is optimised already
        _set_parameters(made, {"intra_op_thread_count": recipe.threads})
    if sample:
        warmup = made.model_warmup.add(name="golden", batch_size=1)
        for spec in part.inputs:
            given = warmup.inputs[spec.name]
            given.data_type = _data_type(spec.dtype)
            given.dims.extend(sample[spec.name] or (1,))
            given.input_data_file = sample_file(spec.name)
    return made


def sample_file(tensor: str) -> str:
    """Name of a warm-up sample in the model's folder `warmup`."""
    return f"{tensor}.raw"


def _batched(spec: TensorSpec) -> dict[str, object]:
    """Dims without the batch axis; Triton wants one at least, so one value a sample is [batch, 1] to clients."""
    if len(spec.axes) > 1:
        return _tensor(spec, spec.axes[1:])
    return _tensor(spec, (1,)) | {"reshape": pb.ModelTensorReshape(shape=[])}


def _tensor(spec: TensorSpec, axes: tuple[int | str, ...]) -> dict[str, object]:
    dims = [-1 if isinstance(axis, str) else axis for axis in axes]
    return {"name": spec.name, "data_type": _data_type(spec.dtype), "dims": dims}


def _data_type(dtype: DType) -> int:
    name = np_to_triton_dtype(dtype.numpy)
    return int(pb.DataType.Value("TYPE_STRING" if name == "BYTES" else f"TYPE_{name}"))


def _set_parameters(model: pb.ModelConfig, parameters: Mapping[str, object]) -> None:
    for name, value in parameters.items():
        model.parameters[name].string_value = str(value)


def config_text(model: pb.ModelConfig, device: Device) -> str:
    """The file: fields in Triton's own order, after comments that say where it comes from and what parameters mean."""
    lines = [
        f"# Generated by mosear.serving.configs from the contract (mosear/contract.py), target {device}: do not edit.",
        *(f"# {name}: {PARAMETERS[name]}" for name in sorted(model.parameters)),
    ]
    return "\n".join([*lines, "", text_format.MessageToString(model)])
