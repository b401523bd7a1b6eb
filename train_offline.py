"""Stage I: behaviour cloning of demonstrations with the flow-matching loss (paper Sec. IV-C1, Eq. 24).

    python train_offline.py --task lift                   # 20 scripted demonstrations, about a minute on two cores
    python train_offline.py --task lift --data FILE       # robomimic HDF5
    python train_offline.py --resume runs/lift-bc-s0      # continues an interrupted run exactly
    python train_offline.py --eval runs/lift-bc-s0        # evaluates its checkpoint

Writes runs/<task>-bc-s<seed>/ with args.json, progress.csv, eval.csv, TensorBoard events, last.pt and curve.png.
`python train_online.py` runs this stage by itself when it is given no checkpoint.
Not here: reinforcement learning (train_online.py), how demonstrations are made or read (demos/).
"""
import argparse
import ctypes
import dataclasses
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import tyro

import demos
import envs
from chunk_critic import aggregate
from flow_policy import FlowPolicy
from logbook import (Clock, Interrupt, Logbook, Progress, UserError, check_end, check_kept, check_numbers, cli, curve,
                     fitting, load_checkpoint, noise_state, plainly, read_args, refuse_nonfinite, restore_noise,
                     usable_device)
from poco import posterior_weights
from replay import ChunkReplay


@dataclass
class Args:
    task: str = "lift"                # lift, can, square, scene, puzzle-3x3, cube-double or cube-triple
    preset: Literal["auto", "cpu", "paper"] = "auto"  # paper: Tables II/III to the letter; cpu: minutes on a laptop
    seed: int = 0                     # of demonstrations, networks, batches and training episodes
    data: str | None = None           # file of demonstrations; default: made (cpu), found, downloaded or made (paper)
    demo_episodes: int = 20           # how many demonstrations to make, or to use of the file
    episode_limit: int = 300          # an episode is truncated after this many steps
    horizon: int = 5                  # H, actions per chunk, executed open loop
    hidden: int = 512                 # width of the hidden layers of every network
    layers: int = 4                   # hidden layers of every network
    flow_steps: int = 10              # K, Euler steps from noise to a chunk
    batch_size: int = 256             # chunks per update
    learning_rate: float = 3e-4       # Adam, in stage I
    normalize: bool = True            # standardise observations with the demonstrations' mean and deviation (ours)
    pretrain_steps: int = 100_000     # stage I gradient steps
    eval_episodes: int = 50           # episodes per evaluation, always the same seeds
    workers: int = 2                  # evaluation and collection processes
    device: str = "auto"              # cpu, cuda, mps; auto takes the best one
    threads: int = 0                  # CPU threads for torch; 0 leaves torch's own choice
    precision: Literal["auto", "float32", "bfloat16"] = "auto"  # of policy and E-step; auto: bfloat16 where fast
    run_dir: str | None = None        # where to write; default runs/<task>-<method>-s<seed>
    overwrite: bool = False           # replace a run that is already in run_dir
    resume: str | None = None         # continue this run folder exactly where it stopped
    eval: str | None = None           # only evaluate this run folder's checkpoint
    video: bool = False               # also write an mp4 of evaluation episodes (needs OpenGL)


COLUMNS = ["bc", "updates_per_s", "time/update"]
SETTINGS = ("offline-to-online", "online")        # Tables III and II
KEPT = ("preset", "setting", "seed", "demo_episodes", "normalize", "reward_offset", "checkpoint")    # by a resumed run


# ---- command line: the task table fills the defaults, the user's flags win -------------------------------------------

