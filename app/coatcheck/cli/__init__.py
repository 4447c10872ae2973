"""The command line: `coatcheck`.

Callers' commands need the `cli` extra only; operators' commands load the service when they run.
"""

import gc
import sys
import time
from typing import Final

#: When this command began, in seconds since the epoch: what happens later was not known to
#: whoever ran it.
STARTED_AT: Final = time.time()

#: How often Python looks for garbage, before a command makes it rarer.
GC_THRESHOLD: Final = gc.get_threshold()


def main() -> None:
    """Run the command line, or say what to install for it."""
    # What is imported stays.  To look for garbage in it again and again is a tenth of a start.
    gc.set_threshold(100 * GC_THRESHOLD[0], *GC_THRESHOLD[1:])
    try:
        from coatcheck.cli.commands import app  # typer is in an extra
    except ModuleNotFoundError as error:
        if error.name not in ("typer", "click"):
            raise
        sys.exit("coatcheck: the command line is an extra: pip install 'coatcheck[cli]'")
    app()
