"""The learning half of Algorithm 1 for an arm: stage I, critic warm-up, POCO; here or in a process of its own.

    from arms.learner import Background, Learner
    learner = Learner(args, task)                     # args: robot.py's; task: arms.episodes.layout
    learner.pretrain(save)                            # stage I on args.data
    learner.absorb(path)                              # one episode from disk, then the updates it pays for
    background = Background(args, task)               # the same from run_dir/last.pt in a second process, never waiting
    background.absorb(path)                           # returns at once
    learner.acting()(obs, rng)                        # obs (D,) -> chunk (H, A), with the newest weights

An episode reaches the learner as the path of its file, and weights come back as one shared array of numbers with a
version; nothing is unpickled that another machine could have sent. A restart needs the episodes on disk and last.pt.
Not here: the loss itself (poco.py), the control loop (robot.py), several arms or machines (distributed/).
"""
import contextlib
import copy
import dataclasses
import hashlib
import os
import signal
import sys
import types
from pathlib import Path

import numpy as np
import torch
from torch import multiprocessing

from chunk_critic import ChunkCritic, aggregate, critic_loss, ema_update, td_target
from flow_policy import FlowPolicy
from logbook import (Interrupt, Progress, UserError, fitting, keep_rate, load_checkpoint, noise_state,
                     refuse_nonfinite, restore_noise, save_checkpoint, usable_device)
from poco import e_step, m_step_loss, posterior_weights
from replay import FIELDS, ChunkReplay

from .episodes import digest, load, numbered
from .pipe import Outlet, flat, unflatten

STATS = ("critic", "q_data", "q_mean", "q_min", "q_max", "q_spread", "ess", "kl", "clip_frac", "alive_mass", "bc",
         "surrogate")

STARVED = 1000                                 # updates behind the steps at which the learner's lag is told
LAST = 10.0                                    # seconds the learner's process has to save and end


def networks(args, task, device="cpu"):
    """An untrained policy and critic for observations of this layout."""
    if args.backbone is None:
        policy = FlowPolicy(task.obs_dim, task.action_dim, args.horizon, args.hidden, args.layers, args.flow_steps)
    else:
        from .language import head
        policy = head(args, task)
    critic = ChunkCritic(len(policy.obs_mean), task.action_dim, args.horizon, args.hidden, args.layers, args.heads)
    return policy.to(device), critic.to(device)


def seen(policy, obs):
    """What the critic is shown of obs (B, D): all of it, or what a head on a backbone pools of the hidden states."""
    return policy.critic_obs(policy.encode(obs)) if hasattr(policy, "critic_obs") else obs


def floor(task):
    """Least deviation (D,) an observation is divided by: demonstrations hardly turn the tool, a young policy does."""
    least = {"joints": [0.05] * 6, "gripper": [0.005], "eef": [0.005] * 3 + [0.05] * 6}
    return torch.tensor([x for key, size in zip(task.obs_keys, task.obs_sizes) for x in least.get(key, [0.005] * size)])


class Acting:
    """act(obs (D,), rng) -> chunk (H, A): a draw from the policy or, with args.act "posterior", from its posterior."""

    def __init__(self, args, policy, critic):
        self.args, self.policy, self.critic = args, policy, critic

    @torch.no_grad()
    def __call__(self, obs, rng):
        posterior, policy = self.args.act == "posterior", self.policy
        n = self.args.num_candidates if posterior else 1
        obs = torch.as_tensor(obs, dtype=torch.float32, device=policy.obs_mean.device)[None]
        noise = rng.standard_normal((1, n, policy.horizon, policy.action_dim), dtype=np.float32)
        chunks = policy.sample(policy.encode(obs), n, noise=torch.as_tensor(noise, device=obs.device))   # (1, n, H, A)
        pick = 0
        if posterior:
            weights = posterior_weights(aggregate(self.critic(seen(policy, obs), chunks), self.args.pessimism),
                                        self.args.temperature)[0]
            weights = weights.cpu().double().numpy()
            pick = rng.choice(n, p=weights / weights.sum())
        return chunks[0, pick].cpu().numpy()

    def fingerprint(self):
        """Eight digits that two programs share only if they act with the same policy."""
        data = flat([self.policy]).numpy().tobytes()
        return hashlib.sha256(data).hexdigest()[:8]


