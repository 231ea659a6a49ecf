"""The gateway's process: its configuration comes through a descriptor, like a worker host's."""

import logging
import os
import sys

import msgspec
import uvloop

from llmosd.gateway.config import GatewayConfig
from llmosd.gateway.server import Gateway
from llmosd.launch.gate import FIRST_GRANT


def main() -> int:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)-7s %(message)s")
    with os.fdopen(FIRST_GRANT, "rb") as file:
        config = msgspec.msgpack.decode(file.read(), type=GatewayConfig)

    async def serve() -> None:
        await Gateway(config).run()

    try:
        uvloop.run(serve())
    except (OSError, ValueError) as error:
        logging.getLogger("llmosd.gateway").error("%s", error)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
