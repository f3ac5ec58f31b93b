"""`config.pbtxt` of the demo's models, committed for people to read: `python -m mosear_export.demo.triton_configs`."""

from pathlib import Path

from mosear.config import ModelConfig
from mosear.contract import ENCODERS, parts
from mosear.recipe import Recipe
from mosear.serving.configs import Device, Settings, Shapes, config_text, model_configs
from mosear_export.demo.assemble import demo_config
from mosear_export.demo.fetch import DemoFiles, default_cache, fetch
from mosear_export.demo.smollm import GGUFModel
from mosear_export.golden import SIZES

ROOT = Path(__file__).parents[3]
FOLDER = ROOT / "triton_repo" / "models"
RECIPE = ROOT / "export" / "recipes" / "cpu-fp32.toml"


def demo_configs(files: DemoFiles) -> dict[str, str]:
    """The text of each model's file, as a repository of the demo's CPU engine has it."""
    config, device = demo_config(GGUFModel(files.gguf)), Device.CPU
    models = model_configs(config, Recipe.load(RECIPE), device=device, settings=Settings(), warm=golden_shapes(config))
    return {name: config_text(model, device) for name, model in models.items()}


def golden_shapes(config: ModelConfig) -> Shapes:
    """Shapes of one golden sample of each encoder."""
    table = parts(config)
    return {
        name: {
            spec.name: tuple(SIZES[axis] if isinstance(axis, str) else axis for axis in spec.axes[1:])
            for spec in table[name].inputs
        }
        for name in ENCODERS
    }


if __name__ == "__main__":
    for name, text in demo_configs(fetch(default_cache(), print)).items():
        path = FOLDER / name / "config.pbtxt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        print(path)
