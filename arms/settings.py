"""What robot.py can be asked: Tables I, III and V, our own additions, and its command line.

    from arms.settings import Args, open_driver, open_eyes, parse_args
    args = parse_args(["train", "--task", "pick-cube"])       # an Args, every limit checked
    driver, operator = open_driver(args)                      # nothing moves yet

The paper leaves open where the box is, the limits of orientation and speed, and what ends a run:
those defaults are ours.
Not here: what the values do (rig.py and workspace.py: the arm; learner.py: stages I and II).
"""

from __future__ import annotations

import math
import re
import shlex
import sys
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
import tyro

import arms
from arms.driver import Driver
from arms.operator import Scripted, open_operator
from arms.profile import Profile, load_profile
from logbook import UserError, usable_device
from logbook.options import (
    Count,
    CountOrZero,
    Finite,
    Fraction,
    NonNegative,
    Positive,
    Seed,
    Share,
    Temperature,
    Threshold,
    Width,
    first_look,
    parse,
    stored_values,
)

EPISODES = {
    "record": 30,
    "train": 200,
    "eval": 20,
}  # ours; recording with --preset paper: Table I's
SEEDS = {"record": 500_000, "train": 0, "eval": 1_000_000}  # where the episodes of a role begin
PROFILES = {"so101_follower": "so101", "so100_follower": "so101"}  # of LeRobot's types


