"""Which driver an engine has. Imports only what that one needs: a host stays small."""

from __future__ import annotations

from llmosd.kernel import spec
from llmosd.worker.config import HostConfig
from llmosd.worker.drivers import CannotWork, Driver
from llmosd.worker.log import WorkerLog


def driver_for(config: HostConfig, log: WorkerLog) -> Driver:
    """The driver of the configured engine. Imports only what that one needs."""
    engine = config.engine
    if isinstance(engine, spec.Simulated):
        from llmosd.worker.drivers.simulated import SimulatedEngine

        return SimulatedEngine(engine, config)
    if isinstance(engine, spec.PythonFunction):
        from llmosd.worker.drivers.python import PythonEngine

        return PythonEngine(engine, config)
    if isinstance(engine, spec.LlamaCpp):
        from llmosd.worker.drivers.llamacpp import LlamaCppEngine

        return LlamaCppEngine(engine, config, log)
    if isinstance(engine, spec.OpenAI):
        from llmosd.worker.drivers.openai import OpenAIEngine

        return OpenAIEngine(engine, config, log)
    if isinstance(engine, spec.Attached):
        from llmosd.worker.drivers.attached import AttachedEngine

        return AttachedEngine(engine, config)
    raise CannotWork(f"driver {engine.driver} has no worker host")
