"""What `define` says where TensorRT cannot be loaded, as JSON."""

import json

from mosear.errors import KernelError
from mosear.kernels.plugins.binding import Device, define

if __name__ == "__main__":
    try:
        define((), Device(arch=90))
        print(json.dumps("nothing"))
    except KernelError as error:
        print(json.dumps(str(error)))