def parse(cls, argv=None):
    """Read the command line into `cls`. --task and --preset are looked at first: --help shows their defaults."""
    argv = sys.argv[1:] if argv is None else argv
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for name, default in (("--task", None), ("--preset", "auto"), ("--setting", SETTINGS[0]), ("--resume", None),
                          ("--eval", None)):
        first.add_argument(name, default=default)
    known, _ = first.parse_known_args(argv)
    if known.resume and known.eval:
        raise UserError("--resume goes on with a run, --eval tests one: give one of them")
    if known.resume or known.eval:
        stored = read_args(known.resume or known.eval) | {"overwrite": False}
        fields = {field.name for field in dataclasses.fields(cls)}
        defaults = cls(**{name: value for name, value in stored.items() if name in fields})
        if known.task not in (None, defaults.task):
            raise UserError(f"{known.resume or known.eval} is a run of task {defaults.task}, not of {known.task}")
    else:
        task = known.task or cls.task
        if task not in envs.TASKS:
            raise UserError(f"unknown task '{task}'; tasks: {', '.join(envs.TASKS)}")
        preset = known.preset if known.preset in envs.PRESETS else "auto"      # tyro refuses an unknown one
        setting = known.setting if known.setting in SETTINGS else SETTINGS[0]
        defaults = preset_defaults(cls, task, resolve_preset(preset)[0], setting)
        defaults.preset = preset
    args = tyro.cli(cls, args=argv, default=defaults, description=sys.modules[cls.__module__].__doc__)
    args.preset = defaults.preset if args.preset == "auto" else args.preset      # a run's own, on any machine
    check_kept(known.resume, args, defaults, KEPT if known.resume else ())
    return args


def preset_defaults(cls, task, preset, setting=SETTINGS[0]):
    """The preset's values, except where a method declares an argument of the loop anew: its own default wins."""
    settings = {"setting": setting} | envs.settings(task, preset, setting)
    own = {name for name in vars(cls).get("__annotations__", ()) if any(hasattr(base, name) for base in cls.__bases__)}
    fields = {field.name for field in dataclasses.fields(cls)} - own
    return cls(task=task, **{name: value for name, value in settings.items() if name in fields})


def resolve_preset(preset):
    if preset != "auto":
        return preset, "as asked"
    if torch.cuda.is_available():
        return "paper", "a GPU is present"
    return "cpu", "no GPU found"


# The numbers, of every method, that need not be above 0 or may be infinite, and those that may be anything finite.
LEAST = dict(temperature=1e-6, clip=0.0, guidance=0.0, pessimism=0.0, rollouts=0, threads=0, seed=0, pretrain_steps=0,
             warmup_steps=0, ratio_clip=1e-9, target_kl=1e-9, alpha=0.0, subset=0, bc_weight=0.0, chi2=0.0, entropy=0.0,
             gae_lambda=0.0)
FREE = ("reward_offset", "target_entropy")


def validate(args):
    """Refuse what could only fail later, after something was written."""
    check_numbers(args, LEAST, FREE)
    if getattr(args, "min_std", 0) > getattr(args, "max_std", math.inf):
        raise UserError(f"--min-std must be at most --max-std, got {args.min_std} and {args.max_std}")
    if getattr(args, "capacity", args.horizon) < args.horizon:
        raise UserError(f"--capacity {args.capacity} cannot hold one chunk of --horizon {args.horizon} steps")
    if getattr(args, "checkpoint", None) and args.setting == "online":
        raise UserError("--setting online begins with an untrained policy: leave out --checkpoint")
    if getattr(args, "ray", None) and not args.rollouts:
        raise UserError("--ray needs the number of its workers: --rollouts N")


