"""Work spread over processes, whose results come in the order of the jobs.

    for result in spread(function, jobs, workers=2): ...

Not here: evaluation (envs.Evaluator).
"""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import islice
from typing import Any


def spread(function: Callable, jobs: Iterable, workers: int) -> Iterator[Any]:
    """Yield function(job) in the order of the jobs, made here or in so many processes.

    Raises RuntimeError if a process dies.
    """
    if workers <= 1:
        yield from map(function, jobs)
        return
    jobs = iter(jobs)
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, spawn, initializer=start_worker) as pool:
        try:
            pending = [pool.submit(function, job) for job in islice(jobs, 2 * workers)]
            while pending:
                yield pending.pop(0).result()
                pending += [pool.submit(function, job) for job in islice(jobs, 1)]
        except BrokenProcessPool as error:
            raise RuntimeError(
                "a process that made demonstrations died: out of memory? Try --workers 1"
            ) from error
        finally:
            pool.shutdown(cancel_futures=True)


def start_worker() -> None:
    """Leave Ctrl-C to the parent, and end when it ends, however that happens."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=end_with_parent, daemon=True).start()


def end_with_parent() -> None:
    multiprocessing.parent_process().join()
    os._exit(1)
