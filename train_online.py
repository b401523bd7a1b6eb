"""Stage II: critic warm-up, then POCO online (Sec. IV-C2, Algorithm 1).

    python train_online.py --task lift                  # all of Algorithm 1: 9 minutes on a laptop
    python train_online.py --task lift --act posterior  # collects from the posterior (ours)
    python train_online.py --task lift --rollouts 1     # acts in a second process meanwhile
    python train_online.py --resume runs/lift-poco-s0   # continues an interrupted run exactly
    python train_online.py --eval runs/lift-poco-s0 --video       # evaluates its checkpoint
    from train_online import load_policy
    chunk = load_policy("runs/lift-poco-s0/best.pt").act(obs)     # obs (D,) -> chunk (H, A)

Runs stage I first where no checkpoint is given. Writes runs/<task>-poco-s<seed>/: args.json,
progress.csv, eval.csv, TensorBoard events, last.pt, best.pt and curve.png.
Below: POCO's update, then a loop that knows only an agent. A baseline is a file with such an agent
(baselines/), a VLA another policy and an environment that sees (vla_head.py).
Not here: the E-step and the M-step (poco.py), the networks (flow_policy.py, chunk_critic.py).
"""

import contextlib
import copy
import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor, nn

import demos
import envs
from chunk_critic import ChunkCritic, aggregate, critic_loss, ema_update, td_target
from flow_policy import FlowPolicy
from logbook import (
    Clock,
    Interrupt,
    Logbook,
    Progress,
    Report,
    UserError,
    check_end,
    cli,
    curve,
    load_checkpoint,
    must_fit,
    noise_state,
    read_args,
    refuse_nonfinite,
    restore_noise,
    usable_device,
)
from logbook.options import (
    Count,
    CountOrZero,
    Finite,
    Fraction,
    NonNegative,
    Positive,
    Share,
    Temperature,
    Threshold,
    Width,
    parse,
)
from poco import e_step, m_step_loss, resample
from replay import Batch, ChunkReplay
from train_offline import (
    EVAL_SEED,
    Acting,
    Simulation,
    adam,
    load_cloned,
    minimise,
    policy_state,
    record_result,
    refuse_other_identity,
    run_evaluation,
    setup,
    stage_one,
    video,
)
from train_offline import Args as OfflineArgs


@dataclass
class LoopArgs(OfflineArgs):
    """What every method of this loop can be asked."""

    setting: Literal["offline-to-online", "online"] = "offline-to-online"  # online: no stage I
    checkpoint: str | None = None  # stage I's file or folder; default: trained if it is missing
    discount: Fraction = 0.99  # gamma, per environment step
    heads: Width = 2  # critic heads
    pessimism: NonNegative = 0.0  # deviations over the heads taken off their mean
    tau: Fraction = 0.005  # rate of the target critic's moving average
    online_learning_rate: Positive = 3e-4  # Adam of the policy in stage II
    critic_learning_rate: Positive = 3e-4  # Adam of the critic
    policy_tau: Fraction = 1.0  # rate of the acting policy's moving average; 1: the newest weights
    reward_offset: Finite = 0.0  # added to every reward (authors' code: -0.01)
    warmup_steps: CountOrZero = 5000  # first steps with a frozen actor: only the critic learns
    online_steps: Count = 500_000  # environment steps in total, warm-up included
    updates_per_step: Positive = 1.0  # gradient updates per environment step; 0.25: every fourth
    demo_share: Share | None = None  # of each batch from demonstrations; None: uniform (paper)
    capacity: Count = 1_000_000  # online transitions kept beside the demonstrations
    eval_every: Count = 10_000  # environment steps between evaluations
    final_episodes: Count = 100  # episodes of the last evaluation
    log_every: Count = 500  # environment steps between rows of progress.csv
    save_every: Count = 5000  # environment steps between checkpoints
    rollouts: CountOrZero = 0  # processes that act while this one learns; 0: in turn, repeatable
    ray: str | None = None  # rollouts as actors of a Ray cluster: its address, or local

    kept: ClassVar[tuple[str, ...]] = (*OfflineArgs.kept, "setting", "reward_offset", "checkpoint")


