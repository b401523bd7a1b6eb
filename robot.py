"""POCO on an arm (paper Sec. V-A2 and V-D, Table III), or on the same arm without hardware.

    python robot.py record --task insert-usb                 # 30 demonstrations, simulated: 1 min
    python robot.py train --task insert-usb --no-realtime    # stage I, warm-up, POCO: 15 min
    python robot.py eval --task insert-usb --no-realtime     # the policy alone
    python robot.py train --resume runs/pick-cube-robot-s0   # a kill costs at most one episode
    python robot.py record --task pick-cube --robot piper --teleop arms.piper:PiperLeader
    python robot.py record --task pick-cube --robot so101_follower \\
        --options port=/dev/ttyACM0 id=mine \\
        --teleop so101_leader --teleop-options port=/dev/ttyACM1 id=leader
    python robot.py train --task pick-pen --backbone DIR --no-realtime    # a head on a VLM

Times are for two cores. Before the first motion of a real arm read arms/README.md: a hardware
emergency stop is mandatory, and position control has no compliance. Every command passes the Guard;
the learner has a process of its own, so the 15 Hz loop never waits for it.
Writes runs/<task>-robot-s<seed>/: args.json, progress.csv, eval.csv, episodes/*.hdf5, last.pt and
curve.png.
Not here: the loop (arms/rig.py), limits (arms/guard.py), drivers and what their numbers mean
(arms/driver.py, arms/profile.py), stages I and II (arms/learner.py), the head on a backbone
(vla_head.py), compliance, force sensing.
Shapes: A = 7 is shift xyz, turn xyz, gripper, each in [-1, 1]; H chunk, D observation.
"""

import contextlib
import dataclasses
import shlex
import sys
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from arms.background import BackgroundLearner
from arms.episodes import (
    Episode,
    layout,
    length,
    merge,
    next_file,
    numbered,
    outcome,
    refuse_loss,
)
from arms.learner import Learner, trained
from arms.pipe import fingerprint
from arms.rig import Rig, session
from arms.settings import Args, hint, parse_args, writing
from arms.workspace import remember
from logbook import Logbook, UserError, cli, curve, must_fit
from logbook.tables import read_table
from train_online import POCO

COLUMNS = (
    "success",
    "reward",
    "length",
    "dropped",
    "interventions",
    "guarded",
    "period_p50",
    "period_p99",
    "period_max",
    "overruns",
    "version",
    "updates",
    "warmup",
    *POCO.stats,
)
RUNNING = 20  # episodes in the running success


class Arm(Protocol):
    """What a robot offers: the ten members of LeRobot's robots; lerobot itself is not needed.

    The keys of an action, their units and the joint count are those of its profile
    (arms/profile.py); a class of one's own names it in an attribute `profile`. An observation has
    the same keys and may have `stamp` (time.monotonic() of the measurement; without one the
    reading counts as fresh, and an arm that froze is not noticed), cameras as HWC uint8 arrays,
    each with NAME.stamp if it can, and object.* floats. A simulated arm also has reset(seed); one
    that judges itself success() -> bool. disconnect must not let the arm fall.
    """

    observation_features: dict[str, Any]  # NAME: float, or (height, width, 3) of a camera
    action_features: dict[str, Any]
    is_connected: bool
    is_calibrated: bool

    def connect(self, calibrate: bool = True) -> None: ...

    def calibrate(self) -> None: ...

    def configure(self) -> None: ...

    def get_observation(self) -> dict[str, Any]: ...

    def send_action(self, action: dict[str, float]) -> dict[str, float]: ...  # what was really sent

    def disconnect(self) -> None: ...


# ---- record --------------------------------------------------------------------------------------