@dataclass
class Args:
    """What robot.py can be asked."""

    role: tyro.conf.Positional[Literal["record", "train", "eval"]] = "train"
    task: str = "insert-usb"  # pick-cube, route-cable, insert-usb, assemble-ssd, pick-pen ...
    preset: Literal["auto", "paper", "cpu"] = "auto"  # paper: the tables; auto: with a GPU
    robot: str = "sim"  # sim, piper, a type of LeRobot's (so101_follower) or package.module:Class
    profile: str | None = None  # what its numbers mean: piper, so101 or a file; default: its own
    options: tuple[str, ...] = ()  # NAME=VALUE ... for the robot, such as channel=can1
    teleop: str | None = None  # a LeRobot type or package.module:Class; sim: a scripted operator
    teleop_options: tuple[str, ...] = ()  # NAME=VALUE ... for it
    keypad: str = "auto"  # terminal, /dev/input/by-id/... or none; auto: none for a simulation
    realtime: bool = True  # False, simulation only: at full speed, learning between the episodes
    seed: Seed = 0  # of networks, batches and simulated episodes
    episodes: CountOrZero = 0  # to record, train on or evaluate; 0: 30 (paper: Table I), 200, 20
    episode_limit: Count = 200  # steps until an episode is truncated
    data: str | None = None  # folder of recorded episodes; default data/<task>-<robot>
    run_dir: str | None = None  # default runs/<task>-robot-s<seed>
    resume: str | None = None  # continue this run folder where it stopped
    overwrite: bool = False  # replace a run that is already in run_dir; never a real arm's episodes
    observe: Literal["auto", "state", "vision"] = "auto"  # vision: cameras instead of object poses
    encoder: str | None = None  # mobilenet (trained) or weights of the ResNet-10; default: random
    backbone: str | None = None  # a vision-language model: its folder, mobilenet-minilm or tiny
    instruction: str | None = None  # what the model is told; default: the task's own words
    channels: Width = 256  # width of the head on it (ours)
    blocks: Width = 6  # transformer blocks of the head (ours)
    attention_heads: Width = 8  # of the head (ours)
    box_center: tuple[float, float, float] | None = None  # cm, in the arm's base
    home: tuple[float, ...] | None = None  # degrees of the joints at every start
    box_size: tuple[float, float, float] = (40, 40, 30)  # cm (Table III)
    box_from_demos: bool = False  # the box of the recorded episodes and 2 cm around it
    cone: Positive = 30.0  # degrees of the tool from where it pointed at first (ours)
    max_step: Positive = 1.5  # cm of the tool per period at full action (ours): 22 cm/s
    max_turn: Positive = 4.0  # degrees of the tool per period at full action (ours)
    max_joint_speed: Positive = 90.0  # degrees per second of every joint (ours)
    leash: Positive = 4.0  # cm between the commanded and the measured tool (ours); bounds the force
    recover: bool = False  # start outside the box: go slowly inside first
    release: bool = False  # at the end, at rest, cut the motors' power (piper can)
    act: Literal["policy", "posterior"] = "policy"  # who collects: policy (paper), posterior (ours)
    horizon: Count = 4  # H (Table III)
    hidden: Width = 512  # width of the hidden layers of every network
    layers: Width = 4  # hidden layers of every network
    heads: Width = 2  # critic heads
    flow_steps: Count = 10  # K, Euler steps from noise to a chunk
    batch_size: Count = 256  # chunks per update
    learning_rate: Positive = 3e-4  # Adam, in stage I
    online_learning_rate: Positive = 3e-4  # Adam of the policy in stage II
    critic_learning_rate: Positive = 3e-4  # Adam of the critic
    pretrain_steps: Count = 20_000  # gradient steps of stage I (Table III)
    warmup_steps: CountOrZero = 5000  # first control steps with a frozen actor (Table III)
    updates_per_step: Positive = 1.0  # gradient updates per control step, never more
    num_candidates: Count = 32  # N, candidates per state in the E-step
    particles: CountOrZero = 0  # M of them resampled for the M-step (ours); 0: all, weighted
    temperature: Temperature = 0.001  # eta
    guidance: NonNegative = 1.0  # beta
    clip: Threshold = 0.1  # zeta (digests of the paper: 0.08 to 0.1)
    pessimism: NonNegative = 0.0  # deviations over the critic's heads taken off their mean
    discount: Fraction = 0.99  # gamma
    tau: Fraction = 0.005  # rate of the target critic's moving average
    policy_tau: Fraction = 1.0  # rate of the acting policy's moving average; 1: the newest weights
    reward_offset: Finite = 0.0  # added to every reward
    demo_share: Share | None = None  # of each batch from the demonstrations; None: uniform (paper)
    capacity: Count = 100_000  # online steps kept beside the demonstrations
    save_every: Count = 500  # updates between checkpoints
    precision: Literal["float32", "bfloat16"] = "float32"  # of policy and E-step in stage II
    threads: Count = 1  # CPU threads of the learner
    device: str = "auto"  # of the learner; the arm's process acts on the CPU
    learner: str | None = None  # a Ray cluster's address, whose GPU machine learns; None: here

    kept: ClassVar[tuple[str, ...]] = ("task", "preset", "robot")

    @classmethod
    def defaults(cls, known: dict[str, str | None]) -> dict[str, Any]:
        """Return the values that --task and --preset stand for. UserError for an unknown task."""
        name = known["task"] or cls.task
        if name not in TASKS:
            raise UserError(f"unknown task '{name}'; choose one of {', '.join(TASKS)}")
        preset = resolve_preset(known["preset"])
        return {"task": name, "preset": preset, **TASKS[name][preset]}

    def seed_of(self, number: int) -> int:
        """Return the seed of simulated episode `number` below 10,000.

        Recording, training and evaluation never share one.
        """
        fifties, seed = divmod(self.seed, 50)
        return SEEDS[self.role] + 10_000 * seed + number + 1_500_000 * fifties


class EvalArgs(Args):
    """The same, with the defaults of the run that is to be evaluated."""

    @classmethod
    def defaults(cls, known: dict[str, str | None]) -> dict[str, Any]:
        """Return the arguments of the run in --run-dir. UserError where there is none."""
        folder = evaluated_run(known)
        values = stored_values(Args, folder, method="robot")
        return values | {"role": "eval", "episodes": 0, "run_dir": folder, "resume": None}


def evaluated_run(known: dict[str, str | None]) -> str:
    """Return the folder of the run that `eval` is about."""
    task = known["task"] or Args.task
    return known["run_dir"] or f"runs/{task}-robot-s{known['seed'] or 0}"


# ---- the tables ----------------------------------------------------------------------------------