def trained(args, task):
    """What acts with the policy in args.run_dir/last.pt, its updates and online steps so far."""
    path, (policy, critic) = Path(args.run_dir) / "last.pt", networks(args, task)
    state = load_checkpoint(path)
    if (columns := state.get("columns", task.obs_keys)) != task.obs_keys:
        raise UserError(f"{path} has learnt from {', '.join(columns)}, this arm offers {', '.join(task.obs_keys)}: "
                        "give the --observe, --encoder, --backbone and --instruction it was trained with")
    with fitting(path, "it is of another arm or of other sizes, give the flags it was trained with"):
        policy.load_state_dict(state["actor"])
        critic.load_state_dict(state["critic"])
    return Acting(args, policy, critic), state["updates"], state["seen"]


class Learner:
    """Networks, replay and optimisers; `updates` of stage II so far, `absorbed` episodes, `seen` online steps."""

    def __init__(self, args, task):
        self.args, self.task = args, task
        files = numbered(args.data) if Path(args.data).is_dir() else [args.data]
        if not files or not Path(files[0]).exists():
            raise UserError(f"no demonstrations in {args.data}: python robot.py record --task {args.task} makes them")
        self.device = usable_device(args.device, mps=False)
        torch.manual_seed(args.seed)
        data = load(files, task)
        self.replay = ChunkReplay(len(data["obs"]) + args.capacity, task.obs_dim, task.action_dim, args.horizon,
                                  args.discount, self.device, args.demo_share)
        self.replay.extend(data | {"reward": data["reward"] + args.reward_offset})
        obs = torch.as_tensor(data["obs"])
        self.policy, self.critic = networks(args, task, self.device)
        if args.backbone is None:
            self.policy.set_normalizer(obs.mean(0), torch.maximum(obs.std(0), floor(task)))
        else:
            self.policy.fit(obs.to(self.device), floor(task)[:self.policy.state_dim].to(self.device))
        self.critic.set_normalizer(self.policy.obs_mean, self.policy.obs_std)
        self.actor, self.target = (copy.deepcopy(net).requires_grad_(False) for net in (self.policy, self.critic))
        self.cloning = keep_rate(torch.optim.Adam(self.policy.parameters(), lr=args.learning_rate))
        self.actor_optimizer = keep_rate(torch.optim.Adam(self.policy.parameters(), lr=args.online_learning_rate))
        self.critic_optimizer = keep_rate(torch.optim.Adam(self.critic.parameters(), lr=args.critic_learning_rate))
        self.generator = torch.Generator(self.device).manual_seed(args.seed)
        self.cloned, self.updates, self.absorbed, self.seen, self.saved, self.sums = 0, 0, 0, 0, 0, {}

    # ---- stage I

    def pretrain(self, save):
        """Eq. 24 for args.pretrain_steps; save(learner) every tenth. False if the user interrupted."""
        steps = self.args.pretrain_steps
        every = max(steps // 10, 1)
        with Interrupt() as interrupt, Progress("stage I", steps, every, self.cloned, self.cloned, "steps") as bar:
            stop = False
            while self.cloned < steps and not stop:
                batch = self.replay.sample(self.args.batch_size, self.generator)
                loss, _ = m_step_loss(self.policy, self.policy.encode(batch.obs), batch.chunk, batch.valid, None, None,
                                      0.0, 0.0)
                minimise(loss, self.cloning)
                self.cloned, stop = self.cloned + 1, interrupt.stop             # read once: a signal may come later
                bar.update(self.cloned, self.cloned)
                if self.cloned == steps:
                    self.actor.load_state_dict(self.policy.state_dict())
                if self.cloned % every == 0 or stop or self.cloned == steps:
                    save(self)
        return self.cloned >= steps

    # ---- stage II

    def add(self, path):
        """The steps of one finished episode into the replay."""
        rows = load([path], self.task)
        for i in range(len(rows["obs"])):
            row = {name: rows[name][i] for name in FIELDS}
            self.replay.add(**row | {"reward": row["reward"] + self.args.reward_offset})
        self.seen += len(rows["obs"])
        self.absorbed += 1

    def owed(self):
        """Updates that the steps seen so far pay for and that are not done."""
        return int(self.args.updates_per_step * self.seen) - self.updates

    def absorb(self, path):
        """Add it, then do every update it pays for. Returns the online steps seen so far."""
        self.add(path)
        for _ in range(self.owed()):
            self.update()
        if self.updates // self.args.save_every > self.saved // self.args.save_every:
            self.save(Path(self.args.run_dir) / "last.pt")
            self.saved = self.updates
        return self.seen

    def wait(self):
        """The same calls as Background's, where there is nothing to wait for."""

    def check(self):
        """Nothing that could have died."""

    def pull(self):
        return self.updates

    def close(self):
        self.save(Path(self.args.run_dir) / "last.pt")

    def update(self):
        """One critic step and, after the warm-up, one E-step and M-step."""
        args, policy = self.args, self.policy
        batch = self.replay.sample(args.batch_size, self.generator)
        now, after = seen(policy, batch.obs), seen(policy, batch.next_obs)
        next_chunk = policy.sample(policy.encode(batch.next_obs), 1)
        next_q = aggregate(self.target(after, next_chunk), args.pessimism)[:, 0]
        target = td_target(batch.returns, batch.bootstrap, next_q)
        loss, stats = critic_loss(self.critic, now, batch.chunk, target)
        minimise(loss, self.critic_optimizer)
        ema_update(self.target, self.critic, args.tau)
        if self.updates >= args.warmup_updates:
            context, candidates, weights, e_stats = policy.encode(batch.obs), None, None, {}
            if args.guidance > 0:
                candidates, weights, e_stats = e_step(
                    policy, lambda _, chunks: aggregate(self.target(now, chunks), args.pessimism), context,
                    args.num_candidates, args.temperature)
            loss, m_stats = m_step_loss(policy, context, batch.chunk, batch.valid, candidates, weights, args.guidance,
                                        args.clip)
            minimise(loss, self.actor_optimizer)
            ema_update(self.actor, policy, args.policy_tau)
            stats |= e_stats | m_stats
        self.updates += 1
        for name in STATS:
            if name in stats:
                total, count = self.sums.get(name, (0.0, 0))
                self.sums[name] = (total + stats[name], count + 1)

    def report(self):
        """Means since the last call, and how far it is."""
        means, self.sums = {name: float(total) / count for name, (total, count) in self.sums.items()}, {}
        return means | {"updates": self.updates, "warmup": int(self.updates < self.args.warmup_updates)}

    def acting(self):
        return Acting(self.args, self.actor, self.critic)

    def state_dict(self):
        parts = ("policy", "actor", "critic", "target", "cloning", "actor_optimizer", "critic_optimizer")
        return {name: getattr(self, name).state_dict() for name in parts} | {
            "columns": self.task.obs_keys, "cloned": self.cloned, "updates": self.updates, "absorbed": self.absorbed,
            "seen": self.seen, "generator": self.generator.get_state(), "torch_rng": noise_state(self.device)}

    def load_state_dict(self, state, folder):
        """Continue from a checkpoint; the episodes it had absorbed are read again from `folder`, none else."""
        for path in numbered(folder)[:state["absorbed"]]:
            self.add(path)
        for name, value in state.items():
            if isinstance(value, dict):
                getattr(self, name).load_state_dict(value)
        self.cloned, self.updates = state["cloned"], state["updates"]
        self.saved = self.updates
        self.generator.set_state(state["generator"])
        restore_noise(state["torch_rng"], self.device)

    def save(self, path):
        state = self.state_dict()
        refuse_nonfinite({name: state[name] for name in ("policy", "critic")}, "learner",
                         f"before update {self.updates}; {path} is the last good checkpoint")
        save_checkpoint(path, state)


def minimise(loss, optimizer):
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    optimizer.step()


# ---- the second process ----------------------------------------------------------------------------------------------

class Background:
    """A Learner in a process of lower priority. `absorb` and `pull` return at once; `check` raises if it has died."""

    def __init__(self, args, task):
        self.args, self.policies = args, networks(args, task)
        context = multiprocessing.get_context("spawn")
        self.shared, self.lock = flat(self.policies).share_memory_(), context.Lock()
        self.version, self.newest = context.Value("l", 0, lock=False), -1
        self.stats, self.told = {}, False
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=serve, name="learner", daemon=True, args=(
            dataclasses.asdict(args), task, Outlet(theirs), self.shared, self.lock, self.version))
        self.process.start()
        theirs.close()

    def wait(self, seconds=300.0):
        """Until the first weights have been taken; UserError if the process dies first."""
        step = 0.05
        while self.pull() < 1:                            # also when it is just writing them
            self.process.join(step)
            self.check()
            seconds -= step
            if seconds < 0:
                raise UserError("the learner has not started within five minutes: is the machine overloaded?")

    def absorb(self, path):
        """Tell the learner of one more episode on disk."""
        try:
            self.connection.send_bytes(os.fsencode(path))
        except OSError:
            self.check(sure=True)

    def pull(self):
        """Take newer weights, if there are any and they are not being written right now. Returns their version."""
        if self.version.value != self.newest and self.lock.acquire(block=False):
            try:
                self.newest = self.version.value
                unflatten(self.shared, self.policies)
            finally:
                self.lock.release()
        return self.newest

    def acting(self):
        return Acting(self.args, *self.policies)

    def report(self):
        try:
            self._listen()
        except (EOFError, OSError):
            self.check(sure=True)
        behind = self.stats.pop("behind", 0)
        if behind > STARVED and not self.told:
            self.told = True
            print(f"the learner is {behind} updates behind the steps, so the policy improves late: pause (space), end "
                  "other programs, or lower --updates-per-step", file=sys.stderr)
        return self.stats

    def _listen(self):
        try:
            while self.connection.poll():
                self.stats |= self.connection.recv()
        finally:                                          # also where the pipe ends after the last words
            if "failed" in self.stats:
                raise UserError(f"the learner stopped: {self.stats['failed']}") from None

    def check(self, sure=False):
        if sure:
            self.process.join(5)
        if not self.process.is_alive():
            with contextlib.suppress(EOFError, OSError):
                self._listen()                            # its last words, if it had any
            raise UserError(f"the learner process has died (exit code {self.process.exitcode}); every finished episode "
                            f"is on disk: python robot.py train --resume {self.args.run_dir}")

    def close(self):
        """Let it save and end; after LAST seconds it is killed, and last.pt stays the whole one it was."""
        with contextlib.suppress(OSError):
            self.connection.send_bytes(b"")
        self.process.join(LAST)
        if self.process.is_alive():
            self.process.kill()                           # SIGTERM it ignores
            self.process.join()
            print(f"the learner did not end within {LAST:.0f} s and was killed: what it has learnt since it last saved "
                  "is lost, no episode is", file=sys.stderr)
        if "failed" not in self.stats:                    # otherwise the run ends because of it
            try:
                self._listen()                            # why it could not save, for example
            except UserError as error:
                print(error, file=sys.stderr)
            except (EOFError, OSError):
                pass


