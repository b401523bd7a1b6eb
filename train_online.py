"""Stage II: critic warm-up, then POCO online (paper Sec. IV-C2, Algorithm 1). Runs stage I first when it has to.

    python train_online.py --task lift                            # all of Algorithm 1: on a laptop 9 minutes
    python train_online.py --task lift --act posterior            # acts from the particle posterior instead (ours)
    python train_online.py --task lift --rollouts 1               # acts in another process while this one learns
    python train_online.py --resume runs/lift-poco-s0             # continues an interrupted run exactly
    python train_online.py --eval runs/lift-poco-s0 --video       # evaluates its checkpoint

Writes runs/<task>-poco-s<seed>/: args.json, progress.csv, eval.csv, TensorBoard events, last.pt, best.pt, curve.png.
Below: POCO's update, then a loop that knows only an agent; a baseline is a file with such an agent (baselines/).
Not here: the E-step and M-step (poco.py), the networks (flow_policy.py, chunk_critic.py).
"""
import contextlib
import copy
import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch

import envs
from chunk_critic import ChunkCritic, aggregate, critic_loss, ema_update, td_target
from logbook import (Clock, Interrupt, Logbook, Progress, Report, UserError, check_end, cli, curve, fitting, keep_rate,
                     load_checkpoint, noise_state, read_args, refuse_nonfinite, restore_noise, usable_device)
from poco import e_step, m_step_loss
from replay import ChunkReplay
from train_offline import (EVAL_SEED, Acting, Args as OfflineArgs, demonstrations, environment, load_policy,
                           make_policy, parse, record_result, run_evaluation, setup, video)


@dataclass
class LoopArgs(OfflineArgs):
    """What every method of this loop needs."""

    setting: Literal["offline-to-online", "online"] = "offline-to-online"  # online (Table II): no stage I
    checkpoint: str | None = None     # file or folder of stage I; default: that of train_offline.py, trained if missing
    discount: float = 0.99            # gamma, per environment step
    heads: int = 2                    # critic heads
    pessimism: float = 0.0            # deviations over the heads taken off their mean; 2 heads, 1: the minimum
    tau: float = 0.005                # rate of the target critic's moving average
    online_learning_rate: float = 3e-4  # Adam in stage II, policy and critic
    policy_tau: float = 1.0           # rate of the acting policy's moving average; 1: the newest weights (paper)
    reward_offset: float = 0.0        # added to every reward, demonstrations included (authors' code: -0.01)
    warmup_steps: int = 5000          # first steps with a frozen actor: only the critic learns
    online_steps: int = 500_000       # environment steps in total, warm-up included
    updates_per_step: float = 1.0     # gradient updates per environment step; 0.25: one every fourth step
    demo_share: float | None = None   # share of every batch from the demonstrations; None: uniform over all (paper)
    capacity: int = 1_000_000         # online transitions kept beside the demonstrations; the oldest go first
    eval_every: int = 10_000          # environment steps between evaluations
    final_episodes: int = 100         # episodes of the last evaluation
    log_every: int = 500              # environment steps between rows of progress.csv
    save_every: int = 5000            # environment steps between checkpoints
    rollouts: int = 0                 # processes that act while this one learns; 0: in turn, bitwise repeatable
    ray: str | None = None            # the rollouts as actors of a Ray cluster: its address, or local to start one


@dataclass
class Args(LoopArgs):
    act: Literal["policy", "posterior"] = "policy"  # who collects: the policy (paper) or the posterior (ours)
    num_candidates: int = 32          # N, candidates per state in the E-step
    temperature: float = 0.001        # eta: how greedily the posterior follows Q
    guidance: float = 1.0             # beta, weight of the posterior against behaviour cloning; 0 is behaviour cloning
    clip: float = 0.15                # zeta, threshold of the surrogate (mean over a chunk's cells); inf is no clip
    graph: bool = False               # NVIDIA GPUs: every update one captured CUDA graph instead of kernel by kernel


# ---- POCO ------------------------------------------------------------------------------------------------------------

