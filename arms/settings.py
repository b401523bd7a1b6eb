"""What robot.py can be asked: Tables III and V, our own additions, and the command line over both.

    from arms.settings import Args, open_arm, open_eyes, parse
    args = parse(["train", "--task", "pick-cube"], "what --help says first")      # an Args
    robot, teleop = open_arm(args)

The paper leaves open where the box is, limits of orientation and speed, what ends a run: those defaults are ours.
Not here: what the values do (robot.py: arm and episodes; learner.py: stages I and II).
"""
import argparse
import contextlib
import importlib
import inspect
import json
import math
import re
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Literal

import torch
import tyro

import arms
from logbook import UserError, check_numbers, read_args, replacing, usable_device

from .senses import JOINTS

# Table III: episode limit and box (cm). Table V: the last two, on a vision-language backbone; its head's sizes, cloning
# rate and capacity: ours. zeta is in neither table: from digests of the paper.
VLA = dict(episode_limit=200, box_size=(40, 40, 40), horizon=10, batch_size=64, online_learning_rate=5e-5,
           warmup_updates=2000, num_candidates=16, clip=0.01, backbone="tiny", learning_rate=1e-4, capacity=20_000)
TASKS = {"pick-cube": dict(episode_limit=200, box_size=(40, 40, 30)),
         "route-cable": dict(episode_limit=150, box_size=(20, 30, 30)),
         "insert-usb": dict(episode_limit=200, box_size=(20, 15, 15)),
         "assemble-ssd": dict(episode_limit=180, box_size=(12, 15, 15)), "pick-pen": VLA, "hang-keychain": VLA}
DEMONSTRATIONS = {"pick-cube": 40, "route-cable": 30, "insert-usb": 50, "assemble-ssd": 40, "pick-pen": 50,
                  "hang-keychain": 50}         # Table I
PRESETS = {"paper": {}, "cpu": dict(                                       # ours: minutes on a laptop
    hidden=256, layers=3, flow_steps=5, batch_size=128, online_learning_rate=3e-4, critic_learning_rate=3e-4,
    act="posterior", heads=5, pessimism=1.0, tau=0.02,
    num_candidates=8, pretrain_steps=5000, warmup_updates=2000, capacity=10_000, reward_offset=-0.01, demo_share=0.5,
    temperature=0.01, clip=0.6, policy_tau=0.005, episode_limit=100, channels=64, blocks=2)}
VLA_CPU = dict(horizon=5, batch_size=32, learning_rate=1e-3, online_learning_rate=1e-3, critic_learning_rate=1e-3,
               pretrain_steps=1500, warmup_updates=1000, updates_per_step=0.5, capacity=5000)   # as in vla_head.py

LEAST = dict(temperature=1e-6, clip=0.0, guidance=0.0, pessimism=0.0, seed=0, episodes=0, warmup_updates=0)