# Table III: episode limit and box (cm). Table V: pick-pen and hang-keychain, on a vision-language
# backbone; the sizes of its head, its cloning rate and its capacity are ours. zeta stands in
# neither table: it is from digests of the paper. The cpu values are ours: minutes on a laptop.
CPU = {
    "hidden": 256,
    "layers": 3,
    "heads": 5,
    "flow_steps": 5,
    "batch_size": 128,
    "online_learning_rate": 3e-4,
    "critic_learning_rate": 3e-4,
    "pretrain_steps": 5000,
    "warmup_steps": 2000,
    "capacity": 10_000,
    "act": "posterior",
    "num_candidates": 8,
    "temperature": 0.01,
    "clip": 0.6,
    "pessimism": 1.0,
    "tau": 0.02,
    "policy_tau": 0.005,
    "reward_offset": -0.01,
    "demo_share": 0.5,
    "episode_limit": 100,
}
VLA_PAPER = {
    "backbone": "tiny",
    "box_size": (40, 40, 40),
    "episode_limit": 200,
    "horizon": 10,
    "batch_size": 64,
    "learning_rate": 1e-4,
    "online_learning_rate": 5e-5,
    "warmup_steps": 2000,
    "capacity": 20_000,
    "num_candidates": 16,
    "clip": 0.01,
}
VLA_CPU = {
    "backbone": "tiny",
    "box_size": (40, 40, 40),
    "episode_limit": 100,
    "horizon": 5,
    "channels": 64,
    "blocks": 2,
    "attention_heads": 2,
    "hidden": 256,
    "layers": 3,
    "heads": 5,
    "flow_steps": 5,
    "batch_size": 32,
    "learning_rate": 1e-3,
    "online_learning_rate": 1e-3,
    "critic_learning_rate": 1e-3,
    "pretrain_steps": 1500,
    "warmup_steps": 2000,
    "updates_per_step": 0.5,
    "capacity": 5000,
    "act": "posterior",
    "num_candidates": 8,
    "temperature": 0.01,
    "clip": 0.6,
    "pessimism": 1.0,
    "tau": 0.02,
    "policy_tau": 0.005,
    "reward_offset": -0.01,
    "demo_share": 0.5,
}
TASKS = {
    "pick-cube": {
        "demonstrations": 40,  # Table I
        "object": "cube",  # what the simulated arm shows
        "paper": {"episode_limit": 200, "box_size": (40, 40, 30)},
        "cpu": {**CPU, "box_size": (40, 40, 30)},
    },
    "route-cable": {
        "demonstrations": 30,
        "object": "peg",
        "paper": {"episode_limit": 150, "box_size": (20, 30, 30)},
        "cpu": {**CPU, "box_size": (20, 30, 30)},
    },
    "insert-usb": {
        "demonstrations": 50,
        "object": "peg",
        "paper": {"episode_limit": 200, "box_size": (20, 15, 15)},
        "cpu": {**CPU, "box_size": (20, 15, 15)},
    },
    "assemble-ssd": {
        "demonstrations": 40,
        "object": "peg",
        "paper": {"episode_limit": 180, "box_size": (12, 15, 15)},
        "cpu": {**CPU, "box_size": (12, 15, 15)},
    },
    "pick-pen": {"demonstrations": 50, "object": "cube", "paper": VLA_PAPER, "cpu": VLA_CPU},
    "hang-keychain": {"demonstrations": 50, "object": "peg", "paper": VLA_PAPER, "cpu": VLA_CPU},
}
CARRIED = (  # what a command that goes on with the same arm has to repeat
    "task",
    "preset",
    "robot",
    "profile",
    "options",
    "teleop",
    "teleop_options",
    "keypad",
    "realtime",
    "observe",
    "encoder",
    "backbone",
    "instruction",
)
SHOWN = ("pick-cube", "insert-usb")  # tasks that the simulated arm has; others borrow their object


# ---- the command line ----------------------------------------------------------------------------


