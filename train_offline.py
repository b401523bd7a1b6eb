"""Stage I: behaviour cloning of demonstrations with the flow-matching loss (Sec. IV-C1, Eq. 24).

    python train_offline.py --task lift               # 20 scripted demonstrations, about a minute
    python train_offline.py --task lift --data FILE   # your own, as robomimic HDF5 or npz
    python train_offline.py --resume runs/lift-bc-s0  # continues an interrupted run exactly
    python train_offline.py --eval runs/lift-bc-s0    # evaluates its checkpoint

Writes runs/<task>-bc-s<seed>/: args.json, progress.csv, eval.csv, TensorBoard events, last.pt and
curve.png. `python train_online.py` runs this stage by itself when it is given no checkpoint.
Not here: reinforcement learning (train_online.py), where demonstrations come from (demos/).
"""

import contextlib
import ctypes
import dataclasses
import functools
import hashlib
import json
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import gymnasium
import numpy as np
import torch
from torch import Tensor, nn

import demos
import envs
from chunk_critic import aggregate
from flow_policy import FlowPolicy
from logbook import (
    Clock,
    Interrupt,
    Logbook,
    Progress,
    UserError,
    check_end,
    cli,
    curve,
    keep_rate,
    load_checkpoint,
    must_fit,
    noise_state,
    read_args,
    refuse_nonfinite,
    restore_noise,
    usable_device,
    user_errors,
)
from logbook.options import Count, CountOrZero, Positive, Seed, Width, parse
from poco import posterior_weights
from replay import FIELDS, Batch, ChunkReplay

EVAL_SEED = 1_000_000  # evaluation episodes are the same for all; training never draws these seeds


@dataclass
class Args:
    """What stage I can be asked."""

    task: str = "lift"  # of the table, or a gymnasium id: Reacher-v5, my_module:MyEnv-v0
    preset: Literal["auto", "cpu", "paper"] = "auto"  # paper: Tables II/III; cpu: minutes
    seed: Seed = 0  # of demonstrations, networks, batches and training episodes
    data: str | None = None  # demonstrations: npz, HDF5 or minari:ID; default: made or downloaded
    demo_episodes: CountOrZero = 20  # how many to make, or to use of the file; 0: from scratch
    obs_keys: tuple[str, ...] = ()  # observations of an HDF5 file; default: the task's
    filter_key: str | None = None  # use the demonstrations of this mask of an HDF5 file
    clip_actions: bool = False  # accept recorded actions beyond [-1, 1] and clip them
    success_key: str | None = None  # of a gymnasium task's info; default: success or is_success
    episode_limit: Count = 300  # steps after which an episode is truncated
    horizon: Count = 5  # H, actions per chunk, executed open loop
    hidden: Width = 512  # width of the hidden layers of every network
    layers: Width = 4  # hidden layers of every network
    flow_steps: Count = 10  # K, Euler steps from noise to a chunk
    batch_size: Count = 256  # chunks per update
    learning_rate: Positive = 3e-4  # Adam, in stage I
    normalize: bool = True  # standardise observations by the demonstrations' statistics (ours)
    pretrain_steps: CountOrZero = 100_000  # gradient steps of stage I
    eval_episodes: Count = 50  # episodes per evaluation, always the same seeds
    workers: Count = 2  # processes that evaluate and make demonstrations
    device: str = "auto"  # cpu, cuda, mps; auto takes the best one
    threads: CountOrZero = 0  # CPU threads for torch; 0 leaves the choice to torch
    precision: Literal["auto", "float32", "bfloat16"] = "auto"  # of policy and E-step in stage II
    run_dir: str | None = None  # where to write; default runs/<task>-<method>-s<seed>
    overwrite: bool = False  # replace a run that is already in run_dir
    resume: str | None = None  # continue this run folder exactly where it stopped
    eval: str | None = None  # only evaluate this run folder's checkpoint
    video: bool = False  # also write an mp4 of evaluation episodes (needs OpenGL)

    # A resumed run keeps these. Stage I is trained anew, in another folder, where one of the second
    # tuple differs. A method's own values per preset come after the task's.
    kept: ClassVar[tuple[str, ...]] = ("preset", "seed", "demo_episodes", "normalize")
    cloning_settings: ClassVar[tuple[str, ...]] = (
        "data",
        "demo_episodes",
        "horizon",
        "hidden",
        "layers",
        "flow_steps",
        "batch_size",
        "learning_rate",
        "normalize",
        "pretrain_steps",
        "seed",
    )
    presets: ClassVar[dict[str, dict[str, Any]]] = {}

    @classmethod
    def defaults(cls, known: dict[str, str | None]) -> dict[str, Any]:
        """Return the values that --task, --preset and --setting stand for."""
        with user_errors():
            task = envs.get_task(known["task"] or cls.task)
        preset = known["preset"] if known["preset"] in ("cpu", "paper") else "auto"
        setting = "online" if known["setting"] == "online" else "offline-to-online"
        resolved, _ = resolve_preset(preset)
        values = {"task": task.name, "preset": preset, "setting": setting}
        values |= cls.task_values(task, resolved, setting)
        values |= cls.presets.get(resolved, {})
        if values["episode_limit"] is None:  # the environment has none: the default holds
            del values["episode_limit"]
        names = {field.name for field in dataclasses.fields(cls)}
        return {name: value for name, value in values.items() if name in names}

    @classmethod
    def task_values(cls, task: envs.Task, preset: str, setting: str) -> dict[str, Any]:
        """Return the task's own values (a script with tables of its own overrides this)."""
        return envs.settings(task, preset, setting)