@dataclass
class Args(LoopArgs):
    """What POCO can be asked."""

    act: Literal["policy", "posterior"] = "policy"  # who collects: policy (paper), posterior (ours)
    num_candidates: Count = 32  # N, candidates per state in the E-step
    particles: CountOrZero = 0  # M of them resampled for the M-step (ours); 0: all, weighted
    temperature: Temperature = 0.001  # eta: how greedily the posterior follows Q
    guidance: NonNegative = 1.0  # beta: the posterior against cloning; 0 is behaviour cloning
    clip: Threshold = 0.15  # zeta: the surrogate's threshold, a mean over cells; inf: none
    graph: bool = False  # NVIDIA GPUs: every update is one captured CUDA graph


# ---- POCO ----------------------------------------------------------------------------------------


class POCO:
    """Policy, critic, and one update of both: the learning thread of Algorithm 1."""

    name = "poco"
    modes = ("policy", "posterior")  # ways to act that are evaluated; what is delivered comes first
    cloned = True  # begins from stage I
    stats = (
        "q_mean",
        "q_min",
        "q_max",
        "q_spread",
        "ess",
        "kl",
        "clip_frac",
        "alive_mass",
        "bc",
        "surrogate",
        "critic",
        "q_data",
        "target",
    )
    saved = ("policy", "actor", "critic", "target", "actor_optimizer", "critic_optimizer")

    def __init__(self, args: Any, policy: nn.Module, clock: Clock):
        self.args = args
        self.policy = policy
        self.clock = clock
        self.device = policy.device
        self.collects = args.act
        self.critic, self.target = make_critic(args, policy)
        self.actor = copy.deepcopy(policy).requires_grad_(False)  # acts, and is what is delivered
        self.actor_optimizer = adam(policy.head_parameters(), args.online_learning_rate)
        self.critic_optimizer = adam(self.critic.parameters(), args.critic_learning_rate)

    def value(self, seen: Tensor, chunks: Tensor) -> Tensor:
        """Rate chunks (B, N, H, A) by the target critic, as the authors do, also in Eq. 16."""
        return aggregate(self.target(seen, chunks), self.args.pessimism)

    def update(self, batch: Batch, warmup: bool) -> dict[str, Tensor]:
        """Learn from a batch of replay chunks; during warm-up only the critic. Returns stats."""
        args = self.args
        policy = self.policy
        context = policy.encode(batch.obs)
        seen = policy.critic_obs(context)

        with self.clock("critic"):
            next_context = policy.encode(batch.next_obs)
            with autocast(args, self.device):
                next_chunk = policy.sample(next_context, 1)
            next_q = self.value(policy.critic_obs(next_context), next_chunk)[:, 0]
            target = td_target(batch.returns, batch.bootstrap, next_q)
            loss, stats = critic_loss(self.critic, seen, batch.chunk, target)
            minimise(loss, self.critic_optimizer)
            ema_update(self.target, self.critic, args.tau)
        if warmup:
            return stats

        candidates = None
        weights = None
        if args.guidance > 0:
            with self.clock("e_step"), autocast(args, self.device):
                candidates, weights, posterior_stats = e_step(
                    policy,
                    lambda _, chunks: self.value(seen, chunks),
                    context,
                    args.num_candidates,
                    args.temperature,
                )
                if args.particles:
                    candidates, weights = resample(candidates, weights, args.particles)
            stats |= posterior_stats

        with self.clock("m_step"):
            with autocast(args, self.device):
                loss, actor_stats = m_step_loss(
                    policy,
                    context,
                    batch.chunk,
                    batch.valid,
                    candidates,
                    weights,
                    args.guidance,
                    args.clip,
                )
            minimise(loss, self.actor_optimizer)
            ema_update(self.actor, policy, args.policy_tau)
        return stats | actor_stats

    def acting(self, mode: str) -> Acting:
        """Return what acts: "policy" draws from the policy, "posterior" from its posterior."""
        if mode == "policy":
            return Acting(self.actor)
        args = self.args
        return Acting(
            self.actor, self.critic, args.num_candidates, args.temperature, args.pessimism
        )

    def draw(self, replay: ChunkReplay, batch_size: int, generator: torch.Generator) -> Batch:
        """Draw what `update` learns from."""
        return replay.sample(batch_size, generator)

    def observe(self, move: envs.Transition) -> None:
        """See each environment step; POCO needs only the replay."""

    @staticmethod
    def check(args: Any) -> None:
        """Refuse arguments that this method cannot work with, before anything runs."""
        if not args.graph or args.eval:
            return
        device = usable_device(args.device).type
        if device != "cuda":
            raise UserError(f"--graph needs an NVIDIA GPU, this would run on {device}: --no-graph")

    def state_dict(self) -> dict[str, Any]:
        return {name: vars(self)[name].state_dict() for name in self.saved}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name in self.saved:
            vars(self)[name].load_state_dict(state[name])