class POCO:
    """Policy, critic, and one update of each: Algorithm 1's learning thread."""

    name = "poco"
    stats = ("q_mean", "q_min", "q_max", "q_spread", "ess", "kl", "clip_frac", "alive_mass", "bc", "surrogate",
             "critic", "q_data", "target")
    modes = ("policy", "posterior")       # ways of acting to evaluate, that of the delivered policy first
    draw = staticmethod(ChunkReplay.sample)       # batches

    @staticmethod
    def check(args):
        if args.graph and not args.eval and (device := usable_device(args.device).type) != "cuda":
            raise UserError(f"--graph is for NVIDIA GPUs, and this would run on {device}: --no-graph")

    def __init__(self, args, policy, clock):
        self.args, self.policy, self.clock = args, policy, clock
        self.device, self.collects = policy.obs_mean.device, args.act
        self.critic, self.target = make_critic(args, policy)
        self.actor = copy.deepcopy(policy).requires_grad_(False)          # what acts and what is delivered
        self.actor_optimizer = adam(policy.head_parameters(), args)
        self.critic_optimizer = adam(self.critic.parameters(), args)
        if args.graph:
            from distributed.graph import Captured
            self.update = Captured(self)

    def acting(self, mode):
        """The callable that acts: "policy" draws from the policy, "posterior" from the online critic's posterior."""
        if mode == "policy":
            return Acting(self.actor)
        args = self.args
        return Acting(self.actor, self.critic, args.num_candidates, args.temperature, args.pessimism)

    def value(self, obs, chunks):
        """The target critic's, in Eq. 14 and, as in the authors' code, in Eq. 16: chunks (B, N, H, A) -> (B, N)."""
        return aggregate(self.target(obs, chunks), self.args.pessimism)

    def update(self, batch, warmup):
        """One update on a batch of replay chunks; during warm-up the actor is frozen. Returns stats."""
        args, policy = self.args, self.policy
        with self.clock("critic"):
            with autocast(args, self.device):
                next_chunk = policy.sample(policy.encode(batch.next_obs), 1)
            next_q = self.value(batch.next_obs, next_chunk)[:, 0]
            y = td_target(batch.returns, batch.bootstrap, next_q)
            loss, stats = critic_loss(self.critic, batch.obs, batch.chunk, y)
            minimise(loss, self.critic_optimizer)
            ema_update(self.target, self.critic, args.tau)
        if warmup:
            return stats
        context, candidates, weights, posterior_stats = policy.encode(batch.obs), None, None, {}
        if args.guidance > 0:
            with self.clock("e_step"), autocast(args, self.device):
                candidates, weights, posterior_stats = e_step(
                    policy, lambda _, chunks: self.value(batch.obs, chunks), context, args.num_candidates,
                    args.temperature)
        with self.clock("m_step"):
            with autocast(args, self.device):
                loss, actor_stats = m_step_loss(policy, context, batch.chunk, batch.valid, candidates, weights,
                                                args.guidance, args.clip)
            minimise(loss, self.actor_optimizer)
            ema_update(self.actor, policy, args.policy_tau)
        return stats | posterior_stats | actor_stats

    def state_dict(self):
        return {name: getattr(self, name).state_dict() for name in
                ("policy", "actor", "critic", "target", "actor_optimizer", "critic_optimizer")}

    def load_state_dict(self, state):
        for name, value in state.items():
            getattr(self, name).load_state_dict(value)


def make_critic(args, policy):
    """The online critic and its target, with the policy's observation statistics, on its device."""
    task = envs.TASKS[args.task]
    critic = ChunkCritic(task.obs_dim, task.action_dim, args.horizon, args.hidden, args.layers, args.heads)
    critic.to(policy.obs_mean.device).set_normalizer(policy.obs_mean, policy.obs_std)
    return critic, copy.deepcopy(critic).requires_grad_(False)


def adam(parameters, args, rate=None):
    parameters, rate = list(parameters), rate or args.online_learning_rate
    return keep_rate(torch.optim.Adam(parameters, lr=rate, fused=parameters[0].device.type != "mps"))


def autocast(args, device):
    return torch.autocast(device.type, torch.bfloat16, enabled=args.precision == "bfloat16")


def minimise(loss, optimizer):
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    optimizer.step()


# ---- the loop: any agent with acting, modes, collects, draw, update, stats and state_dict ----------------------------

PHASES = ("env", "act", "critic", "e_step", "m_step", "eval")
COLUMNS = ("warmup", "success", "episodes", "updates", "env_steps_per_s", "updates_per_s")


