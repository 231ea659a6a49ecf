"""llama.cpp's HTTP server from the `xllamacpp` wheel, as a program: ``llamacpp_server.py SETTINGS-AS-JSON``.

Run by the llamacpp driver in a process of its own, so that it can be limited, killed and restarted like any engine.
`args` are ``name=value``, each an attribute of llama.cpp's common_params: ``swa_full=true``, ``n_batch=512``.
"""

import json
import signal
import sys
from typing import Any


def main() -> None:
    settings = json.loads(sys.argv[1])
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = settings["weights"]
    params.model_alias = {settings["alias"]}
    params.hostnames = [settings["socket"]]
    params.n_parallel = settings["slots"]
    # llama.cpp divides its context among the slots; the model file speaks of one request's.
    params.n_ctx = settings["context"] * settings["slots"]
    params.cpuparams.n_threads = settings["threads"]
    params.cpuparams_batch.n_threads = settings["threads"]
    params.n_gpu_layers = settings["gpu_layers"]
    params.n_threads_http = settings["slots"] + 4
    params.ui = False
    if settings["embeddings"]:
        params.embedding = True
        params.pooling_type = xllamacpp.llama_pooling_type.LLAMA_POOLING_TYPE_MEAN
    if settings["chat_template"]:
        params.chat_template = settings["chat_template"]
    for arg in settings["args"]:
        set_parameter(params, arg)
    server = xllamacpp.Server(params)
    print(f"llama.cpp listens on {server.listening_address}", flush=True)
    # The server has its own threads. SIGTERM keeps its default action: whoever sends it has drained, or does not care.
    while True:
        signal.pause()


def set_parameter(params: Any, arg: str) -> None:
    name, equals, text = arg.partition("=")
    if not equals or name.startswith("_") or not hasattr(params, name):
        sys.exit(f"engine.args: {arg!r} is not name=value with a parameter of llama.cpp's common_params")
    try:
        value = json.loads(text)
    except ValueError:
        value = text
    try:
        setattr(params, name, value)
    except (TypeError, ValueError) as error:
        sys.exit(f"engine.args: {arg!r}: {error}")


if __name__ == "__main__":
    main()