def record(args: Args) -> None:
    """Tele-operate until the folder args.data holds args.episodes successes, then merge them.

    Failures are not kept.
    """
    folder = Path(args.data)
    with session(args) as rig:
        task = layout(args.task, rig.senses.sizes)
        with rig:
            remember_place(args)
            kept = len(numbered(folder))
            tried, _ = next_file(folder)
            while kept < args.episodes:
                seed = args.seed_of(tried)
                episode = rig.episode(None, seed)
                tried += 1
                if episode.outcome in ("quit", "stop"):
                    break
                if episode.outcome == "success" and save(episode, folder, task, seed):
                    kept += 1
                print(
                    f"{episode.outcome} after {episode.steps} steps: {kept} of {args.episodes} "
                    f"recorded, {tried} tried, {rig.status()}"
                )
    files = numbered(folder)
    if files:
        whole = folder.with_suffix(".hdf5")
        with writing(whole):
            merge(files, whole)
        print(f"{whole}; next: {hint(args, 'train')}")


def save(episode: Episode, folder: Path, task, seed: int) -> Path | None:
    """Write an episode to the next file of the folder; None, and said, where it has no step."""
    path = next_file(folder)[1]
    with writing(path):
        kept = episode.save(path, task, episode.outcome == "success", seed)
    if not kept:
        print("no step was played, so nothing is kept")
        return None
    return path


def remember_place(args: Args) -> None:
    """Keep where this arm works, for later sessions."""
    with writing(args.data):
        remember(args)


# ---- train ---------------------------------------------------------------------------------------


def train(args: Args) -> None:
    """Run stage I, then play episodes and learn until args.episodes are on disk."""
    folder = Path(args.run_dir)
    with session(args) as rig:
        task = layout(args.task, rig.senses.sizes)
        learner = open_learner(args, task)  # refuses missing demonstrations first
        book = open_book(args, learner)
        try:
            if not learner.pretrain(lambda one: one.save(folder / "last.pt")):
                return
            history = catch_up(args, learner, book)
            if args.realtime and not args.learner:
                learner = BackgroundLearner(args, task)
            try:
                play(args, rig, task, learner, book, history)
            finally:
                learner.close()
        except ValueError as error:  # a non-finite Q
            raise UserError(f"stopped: {error}. {book.last_good()}") from error
        finally:
            book.close()
    evaluation = ["python", "robot.py", "eval", "--run-dir", str(folder), "--task", args.task]
    print(f"{curve(folder)}; next: {shlex.join(evaluation)}")


def open_learner(args: Args, task):
    """Return the learner: on another machine with --learner, else here."""
    if args.learner:
        from distributed.arm import RemoteLearner

        return RemoteLearner(args, task)
    return Learner(args, task)


def open_book(args: Args, learner) -> Logbook:
    """Begin the run's folder, or resume it with its checkpoint."""
    folder = Path(args.run_dir)
    arguments = dataclasses.asdict(args) | {"method": "robot"}
    if args.resume:
        book = Logbook.resume(folder, COLUMNS, task=args.task, method="robot")
        with must_fit(folder):
            learner.load_state_dict(book.load("last.pt"), folder / "episodes")
        book.amend(arguments)
        return book
    refuse_loss(folder, args.robot)
    book = Logbook.create(folder, arguments, COLUMNS, args.overwrite)
    for path in numbered(folder / "episodes"):
        path.unlink()
    return book


@dataclasses.dataclass
class History:
    """What the episodes of a run say so far: successes (0 or 1) and control steps."""

    successes: list[float] = dataclasses.field(default_factory=list)
    steps: int = 0

    def add(self, success: bool, steps: int) -> dict[str, float]:
        """Count one episode; return its part of a row of progress.csv."""
        self.successes.append(float(success))
        self.steps += steps
        return {"success": self.running(), "reward": self.successes[-1], "length": steps}

    def running(self) -> float:
        """The success rate of the last RUNNING episodes."""
        return float(np.mean(self.successes[-RUNNING:]))


def catch_up(args: Args, learner, book: Logbook) -> History:
    """Absorb the episodes that are newer than the checkpoint and write the rows that are missing.

    A process that died between an episode's file and its row leaves the file alone.
    """
    files = numbered(Path(args.run_dir) / "episodes")
    history = History()
    lengths = [length(path) for path in files]
    book.rewind(sum(lengths))
    written = last_row(book.folder / "progress.csv")
    here = not args.learner and not args.realtime  # else a second process will read them
    for number, (path, steps) in enumerate(zip(files, lengths)):
        row = history.add(outcome(path) == "success", steps)
        if here and number >= learner.absorbed:
            learner.absorb(path)
            row |= learner.report()
        if history.steps > written:
            book.log(history.steps, **row)
    return history


