"""A process that dies with its parent: the kernel sees to it, also after SIGKILL."""

import ctypes
import os
import signal
import sys

from schemas.environment import parent

PR_SET_PDEATHSIG = 1


def die_with_parent(how: signal.Signals = signal.SIGKILL) -> bool:
    """Ask the kernel to send this process a signal when its parent dies. Outlasts exec; children ask for themselves.

    False where the parent that waits for this one (ALIGNFLOW_PARENT) has died before: of that the kernel tells nobody.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, how)
    return parent() in (None, os.getppid())
