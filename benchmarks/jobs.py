"""The runs of a comparison: which script makes them, which are finished, two of them at a time.

    from benchmarks.jobs import Job, finished, run_all
    run_all([Job("lift", "poco --clip inf", seed=0)], flags=["--preset", "cpu"], parallel=2)

A run is a process of its own, so an interrupted comparison loses nothing: every process saves, and
the next call continues it. What a run prints goes to runs/<its folder>.log.
Not here: the command line (compare.py), whether runs may be compared (fairness.py).
"""

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

from logbook import Interrupt, UserError, read_args, read_run

ROOT = Path(__file__).resolve().parent.parent


class Method(NamedTuple):
    module: str  # the script
    flags: tuple[str, ...]  # what makes the script run this method
    delivers: str  # the way of acting that the method is judged by


METHODS = {
    "poco": Method("train_online", (), "policy"),
    "poco-posterior": Method("train_online", ("--act", "posterior"), "posterior"),
    "qc": Method("baselines.qc", (), "best"),
    "qc-fql": Method("baselines.fql", ("--variant", "qc-fql"), "policy"),
    "fql": Method("baselines.fql", ("--variant", "fql"), "policy"),
    "rlpd-ac": Method("baselines.rlpd", ("--variant", "rlpd-ac"), "policy"),
    "rlpd": Method("baselines.rlpd", ("--variant", "rlpd"), "policy"),
    "dsrl-na": Method("baselines.dsrl", ("--variant", "dsrl-na"), "policy"),
    "dsrl-sac": Method("baselines.dsrl", ("--variant", "dsrl-sac"), "policy"),
    "dppo": Method("baselines.dppo", (), "policy"),
    "reinflow": Method("baselines.reinflow", (), "policy"),
    "ogpo": Method("baselines.ogpo", ("--variant", "ogpo"), "policy"),
    "ogpo-plus": Method("baselines.ogpo", ("--variant", "ogpo-plus"), "policy"),
    "ogpo-ca": Method("baselines.ogpo", ("--variant", "ogpo-ca"), "policy"),
}


class Job(NamedTuple):
    """One run of a comparison. `method` may carry flags of its own: "poco --clip inf"."""

    task: str
    method: str
    seed: int

    @property
    def kind(self) -> Method:
        return METHODS[self.method.split()[0]]

    @property
    def own_flags(self) -> list[str]:
        return self.method.split()[1:]

    @property
    def folder(self) -> Path:
        """The run's folder; flags are part of its name: runs/lift-poco_clip_inf-s0."""
        name = "_".join(self.method.replace("--", "").split())
        return Path("runs") / f"{self.task}-{name}-s{self.seed}"

    @property
    def begun(self) -> bool:
        return (self.folder / "last.pt").exists()


def finished(folder: Path) -> bool:
    """Say whether every way of acting has its last evaluation; the curve is drawn after that."""
    if not (folder / "eval.csv").exists() or not (folder / "curve.png").exists():
        return False
    last = read_args(folder)["online_steps"]
    evaluations = read_run(folder)[1].values()
    learnt = [steps for steps in evaluations if max(steps) > 0]  # step 0 is of one way alone
    return bool(learnt) and all(last in steps for steps in learnt)


def command(job: Job, flags: list[str]) -> list[str]:
    """Return the arguments of the job's script; flags are those of all runs."""
    if job.begun:
        return ["--resume", str(job.folder)]
    argv = ["--task", job.task, "--seed", str(job.seed)]
    argv += [*job.kind.flags, *job.own_flags, *flags]
    # What is in the folder was interrupted before it first saved.
    return [*argv, "--run-dir", str(job.folder), "--overwrite"]


def run_all(jobs: list[Job], flags: list[str], parallel: int) -> bool:
    """Run the jobs that are not finished, `parallel` at a time.

    Returns False if the user interrupted: then the runs have saved. Raises UserError where a run
    failed, after the others have ended.
    """
    waiting = [job for job in jobs if not finished(job.folder)]
    for job in jobs:
        if job not in waiting:
            print(f"{job.folder}: finished", flush=True)
    running: dict[Job, subprocess.Popen] = {}
    failed = []
    with Interrupt() as interrupt:
        while waiting or running:
            if interrupt.stop:
                stop(running)
                return False
            job = next_job(waiting, running)
            if job is not None and len(running) < parallel:
                waiting.remove(job)
                running[job] = start(job, flags)
                continue
            time.sleep(0.2)
            failed += reap(running)
    if failed:
        raise UserError(
            "these runs failed: " + ", ".join(f"{job.folder} (see {log(job)})" for job in failed)
        )
    return True


def next_job(waiting: list[Job], running: dict[Job, subprocess.Popen]) -> Job | None:
    """Return the first job that shares its stage I with no run that is still training it."""
    cloning = {
        (job.task, job.seed) for job in running if not (job.folder / "args.json").exists()
    }  # args.json is written when stage II begins
    for job in waiting:
        if (job.task, job.seed) not in cloning:
            return job
    return None


def start(job: Job, flags: list[str]) -> subprocess.Popen:
    argv = command(job, flags)
    print(f"{job.folder}: python -m {job.kind.module} {' '.join(argv)}", flush=True)
    log(job).parent.mkdir(parents=True, exist_ok=True)
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    with open(log(job), "a") as file:
        return subprocess.Popen(
            [sys.executable, "-m", job.kind.module, *argv],
            stdout=file,
            stderr=subprocess.STDOUT,
            env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        )


def log(job: Job) -> Path:
    return job.folder.with_name(f"{job.folder.name}.log")


def reap(running: dict[Job, subprocess.Popen]) -> list[Job]:
    """Take the runs that have ended off `running`; return those that failed."""
    failed = []
    for job, process in list(running.items()):
        if process.poll() is None:
            continue
        del running[job]
        if process.returncode == 0 and finished(job.folder):
            print(f"{job.folder}: done", flush=True)
        else:
            print(f"{job.folder}: ended with code {process.returncode}", flush=True)
            failed.append(job)
    return failed


def stop(running: dict[Job, subprocess.Popen]) -> None:
    """Let every run save and end."""
    for process in running.values():
        process.terminate()
    for process in running.values():
        process.wait()
