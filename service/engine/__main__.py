"""`python -m service.engine FD`: the engine process. FD is its end of a socket pair; see `service.engine.messages`.

It ends with the socket, with Shutdown, or with exit code EX_CONFIG for a config that cannot work here.
"""

from __future__ import annotations

import faulthandler
import logging
import os
import signal
import socket
import sys
from contextlib import closing

# Before torch is imported, which reads both
os.environ["TORCH_DEVICE_BACKEND_AUTOLOAD"] = "0"  # a broken torch_npu would fail the import
# Threads of the processor do not spin while they wait: beside a training run they would wait for each other's turns
# (2 cores, SmolLM2-135M, 6 busy processes: a decode step of 4 rows took 5.2 s, and 0.1 s so)
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

from lm.errors import UserError
from service.engine.channel import Channel
from service.engine.core import Engine
from service.engine.messages import EngineConfig, Shutdown
from service.engine.setup import build_engine

logger = logging.getLogger("engine")


def main() -> int:
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s", stream=sys.stderr)
    faulthandler.enable()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent says when to end
    with closing(Channel(socket.socket(fileno=int(sys.argv[1])))) as channel:
        return _run(channel)


def _run(channel: Channel) -> int:
    """Returns the exit code."""
    config = _first_command(channel)
    if config is None:
        return 0
    try:
        engine = build_engine(config, wake=channel.ring)
    except UserError as error:
        logger.error("the engine cannot start: %s", error)
        return os.EX_CONFIG
    channel.send([engine.ready])
    serve(engine, channel)
    return 0


def serve(engine: Engine, channel: Channel) -> None:
    """Until Shutdown or the end of the socket. Sleeps on the socket while there is nothing to compute."""
    is_open = True
    while is_open:
        commands = channel.receive(wait=not engine.has_work)
        if commands is None:
            return
        for command in commands:
            if isinstance(command, Shutdown):
                engine.abort_all()
                channel.send(engine.take_events())
                return
            assert not isinstance(command, EngineConfig)  # that one came first, and once
            engine.handle(command)
        engine.step()
        is_open = channel.send(engine.take_events())


def _first_command(channel: Channel) -> EngineConfig | None:
    """None when the other side went before it said anything, or has asked for the end already."""
    while (commands := channel.receive(wait=True)) is not None:
        if commands:
            config, *rest = commands  # the client sends nothing but Shutdown before EngineReady
            assert isinstance(config, EngineConfig)
            return None if rest else config
    return None


if __name__ == "__main__":
    code = main()
    sys.stderr.flush()
    os._exit(code)  # taking torch down takes a second, and there is nothing to save
