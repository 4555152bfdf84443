"""Keeps a benchmark of small operations on one core of the CPU."""

import os


def keep_to_one_core() -> bool:
    """Keeps this process, its peers in it included, on one core; call it before JAX starts its threads.

    XLA hands small operations from thread to thread: with two, a call of 80 of them takes two to three times
    as long, more when the other core is busy, and there is nothing in it to run at once.

    Returns:
      Whether it does; not every system can.
    """
    if not hasattr(os, "sched_setaffinity"):
        return False
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    return True