class Interaction:
    """Algorithm 1's interaction thread: one chunk from the policy, executed open loop, every step into the replay.

    Holds all that a resumed run needs besides the agent, with one random generator per purpose, so that what one part
    draws never shifts another.
    """

    def __init__(self, args, agent, clock, demo_steps):
        self.args, self.clock, task = args, clock, envs.TASKS[args.task]
        self.draw, self.observe = agent.draw, getattr(agent, "observe", lambda move: None)
        self.replay = ChunkReplay(demo_steps + args.capacity, task.obs_dim, task.action_dim, args.horizon,
                                  args.discount, agent.device, args.demo_share)
        self.act_rng, self.episode_rng = np.random.default_rng([args.seed, 1]), np.random.default_rng([args.seed, 2])
        self.batch_rng = torch.Generator(agent.device).manual_seed(args.seed + 1)
        acting, options = agent.acting(agent.collects), {"task": args.task, **environment(args)}

        def act(obs):
            with clock("act"):
                return acting(obs[None], self.act_rng)

        if args.rollouts == 0:
            self.runner = envs.ChunkRunner(envs.make_env(**options), act)
        else:
            from distributed import Rollouts
            self.runner = Rollouts(acting, options, args.rollouts, args.seed, EVAL_SEED, args.horizon, args.ray)
        self.steps, self.episodes, self.recent = 0, 0, []

    def start(self, demonstrations):
        offset = self.args.reward_offset
        self.replay.extend(demonstrations | {"reward": demonstrations["reward"] + offset})
        self.runner.reset(self._episode_seed())

    def step(self):
        """One environment step into the replay; a new episode when the old one has ended."""
        with self.clock("env"):
            move = self.runner.step()
            self.replay.add(move.obs, move.action, move.reward + self.args.reward_offset, move.next_obs,
                            move.terminated, move.truncated)
            self.observe(move)
            self.steps += 1
            if move.terminated or move.truncated:
                self.episodes += 1
                self.recent = [*self.recent[-19:], float(move.success)]
                self.runner.reset(self._episode_seed())

    def warmup(self):
        """Whether the actor is still frozen in the updates after the next step."""
        return self.steps < self.args.warmup_steps

    def batches(self):
        """What the agent learns from after this step."""
        ratio = self.args.updates_per_step
        due = int(self.steps * ratio) - int((self.steps - 1) * ratio)
        return (self.draw(self.replay, self.args.batch_size, self.batch_rng) for _ in range(due))

    def success(self):
        """Share of the last 20 episodes, None before the first has ended."""
        return sum(self.recent) / len(self.recent) if self.recent else None

    def _episode_seed(self):
        return int(self.episode_rng.integers(EVAL_SEED))

    def state_dict(self):
        return {"replay": self.replay.state_dict(), "runner": self.runner.state_dict(), "steps": self.steps,
                "episodes": self.episodes, "recent": self.recent, "act_rng": self.act_rng.bit_generator.state,
                "episode_rng": self.episode_rng.bit_generator.state, "batch_rng": self.batch_rng.get_state(),
                "torch_rng": noise_state(self.replay.device)}

    def load_state_dict(self, state):
        if ("waiting" in state["runner"]) != (self.args.rollouts > 0):
            raise UserError("a run goes on as it began: in turn (--rollouts 0) or with --rollouts of any number")
        self.replay.load_state_dict(state["replay"])
        self.runner.load_state_dict(state["runner"])
        if self.args.rollouts == 0 and self.runner.ended:
            raise UserError(f"--episode-limit {self.args.episode_limit} has passed in the episode being played")
        self.steps, self.episodes, self.recent = state["steps"], state["episodes"], state["recent"]
        self.act_rng.bit_generator.state = state["act_rng"]
        self.episode_rng.bit_generator.state = state["episode_rng"]
        self.batch_rng.set_state(state["batch_rng"])
        restore_noise(state["torch_rng"], self.replay.device)

    def close(self):
        (self.runner if self.args.rollouts else self.runner.env).close()


