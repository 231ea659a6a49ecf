"""The life of a worker: everything that affects its state is in this file.

`TABLE` maps state and trigger to the next state and the actions to take; `step` looks it up. A pair that is not in the
table cannot happen: `step` returns None and the caller refuses the command, or counts an event that came too late.
Nothing decides a transition elsewhere: the kernel decides only which trigger an event amounts to (for example that
an exit is to be retried, which is `restart.py`'s to say), and carries the actions out.

A worker is down only when its process group is empty. So an EXITED leads to `stopping`, which kills what is left of
the group, and only the verdict on an empty group (ENDED, RETRY or GAVE_UP) leads out of it. Its requests are given
away then and not before, so that no two workers are ever at work on one request; only of a group that is killed and
still there they are given away at once, for no instruction of it will ever run again.
"""

from __future__ import annotations

import enum
from typing import Final


class State(enum.StrEnum):
    STOPPED = "stopped"  # wanted down, or scaled to zero
    WAITING = "waiting"  # wanted up; what its model requires is not ready yet
    STARTING = "starting"  # spawned; the host has not said HELLO
    LOADING = "loading"  # the host is up, the engine loads; or a command is not ready
    READY = "ready"  # takes requests
    DRAINING = "draining"  # finishes what it has, takes no more
    ASLEEP = "asleep"  # engine alive, its GPU memory given back
    WAKING = "waking"  # its GPU memory is coming back
    FROZEN = "frozen"  # stopped by the freezer on request: not hung
    STOPPING = "stopping"  # signalled, or dead; waiting until the group is empty
    BACKOFF = "backoff"  # will restart at a known time
    FAILED = "failed"  # gave up, with the reason
    ADOPTED = "adopted"  # alive from before the daemon started; its HELLO is awaited
    UNKILLABLE = "unkillable"  # killed and still there: resources stay reserved


class Trigger(enum.StrEnum):
    # by an operator, by demand, or by a timer
    START = "start"  # resources are reserved: run it
    AWAIT = "await"  # run it once what its model requires is ready
    STOP = "stop"  # end it now
    DRAIN = "drain"  # end it when its requests are done
    FREEZE = "freeze"
    THAW = "thaw"
    SLEEP = "sleep"
    WAKE = "wake"
    RESET = "reset"
    ADOPT = "adopt"  # found alive when the daemon started
    TIMEOUT = "timeout"  # the state's own deadline passed
    # by the worker
    HELLO = "hello"  # the host speaks, its engine loads; or a command runs that says when it is ready
    LOADED = "loaded"  # the engine takes requests; or a command is ready
    SLEPT = "slept"  # the engine gave its GPU memory back
    DRAINED = "drained"  # no request is left, nor any answer kept
    HUNG = "hung"  # silent for too long while requests run, or does not answer any more
    # by the node
    EXITED = "exited"  # its leader is gone; the group may not be
    # verdicts, once the group is empty or the spawn failed
    ENDED = "ended"  # it is to stay down
    RETRY = "retry"  # it is to come back after a delay
    GAVE_UP = "gave_up"  # it keeps failing, or cannot work


class Action(enum.StrEnum):
    SPAWN = "spawn"
    TERM = "term"  # SIGTERM to the leader; the deadline of `stopping` starts
    KILL = "kill"  # SIGKILL to the whole group; the deadline for it to be empty starts
    TELL_DRAIN = "tell_drain"
    TELL_SLEEP = "tell_sleep"
    TELL_WAKE = "tell_wake"
    FREEZE = "freeze"
    THAW = "thaw"
    LOSE_REQUESTS = "lose_requests"  # what ran here is run elsewhere, or failed
    RELEASE = "release"  # the ledger's reservation is given back
    SCHEDULE_RESTART = "schedule_restart"
    DISPATCH = "dispatch"  # there may be a slot for a waiting request


S, T, A = State, Trigger, Action
_DOWN: Final = (A.LOSE_REQUESTS, A.RELEASE)
_AGAIN: Final = (A.LOSE_REQUESTS, A.RELEASE, A.SCHEDULE_RESTART)

