"""What a worker runs: the daemon's knowledge of its own programs, for the node to start.

A model gets a worker host, which starts the engine; the gateway is our own program; a `command` is the user's.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Final

from llmosd.gateway.config import GatewayConfig
from llmosd.isolation import Isolator
from llmosd.kernel import effects as do
from llmosd.kernel.ledger import Grant
from llmosd.kernel.spec import Command, Liveness, ModelSpec, Ready, Restart, Scale, Timeouts
from llmosd.kernel.units import Seconds
from llmosd.launch.gate import FIRST_GRANT, Order, inherited_environment
from llmosd.listen import HttpSocket
from llmosd.node.confine import Confinement, LaunchSettings
from llmosd.node.groups import MARK
from llmosd.node.life import Birth, Program
from llmosd.runtime import OPEN_FILES
from llmosd.settings import Directories, Settings
from llmosd.worker.config import HostConfig, encode

GATEWAY: Final = "gateway"
#: -P: modules come from where they were installed, never from the directory a worker runs in.
_PYTHON: Final = (sys.executable, "-P")
#: How much sooner the OOM killer takes an engine than its host, which has to tell what happened.
ENGINE_OOM_SCORE: Final = 500


def gateway_spec(settings: Settings, health_url: str) -> ModelSpec:
    """The gateway's own model file, so to speak. It has in it what its process is made from, so that a gateway of an
    earlier daemon with other settings does not go on. Its socket listens before it serves: it is asked when it does."""
    made_from = (settings.gateway.listen, settings.gateway.api_keys_file, str(int(settings.scheduler.body_max)))
    return ModelSpec(
        model=GATEWAY,
        kind="service",
        engine=Command(command=(GATEWAY,), args=made_from),
        scale=Scale(min=1, max=1),
        restart=Restart(policy="always", delay=Seconds(0.1), delay_max=Seconds(10), burst=0),
        timeouts=Timeouts(load=Seconds(60), stop=Seconds(5)),
        ready=Ready(http=health_url),
        liveness=Liveness(http=health_url),
    )


class Programs:
    """Makes the program of each worker that is spawned."""

    def __init__(
        self, directories: Directories, settings: Settings, http: HttpSocket | None, isolator: Isolator
    ) -> None:
        self._directories = directories
        self._isolator = isolator
        self._settings = settings
        self._http = http

    def program(self, effect: do.Spawn, birth: Birth, confinement: Confinement) -> Program:
        """Raises OSError or ValueError with what is wrong for good."""
        spec = effect.spec
        launch = confinement.launch_settings(effect.limits)
        marks = {MARK: birth.mark}
        if spec.model == GATEWAY:
            return self._gateway(marks, launch)
        if isinstance(spec.engine, Command):
            env = inherited_environment({**spec.engine.env, **marks, **_visible_gpus(effect)})
            order = _order(launch, (*spec.engine.command, *spec.engine.args), env, grant=effect.grant)
            return Program(self._isolator.isolate(order, spec, effect.grant, birth.scratch))
        return self._host(effect, birth, launch, marks)

    def _gateway(self, marks: dict[str, str], launch: LaunchSettings) -> Program:
        directories, gateway = self._directories, self._settings.gateway
        config = GatewayConfig(
            front_address=directories.front,
            runtime_directory=str(directories.runtime),
            listen_fd=FIRST_GRANT + 1,
            api_keys_file=gateway.api_keys_file,
            body_max=self._settings.scheduler.body_max,
            orphan_timeout=float(self._settings.node.orphan_timeout),
        )
        argv = (*_PYTHON, "-m", "llmosd.gateway")
        order = _order(launch, argv, inherited_environment(marks), keep=(FIRST_GRANT, FIRST_GRANT + 1))
        assert self._http is not None, "no gateway is declared where there is no socket for it"
        return Program(order, encode(config), (self._http.fileno(),))

    def _host(self, effect: do.Spawn, birth: Birth, launch: LaunchSettings, marks: dict[str, str]) -> Program:
        spec, limits = effect.spec, effect.limits
        base = _own_oom_score_adj() if launch.oom_score_adj is None else launch.oom_score_adj
        engine_oom = min(1000, base + ENGINE_OOM_SCORE)
        config = HostConfig(
            worker=effect.worker,
            model=spec.model,
            identity=birth.identity,
            token=birth.token,
            back_address=self._directories.back,
            engine=spec.engine,
            liveness=spec.liveness,
            slots=limits.slots,
            threads=_threads(effect, launch),
            engine_order=Order(
                argv=(), env={**marks, **_visible_gpus(effect)}, cwd=str(birth.scratch), oom_score_adj=engine_oom
            ),
            scratch=str(birth.scratch),
            weights_path=(str(self._directories.state / "models"), str(self._directories.models)),
            stop_timeout=max(0.5, float(spec.timeouts.stop) * 0.8),
            orphan_timeout=float(self._settings.node.orphan_timeout),
        )
        env = inherited_environment({**marks, **_visible_gpus(effect)})
        argv = (*_PYTHON, "-m", "llmosd.worker")
        order = _order(launch, argv, env, keep=(FIRST_GRANT,), grant=effect.grant)
        # The host as a whole: its engine inherits it.
        return Program(self._isolator.isolate(order, spec, effect.grant, birth.scratch), encode(config))


def _order(
    launch: LaunchSettings,
    argv: tuple[str, ...],
    env: dict[str, str],
    keep: tuple[int, ...] = (),
    grant: Grant | None = None,
) -> Order:
    return Order(
        argv=argv,
        env=env,
        cwd="/",
        umask=0o027,
        rlimits={"NOFILE": OPEN_FILES} | launch.rlimits,
        oom_score_adj=launch.oom_score_adj,
        cpu_affinity=launch.cpu_affinity,
        memory_node=grant.memory_node if grant is not None else None,
        nice=launch.nice,
        ionice=launch.ionice,
        subreaper=True,
        keep_fds=keep,
    )


def _visible_gpus(effect: do.Spawn) -> dict[str, str]:
    """Only the granted GPUs, by UUID; an empty list hides all (CUDA C++ Programming Guide, CUDA_VISIBLE_DEVICES)."""
    return {"CUDA_VISIBLE_DEVICES": ",".join(effect.grant.gpus)}


def _own_oom_score_adj() -> int:
    """What a child of ours has that is not given another value."""
    return int(Path("/proc/self/oom_score_adj").read_text())


def _threads(effect: do.Spawn, launch: LaunchSettings) -> int:
    """Threads for the engine to compute with: one for each CPU of its own, for each CPU that it reserved, or for each
    that it may run on. Counted once: no engine changes their number while it runs.
    """
    if effect.grant.cpus:
        return len(effect.grant.cpus)
    if effect.grant.millicpus:
        return max(1, effect.grant.millicpus // 1000)
    return len(effect.limits.allowed_cpus or launch.cpu_affinity or os.sched_getaffinity(0))