def make_critic(args: Any, policy: nn.Module) -> tuple[ChunkCritic, ChunkCritic]:
    """Build the online critic and its target for what this policy lets a critic see."""
    critic = ChunkCritic(
        policy.critic_dim, policy.action_dim, args.horizon, args.hidden, args.layers, args.heads
    ).to(policy.device)
    return critic, copy.deepcopy(critic).requires_grad_(False)


def autocast(args: Any, device: torch.device) -> torch.autocast:
    return torch.autocast(device.type, torch.bfloat16, enabled=args.precision == "bfloat16")


def load_policy(path: str | Path) -> Acting:
    """Load the policy of a checkpoint or a run folder, to be called with `.act(obs)`."""
    state = load_checkpoint(path)
    if state.get("kind") != "FlowPolicy":
        kind = state.get("kind", "policy of another kind")
        raise UserError(f"{path} holds a {kind}: evaluate it with --eval, this loads flow policies")
    with must_fit(path):
        policy = FlowPolicy(**state["sizes"])
        policy.load_state_dict(state["policy"])
    return Acting(policy)


# ---- the world: one environment, one replay ------------------------------------------------------


class Interaction:
    """The interaction thread of Algorithm 1: draw a chunk, execute it open loop, store every step.

    Holds all that a resumed run needs besides the agent. There is one random generator per purpose,
    so what one part draws never shifts another.
    """

    def __init__(
        self,
        args: Any,
        agent: Any,
        clock: Clock,
        simulation: Simulation,
        demo_steps: int,
        interrupt: Interrupt,
    ):
        self.args = args
        self.agent = agent
        self.clock = clock
        self.replay = ChunkReplay(
            demo_steps + args.capacity,
            simulation.obs_dim,
            simulation.action_dim,
            args.horizon,
            args.discount,
            agent.device,
            args.demo_share,
        )
        self.act_rng = np.random.default_rng([args.seed, 1])
        self.episode_rng = np.random.default_rng([args.seed, 2])
        self.batch_rng = torch.Generator(agent.device).manual_seed(args.seed + 1)
        self.acting = agent.acting(agent.collects)
        self.runner = self._runner(simulation, interrupt)
        self.steps = 0
        self.episodes = 0
        self.recent: list[float] = []  # successes of the last 20 episodes

    def _runner(self, simulation, interrupt):
        args = self.args
        if args.rollouts == 0:
            return envs.ChunkRunner(simulation.make_env(), self._act)
        from distributed import Rollouts

        return Rollouts(
            self.acting,
            simulation.make_env,
            episode_limit=args.episode_limit,
            count=args.rollouts,
            seed=args.seed,
            seed_bound=EVAL_SEED,
            horizon=args.horizon,
            interrupt=interrupt,
            address=args.ray,
        )

    def _act(self, obs):
        with self.clock("act"):
            return self.acting(obs[None], self.act_rng)

    def start(self, demonstrations: dict[str, np.ndarray]) -> None:
        """Fill the replay with demonstrations and begin the first episode."""
        reward = demonstrations["reward"] + self.args.reward_offset
        self.replay.extend(demonstrations | {"reward": reward})
        self.runner.reset(self._episode_seed())

    def step(self) -> bool:
        """Store one environment step; begin a new episode where the old one has ended.

        Returns False if the user interrupted while it waited for a step from another process.
        """
        with self.clock("env"):
            move = self.runner.step()
            if move is None:
                return False
            reward = move.reward + self.args.reward_offset
            self.replay.add(
                move.obs, move.action, reward, move.next_obs, move.terminated, move.truncated
            )
            self.agent.observe(move)
            self.steps += 1
            if move.terminated or move.truncated:
                self.episodes += 1
                self.recent = [*self.recent[-19:], float(move.success)]
                self.runner.reset(self._episode_seed())
        return True

    def warmup(self) -> bool:
        """Say whether the actor is still frozen in the updates after the next step."""
        return self.steps < self.args.warmup_steps

    def batches(self) -> Iterator[Any]:
        """Draw what the agent learns from after this step."""
        if self.replay.starts <= 0:  # from scratch: the first chunk is not complete
            return
        ratio = self.args.updates_per_step
        due = int(self.steps * ratio) - int((self.steps - 1) * ratio)
        for _ in range(due):
            yield self.agent.draw(self.replay, self.args.batch_size, self.batch_rng)

    def success(self) -> float | None:
        """Return the share of the last 20 episodes, None before the first has ended."""
        return sum(self.recent) / len(self.recent) if self.recent else None

    def _episode_seed(self) -> int:
        return int(self.episode_rng.integers(EVAL_SEED))

    def state_dict(self) -> dict[str, Any]:
        return {
            "replay": self.replay.state_dict(),
            "runner": self.runner.state_dict(),
            "steps": self.steps,
            "episodes": self.episodes,
            "recent": self.recent,
            "act_rng": self.act_rng.bit_generator.state,
            "episode_rng": self.episode_rng.bit_generator.state,
            "batch_rng": self.batch_rng.get_state(),
            "torch_rng": noise_state(self.replay.device),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if ("waiting" in state["runner"]) != (self.args.rollouts > 0):
            raise UserError(
                "a run goes on as it began: in turn (--rollouts 0) or with any number of them"
            )
        self.replay.load_state_dict(state["replay"])
        if not self.runner.load_state_dict(state["runner"]):
            self.replay.cut()  # another episode has begun
        if self.args.rollouts == 0 and self.runner.ended:
            raise UserError(
                f"the episode being played is longer than --episode-limit {self.args.episode_limit}"
            )
        self.steps = int(state["steps"])
        self.episodes = int(state["episodes"])
        self.recent = state["recent"]
        self.act_rng.bit_generator.state = state["act_rng"]
        self.episode_rng.bit_generator.state = state["episode_rng"]
        self.batch_rng.set_state(state["batch_rng"])
        restore_noise(state["torch_rng"], self.replay.device)

    def close(self) -> None:
        self.runner.close()


# ---- the loop ------------------------------------------------------------------------------------

PHASES = ("env", "act", "critic", "e_step", "m_step", "eval")
COLUMNS = ("warmup", "success", "episodes", "updates", "env_steps_per_s", "updates_per_s")


class Run:
    """An agent, its world and its logbook: what the loop works on, and all that is saved."""

    def __init__(self, args, agent, world, book, report):
        self.args = args
        self.agent = agent
        self.world = world
        self.book = book
        self.report = report

    def save(self, name: str) -> None:
        """Write a checkpoint, unless a weight is no longer finite."""
        step = self.world.steps
        agent = self.agent.state_dict()
        advice = "Lower --online-learning-rate, or check the demonstrations"
        refuse_nonfinite(agent, "agent", f"before step {step}; {self.book.last_good()}. {advice}")
        state = {
            "agent": agent,
            "world": self.world.state_dict(),
            "report": self.report.state_dict(),
        }
        delivered = self.agent.acting(self.agent.modes[0])
        if isinstance(delivered, Acting):  # a bare policy, for load_policy
            state |= policy_state(delivered.policy)
        self.book.save(name, state)

    def load(self, state: dict[str, Any]) -> None:
        with must_fit(self.book.folder):
            self.agent.load_state_dict(state["agent"])
            self.world.load_state_dict(state["world"])
            self.report.load_state_dict(state["report"])
        self.book.amend(dataclasses.asdict(self.args))

    def evaluate(self, evaluator: envs.Evaluator, bar: Progress) -> float:
        """Evaluate every way to act; return the success of the first, which is delivered."""
        step = self.world.steps
        first_or_last = step in (0, self.args.online_steps)
        episodes = self.args.final_episodes if first_or_last else self.args.eval_episodes
        modes = self.agent.modes if step > 0 else ("policy",)  # at first no critic has learnt
        rates = []
        for mode in modes:
            acting = copy.deepcopy(self.agent.acting(mode))
            result = run_evaluation(evaluator, acting, episodes, self.book.last_good())
            record_result(self.book, step, mode, result)
            bar.write(f"step {step}, acting from the {mode}: success {result}")
            rates.append(result.success_rate)
        return rates[0]


def train(run: Run, evaluator: envs.Evaluator, clock: Clock, interrupt: Interrupt) -> bool:
    """Interact, learn, log, evaluate and save until online_steps. Returns False if interrupted."""
    args, agent, world, report = run.args, run.agent, run.world, run.report
    with Progress("", args.online_steps, args.log_every, world.steps, report.updates) as bar:
        if world.steps == 0:
            run.evaluate(evaluator, bar)
        clock.split()
        while world.steps < args.online_steps:
            warmup = world.warmup()
            bar.stage = "critic warm-up" if warmup else agent.name
            try:
                arrived = world.step()  # act and store
                if arrived:
                    for batch in world.batches():
                        report.add(agent.update(batch, warmup))  # learn
            except ValueError as error:  # a non-finite action, transition or Q
                raise UserError(
                    f"stopped at step {world.steps}: {error}. {run.book.last_good()}"
                ) from error
            step = world.steps
            last = step == args.online_steps
            if arrived:
                bar.update(step, report.updates, world.success())
                evaluate_and_log(run, evaluator, clock, bar, warmup)
            stop = interrupt.stop  # read once: a signal may arrive at any moment
            if (arrived and step % args.save_every == 0) or last or stop:
                run.save("last.pt")
            if stop and not last:
                bar.write(f"saved at step {step}; continue with --resume {run.book.folder}")
                return False
        bar.write(report.time_split())
    return True


def evaluate_and_log(run: Run, evaluator, clock: Clock, bar: Progress, warmup: bool) -> None:
    """After a step, where it is due: evaluate, write a row of progress.csv, keep the best."""
    args, world, report = run.args, run.world, run.report
    step = world.steps
    last = step == args.online_steps
    rate = None
    if step % args.eval_every == 0 or last:
        with clock("eval"):
            rate = run.evaluate(evaluator, bar)
    if step % args.log_every == 0 or last:  # after the evaluation, whose time belongs to this row
        success = world.success()
        report.write(step, warmup=int(warmup), success=success, episodes=world.episodes)
    if rate is not None and rate > report.best and not warmup:
        report.best = rate
        run.save("best.pt")


def main(
    argv: list[str] | None = None,
    args_class: type = Args,
    agent_class: type = POCO,
    simulation_class: type = Simulation,
    world_class: type = Interaction,
) -> None:
    """Run stage I if needed, then stage II; or resume or evaluate a run."""
    args = parse(args_class, argv)
    refuse_contradictions(args)
    agent_class.check(args)
    device = setup(args)
    clock = Clock()
    simulation = simulation_class(args)
    if args.eval:
        evaluate_checkpoint(args, agent_class, simulation, device, clock)
        return
    data = simulation.demonstrations()  # bad files are refused before anything is written
    opened = open_run(args, agent_class, simulation, device, data)
    if opened is None:
        return
    policy, book, state = opened
    torch.manual_seed(args.seed)  # the same whether stage I has just run or was loaded
    agent = make_agent(args, agent_class, policy, clock)
    with Interrupt() as interrupt:
        world = world_class(args, agent, clock, simulation, len(data["obs"]), interrupt)
        run = Run(args, agent, world, book, Report(book, clock, PHASES))
        with (
            contextlib.closing(world),
            envs.Evaluator(simulation.make_eval_env, args.workers) as evaluator,
        ):
            if state is None:
                world.start(data)
            else:
                run.load(state)
            finished = train(run, evaluator, clock, interrupt)
        if finished:  # still with Interrupt: a late signal must not fail a finished run
            print(f"done: {curve(book.folder)}")
            if args.video:
                video(simulation, agent.acting(agent.modes[0]), book.folder)
        book.close()


def open_run(args, agent_class, simulation, device, data):
    """Return policy, logbook and checkpoint (None in a new run); None if stage I is interrupted."""
    name = run_name(args, agent_class, simulation)
    folder = Path(args.resume or args.run_dir or f"runs/{args.task}-{name}-s{args.seed}")
    columns = [*COLUMNS, *agent_class.stats, *(f"time/{phase}" for phase in PHASES)]
    # a backbone comes before what it saw of the demonstrations
    identity = simulation.identity() | {"demonstrations": demos.fingerprint(data)}
    if args.resume:
        book = Logbook.resume(folder, columns, task=args.task, method=name)
        refuse_other_identity(book, identity)
        state = book.load("last.pt")
        with must_fit(folder):
            check_end(folder, state["world"]["steps"], args)
            book.rewind(state["world"]["steps"])
        return simulation.make_policy(device), book, state
    Logbook.refuse_existing(folder, args.overwrite)  # now, not after stage I
    policy = starting_policy(args, agent_class, simulation, device, data)
    if policy is None:
        return None
    stored = dataclasses.asdict(args) | identity | {"method": name}
    return policy, Logbook.create(folder, stored, columns, overwrite=args.overwrite), None


def make_agent(args, agent_class, policy, clock):
    """Build the agent; with --graph POCO's updates are one captured CUDA graph each."""
    if agent_class is POCO and args.graph:
        from distributed.graph import CapturedPOCO

        return CapturedPOCO(args, policy, clock)
    return agent_class(args, policy, clock)


def run_name(args: Any, agent_class: type, simulation: Simulation) -> str:
    """Return the method's name in run folders: a file may hold variants, a VLA has its own."""
    if simulation.method is not None:
        return simulation.method
    return vars(args).get("variant", agent_class.name)


def starting_policy(args, agent_class, simulation, device, data):
    """Return stage II's first policy: untrained, loaded or cloned now. None if interrupted."""
    from_scratch = args.setting == "online" or len(data["obs"]) == 0
    if from_scratch or not agent_class.cloned:
        return simulation.make_policy(device, data)
    if args.checkpoint is not None:
        return load_cloned(args.checkpoint, simulation, device)
    done = stage_one(args, simulation, device, data)
    return None if done is None else done[0]


def refuse_contradictions(args: Any) -> None:
    """Refuse arguments that exclude each other."""
    if args.capacity < args.horizon:
        raise UserError(
            f"--capacity {args.capacity} cannot hold one chunk of --horizon {args.horizon} steps"
        )
    if args.checkpoint and args.setting == "online":
        raise UserError("--setting online begins untrained: leave out --checkpoint")
    if args.ray and not args.rollouts:
        raise UserError("--ray needs the number of its workers: --rollouts N")


def evaluate_checkpoint(args, agent_class, simulation, device, clock):
    """Evaluate every way to act of the checkpoint in args.eval."""
    folder = Path(args.eval)
    read_args(folder, method=run_name(args, agent_class, simulation))
    agent = agent_class(args, simulation.make_policy(device), clock)
    with must_fit(folder):
        agent.load_state_dict(load_checkpoint(folder)["agent"])
    with envs.Evaluator(simulation.make_eval_env, args.workers) as evaluator:
        for mode in agent.modes:
            result = run_evaluation(evaluator, agent.acting(mode), args.final_episodes)
            print(f"acting from the {mode}: success {result}")
    if args.video:
        video(simulation, agent.acting(agent.modes[0]), folder)


if __name__ == "__main__":
    cli(main)