@dataclass
class Args:
    role: tyro.conf.Positional[Literal["record", "train", "eval"]] = "train"  # demonstrations; stages I and II; test
    task: str = "insert-usb"          # pick-cube, route-cable, insert-usb, assemble-ssd, pick-pen or hang-keychain
    preset: Literal["auto", "paper", "cpu"] = "auto"  # paper: the tables to the letter; auto: paper if there is a GPU
    robot: str = "sim"                # sim, piper or package.module:Class
    options: tuple[str, ...] = ()     # NAME=VALUE ... for the driver's constructor, such as channel=can1
    teleop: str | None = None         # package.module:Class with get_action() -> joint targets; sim: an expert
    keypad: str = "auto"              # terminal, /dev/input/by-id/... or none; auto: none where the arm knows success
    realtime: bool = True             # False, simulated arm only: at full speed, learning between the episodes
    seed: int = 0                     # of networks, batches and simulated episodes
    episodes: int = 0                 # to record, to have trained on, to evaluate; 0: 30 (paper: Table I's), 200, 20
    episode_limit: int = 200          # steps until an episode is truncated
    data: str | None = None           # folder of recorded episodes; default data/<task>-<robot>
    run_dir: str | None = None        # default runs/<task>-robot-s<seed>
    resume: str | None = None         # continue this run folder where it stopped
    overwrite: bool = False           # replace a run that is already in run_dir; never the episodes of a real arm
    observe: Literal["auto", "state", "vision"] = "auto"  # vision: cameras instead of the simulator's object poses
    encoder: str | None = None        # weights of the ResNet-10; without: fixed random ones, with a warning
    backbone: str | None = None       # a vision-language model instead: its folder, or tiny: a random one (Table V's)
    instruction: str | None = None    # what the model is told; default: the task's own words
    channels: int = 256               # width of the head on it (ours)
    blocks: int = 6                   # transformer blocks of the head (ours)
    box_center: tuple[float, float, float] | None = None  # cm, in the arm's base frame; default: around the start
    home: tuple[float, ...] | None = None  # degrees of the joints at every start; default: as in the first session
    box_size: tuple[float, float, float] = (40, 40, 30)  # cm (Table III)
    box_from_demos: bool = False      # the box of the recorded episodes and 2 cm around it
    cone: float = 30.0                # degrees between the tool's axis and where it pointed at the start (ours)
    max_step: float = 1.5             # cm of the tool per period at full action (ours): 22 cm/s
    max_turn: float = 4.0             # degrees of the tool per period at full action (ours)
    max_joint_speed: float = 90.0     # degrees per second of every joint (ours)
    leash: float = 4.0                # cm between the commanded and the measured tool (ours); bounds the force
    recover: bool = False             # start outside the box: go slowly to its middle first
    release: bool = False             # at the end, at rest, ask the driver to cut the motors' power (piper can)
    act: Literal["policy", "posterior"] = "policy"  # who collects: the policy (paper) or the posterior (ours)
    horizon: int = 4                  # H (Table III)
    hidden: int = 512                 # width of the hidden layers of every network
    layers: int = 4                   # hidden layers of every network
    heads: int = 2                    # M, of the critic
    flow_steps: int = 10              # K
    batch_size: int = 256             # chunks per update
    learning_rate: float = 3e-4       # Adam, in stage I
    online_learning_rate: float = 3e-4  # Adam, policy in stage II
    critic_learning_rate: float = 3e-4  # Adam, critic
    pretrain_steps: int = 20_000      # stage I gradient steps (Table III)
    warmup_updates: int = 5000        # first updates with a frozen actor (Table III)
    updates_per_step: float = 1.0     # updates per control step; the learner never does more
    num_candidates: int = 32          # N
    temperature: float = 0.001        # eta
    guidance: float = 1.0             # beta
    clip: float = 0.1                 # zeta (digests of the paper: 0.08 to 0.1)
    pessimism: float = 0.0            # standard deviations taken from the mean of the critic's heads
    discount: float = 0.99            # gamma
    tau: float = 0.005                # rate of the target critic's moving average
    policy_tau: float = 1.0           # rate of the acting policy's moving average; 1: the newest weights (paper)
    reward_offset: float = 0.0        # added to every reward
    demo_share: float | None = None   # share of every batch from the demonstrations; None: uniform over all (paper)
    capacity: int = 100_000           # online steps kept beside the demonstrations
    save_every: int = 500             # updates between checkpoints
    threads: int = 1                  # CPU threads of the learner
    device: str = "auto"              # of the learner; the arm's process acts on the CPU
    learner: str | None = None        # address of a Ray cluster whose GPU machine learns; None: a process here

    def seed_of(self, number):
        """Of simulated episode `number` below 10,000: recording, training and evaluation never share one."""
        fifties, seed = divmod(self.seed, 50)
        role = {"record": 500_000, "train": 0, "eval": 1_000_000}[self.role]
        return role + 10_000 * seed + number + 1_500_000 * fifties


def parse(argv, description):
    """Command line -> Args: the tables fill the defaults, a resumed run's own arguments come before them."""
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)        # looked at first: --help then shows the
    for names in ("--task",), ("--preset",), ("--seed",), ("--run-dir", "--run_dir"), ("--resume",):  # defaults of
        first.add_argument(*names)                                             # this task; tyro takes both spellings
    given = first.parse_known_args(argv)[0]
    task, folder = given.task or Args.task, given.resume
    tests = argv[:1] == ["eval"]
    if tests:                                                                  # as it was trained
        folder = given.resume or given.run_dir or f"runs/{task}-robot-s{given.seed or 0}"
        if {"-h", "--help"} & set(argv) and not Path(folder).exists():
            folder = None                                                      # nothing is trained yet: the task's
    if folder is not None:
        names = {field.name for field in fields(Args)}
        known = {name: value for name, value in read_args(folder, method="robot").items() if name in names}
        known |= {"role": "eval", "episodes": 0, "run_dir": folder} if tests else {"role": "train"}
        default = Args(**{n: tuple(v) if isinstance(v, list) else v for n, v in known.items()})
    else:
        if task not in TASKS:
            raise UserError(f"unknown task '{task}'; choose one of {', '.join(TASKS)}")
        preset = given.preset if given.preset in PRESETS else "paper" if torch.cuda.is_available() else "cpu"
        small = VLA_CPU if preset == "cpu" and TASKS[task] is VLA else {}
        default = Args(task=task, preset=preset, **TASKS[task] | PRESETS[preset] | small)
    args = tyro.cli(Args, args=argv, default=default, description=description)
    args.preset = default.preset if args.preset == "auto" else args.preset     # what auto came to
    if args.box_center != default.box_center and args.home == default.home:
        args.home = None                                     # the start of another box
    check_numbers(args, LEAST)
    if args.role == "train" and args.learner is None:        # it learns here
        usable_device(args.device, mps=False)
    if args.capacity < args.horizon:
        raise UserError(f"--capacity {args.capacity} cannot hold one chunk of --horizon {args.horizon} steps")
    if not all(0 < side < math.inf for side in args.box_size):
        raise UserError(f"--box-size is three lengths in cm, got {' '.join(map(str, args.box_size))}")
    if not all(map(math.isfinite, args.box_center or ())):
        raise UserError(f"--box-center is a place in cm, got {' '.join(map(str, args.box_center))}")
    if args.home is not None and not (len(args.home) == 6 and all(map(math.isfinite, args.home))):
        raise UserError(f"--home is six joints in degrees, got {' '.join(map(str, args.home))}")
    if not args.realtime and args.robot != "sim":
        raise UserError(f"--no-realtime is for the simulated arm: {args.robot} cannot wait for the learner")
    if args.backbone is not None and args.observe == "state":
        raise UserError(f"--observe state: {args.task} is seen by a vision-language backbone, which needs pictures")
    args.observe = "vision" if args.backbone is not None else args.observe
    args.data = args.data or f"data/{args.task}-{args.robot.rpartition(':')[2]}"
    if args.role == "record" and (Path(args.data).is_file() or Path(args.data).suffix == ".hdf5"):
        raise UserError(f"--data {args.data} is a file: record writes one file per episode into a folder, and then one "
                        "of all beside it, FOLDER.hdf5")
    args.run_dir = args.resume or args.run_dir or f"runs/{args.task}-robot-s{args.seed}"
    record = 30 if args.preset == "cpu" else DEMONSTRATIONS[args.task]
    args.episodes = args.episodes or {"record": record, "train": 200, "eval": 20}[args.role]
    return args