def serve(settings, task, connection, shared, lock, version):
    """The second process: learn while updates are owed, publish every 20, save now and then and at the end."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)             # the arm's process decides when to stop
    os.nice(5)
    args, running = types.SimpleNamespace(**settings), True
    torch.set_num_threads(args.threads)
    folder, path = Path(args.run_dir) / "episodes", Path(args.run_dir) / "last.pt"
    learner = Learner(args, task)
    learner.load_state_dict(load_checkpoint(path), folder)
    for late in numbered(folder)[learner.absorbed:]:
        learner.add(late)
    known = {str(name): digest(name) for name in numbered(folder)[:learner.absorbed]}

    def publish():
        vector = flat([learner.actor, learner.critic])
        with lock:
            shared.copy_(vector)
            version.value = version.value + 1
        connection.send(learner.report() | {"behind": learner.owed()})

    publish()
    try:
        with contextlib.suppress(EOFError, OSError):      # the arm's process is gone: save what was learnt
            while running:
                due = learner.owed() > 0
                if connection.poll(0 if due else 0.2):
                    name = os.fsdecode(connection.recv_bytes())
                    running = bool(name)
                    found = digest(name) if running else None
                    if found not in (None, known.get(name)):      # neither deleted since nor told of twice
                        learner.add(name)
                        known[name] = found
                if due and running:
                    learner.update()
                    if learner.updates % 20 == 0 or learner.owed() == 0:
                        publish()
                    if learner.updates % args.save_every == 0:
                        learner.save(path)
        learner.save(path)
    except UserError as error:                            # diverged, as `save` noticed and says
        connection.send({"failed": str(error)})
    except ValueError as error:                           # or as the E-step did
        connection.send({"failed": f"{error}. {path} is the last good checkpoint"})