def parse_args(argv: list[str] | None = None, description: str | None = None) -> Args:
    """Read the command line. UserError for what could only fail later.

    The tables fill the defaults; a resumed run's own arguments come before them, and `eval` takes
    those of the run in --run-dir.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    cls = Args
    begun = None
    known = first_look(argv)
    if argv[:1] == ["eval"]:
        argv = [
            re.sub(r"^--resume(?==|$)", "--run-dir", word) for word in argv
        ]  # either name will do
        folder = evaluated_run(first_look(argv))
        # --help before anything is trained shows the task's defaults
        if Path(folder).exists() or not {"-h", "--help"} & set(argv):
            cls = EvalArgs
            begun = folder
    elif known["resume"]:
        begun = known["resume"]
    args = parse(cls, argv, description, "robot")
    if begun is not None:
        forget_start_of_another_box(args, begun)
    args.preset = resolve_preset(args.preset)
    check_place(args)
    check_sense(args)
    fill_in(args)
    return args


def forget_start_of_another_box(args: Args, folder: str) -> None:
    """Forget the start of the run in `folder` where another box was named."""
    begun = stored_values(Args, folder, method="robot")
    moved = args.box_center != begun.get("box_center")
    if moved and args.home == begun.get("home"):
        args.home = None


def resolve_preset(name: str | None) -> str:
    """Return paper or cpu; auto is paper where there is a GPU."""
    if name in ("paper", "cpu"):
        return name
    return "paper" if torch.cuda.is_available() else "cpu"


def check_place(args: Args) -> None:
    """UserError for a box or a start that is no place."""
    if not all(0 < side < math.inf for side in args.box_size):
        sides = " ".join(map(str, args.box_size))
        raise UserError(f"--box-size is three lengths in cm, got {sides}")
    if not all(map(math.isfinite, args.box_center or ())):
        place = " ".join(map(str, args.box_center))
        raise UserError(f"--box-center is a place in cm, got {place}")
    if args.home is not None and not all(map(math.isfinite, args.home)):
        raise UserError(f"--home is joints in degrees, got {' '.join(map(str, args.home))}")


def check_sense(args: Args) -> None:
    """UserError for options that contradict each other or this machine."""
    if args.role == "train" and args.learner is None:  # it learns here
        usable_device(args.device, mps=False)
    if args.capacity < args.horizon:
        raise UserError(
            f"--capacity {args.capacity} cannot hold one chunk of --horizon {args.horizon} steps"
        )
    if args.backbone is not None and args.observe == "state":
        raise UserError(
            f"--observe state: {args.task} is seen by a vision-language backbone, which needs "
            "pictures"
        )
    data = Path(args.data or "")
    if args.role == "record" and (data.is_file() or data.suffix == ".hdf5"):
        raise UserError(
            f"--data {args.data} is a file: record writes one file per episode into a folder, and "
            "then one of all beside it, FOLDER.hdf5"
        )


def fill_in(args: Args) -> None:
    """Set what follows from other arguments."""
    if args.backbone is not None:
        args.observe = "vision"
    args.data = args.data or default_data(args)
    args.run_dir = args.resume or args.run_dir or f"runs/{args.task}-robot-s{args.seed}"
    if args.episodes == 0:
        args.episodes = EPISODES[args.role]
        if args.role == "record" and args.preset == "paper":
            args.episodes = TASKS[args.task]["demonstrations"]


def default_data(args: Args) -> str:
    """Return where recordings go that nobody has named a folder for."""
    return f"data/{args.task}-{args.robot.rpartition(':')[2]}"


def hint(args: Args, role: str) -> str:
    """Return the command that goes on with this arm and this data, as a shell takes it."""
    words = ["python", "robot.py", role]
    names = [*CARRIED]
    if args.data != default_data(args):
        names.append("data")
    usual = Args(**Args.defaults({"task": args.task, "preset": args.preset}))
    for name in names:
        value = getattr(args, name)
        flag = f"--{name.replace('_', '-')}"
        if value == getattr(usual, name) and name not in ("task", "preset"):
            continue
        if isinstance(value, bool):
            words.append(flag if value else f"--no-{name.replace('_', '-')}")
        elif isinstance(value, tuple):
            words += [flag, *value]
        else:
            words += [flag, str(value)]
    return shlex.join(words)


# ---- what the arguments name ---------------------------------------------------------------------


def open_driver(args: Args):
    """Return the Driver that args.robot names, and whoever tele-operates it or None.

    Nothing moves, and the arm is not connected. UserError for a robot that its profile does not
    describe and for a request that it cannot fulfil.
    """
    robot = make_robot(args)
    driver = Driver(robot, find_profile(args, robot))
    if not args.realtime and not (driver.simulated and driver.judges):
        raise UserError(
            f"--no-realtime is for a simulated arm: {args.robot} cannot wait for the learner"
        )
    if args.release and not driver.can_release:
        raise UserError(
            f"--release: the driver of {args.robot} cannot cut the motors' power (piper's can)"
        )
    if args.home is not None and len(args.home) != len(driver.profile.joints):
        raise UserError(
            f"--home is {len(driver.profile.joints)} joints in degrees, got {len(args.home)}"
        )
    operator = make_operator(args, robot, driver.profile)
    if args.role == "record" and operator is None:
        raise UserError(
            "recording needs someone to tele-operate: --teleop so101_leader or package.module:Class"
        )
    return driver, operator


def make_robot(args: Args):
    """Return the robot that args.robot names, with its options."""
    options = read_options("--options", args.options)
    if args.robot != "sim":
        return arms.make(args.robot, **options)
    shown = TASKS[args.task]["object"]
    if args.task not in SHOWN:
        print(
            f"the simulated arm has a cube and a peg with its socket: {args.task} is played with "
            f"the {shown}"
        )
    usual = {
        "task": shown,
        "seed": args.seed,
        "cameras": None if args.observe == "vision" else False,
        "realtime": args.realtime,
    }
    return arms.make("sim", **usual | options)


def find_profile(args: Args, robot) -> Profile:
    """Return what the robot's numbers mean. UserError where nobody says: nothing is guessed."""
    if args.profile is not None:
        return load_profile(args.profile)
    declared = getattr(robot, "profile", None)
    if declared is not None:
        return declared
    if args.robot in PROFILES:
        return load_profile(PROFILES[args.robot])
    keys = ", ".join(sorted(robot.action_features))
    raise UserError(
        f"nobody says in which units {args.robot} speaks of its joints ({keys}) and how they turn: "
        "give --profile piper, so101 or a file of your own (arms/README.md)"
    )


