"""TensorRT's real Python bindings without its libraries: link-time stand-ins, in a process of their own.

The bindings need nine C functions of three libraries to be imported. Stand-ins that return null are compiled into a
temporary folder, and a child process finds them by LD_LIBRARY_PATH; this process never loads them. Nothing can be built or
run so: what can is every line of Python between a plugin's definition and the library (`offline.py`).
"""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
LIBRARIES = ("nvinfer", "nvonnxparser", "nvinfer_plugin")
FUNCTIONS = (
    "createInferBuilder_INTERNAL", "createInferRuntime_INTERNAL", "createInferRefitter_INTERNAL",
    "getBuilderPluginRegistry", "getPluginRegistry", "initLibNvInferPlugins", "createNvOnnxParser_INTERNAL",
    "createNvOnnxParserRefitter_INTERNAL", "getNvOnnxParserVersion",
)  # fmt: skip
COMPILER = next((found for name in ("cc", "gcc", "clang") if (found := shutil.which(name))), None)


def missing() -> str:
    """Why the bindings cannot be loaded here, or nothing."""
    if importlib.util.find_spec("tensorrt_bindings") is None or importlib.util.find_spec("tensorrt") is None:
        return "needs tensorrt-cu13 and tensorrt-cu13-bindings 11, installed with --no-deps"
    return "" if COMPILER else "needs a C compiler, for stand-ins of TensorRT's libraries"


def stand_ins(folder: Path) -> Path:
    """Compile the stand-ins into `folder`."""
    source = folder / "stand_in.c"
    source.write_text("".join(f"void *{name}(void) {{ return 0; }}\n" for name in FUNCTIONS))
    for name in LIBRARIES:
        file = f"lib{name}.so.11"
        command = [str(COMPILER), "-shared", "-fPIC", f"-Wl,-soname,{file}", "-o", str(folder / file), str(source)]
        subprocess.run(command, check=True, capture_output=True)
    return folder


def child(script: str, *arguments: str, libraries: Path | None = None) -> Any:  # Any: whatever JSON the script prints
    """Run a script of this folder in a process of its own, kernels compiled and not interpreted; its last line is JSON."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT / "engine"), str(HERE), *filter(None, sys.path)])
    if libraries:
        environment["LD_LIBRARY_PATH"] = str(libraries)
    command = [sys.executable, str(HERE / script), *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])