def keep_memory():
    """Let the C library keep freed memory instead of returning it: activations would be mapped anew in every update.

    A fifth of an update on a processor. glibc only; elsewhere nothing happens.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt:
        mallopt(-3, 32 << 20)        # M_MMAP_THRESHOLD: its highest value; larger blocks are still mapped one by one
        mallopt(-1, 1 << 30)         # M_TRIM_THRESHOLD: free bytes kept at the end of the heap


def setup(args):
    """Device, precision and seeds, said aloud. Returns the device."""
    validate(args)
    preset, why = resolve_preset(args.preset)
    device = usable_device(args.device)
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.precision == "auto":
        fast = device.type == "cuda" or (device.type == "cpu" and torch.cpu._is_avx512_bf16_supported())
        args.precision = "bfloat16" if fast else "float32"
    args.preset = preset
    keep_memory()
    torch.manual_seed(args.seed)
    print(f"task {args.task}, preset {preset} ({why}), {device.type}, {args.precision}, "
          f"{torch.get_num_threads()} threads, seed {args.seed}", flush=True)
    return device


# ---- what both stages share ------------------------------------------------------------------------------------------

class Acting:
    """policy(obs (1, D), rng) -> chunk (H, A): the callable that the environments run. Picklable, noise from `rng`.

    Without a critic it is a draw from the policy. With one it is a draw from the particle posterior: the E-step used
    for acting, candidates weighed by the critic (ours).
    """

    def __init__(self, policy, critic=None, num_candidates=1, temperature=1.0, pessimism=0.0):
        self.policy, self.critic, self.temperature, self.pessimism = policy, critic, temperature, pessimism
        self.num_candidates = num_candidates if critic is not None else 1

    def to(self, device):
        """Move the networks, which a worker process wants on the CPU."""
        self.policy.to(device)
        if self.critic is not None:
            self.critic.to(device)
        return self

    @torch.no_grad()
    def __call__(self, obs, rng):
        policy, n = self.policy, self.num_candidates
        obs = torch.as_tensor(obs, device=policy.obs_mean.device)
        noise = rng.standard_normal((1, n, policy.horizon, policy.action_dim), dtype=np.float32)
        chunks = policy.sample(policy.encode(obs), n, noise=torch.as_tensor(noise, device=obs.device))   # (1, n, H, A)
        pick = 0
        if self.critic is not None:
            q = aggregate(self.critic(obs, chunks), self.pessimism)                                          # (1, n)
            weights = posterior_weights(q, self.temperature)[0].cpu().double().numpy()      # MPS has no float64
            pick = rng.choice(n, p=weights / weights.sum())
        return chunks[0, pick].cpu().numpy()


@plainly()
def demonstrations(args):
    """Transitions as arrays; args.data then names their file."""
    path = demos.obtain(args.task, args.preset, args.data, args.demo_episodes, args.seed, args.workers)
    args.data = str(path)
    data, world = demos.load(path, args.task, args.demo_episodes), environment(args)
    if world["env_args"]:
        envs.make_env(args.task, **world).close()            # refuses another simulator's file now, not after stage I
    return data


@plainly()
def environment(args):
    """Arguments of make_env and Evaluator: with the simulator's settings of a file that was not made here."""
    own = args.data is None or Path(args.data) == demos.made(args.task, args.demo_episodes, args.seed)
    return {"episode_limit": args.episode_limit, "env_args": None if own else demos.env_args(args.data, args.task)}


def make_policy(args, device, data=None):
    """An untrained policy; with demonstrations it standardises observations by their statistics."""
    task = envs.TASKS[args.task]
    policy = FlowPolicy(task.obs_dim, task.action_dim, args.horizon, args.hidden, args.layers, args.flow_steps)
    if data is not None and args.normalize:
        obs = torch.as_tensor(data["obs"])
        std = obs.std(0)          # what hardly moves in the demonstrations, a cube to be left alone, may move later
        policy.set_normalizer(obs.mean(0), std.clamp(min=max(1e-3, 0.1 * std.median().item())))
    return policy.to(device)


def run_evaluation(evaluator, acting, episodes, where="evaluation", left="No result was written"):
    """EvalResult of the first `episodes` evaluation seeds."""
    try:
        return evaluator.run(acting.to("cpu"), episodes, EVAL_SEED)
    except (ValueError, RuntimeError, ImportError) as error:     # a non-finite action, a dead worker, another simulator
        raise UserError(f"{where}: {error}. {left}") from error


