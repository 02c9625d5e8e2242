"""The `rlbridge` command. Each command lies in a file of its own, imported only when it is the one that was asked for."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from cyclopts import App, CycloptsError
from rich.console import Console
from rich.text import Text

from rlbridge import __version__
from rlbridge.errors import RlbridgeError

_INTERRUPTED = 130  # what a shell reports for a process that SIGINT ended
_USAGE = 2

app = App(
    name="rlbridge",
    version=__version__,
    help="RL post-training with a trainer, a generator and a transport that are each named by one line of config.",
    # An interrupt and a wrong command line get their exit codes below.
    suppress_keyboard_interrupt=False,
    exit_on_error=False,
    result_action="return_value",
)
app.command("rlbridge.cli.run_command:run", name="run", help="Run a config file to its end.")
app.command("rlbridge.cli.config_command:app", name="config", help="Show, check or describe config files.")
app.command("rlbridge.cli.conform_command:conform", name="conform", help="Hold backends to their contracts.")
app.command("rlbridge.cli.doctor_command:doctor", name="doctor", help="Say why RDMA would or would not be used here.")
app.command("rlbridge.cli.env_command:app", name="env", help="Build and list the environments that roles can run in.")
app.command("rlbridge.cli.plugins_command:plugins", name="plugins", help="List the backends that are installed.")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line (`sys.argv` where none is given) and return its exit code.

    An error of ours is printed without a traceback: it says what to do. Anything else is a bug, and keeps its traceback.
    """
    try:
        code = app(sys.argv[1:] if arguments is None else list(arguments))
    except CycloptsError:  # printed by cyclopts
        return _USAGE
    except RlbridgeError as error:
        Console(stderr=True).print(Text.assemble(("error:", "bold red"), f" {error}"), soft_wrap=True)
        return error.exit_code
    except KeyboardInterrupt:
        Console(stderr=True).print("interrupted")
        return _INTERRUPTED
    return code if isinstance(code, int) else 0