TABLE: Final[dict[State, dict[Trigger, tuple[State, tuple[Action, ...]]]]] = {
    S.STOPPED: {
        T.START: (S.STARTING, (A.SPAWN,)),
        T.AWAIT: (S.WAITING, ()),
        T.ADOPT: (S.ADOPTED, ()),
        T.RESET: (S.STOPPED, ()),
    },
    S.WAITING: {
        T.START: (S.STARTING, (A.SPAWN,)),
        T.AWAIT: (S.WAITING, ()),
        T.STOP: (S.STOPPED, ()),
        T.DRAIN: (S.STOPPED, ()),
        T.RESET: (S.STOPPED, ()),
    },
    S.STARTING: {
        T.HELLO: (S.LOADING, ()),
        T.LOADED: (S.READY, (A.DISPATCH,)),
        T.STOP: (S.STOPPING, (A.TERM,)),
        T.DRAIN: (S.STOPPING, (A.TERM,)),
        T.TIMEOUT: (S.STOPPING, (A.KILL,)),
        T.EXITED: (S.STOPPING, (A.KILL,)),
        T.ENDED: (S.STOPPED, _DOWN),
        T.RETRY: (S.BACKOFF, _AGAIN),
        T.GAVE_UP: (S.FAILED, _DOWN),
    },
    S.LOADING: {
        T.HELLO: (S.LOADING, ()),
        T.LOADED: (S.READY, (A.DISPATCH,)),
        T.STOP: (S.STOPPING, (A.TERM,)),
        T.DRAIN: (S.STOPPING, (A.TERM,)),
        T.TIMEOUT: (S.STOPPING, (A.TERM,)),
        T.EXITED: (S.STOPPING, (A.KILL,)),
    },
    S.READY: {
        T.HELLO: (S.READY, ()),
        T.STOP: (S.STOPPING, (A.TERM,)),
        T.DRAIN: (S.DRAINING, (A.TELL_DRAIN,)),
        T.FREEZE: (S.FROZEN, (A.FREEZE,)),
        T.SLEEP: (S.ASLEEP, (A.TELL_SLEEP,)),
        T.HUNG: (S.STOPPING, (A.KILL,)),
        T.EXITED: (S.STOPPING, (A.KILL,)),
    },
    S.DRAINING: {
        T.HELLO: (S.DRAINING, (A.TELL_DRAIN,)),
        T.DRAIN: (S.DRAINING, ()),
        T.DRAINED: (S.STOPPING, (A.TERM,)),
        T.STOP: (S.STOPPING, (A.TERM,)),
        T.TIMEOUT: (S.STOPPING, (A.TERM,)),
        T.HUNG: (S.STOPPING, (A.KILL,)),
        T.EXITED: (S.STOPPING, (A.KILL,)),
    },
    S.ASLEEP: {
        T.HELLO: (S.ASLEEP, ()),
        T.SLEPT: (S.ASLEEP, ()),
        T.WAKE: (S.WAKING, (A.TELL_WAKE,)),
        T.STOP: (S.STOPPING, (A.TERM,)),
        T.DRAIN: (S.STOPPING, (A.TERM,)),
        T.EXITED: (S.STOPPING, (A.KILL,)),
    },
    S.WAKING: {
        T.HELLO: (S.WAKING, (A.TELL_WAKE,)),
        T.LOADED: (S.READY, (A.DISPATCH,)),
        T.STOP: (S.STOPPING, (A.TERM,)),
        T.DRAIN: (S.STOPPING, (A.TERM,)),
        T.TIMEOUT: (S.STOPPING, (A.TERM,)),
        T.EXITED: (S.STOPPING, (A.KILL,)),
    },
    S.FROZEN: {
        T.HELLO: (S.FROZEN, ()),
        T.THAW: (S.READY, (A.THAW, A.DISPATCH)),
        T.STOP: (S.STOPPING, (A.THAW, A.TERM)),
        T.DRAIN: (S.DRAINING, (A.THAW, A.TELL_DRAIN)),
        T.EXITED: (S.STOPPING, (A.KILL,)),
    },
    S.STOPPING: {
        T.STOP: (S.STOPPING, ()),
        T.DRAIN: (S.STOPPING, ()),
        T.TIMEOUT: (S.STOPPING, (A.KILL,)),
        T.EXITED: (S.STOPPING, (A.KILL,)),
        T.ENDED: (S.STOPPED, _DOWN),
        T.RETRY: (S.BACKOFF, _AGAIN),
        T.GAVE_UP: (S.FAILED, _DOWN),
        T.HUNG: (S.UNKILLABLE, (A.LOSE_REQUESTS,)),
    },
    S.BACKOFF: {
        T.START: (S.STARTING, (A.SPAWN,)),
        T.AWAIT: (S.WAITING, ()),
        T.STOP: (S.STOPPED, ()),
        T.DRAIN: (S.STOPPED, ()),
        T.RESET: (S.STOPPED, ()),
    },
    S.FAILED: {
        T.START: (S.STARTING, (A.SPAWN,)),
        T.AWAIT: (S.WAITING, ()),
        T.STOP: (S.STOPPED, ()),
        T.DRAIN: (S.STOPPED, ()),
        T.RESET: (S.STOPPED, ()),
    },
    S.ADOPTED: {
        T.HELLO: (S.LOADING, ()),
        T.LOADED: (S.READY, (A.DISPATCH,)),
        T.FREEZE: (S.FROZEN, (A.FREEZE,)),
        T.STOP: (S.STOPPING, (A.TERM,)),
        T.DRAIN: (S.DRAINING, (A.TELL_DRAIN,)),
        T.TIMEOUT: (S.STOPPING, (A.KILL,)),
        T.EXITED: (S.STOPPING, (A.KILL,)),
    },
    S.UNKILLABLE: {
        T.STOP: (S.UNKILLABLE, ()),
        T.DRAIN: (S.UNKILLABLE, ()),
        T.EXITED: (S.UNKILLABLE, ()),
        T.TIMEOUT: (S.UNKILLABLE, (A.KILL,)),
        T.ENDED: (S.STOPPED, _DOWN),
        T.RETRY: (S.BACKOFF, _AGAIN),
        T.GAVE_UP: (S.FAILED, _DOWN),
    },
}

#: States in which a process exists, and the ledger's reservation with it.
ALIVE: Final = frozenset(State) - {S.STOPPED, S.WAITING, S.BACKOFF, S.FAILED}
#: States from which a worker will be ready without anybody's help.
COMING: Final = frozenset({S.WAITING, S.STARTING, S.LOADING, S.WAKING, S.BACKOFF, S.ADOPTED})


def step(state: State, trigger: Trigger) -> tuple[State, tuple[Action, ...]] | None:
    """What `trigger` means in `state`: the next state and what to do, or None where it means nothing."""
    return TABLE[state].get(trigger)