def make_operator(args: Args, robot, profile: Profile):
    """Return who tele-operates, connected, or None."""
    if args.teleop is None:
        if args.robot != "sim":
            return None
        from arms.teleop import ScriptedExpert

        return Scripted(ScriptedExpert(robot, seed=args.seed), profile)
    what = f"--teleop {args.teleop}"
    options = read_options("--teleop-options", args.teleop_options)
    if ":" in args.teleop:
        teleop = arms.construct(what, arms.load_class(what, args.teleop), options)
    else:
        from arms.lerobot import make_by_type

        teleop = make_by_type("teleop", args.teleop, options)
    try:
        teleop.connect()
    except (AttributeError, ValueError, TypeError, OSError) as error:
        raise UserError(f"{what}: {error}; it does not connect") from error
    return open_operator(teleop, profile, args.teleop)


def read_options(flag: str, words: tuple[str, ...]) -> dict[str, str]:
    """Turn NAME=VALUE words into a dict."""
    options = {}
    for word in words:
        name, equals, value = word.partition("=")
        if not equals:
            raise UserError(f"{flag} takes NAME=VALUE, got '{word}'")
        options[name] = value
    return options


def open_eyes(args: Args, cameras: list[str]):
    """Return what makes features of these cameras' pictures: an encoder or the backbone."""
    if args.encoder == "mobilenet" and args.backbone is None:
        from arms.adapters.pretrained import PackagedEncoder

        return PackagedEncoder()
    if args.backbone is None:
        from arms.vision import Encoder

        return Encoder(args.encoder)
    from arms.language import Tokens

    return Tokens(args, cameras)


@contextmanager
def writing(path):
    """Turn a full disk into one sentence; the arm then goes to rest.

    h5py raises RuntimeError, too, and its message buries the cause.
    """
    try:
        yield
    except (OSError, RuntimeError) as error:
        buried = re.search(r"error message = '([^']*)'", str(error))
        reason = buried[1] if buried else str(error).splitlines()[0]
        raise UserError(
            f"cannot write {path} ({reason}): what was there before is whole"
        ) from error