def open_arm(args):
    """The driver that args.robot names and whoever tele-operates it, or None; nothing moves yet."""
    options = {}
    for option in args.options:
        name, equals, value = option.partition("=")
        if not equals:
            raise UserError(f"--options takes NAME=VALUE, got '{option}'")
        options[name] = value
    if args.robot == "sim":
        task = "cube" if args.task in ("pick-cube", "pick-pen") else "peg"
        options = {"task": task, "seed": args.seed, "cameras": None if args.observe == "vision" else False,
                   "realtime": args.realtime} | options
        if args.task not in ("pick-cube", "insert-usb"):
            print(f"the simulated arm has a cube and a peg with its socket: {args.task} is played with the {task}")
    robot, teleop = arms.make(args.robot, **options), None
    if args.release and "release" not in inspect.signature(robot.disconnect).parameters:
        raise UserError(f"--release: the driver of {args.robot} cannot cut the motors' power (piper's can)")
    if args.teleop is not None:
        module, _, name = args.teleop.partition(":")
        try:
            teleop = getattr(importlib.import_module(module), name)()
            teleop.connect()
        except (ImportError, AttributeError, ValueError, TypeError, OSError) as error:
            raise UserError(f"--teleop {args.teleop}: {error}; it is package.module:Class, made without arguments, "
                            "that connects") from error
        _check_keys(args.teleop, teleop)
    elif args.robot == "sim":
        from .teleop import ScriptedExpert
        teleop = ScriptedExpert(robot, seed=args.seed)
    if args.role == "record" and teleop is None:
        raise UserError("recording needs someone to tele-operate: --teleop package.module:Class")
    return robot, teleop


def _check_keys(name, teleop):
    """UserError, before anything moves, for an operator of another kind; one that is silent now is not judged yet."""
    keys = getattr(teleop, "action_features", None)
    if keys is None:
        with contextlib.suppress(OSError, RuntimeError):
            keys = teleop.get_action()
    if keys is not None and (missing := [one for one in (*JOINTS, "gripper.pos") if one not in keys]):
        raise UserError(f"--teleop {name} leads another kind of arm: of its keys ({', '.join(keys)}) "
                        f"{', '.join(missing)} is missing")


def _place(args):
    data = Path(args.data)
    return (data.with_suffix("") if data.suffix == ".hdf5" else data) / "args.json"


def recall(args):
    """Where this arm worked in an earlier session with this data: box_center and home, where args names no other."""
    stored = read_args(_place(args).parent) if _place(args).exists() else {}
    center, home = stored.get("box_center"), stored.get("home")
    if stored.get("robot") != args.robot or not center or not home:
        return
    if args.box_center is None or list(args.box_center) == center:
        args.box_center, args.home = tuple(center), args.home or tuple(home)


@contextlib.contextmanager
def writing(path):
    """A full disk is one line, and the arm goes to rest. h5py also raises RuntimeError, and tells a whole story."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        why = re.search(r"error message = '([^']*)'|()\Z", str(error))[1] or str(error).splitlines()[0]
        raise UserError(f"cannot write {path} ({why}): what was there before is whole") from error


def remember(args):
    """For later sessions, beside the recorded episodes: what a recording or else the first training works with."""
    path = _place(args)
    if args.home is None or (args.role != "record" and (path.exists() or not path.parent.is_dir())):
        return
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as file:
            file.write(json.dumps({"args": asdict(args)}, indent=1).encode())


def open_eyes(args, cameras):
    """What makes features of these cameras' pictures: the frozen ResNet-10 or the vision-language backbone."""
    if args.backbone is None:
        from .vision import Encoder
        return Encoder(args.encoder)
    from .language import Tokens
    return Tokens(args, cameras)