def record_result(book, step, acting, result):
    rows = zip(result.seed, result.success, result.length, result.episode_return)
    book.evaluation(step, acting, [dict(zip(("seed", "success", "length", "return"), row)) for row in rows])


def video(args, acting, folder):
    """Four evaluation episodes as folder/policy.mp4."""
    try:
        envs.record(acting.to("cpu"), args.task, folder / "policy.mp4", 4, EVAL_SEED, **environment(args))
    except (ImportError, RuntimeError, OSError) as error:
        raise UserError(f"no video, everything else in {folder} is complete: {error}") from error
    print(f"{folder}/policy.mp4")


EVAL_SEED = 1_000_000     # evaluation episodes are the same for every run and method; training never draws these seeds


# ---- stage I ---------------------------------------------------------------------------------------------------------

def pretrain(args, data, device, book, state=None):
    """Minimise Eq. 24 on the demonstrations. Returns the policy, or None if the user interrupted."""
    torch.manual_seed(args.seed)
    capacity, sizes = max(len(data["obs"]), args.horizon), (data["obs"].shape[1], data["action"].shape[1])
    replay = ChunkReplay(capacity, *sizes, args.horizon, 1.0, device)
    replay.extend(data)
    policy = make_policy(args, device, data)
    optimizer = torch.optim.Adam(policy.head_parameters(), lr=args.learning_rate, fused=device.type != "mps")
    generator = torch.Generator(device).manual_seed(args.seed)
    start, clock, total, summed = 0, Clock(), torch.zeros((), device=device), 0       # the loss since the last row
    timed, seconds = 0, 0.0                                                      # the updates and their time since then
    if state is not None:
        with fitting(book.folder):
            policy.load_state_dict(state["policy"])
            optimizer.load_state_dict(state["optimizer"])
            generator.set_state(state["generator"])
            restore_noise(state["torch_rng"], device)
            start, total, summed = state["step"], state["loss"].to(device), state["summed"]
            if "seconds" in state:                                               # older checkpoints do not tell
                timed, seconds = summed, state["seconds"]

    def save(step):
        refuse_nonfinite(policy.state_dict(), "policy", f"before step {step}; {book.last_good()}. Check the "
                         "demonstrations, or lower --learning-rate")
        book.save("last.pt", {"step": step, "policy": policy.state_dict(), "optimizer": optimizer.state_dict(),
                              "generator": generator.get_state(), "torch_rng": noise_state(device),
                              "loss": total, "summed": summed, "seconds": seconds})

    if args.pretrain_steps == 0:
        save(0)
    every = max(args.pretrain_steps // 20, 1)
    with Interrupt() as interrupt, Progress("stage I", args.pretrain_steps, every, start, start, "steps") as bar:
        for step in range(start + 1, args.pretrain_steps + 1):
            with clock("update"):
                batch = replay.sample(args.batch_size, generator)
                loss = policy.cfm_loss(policy.encode(batch.obs), batch.chunk[:, None], batch.valid).mean()   # Eq. 24
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                optimizer.step()
                total, summed, timed = total + loss.detach(), summed + 1, timed + 1
            report, stop = step % every == 0 or step == args.pretrain_steps, interrupt.stop
            if report or stop:
                seconds += clock.split()["update"]
            if report:
                mean = total.item() / summed
                if not np.isfinite(mean):
                    raise UserError(f"the loss became {mean} before step {step}; {book.last_good()}. Check the "
                                    "demonstrations, or lower --learning-rate")
                book.log(step, bc=mean, updates_per_s=timed / seconds, **{"time/update": seconds})
                total, summed, timed, seconds = torch.zeros_like(total), 0, 0, 0.0
            if report or stop:
                save(step)
            bar.update(step, step)
            if stop:
                print(f"stage I saved at step {step} in {book.folder}")
                return None
    return policy


def stage_one(args, device, data=None):
    """The policy and logbook of the run folder's stage I, trained or finished first if need be. None if interrupted.

    data: the demonstrations, where stage II has read them already; errors then name stage II's flags.
    """
    within_stage_two = data is not None
    chunks = f"-h{args.horizon}" if args.horizon != Args.horizon else ""         # another policy, another run
    folder = Path(args.resume or args.run_dir or f"runs/{args.task}-bc{chunks}-s{args.seed}")
    data, state = data if within_stage_two else demonstrations(args), None
    stored = dataclasses.asdict(args) | {"method": "bc"}
    if args.resume or ((folder / "last.pt").is_file() and not args.overwrite):
        book = Logbook.resume(folder, COLUMNS, task=args.task, method="bc")
        same = ("data", "demo_episodes", "horizon", "hidden", "layers", "flow_steps", "batch_size", "learning_rate",
                "normalize", "pretrain_steps", "seed")
        changed = [name for name in same if book.args.get(name) != stored[name]
                   and not (args.resume and name == "pretrain_steps")]           # resuming may train for longer
        if changed:
            raise UserError(f"{folder} was trained with another {', '.join(changed)}: " + (
                "remove it, or train one beside it with train_offline.py --run-dir DIR and give --checkpoint DIR here"
                if within_stage_two else
                "choose another folder with --run-dir DIR or replace it with --overwrite"))
        state = book.load("last.pt")
        with fitting(folder):
            check_end(folder, state["step"], args, "pretrain_steps")
            book.rewind(state["step"])
        if state["step"] < args.pretrain_steps or not within_stage_two:          # a finished one is evaluated anew
            book.amend(stored)
        print(f"{folder}: stage I at step {state['step']} of {args.pretrain_steps}", flush=True)
    else:
        book = Logbook.create(folder, stored, COLUMNS, overwrite=args.overwrite)
    policy = pretrain(args, data, device, book, state)
    book.close()
    if policy is None:
        print("the same command goes on from there" if within_stage_two else f"continue with --resume {folder}")
        return None
    return policy, book


def load_policy(args, device, data):
    """The policy of stage II's start: untrained (online), from args.checkpoint, or trained now. None if interrupted."""
    if args.setting == "online":
        return make_policy(args, device, data)
    if args.checkpoint is None:
        offline = Args(**{field.name: getattr(args, field.name) for field in dataclasses.fields(Args)})
        offline.run_dir, offline.resume, offline.overwrite = None, None, False
        done = stage_one(offline, device, data)
        return None if done is None else done[0]
    policy = make_policy(args, device)
    with fitting(args.checkpoint, "use the same --task, --preset, --hidden, --layers and --horizon in both stages"):
        policy.load_state_dict(load_checkpoint(args.checkpoint)["policy"])
    return policy


def evaluate(args, policy):
    with envs.Evaluator(args.task, args.workers, **environment(args)) as evaluator:
        result = run_evaluation(evaluator, Acting(policy), args.eval_episodes)
    print(f"behaviour cloning: success {result}")
    return result


def main(argv=None):
    args = parse(Args, argv)
    device = setup(args)
    if args.eval:
        read_args(args.eval, method="bc")
        policy = make_policy(args, device)
        with fitting(args.eval):
            policy.load_state_dict(load_checkpoint(args.eval)["policy"])
        evaluate(args, policy)
        if args.video:
            video(args, Acting(policy), Path(args.eval))
        return
    done = stage_one(args, device)
    if done is None:
        return
    policy, book = done
    result = evaluate(args, policy)
    record_result(book, args.pretrain_steps, "policy", result)
    print(f"{curve(book.folder)}; next: python train_online.py --task {args.task} --checkpoint {book.folder}/last.pt")
    if args.video:
        video(args, Acting(policy), book.folder)


if __name__ == "__main__":
    cli(main)
