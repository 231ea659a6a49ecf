"""What a model file may say. Declared once: validation, `llmos limits`, docs and JSON schema come from here.

Frozen data. Reading a file into it is `llmosd.modelfile`'s work.
"""

from __future__ import annotations

from typing import Annotated, Final, Literal

import msgspec
from msgspec import Meta

from llmosd.kernel.units import Bytes, CpuSet, Percent, Seconds

Name = Annotated[
    str, Meta(pattern=r"^[a-z0-9][a-z0-9._-]{0,62}$", description="lower case letters, digits, '.', '_', '-'")
]
Count = Annotated[int, Meta(ge=0, le=1_000_000)]


def doc(text: str) -> Meta:
    """A key's meaning, as the generated documentation prints it."""
    return Meta(description=text)


class Declared(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A table of a model file: unknown keys are refused."""


class Engine(Declared, frozen=True, kw_only=True, tag_field="driver"):
    """What to run. Each driver has its own keys besides these."""

    args: Annotated[tuple[str, ...], doc("passed on to the engine as they are")] = ()
    env: Annotated[dict[str, str], doc("environment of the engine, besides PATH, HOME, LANG and the like")] = {}

    @property
    def driver(self) -> str:
        return str(self.__struct_config__.tag)

    @property
    def hosted(self) -> bool:
        """Whether a worker host stands between daemon and engine, so that requests are routed to it."""
        return True


class LlamaCpp(Engine, frozen=True, kw_only=True, tag="llamacpp"):
    """llama.cpp's HTTP server: the one in the `xllamacpp` wheel, or a `llama-server` on PATH."""

    weights: Annotated[str, doc("a GGUF file: absolute, or under the model store or beside this file")]
    context: Annotated[int, Meta(ge=8, description="tokens of context each request may use")] = 2048
    threads: Annotated[Count, doc("threads that compute; 0: as many as CPUs are granted when it starts")] = 0
    gpu_layers: Annotated[int, Meta(ge=-1, description="layers on the GPU; -1: as many as fit")] = 0
    embeddings: Annotated[bool, doc("serve /v1/embeddings instead of completions")] = False
    chat_template: Annotated[str, doc("a Jinja chat template, for weights that bring none")] = ""
    server: Annotated[
        Literal["auto", "wheel", "path"],
        doc("wheel: the xllamacpp wheel; path: llama-server; auto: the first there is"),
    ] = "auto"


class OpenAI(Engine, frozen=True, kw_only=True, tag="openai"):
    """Any command that serves OpenAI's HTTP API: vLLM, SGLang, TGI, one's own."""

    command: Annotated[tuple[str, ...], Meta(min_length=1, description="argv; {port} and {model} are filled in")]
    ready_path: Annotated[str, doc("GET on it answers 200 once the engine is ready")] = "/health"
    served_name: Annotated[str, doc("the engine's own name for the model, where it differs")] = ""
    api_key_file: Annotated[str, doc("a file with the API key that the engine wants")] = ""
    headers: Annotated[dict[str, str], doc("sent with every request")] = {}


class Attached(Engine, frozen=True, kw_only=True, tag="attached"):
    """An engine that somebody else runs: routed to, not supervised."""

    url: Annotated[str, Meta(pattern=r"^https?://", description="where the engine's HTTP API is, without /v1")]
    ready_path: Annotated[str, doc("GET on it answers 200 while the engine is ready")] = "/health"
    served_name: Annotated[str, doc("the engine's own name for the model, where it differs")] = ""
    api_key_file: Annotated[str, doc("a file with the API key that the engine wants")] = ""
    headers: Annotated[dict[str, str], doc("sent with every request")] = {}


class PythonFunction(Engine, frozen=True, kw_only=True, tag="python"):
    """An async generator of one's own, run inside the worker host."""

    function: Annotated[
        str, Meta(pattern=r"^[^:]+:[A-Za-z_]\w*$", description="package.module:name or /path/file.py:name")
    ]


class Command(Engine, frozen=True, kw_only=True, tag="command"):
    """A plain command: supervised, limited and logged, not routed to."""

    command: Annotated[tuple[str, ...], Meta(min_length=1, description="argv")]

    @property
    def hosted(self) -> bool:
        return False


class Simulated(Engine, frozen=True, kw_only=True, tag="simulated"):
    """An engine that only takes time, at declared rates. For tests, benchmarks and trying policies out."""

    load_time: Annotated[Seconds, doc("from start to ready")] = Seconds(0.1)
    prefill_rate: Annotated[float, Meta(gt=0, description="prompt tokens a second")] = 10_000.0
    decode_rate: Annotated[float, Meta(gt=0, description="generated tokens a second, a request")] = 100.0


AnyEngine = LlamaCpp | OpenAI | Attached | PythonFunction | Command | Simulated


class Resources(Declared, frozen=True, kw_only=True):
    """What the ledger reserves, whole or not at all, before the worker is started."""

    cpus: Annotated[float, Meta(ge=0, le=8192, description="CPUs")] = 0.0
    cpu_placement: Annotated[
        Literal["shared", "exclusive"],
        doc(
            "exclusive: whole CPUs of its own, on which no other worker runs; `cpus` must then be a whole number of at "
            "least 1, and one CPU always stays shared"
        ),
    ] = "shared"
    memory: Annotated[Bytes, doc("RAM")] = Bytes(0)
    gpus: Annotated[Count, doc("GPUs that gpu_memory is spread over")] = 1
    gpu_memory: Annotated[Bytes, doc("GPU memory in all; the granted GPUs are in CUDA_VISIBLE_DEVICES")] = Bytes(0)


Weight = Annotated[int, Meta(ge=1, le=10_000)]
Nice = Annotated[int, Meta(ge=-20, le=19)]
OomScore = Annotated[int, Meta(ge=-1000, le=1000)]
Tasks = Annotated[int, Meta(ge=1, le=4_194_304)]
Files = Annotated[int, Meta(ge=16, le=1 << 30)]


class Limits(Declared, frozen=True, kw_only=True):
    """What is enforced on a worker. Names and meaning are systemd's, in snake case; the last block is llmosd's own."""

    allowed_cpus: Annotated[CpuSet | None, doc("CPUs it may run on; exclusive ones are taken from these")] = None
    cpu_weight: Annotated[Weight | None, doc("share of CPU time against others; 100 is normal")] = None
    cpu_quota: Annotated[Percent | None, doc("most CPU time, in percent of one CPU")] = None
    memory_high: Annotated[Bytes | None, doc("above it, memory is reclaimed and the worker slowed")] = None
    memory_max: Annotated[Bytes | None, doc("above it, the worker is killed")] = None
    swap_max: Annotated[Bytes | None, doc("most swap")] = None
    tasks_max: Annotated[Tasks | None, doc("most processes and threads")] = None
    io_weight: Annotated[Weight | None, doc("share of disk time against others; 100 is normal")] = None
    nice: Annotated[Nice | None, doc("nice value")] = None
    oom_score_adj: Annotated[
        OomScore | None, doc("who the OOM killer takes first; an engine's is 500 above its host's")
    ] = None
    open_files: Annotated[Files | None, doc("most open files")] = None

    gpu_memory_max: Annotated[Bytes | None, doc("most GPU memory")] = None
    slots: Annotated[int, Meta(ge=1, le=4096, description="requests a worker runs at once")] = 4
    queue_max: Annotated[Count, doc("requests that may wait for the model")] = 1024
    max_tokens: Annotated[Count, doc("most tokens a request may generate; 0: no bound")] = 0
    request_timeout: Annotated[Seconds, doc("time a request may take, waiting included; 0: no bound")] = Seconds(600)


class Scale(Declared, frozen=True, kw_only=True):
    """How many workers there are."""

    min: Annotated[Count, doc("workers kept, used or not")] = 0
    max: Annotated[int, Meta(ge=1, le=4096, description="workers started at most, on demand")] = 1
    idle_timeout: Annotated[Seconds, doc("a worker above min that was idle this long is stopped; 0: never")] = Seconds(
        600
    )


class Restart(Declared, frozen=True, kw_only=True):
    """When a worker that ended is started again. Policies are systemd's `Restart=`."""

    policy: Annotated[
        Literal["no", "on-success", "on-failure", "on-abnormal", "always"], doc("systemd's words and meaning")
    ] = "on-failure"
    delay: Annotated[Seconds, doc("before the first restart; doubles with each one that follows")] = Seconds(0.2)
    delay_max: Annotated[Seconds, doc("the back-off grows no further")] = Seconds(60)
    reset_after: Annotated[Seconds, doc("a worker that ran this long starts with the first delay again")] = Seconds(30)
    burst: Annotated[Count, doc("starts within `interval` after which it has failed; 0: no bound")] = 10
    interval: Annotated[Seconds, doc("window of `burst`")] = Seconds(300)
    prevent_exit_codes: Annotated[
        tuple[Annotated[int, Meta(ge=0, le=255)], ...], doc("exit codes after which trying again cannot help")
    ] = ()


class Timeouts(Declared, frozen=True, kw_only=True):
    """How long each step of a worker's life may take."""

    start: Annotated[Seconds, doc("from its process's first moment until the host says HELLO")] = Seconds(30)
    load: Annotated[Seconds, doc("without progress while the engine loads")] = Seconds(600)
    drain: Annotated[Seconds, doc("for requests that run when the worker is stopped")] = Seconds(30)
    stop: Annotated[Seconds, doc("from SIGTERM to SIGKILL")] = Seconds(10)
    silence: Annotated[Seconds, doc("without a sign of life while requests run; then it counts as hung")] = Seconds(30)


class Isolation(Declared, frozen=True, kw_only=True):
    """What keeps a worker from the rest of this machine, its host and its engine alike. Names and meaning are
    systemd's, in snake case. What this machine cannot do is refused. Without `user`, a worker of root's daemon is root:
    it loses the capabilities that could undo all this, and may still write whatever is not read-only."""

    user: Annotated[str, doc("run as this user, with that user's groups; needs a daemon run by root")] = ""
    private_tmp: Annotated[
        bool, doc("a /tmp and a /var/tmp of its own, in RAM, empty but for what the worker is made of")
    ] = False
    read_only_paths: Annotated[
        tuple[Annotated[str, Meta(pattern=r"^/", description="an absolute path")], ...],
        doc("cannot be written to, nor what is below; /proc, /dev, logs, the worker's own directories stay writable"),
    ] = ()
    no_new_privileges: Annotated[bool, doc("programs it runs gain nothing by setuid bits or file capabilities")] = False
    private_network: Annotated[bool, doc("no network but a loopback of its own; the bus is none")] = False
    device_policy: Annotated[
        Literal["auto", "closed"],
        doc("closed: no device but null, zero, full, random, urandom, tty, its own terminals, and the GPUs granted"),
    ] = "auto"


class Ready(Declared, frozen=True, kw_only=True):
    """When a `command` is ready: `log` first, then `http`; without either, as soon as its process runs. Meanwhile it is
    `loading`, for at most `timeouts.load` without printing anything. The other drivers know it by themselves."""

    http: Annotated[str, doc("URL on this machine; GET on it answers 2xx")] = ""
    log: Annotated[
        str,
        doc(
            "regular expression; it is found in a line it prints, in the first 4096 bytes of it, unless it prints more "
            "than half of logs.max_size a second"
        ),
    ] = ""


class Liveness(Declared, frozen=True, kw_only=True):
    """Whether a worker that is ready still answers. One that does not counts as hung, is killed, and restarted as
    [restart] says; an `attached` engine is only taken for gone. Engines of `llamacpp`, `openai` and `attached` are
    asked on their ready_path, and only when nothing was heard from them for an interval: tokens are a sign of life.
    From the last one it takes `interval` * `failures` + `timeout` to tell that one hangs: an engine that answers
    nothing while it reads a long prompt wants more than that prompt takes. A worker that was frozen gets all of it
    again."""

    http: Annotated[str, doc("for a `command`: URL on this machine; GET on it answers 2xx")] = ""
    interval: Annotated[Seconds, doc("from one question to the next; 0: it is not asked")] = Seconds(10)
    timeout: Annotated[Seconds, doc("for an answer")] = Seconds(5)
    failures: Annotated[int, Meta(ge=1, le=1000, description="in a row, after which it counts as hung")] = 3


class ModelSpec(Declared, frozen=True, kw_only=True):
    """A model, or a service: a file of models.d."""

    model: Annotated[Name, doc("the name; the file's own by convention")]
    engine: AnyEngine
    aliases: Annotated[tuple[Name, ...], doc("further names that requests may use")] = ()
    kind: Annotated[Literal["model", "service"], doc("a service is supervised and takes no requests")] = "model"
    requires: Annotated[
        tuple[Name, ...],
        doc("models or services that must be ready before a worker of this one is started; stopped after it"),
    ] = ()
    resources: Resources = Resources()
    limits: Limits = Limits()
    scale: Scale = Scale()
    restart: Restart = Restart()
    timeouts: Timeouts = Timeouts()
    isolation: Isolation = Isolation()
    ready: Ready = Ready()
    liveness: Liveness = Liveness()

    @property
    def says_ready(self) -> bool:
        """Whether its host, or the answer to a question, says when it is ready. Else it is when its process runs."""
        return self.engine.hosted or self.ready != Ready()

    @property
    def routed(self) -> bool:
        """Whether requests may name it."""
        return self.kind == "model" and self.engine.hosted


#: With this exit code a worker host says that trying again cannot help (EX_CONFIG of sysexits.h).
EXIT_CANNOT_WORK: Final = 78
#: Limits that only llmosd's own kernel looks at: they apply at once and touch no process.
KERNEL_LIMITS: Final = frozenset({"slots", "queue_max", "max_tokens", "request_timeout"})
