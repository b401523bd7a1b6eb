"""A run's folder and its command line: the only plumbing that all scripts share.

    from logbook import Logbook, UserError, cli, curve, load_checkpoint
    from logbook.options import Count, Positive, parse

book.py         Logbook: create, resume, rewind, log, evaluation, save
arguments.py    args.json                       options.py      dataclass -> command line, limits
tables.py       progress.csv and eval.csv       events.py       TensorBoard
checkpoints.py  atomic, verified files          optimizers.py   Adam's state, checked
console.py      Interrupt, Clock, Progress      report.py       the rows of progress.csv
devices.py      device, torch's random numbers  errors.py       UserError, cli
series.py       success of runs and seeds       figure.py       curve.png, comparisons, the grid
intervals.py    Wilson's interval

`python -m logbook RUN` redraws its curve.png. Imports no project file.
Not here: seeding and generators (each script owns its own), what is worth logging.
"""

from .arguments import read_args
from .book import Logbook
from .checkpoints import (
    VERSION,
    load_checkpoint,
    load_tensors,
    refuse_nonfinite,
    replacing,
    save_checkpoint,
)
from .console import Clock, Interrupt, Progress, outlive_console
from .devices import noise_state, restore_noise, usable_device
from .errors import UserError, check_end, cli, must_fit, reason, user_errors
from .figure import curve
from .intervals import wilson
from .optimizers import keep_rate
from .report import Report
from .series import read_run

__all__ = [
    "VERSION",
    "Clock",
    "Interrupt",
    "Logbook",
    "Progress",
    "Report",
    "UserError",
    "check_end",
    "cli",
    "curve",
    "keep_rate",
    "load_checkpoint",
    "load_tensors",
    "must_fit",
    "noise_state",
    "outlive_console",
    "read_args",
    "read_run",
    "reason",
    "refuse_nonfinite",
    "replacing",
    "restore_noise",
    "save_checkpoint",
    "usable_device",
    "user_errors",
    "wilson",
]