# ---- what both stages share ----------------------------------------------------------------------


class Acting:
    """Choose a chunk: obs (1, D) and a numpy generator -> chunk (H, A). Picklable.

    Without a critic it draws from the policy. With one it draws from the particle posterior: the
    E-step used for acting, candidates weighed by the critic (ours).
    """

    def __init__(
        self,
        policy: nn.Module,
        critic: nn.Module | None = None,
        num_candidates: int = 1,
        temperature: float = 1.0,
        pessimism: float = 0.0,
    ):
        self.policy = policy
        self.critic = critic
        self.num_candidates = 1 if critic is None else num_candidates
        self.temperature = temperature
        self.pessimism = pessimism
        self.rng = np.random.default_rng()

    def to(self, device: str | torch.device) -> "Acting":
        """Move the networks: a worker process wants them on the CPU."""
        self.policy.to(device)
        if self.critic is not None:
            self.critic.to(device)
        return self

    def act(self, obs: np.ndarray) -> np.ndarray:
        """Choose a chunk (H, A) for one observation (D,)."""
        return self(np.asarray(obs, dtype=np.float32)[None], self.rng)

    @torch.no_grad()
    def __call__(self, obs: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        policy = self.policy
        shape = (1, self.num_candidates, policy.horizon, policy.action_dim)
        noise = torch.as_tensor(rng.standard_normal(shape, dtype=np.float32), device=policy.device)
        context = policy.encode(torch.as_tensor(obs, device=policy.device))
        chunks = policy.sample(context, self.num_candidates, noise=noise)  # (1, N, H, A)
        if self.critic is None:
            return chunks[0, 0].cpu().numpy()
        q = aggregate(self.critic(policy.critic_obs(context), chunks), self.pessimism)  # (1, N)
        weights = posterior_weights(q, self.temperature)[0].cpu().double().numpy()
        pick = rng.choice(self.num_candidates, p=weights / weights.sum())
        return chunks[0, pick].cpu().numpy()


class Simulation:
    """Where a policy acts and what it starts from: one task in its simulator.

    vla_head.py has another with the same members, for policies that see pictures.
    """

    policy_class: type[nn.Module] = FlowPolicy  # examples/diffusion.py has another
    stage_one = "bc"  # stage I's name in run folders
    method = None  # stage II's, where it is not the agent's

    def __init__(self, args: Any):
        self.args = args
        with user_errors():
            self.task = envs.get_task(args.task, args.success_key)
        self.obs_dim = self.task.obs_dim
        self.action_dim = self.task.action_dim

    def demonstrations(self) -> dict[str, np.ndarray]:
        """Make, find or download the demonstrations and read them; args.data then names the file.

        Returns obs (T, D), action (T, A), reward, next_obs, terminated and truncated.
        """
        args = self.args
        if args.demo_episodes == 0:
            return no_demonstrations(self.obs_dim, self.action_dim)
        with user_errors():
            path = demos.obtain(
                self.task, args.preset, args.data, args.demo_episodes, args.seed, args.workers
            )
            args.data = str(path)
            data = demos.load(
                path,
                self.task,
                args.demo_episodes,
                args.obs_keys or None,
                args.filter_key,
                args.clip_actions,
            )
            with contextlib.closing(self.make_env()) as env:  # refuses another simulator's file
                demos.refuse_implausible(path, data, env)
        return data

    def make_policy(self, device: torch.device, data: dict | None = None) -> nn.Module:
        """Build an untrained policy that standardises observations by the data's statistics."""
        args = self.args
        policy = self.policy_class(
            self.obs_dim, self.action_dim, args.horizon, args.hidden, args.layers, args.flow_steps
        )
        if data is not None and len(data["obs"]) and args.normalize:
            obs = torch.as_tensor(data["obs"])
            std = obs.std(0)
            # Floor the deviation: a cube that is static in the demonstrations may move online.
            floor = max(1e-3, 0.1 * std.median().item())
            policy.set_normalizer(obs.mean(0), std.clamp(min=floor))
        return policy.to(device)

    def make_env(self, render_mode: str | None = None) -> gymnasium.Env:
        """Build the environment that collects."""
        return envs.make_env(
            self.task,
            render_mode=render_mode,
            episode_limit=self.args.episode_limit,
            env_args=self.recorded_world,
        )

    def make_eval_env(self, render_mode: str | None = None) -> gymnasium.Env:
        """Build the environment that evaluates."""
        return self.make_env(render_mode)

    def identity(self) -> dict[str, Any]:
        """Return what a resumed run must find unchanged, besides its arguments."""
        return {}

    @functools.cached_property
    def recorded_world(self) -> dict | None:
        """The simulator's settings in a data file that was not made here, None otherwise."""
        args = self.args
        if args.data is None:
            return None
        if Path(args.data) == demos.made(self.task, args.demo_episodes, args.seed):
            return None
        with user_errors():
            return demos.env_args(args.data, self.task)


def no_demonstrations(obs_dim: int, action_dim: int) -> dict[str, np.ndarray]:
    """Return demonstrations of no step, for a run from scratch."""
    widths = {"obs": (0, obs_dim), "action": (0, action_dim), "next_obs": (0, obs_dim)}
    return {name: np.zeros(widths.get(name, (0,)), np.float32) for name in FIELDS}


def resolve_preset(preset: str) -> tuple[str, str]:
    """Return the preset that "auto" stands for on this machine, and why."""
    if preset != "auto":
        return preset, "as asked"
    if torch.cuda.is_available():
        return "paper", "a GPU is present"
    return "cpu", "no GPU found"


def policy_state(policy: nn.Module) -> dict[str, Any]:
    """Return what a checkpoint needs to rebuild a policy: its class, sizes and weights."""
    return {"kind": type(policy).__name__, "sizes": policy.sizes(), "policy": policy.state_dict()}


def setup(args: Any) -> torch.device:
    """Choose and print preset, device, precision and seed. Returns the device."""
    args.preset, why = resolve_preset(args.preset)
    device = usable_device(args.device)
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.precision == "auto":
        fast_cpu = device.type == "cpu" and torch.cpu._is_avx512_bf16_supported()
        args.precision = "bfloat16" if fast_cpu or device.type == "cuda" else "float32"
    keep_freed_memory()
    torch.manual_seed(args.seed)
    print(
        f"task {args.task}, preset {args.preset} ({why}), {device.type}, {args.precision}, "
        f"{torch.get_num_threads()} threads, seed {args.seed}",
        flush=True,
    )
    return device


def keep_freed_memory() -> None:
    """Let the C library keep freed memory, which saves a fifth of an update on a CPU.

    Otherwise every update maps its activations anew. glibc only; elsewhere nothing happens.
    """
    if sys.platform != "linux":
        return
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except AttributeError:  # another C library
        return
    mallopt(-3, 32 << 20)  # M_MMAP_THRESHOLD at its highest: only larger blocks are mapped singly
    mallopt(-1, 1 << 30)  # M_TRIM_THRESHOLD: free bytes kept at the end of the heap


def adam(parameters, rate: float) -> torch.optim.Adam:
    """Build an Adam whose rate is this run's, also after it is loaded from a checkpoint."""
    parameters = list(parameters)
    fused = parameters[0].device.type != "mps"
    return keep_rate(torch.optim.Adam(parameters, lr=rate, fused=fused))


def minimise(loss: Tensor, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    optimizer.step()


def run_evaluation(
    evaluator: envs.Evaluator,
    acting: Callable,
    episodes: int,
    advice: str = "No result was written",
) -> envs.EvalResult:
    """Evaluate on the first `episodes` evaluation seeds. Raises UserError if an episode fails."""
    try:
        return evaluator.run(acting.to("cpu"), episodes, EVAL_SEED)
    except (ValueError, RuntimeError, ImportError) as error:  # a non-finite action, a dead worker
        raise UserError(f"the evaluation failed: {error}. {advice}") from error


def record_result(book: Logbook, step: int, acting: str, result: envs.EvalResult) -> None:
    """Write one row of eval.csv per episode."""
    columns = zip(result.seed, result.success, result.length, result.episode_return)
    names = ("seed", "success", "length", "return")
    book.evaluation(step, acting, [dict(zip(names, row)) for row in columns])


def video(simulation: Simulation, acting: Callable, folder: Path) -> None:
    """Record four evaluation episodes as folder/policy.mp4."""
    path = folder / "policy.mp4"
    try:
        envs.record(acting.to("cpu"), simulation.make_env, path, episodes=4, seed=EVAL_SEED)
    except (ImportError, RuntimeError, OSError) as error:
        raise UserError(f"no video, everything else in {folder} is complete: {error}") from error
    print(path)


# ---- stage I -------------------------------------------------------------------------------------

COLUMNS = ["bc", "updates_per_s", "time/update"]


def cloning_loss(policy, batch: Batch) -> Tensor:
    """Compute the flow-matching loss of replayed chunks, masked where their episodes end."""
    context = policy.encode(batch.obs)
    return policy.cfm_loss(context, batch.chunk.unsqueeze(1), batch.valid).mean()  # Eq. 24


class Cloning:
    """Policy, optimiser and demonstrations of stage I, and all that resuming it needs."""

    def __init__(self, args: Any, policy: nn.Module, data: dict, device: torch.device):
        steps, obs_dim = data["obs"].shape
        self.args = args
        self.policy = policy
        self.optimizer = adam(policy.head_parameters(), args.learning_rate)
        self.generator = torch.Generator(device).manual_seed(args.seed)
        self.replay = ChunkReplay(
            max(steps, args.horizon), obs_dim, data["action"].shape[1], args.horizon, 1.0, device
        )
        self.replay.extend(data)
        self.step = 0
        self.loss = torch.zeros((), device=device)  # summed since the last row of progress.csv
        self.seconds = 0.0  # since then

    def update(self) -> None:
        batch = self.replay.sample(self.args.batch_size, self.generator)
        loss = cloning_loss(self.policy, batch)
        minimise(loss, self.optimizer)
        self.loss += loss.detach()
        self.step += 1

    def state_dict(self) -> dict[str, Any]:
        return {
            "step": self.step,
            **policy_state(self.policy),
            "optimizer": self.optimizer.state_dict(),
            "generator": self.generator.get_state(),
            "torch_rng": noise_state(self.replay.device),
            "loss": self.loss,
            "seconds": self.seconds,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.policy.load_state_dict(state["policy"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.generator.set_state(state["generator"])
        restore_noise(state["torch_rng"], self.replay.device)
        self.step = state["step"]
        self.loss = state["loss"].to(self.replay.device)
        self.seconds = state["seconds"]


def pretrain(cloning: Cloning, book: Logbook) -> bool:
    """Minimise Eq. 24 for pretrain_steps. Returns False if the user interrupted."""
    total = cloning.args.pretrain_steps
    every = max(total // 20, 1)
    clock = Clock()
    if total == 0:
        save_cloning(cloning, book)
    start = cloning.step
    with (
        Interrupt() as interrupt,
        Progress("stage I", total, every, start, start, "steps") as bar,
    ):
        while cloning.step < total:
            with clock("update"):
                cloning.update()
            step = cloning.step
            row_due = step % every == 0 or step == total
            stop = interrupt.stop  # read once: a signal may arrive at any moment
            if row_due or stop:
                cloning.seconds += clock.split()["update"]
            if row_due:
                log_cloning(cloning, book, since=(step - 1) // every * every)
            if row_due or stop:
                save_cloning(cloning, book)
            bar.update(step, step)
            if stop and step < total:
                print(f"stage I saved at step {step} in {book.folder}")
                return False
    return True


def log_cloning(cloning: Cloning, book: Logbook, since: int) -> None:
    """Write a row of progress.csv with the mean loss since that step."""
    count = cloning.step - since
    mean = cloning.loss.item() / count
    if not math.isfinite(mean):
        raise UserError(
            f"the loss became {mean} before step {cloning.step}; {book.last_good()}. Check the "
            "demonstrations, or lower --learning-rate"
        )
    rate = count / cloning.seconds
    book.log(cloning.step, bc=mean, updates_per_s=rate, **{"time/update": cloning.seconds})
    cloning.loss.zero_()
    cloning.seconds = 0.0


def save_cloning(cloning: Cloning, book: Logbook) -> None:
    state = cloning.state_dict()
    advice = "Check the demonstrations, or lower --learning-rate"
    when = f"before step {cloning.step}; {book.last_good()}. {advice}"
    refuse_nonfinite(state["policy"], "policy", when)
    book.save("last.pt", state)


def cloning_folder(args: Any, name: str, demonstrations: dict[str, Any]) -> Path:
    """Return stage I's run folder. Other settings get one beside it, named by their digest."""
    plain = Path(f"runs/{args.task}-{name}-s{args.seed}")
    if not (plain / "args.json").is_file():
        return plain
    stored = read_args(plain)
    wanted = {field: vars(args)[field] for field in args.cloning_settings}
    wanted["demonstrations"] = demonstrations
    if all(stored.get(field) == value for field, value in wanted.items()):
        return plain
    text = json.dumps(wanted, sort_keys=True)
    return plain.with_name(f"{plain.name}-{hashlib.sha256(text.encode()).hexdigest()[:8]}")


def stage_one(
    args: Any, simulation: Simulation, device: torch.device, data: dict | None = None
) -> tuple[nn.Module, Logbook] | None:
    """Train, finish or find stage I. Returns the policy and its logbook, None if interrupted.

    data: the demonstrations, where stage II has read them already.
    """
    within_stage_two = data is not None
    if data is None:
        data = simulation.demonstrations()
    if len(data["obs"]) == 0:
        raise UserError("stage I clones demonstrations: --demo-episodes must be at least 1")
    identity = {"demonstrations": demos.fingerprint(data)} | simulation.identity()
    given = None if within_stage_two else args.resume or args.run_dir
    if given:
        folder = Path(given)
    else:
        folder = cloning_folder(args, simulation.stage_one, identity["demonstrations"])
    resumed = args.resume if not within_stage_two else None
    overwrite = args.overwrite and not within_stage_two
    stored = dataclasses.asdict(args) | identity | {"method": simulation.stage_one}
    if within_stage_two:
        stored |= {"run_dir": None, "resume": None, "overwrite": False}
    torch.manual_seed(args.seed)
    cloning = Cloning(args, simulation.make_policy(device, data), data, device)
    if resumed or ((folder / "last.pt").is_file() and not overwrite):
        book = resume_cloning(args, folder, cloning, stored, resumed is not None)
        if cloning.step < args.pretrain_steps or not within_stage_two:
            book.amend(stored)
        print(f"{folder}: stage I at step {cloning.step} of {args.pretrain_steps}", flush=True)
    else:
        book = Logbook.create(folder, stored, COLUMNS, overwrite=overwrite)
    finished = pretrain(cloning, book)
    book.close()
    if not finished:
        hint = "the same command" if within_stage_two else f"--resume {folder}"
        print(f"continue with {hint}")
        return None
    return cloning.policy, book


def resume_cloning(
    args: Any, folder: Path, cloning: Cloning, stored: dict[str, Any], longer: bool
) -> Logbook:
    """Load an earlier stage I into `cloning`; longer: it may train for more steps than before."""
    book = Logbook.resume(folder, COLUMNS, task=args.task, method=stored["method"])
    for name in args.cloning_settings:
        if longer and name == "pretrain_steps":
            continue
        if book.args.get(name) != stored[name]:
            raise UserError(
                f"{folder} was trained with another {name}, {book.args.get(name)}: choose another "
                "folder with --run-dir DIR, or replace it with --overwrite"
            )
    refuse_other_identity(book, {"demonstrations": stored["demonstrations"]})
    with must_fit(folder):
        cloning.load_state_dict(book.load("last.pt"))
        check_end(folder, cloning.step, args, "pretrain_steps")
        book.rewind(cloning.step)
    return book


def refuse_other_identity(book: Logbook, identity: dict[str, Any]) -> None:
    """Refuse to continue a run with other demonstrations or another backbone than it began with."""
    for name, now in identity.items():
        then = book.args.get(name, now)
        if then == now:
            continue
        if name == "demonstrations":
            raise UserError(
                f"{book.folder}: the demonstrations have changed, {then['steps']} steps of "
                f"{then['episodes']} episodes then, {now['steps']} of {now['episodes']} now: "
                "put the old file back, or start a new run with --run-dir DIR"
            )
        raise UserError(f"{book.folder} was begun with another {name}: {then} then, {now} now")


def load_cloned(path: str | Path, simulation: Simulation, device: torch.device) -> nn.Module:
    """Load stage I's policy from a checkpoint or a run folder."""
    policy = simulation.make_policy(device)
    advice = "use the same --task, --preset, --hidden, --layers and --horizon in both stages"
    with must_fit(path, advice):
        policy.load_state_dict(load_checkpoint(path)["policy"])
    return policy


def evaluate(args: Any, simulation: Simulation, policy: nn.Module) -> envs.EvalResult:
    with envs.Evaluator(simulation.make_eval_env, args.workers) as evaluator:
        result = run_evaluation(evaluator, Acting(policy), args.eval_episodes)
    print(f"behaviour cloning: success {result}")
    return result


def main(argv: list[str] | None = None) -> None:
    args = parse(Args, argv, method=Simulation.stage_one)
    device = setup(args)
    simulation = Simulation(args)
    if args.eval:
        policy = load_cloned(args.eval, simulation, device)
        evaluate(args, simulation, policy)
        folder = Path(args.eval)
    else:
        done = stage_one(args, simulation, device)
        if done is None:
            return
        policy, book = done
        result = evaluate(args, simulation, policy)
        record_result(book, args.pretrain_steps, "policy", result)
        folder = book.folder
        print(
            f"{curve(folder)}; next: python train_online.py --task {args.task} "
            f"--checkpoint {folder}/last.pt"
        )
    if args.video:
        video(simulation, Acting(policy), folder)


if __name__ == "__main__":
    cli(main)