def train(args, agent, data, clock, book, state=None, world_class=Interaction):
    """Interact, learn, log, evaluate and save until online_steps. Returns False if the user interrupted."""
    world, report = world_class(args, agent, clock, len(data["obs"])), Report(book, clock, PHASES)
    if state is None:
        world.start(data)
    else:
        with fitting(book.folder):
            agent.load_state_dict(state["agent"])
            world.load_state_dict(state["world"])
            report.load_state_dict(state["report"], world.steps)
        book.amend(dataclasses.asdict(args))
    with contextlib.closing(world), Interrupt() as interrupt, \
            envs.Evaluator(args.task, args.workers, **environment(args)) as evaluator, \
            Progress("", args.online_steps, args.log_every, world.steps, report.updates) as bar:
        if world.steps == 0:
            evaluate(agent, evaluator, args.final_episodes, 0, book, bar)
        clock.split()
        while world.steps < args.online_steps:
            warmup = world.warmup()
            try:
                world.step()
                for batch in world.batches():
                    report.add(agent.update(batch, warmup))
            except ValueError as error:                       # a non-finite action, transition or Q
                raise UserError(f"stopped at step {world.steps}: {error}. {book.last_good()}") from error
            step, last = world.steps, world.steps == args.online_steps
            bar.stage = "critic warm-up" if warmup else agent.name
            bar.update(step, report.updates, world.success())
            rate = -1.0
            if step % args.eval_every == 0 or last:
                with clock("eval"):
                    episodes = args.final_episodes if last else args.eval_episodes
                    rate = evaluate(agent, evaluator, episodes, step, book, bar)
            if step % args.log_every == 0 or last:            # after the evaluation, whose time belongs to it
                report.write(step, warmup=int(warmup), success=world.success(), episodes=world.episodes)
            if rate > report.best and not warmup:
                report.best = rate
                save(book, "best.pt", agent, world, report)
            stop = interrupt.stop                             # read once: a signal may come in between
            if step % args.save_every == 0 or last or stop:
                save(book, "last.pt", agent, world, report)
            if stop and not last:
                bar.write(f"saved at step {step}; continue with --resume {book.folder}")
                return False
        bar.write(report.time_split())
    return True


def save(book, name, agent, world, report):
    state = {"agent": agent.state_dict(), "world": world.state_dict(), "report": report.state_dict()}
    refuse_nonfinite(state["agent"], "agent", f"before step {world.steps}; {book.last_good()}. Lower "
                     "--online-learning-rate, or check the demonstrations")
    book.save(name, state)


def evaluate(agent, evaluator, episodes, step, book, bar):
    """Success of every way of acting (at step 0 of the bare policy: no critic has learnt yet); returns the first's."""
    rates = {}
    modes = agent.modes if step > 0 else ("policy",)
    for mode in modes:
        result = run_evaluation(evaluator, copy.deepcopy(agent.acting(mode)), episodes, f"evaluation at step {step}",
                                book.last_good())
        record_result(book, step, mode, result)
        bar.write(f"step {step}, acting from the {mode}: success {result}")
        rates[mode] = result.success_rate
    return rates[modes[0]]


def main(argv=None, args_class=Args, agent_class=POCO, load=load_policy, world_class=Interaction):
    args = parse(args_class, argv)
    getattr(agent_class, "check", lambda args: None)(args)
    device, clock = setup(args), Clock()
    name = getattr(args, "variant", agent_class.name)         # a file may hold a method's variants
    folder = Path(args.eval or args.resume or args.run_dir or f"runs/{args.task}-{name}-s{args.seed}")
    columns = [*COLUMNS, *agent_class.stats, *(f"time/{phase}" for phase in PHASES)]
    if args.eval:
        read_args(folder, method=name)
        return evaluate_checkpoint(args, agent_class(args, make_policy(args, device), clock), folder)
    data = demonstrations(args)           # bad files are refused before anything is written
    if args.resume:
        book = Logbook.resume(folder, columns, task=args.task, method=name)
        state = book.load("last.pt")
        with fitting(folder):
            check_end(folder, state["world"]["steps"], args)
            book.rewind(state["world"]["steps"])
        policy = make_policy(args, device)
    else:
        state = None
        Logbook.refuse_existing(folder, args.overwrite)       # now, not after stage I
        policy = load(args, device, data)
        if policy is None:
            return
        stored = dataclasses.asdict(args) | {"method": name}
        book = Logbook.create(folder, stored, columns, overwrite=args.overwrite)
    torch.manual_seed(args.seed)          # the same whether stage I ran just now or its checkpoint was loaded
    agent = agent_class(args, policy, clock)
    if train(args, agent, data, clock, book, state, world_class):
        print(f"done: {curve(book.folder)}")
        if args.video:
            video(args, agent.acting(agent.modes[0]), book.folder)
    book.close()


def evaluate_checkpoint(args, agent, folder):
    with fitting(folder):
        agent.load_state_dict(load_checkpoint(folder)["agent"])
    with envs.Evaluator(args.task, args.workers, **environment(args)) as evaluator:
        for mode in agent.modes:
            result = run_evaluation(evaluator, agent.acting(mode), args.final_episodes)
            print(f"acting from the {mode}: success {result}")
    if args.video:
        video(args, agent.acting(agent.modes[0]), folder)


if __name__ == "__main__":
    cli(main)
