"""Exceptions a user can meet. Each is also the standard-library type it specialises, and survives pickling.

Messages say what was found, where, and what to do. `run_cli` turns them into one line and a non-zero exit; anything that is
neither a `GPRError` nor a full disk is our own mistake and keeps its traceback.
"""

import errno
import os
import sys
import time
from collections.abc import Callable

from gpr_dist.safety import redact, redact_tracebacks

OTHER_RANKS_WAIT_S = 3.0
DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class GPRError(Exception):
    """Base of every error caused by input, environment or configuration rather than by a bug."""


class ConfigError(GPRError, ValueError):
    """A configuration value is unknown, of the wrong type, or contradicts another one."""


class DataError(GPRError, ValueError):
    """Raw logs, a catalogue or shards are missing, damaged or not what they claim to be."""


class TokenizerError(GPRError, ValueError):
    """A tokenizer bundle cannot be fitted, is damaged, or does not belong to this model or catalogue."""


class CheckpointError(GPRError, RuntimeError):
    """A checkpoint is damaged, incomplete, or belongs to another model, tokenizer or data set."""


class TrainingError(GPRError, RuntimeError):
    """Training cannot go on: a loss or gradient is not finite, or ranks disagree."""


def run_cli(main: Callable[[], int | None]) -> None:
    """Run a script's `main`; a `GPRError` or a full disk becomes one line on stderr and exit code 2, Ctrl-C exit code 130.

    Bad input usually stops all ranks with the same message. Ranks other than 0 wait before they speak: by then the launcher has ended
    them, unless the problem is theirs alone. No message shows a credential.
    """
    redact_tracebacks()
    try:
        code = main() or 0
    except GPRError as error:
        if os.environ.get("RANK", "0") != "0":
            time.sleep(OTHER_RANKS_WAIT_S)
        print(f"{type(error).__name__}: {redact(' '.join(str(error).split()))}", file=sys.stderr, flush=True)
        code = 2
    except OSError as error:
        if error.errno not in DISK_FULL:
            raise
        where = f" while writing {redact(str(error.filename))}" if error.filename else ""
        print(f"OSError: {error.strerror}{where}; make room and start again", file=sys.stderr, flush=True)
        code = 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr, flush=True)
        code = 130
    sys.exit(code)
