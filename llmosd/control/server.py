"""The gRPC server: the Control service, the standard health service and reflection, on a unix socket."""

from __future__ import annotations

import logging
from pathlib import Path

import grpc
from google.protobuf.message import DecodeError
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from llmos.v1 import control_pb2, control_pb2_grpc
from llmosd.control.machine import Machine
from llmosd.control.service import ControlService

#: Far above any honest call.
MESSAGE_MAX = 4 << 20


def _shorten(record: logging.LogRecord) -> bool:
    """A message that is no protobuf has been answered, and is worth a line, not a traceback."""
    problem = record.exc_info[1] if record.exc_info else None
    if isinstance(problem, DecodeError):
        record.msg, record.args, record.exc_info = f"control plane: {problem}", (), None
    return True


class ControlServer:
    """Serves from `start` to `stop`."""

    def __init__(self, machine: Machine, address: str) -> None:
        self._address = address
        self._server = grpc.aio.server(
            options=[("grpc.max_receive_message_length", MESSAGE_MAX), ("grpc.so_reuseport", 0)]
        )
        control_pb2_grpc.add_ControlServicer_to_server(  # type: ignore[no-untyped-call]  # generated
            ControlService(machine), self._server
        )
        self._health = health.aio.HealthServicer()
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        names = (
            control_pb2.DESCRIPTOR.services_by_name["Control"].full_name,
            health.SERVICE_NAME,
            reflection.SERVICE_NAME,
        )
        reflection.enable_server_reflection(names, self._server)
        self._names = ("", names[0])
        logging.getLogger("grpc._cython.cygrpc").addFilter(_shorten)

    async def start(self) -> None:
        """Raises RuntimeError when the address cannot be bound."""
        path = Path(self._address.removeprefix("unix:"))
        path.unlink(missing_ok=True)
        self._server.add_insecure_port(self._address)
        await self._server.start()
        path.chmod(0o660)
        for name in self._names:
            await self._health.set(name, health_pb2.HealthCheckResponse.SERVING)

    async def stop(self, grace_s: float) -> None:
        """End: calls under way have `grace_s` seconds; watchers are cut off, and come back to the next daemon."""
        await self._health.enter_graceful_shutdown()
        await self._server.stop(grace_s)
        Path(self._address.removeprefix("unix:")).unlink(missing_ok=True)