def last_row(path: Path) -> int:
    """Return the step of the last row of progress.csv, 0 where there is none."""
    columns, rows = read_table(path)
    return int(rows[-1][columns.index("step")]) if rows else 0


def play(args: Args, rig: Rig, task, learner, book: Logbook, history: History) -> None:
    """Run the interaction half of Algorithm 1.

    Every episode is on disk and announced to the learner before the next one begins.
    """
    learner.wait(rig.interrupt)
    if rig.interrupt.stop:  # the arm has no power yet, and gets none
        return
    folder = Path(args.run_dir) / "episodes"
    with rig:
        remember_place(args)
        book.amend(dataclasses.asdict(args))
        while len(history.successes) < args.episodes:
            number, _ = next_file(folder)
            version = learner.pull()
            act = with_noise(learner.acting(), [args.seed, 1, number])
            seed = args.seed_of(number)
            episode = rig.episode(act, seed)
            if episode.outcome in ("quit", "stop"):
                break
            if episode.outcome == "discard":
                continue
            path = save(episode, folder, task, seed)
            if path is None:
                continue
            learner.absorb(path)
            learner.check()
            row = history.add(episode.outcome == "success", episode.steps)
            row |= {
                "dropped": episode.dropped,
                "interventions": episode.interventions,
                "guarded": rig.guard.counts.total(),
                "version": version,
            }
            report = learner.report()
            book.log(history.steps, **row, **rig.pace.report(), **report)
            print(
                f"episode {len(history.successes)}/{args.episodes} {episode.outcome}, "
                f"{episode.steps} steps: success {history.running():.0%} of the last "
                f"{min(len(history.successes), RUNNING)}, {report.get('updates', 0)} updates, "
                f"{rig.status()}"
            )


def with_noise(acting, seed: list[int]):
    """Return act(obs (D,)) -> chunk (H, A), with random numbers of its own for one episode."""
    rng = np.random.default_rng(seed)

    def act(obs):
        return acting(obs[None], rng)

    return act


# ---- eval ----------------------------------------------------------------------------------------


def evaluate(args: Args) -> list[dict[str, Any]]:
    """Play args.episodes episodes with the policy of args.run_dir; rows go to eval.csv, too."""
    rows = []
    with session(args) as rig:
        acting, updates, steps = trained(args, layout(args.task, rig.senses.sizes))
        mark = fingerprint([acting.policy])
        print(f"policy {mark} after {updates} updates, acting from the {args.act}")
        # who stops it now wants no motion
        with contextlib.nullcontext() if rig.interrupt.stop else rig:
            while len(rows) < args.episodes and not rig.interrupt.stop:
                number = len(rows)
                seed = args.seed_of(number)
                episode = rig.episode(with_noise(acting, [args.seed, 2, number]), seed)
                if episode.outcome in ("quit", "stop"):
                    break
                if episode.outcome != "discard":
                    won = episode.outcome == "success"
                    row = {"seed": seed, "success": won, "length": episode.steps}
                    rows.append(row | {"return": float(won)})
                print(
                    f"{len(rows)}/{args.episodes} {episode.outcome}, {episode.steps} steps, "
                    f"{rig.status()}"
                )
    if rows:
        Logbook(Path(args.run_dir), {}, COLUMNS).evaluation(steps, args.act, rows)
        print(f"success {sum(row['success'] for row in rows)} of {len(rows)}")
    return rows


def main(argv: list[str] | None = None) -> list[dict[str, Any]] | None:
    """Run the command line; `eval` returns its rows."""
    args = parse_args(argv, __doc__)
    sys.stdout.reconfigure(line_buffering=True)
    # in real time the loop must not fight the learner for cores
    torch.set_num_threads(1 if args.realtime else args.threads)
    speed = "15 Hz" if args.realtime else "as fast as it goes"
    print(f"{args.role} {args.task} on {args.robot}, preset {args.preset}, {speed}")
    if args.role == "record":
        return record(args)
    if args.role == "train":
        return train(args)
    return evaluate(args)


if __name__ == "__main__":
    cli(main)
