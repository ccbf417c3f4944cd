"""`python -m tests.support.echo_server serve ...`: the real command, whose engine process is tests.support.echo_engine."""

from __future__ import annotations

import sys

from service.cli import main
from service.engine_process import EngineProcess

if __name__ == "__main__":
    EngineProcess.module = "tests.support.echo_engine"
    sys.exit(main())
