"""Ports of this machine: three that are free, and one that a server is about to listen at."""

import socket
from contextlib import ExitStack
from typing import TypedDict

from mosear.errors import ServingError


class Ports(TypedDict):
    """Those of ServerOptions."""

    http_port: int
    grpc_port: int
    metrics_port: int


def free_ports() -> Ports:
    """Ports that nobody listened at a moment ago."""
    with ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(3)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        http, grpc, metrics = (int(probe.getsockname()[1]) for probe in probes)
        return {"http_port": http, "grpc_port": grpc, "metrics_port": metrics}


def check_port(address: str, port: int, what: str) -> None:
    """Raise ServingError where the server could not listen: it would say so only after its models are loaded."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((address, port))
        except OSError as error:
            raise ServingError(
                f"{what} port {port} of {address} cannot be had ({error.strerror}): "
                f"stop what listens there, or name another with --{what}-port"
            ) from error
