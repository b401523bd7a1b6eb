"""POCO for an arm: train_online.POCO on a replay that is filled from the files of episodes.

    from arms.learner import Learner, trained
    learner = Learner(args, task)                 # args: robot.py's; task: arms.episodes.layout
    learner.pretrain(save)                        # stage I on the recordings in args.data
    learner.absorb(path)                          # one episode, then the updates it pays for
    chunk = learner.acting()(obs[None], rng)      # obs (D,) -> (H, A)
    acting, updates, steps = trained(args, task)  # what run_dir/last.pt has learnt

A restart needs last.pt and the episodes: the checkpoint says how many of them it had absorbed.
On one core a preset `cpu` update takes about 30 ms.
Not here: the update (train_online.py), the same in a second process (background.py) or on another
machine (distributed/arm.py), the control loop (rig.py).

Shapes: D observation, H chunk, A action.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import demos
from flow_policy import FlowPolicy
from logbook import (
    Clock,
    Interrupt,
    Progress,
    UserError,
    load_checkpoint,
    must_fit,
    noise_state,
    refuse_nonfinite,
    restore_noise,
    save_checkpoint,
    usable_device,
)
from replay import FIELDS, ChunkReplay
from train_offline import Acting, adam, cloning_loss, minimise, policy_state
from train_online import POCO

from .episodes import Layout, load, numbered

# ---- the policy of an arm ------------------------------------------------------------------------


def make_policy(args: Any, task: Layout, device: str | torch.device = "cpu") -> nn.Module:
    """Build an untrained policy for observations of this layout."""
    if args.backbone is None:
        policy = FlowPolicy(
            task.obs_dim, task.action_dim, args.horizon, args.hidden, args.layers, args.flow_steps
        )
    else:
        from .language import head

        policy = head(args, task)
    return policy.to(device)


def standardise(policy: nn.Module, obs: Tensor, task: Layout) -> None:
    """Standardise observations as these demonstrations (T, D) suggest."""
    least = least_deviation(task)
    if task.token_shape is None:
        policy.set_normalizer(obs.mean(0), torch.maximum(obs.std(0), least))
    else:
        policy.fit(obs.to(policy.device), least[: policy.state_dim].to(policy.device))


def least_deviation(task: Layout) -> Tensor:
    """Return the smallest number (D,) that an observation is divided by, in rad and m.

    Demonstrations hardly turn the tool; a young policy does.
    """
    parts = []
    for key, size in zip(task.obs_keys, task.obs_sizes):
        part = torch.full((size,), 0.005)
        if key == "joints":
            part[:] = 0.05
        if key == "eef":
            part[3:] = 0.05  # place in m, then two columns of the rotation
        parts.append(part)
    return torch.cat(parts)


def rebuilt(state: dict[str, Any]) -> nn.Module:
    """Build the policy of a checkpoint, untrained; the checkpoint says its kind and sizes."""
    if state["kind"] == FlowPolicy.__name__:
        return FlowPolicy(**state["sizes"])
    from vla_head import VLAFlowHead

    return VLAFlowHead(**state["sizes"])


def trained(args: Any, task: Layout) -> tuple[Acting, int, int]:
    """Load run_dir/last.pt: what acts as args.act says, its updates and its online steps."""
    path = Path(args.run_dir) / "last.pt"
    state = load_checkpoint(path)
    with must_fit(path, "it is of another arm or of other sizes, give the flags of its training"):
        columns = tuple(state["columns"])
        if columns != task.obs_keys:
            raise UserError(
                f"{path} has learnt from {', '.join(columns)}, this arm offers "
                f"{', '.join(task.obs_keys)}: give the --observe, --encoder, --backbone and "
                "--instruction it was trained with"
            )
        agent = POCO(args, rebuilt(state), Clock())
        agent.load_state_dict(state["agent"])
        return agent.acting(args.act), state["updates"], state["seen"]


# ---- learning ------------------------------------------------------------------------------------


class Learner:
    """Replay and POCO in this process.

    cloned: gradient steps of stage I so far. updates: those of stage II. absorbed: episodes in the
    replay. seen: steps of these.
    """

    def __init__(self, args: Any, task: Layout):
        self.args = args
        self.task = task
        files = recordings(args)
        device = usable_device(args.device, mps=False)
        torch.manual_seed(args.seed)
        data = load(files, task)
        self.replay = ChunkReplay(
            len(data["obs"]) + args.capacity,
            task.obs_dim,
            task.action_dim,
            args.horizon,
            args.discount,
            device,
            args.demo_share,
        )
        self.replay.extend(data | {"reward": data["reward"] + args.reward_offset})
        self.demonstrations = demos.fingerprint(data)
        policy = make_policy(args, task, device)
        standardise(policy, torch.as_tensor(data["obs"]), task)
        self.agent = POCO(args, policy, Clock())
        self.cloning = adam(policy.head_parameters(), args.learning_rate)
        self.generator = torch.Generator(device).manual_seed(args.seed)
        self.cloned = 0
        self.updates = 0
        self.absorbed = 0
        self.seen = 0
        self.totals: dict[str, Tensor] = {}  # sums of the statistics since the last report
        self.counts: dict[str, int] = {}

    # ---- stage I

    def pretrain(self, save: Callable[["Learner"], None]) -> bool:
        """Clone the demonstrations for pretrain_steps; `save` every tenth. False if interrupted."""
        total = self.args.pretrain_steps
        every = max(total // 10, 1)
        start = self.cloned
        with (
            Interrupt() as interrupt,
            Progress("stage I", total, every, start, start, "steps") as bar,
        ):
            stop = False
            while self.cloned < total and not stop:
                batch = self.replay.sample(self.args.batch_size, self.generator)
                minimise(cloning_loss(self.agent.policy, batch), self.cloning)
                self.cloned += 1
                stop = interrupt.stop  # read once: a signal may arrive at any moment
                bar.update(self.cloned, self.cloned)
                finished = self.cloned == total
                if finished:
                    self.agent.actor.load_state_dict(self.agent.policy.state_dict())
                if self.cloned % every == 0 or stop or finished:
                    save(self)
        return self.cloned >= total

    # ---- stage II

    def add(self, path: Path) -> None:
        """Add the steps of one finished episode to the replay."""
        rows = load([path], self.task)
        rows["reward"] = rows["reward"] + self.args.reward_offset
        for i in range(len(rows["obs"])):
            self.replay.add(**{name: rows[name][i] for name in FIELDS})
        self.seen += len(rows["obs"])
        self.absorbed += 1

    def owed(self) -> int:
        """Count the updates that the steps so far pay for and that are still to do."""
        return int(self.args.updates_per_step * self.seen) - self.updates

    def warmup(self) -> bool:
        """Say whether the actor is still frozen in the next update."""
        return self.updates < self.args.warmup_steps * self.args.updates_per_step

    def update(self) -> None:
        """Draw a batch and learn from it."""
        batch = self.replay.sample(self.args.batch_size, self.generator)
        stats = self.agent.update(batch, self.warmup())
        self.updates += 1
        for name, value in stats.items():
            self.totals[name] = self.totals.get(name, 0.0) + value
            self.counts[name] = self.counts.get(name, 0) + 1

    def absorb(self, path: Path) -> None:
        """Add an episode, then do every update that it pays for."""
        self.add(path)
        before = self.updates
        for _ in range(self.owed()):
            self.update()
        if self.updates // self.args.save_every > before // self.args.save_every:
            self.save(Path(self.args.run_dir) / "last.pt")

    def report(self) -> dict[str, float]:
        """Return the statistics' means since the last call, and the updates so far."""
        means = {name: float(total) / self.counts[name] for name, total in self.totals.items()}
        self.totals = {}
        self.counts = {}
        return means | {"updates": self.updates, "warmup": int(self.warmup())}

    def acting(self) -> Acting:
        return self.agent.acting(self.args.act)

    # ---- what a learner elsewhere has to do besides

    def wait(self, interrupt: Interrupt) -> None:
        """Wait for the first weights: here they are."""

    def check(self) -> None:
        """Raise UserError if the learner has died: here nothing can."""

    def pull(self) -> int:
        """Take newer weights and return their version: here every update makes one."""
        return self.updates

    def close(self) -> None:
        self.save(Path(self.args.run_dir) / "last.pt")

    # ---- checkpoints

    def state_dict(self) -> dict[str, Any]:
        return policy_state(self.agent.actor) | {
            "agent": self.agent.state_dict(),
            "cloning": self.cloning.state_dict(),
            "columns": self.task.obs_keys,
            "demonstrations": self.demonstrations,
            "cloned": self.cloned,
            "updates": self.updates,
            "absorbed": self.absorbed,
            "seen": self.seen,
            "generator": self.generator.get_state(),
            "torch_rng": noise_state(self.replay.device),
        }

    def load_state_dict(self, state: dict[str, Any], folder: Path) -> None:
        """Go on from a checkpoint; the episodes that it had absorbed are read from `folder`."""
        refuse_other_demonstrations(state["demonstrations"], self.demonstrations, self.args.data)
        for path in numbered(folder)[: state["absorbed"]]:
            self.add(path)
        self.agent.load_state_dict(state["agent"])
        self.cloning.load_state_dict(state["cloning"])
        self.cloned = state["cloned"]
        self.updates = state["updates"]
        self.generator.set_state(state["generator"])
        restore_noise(state["torch_rng"], self.replay.device)

    def save(self, path: Path) -> None:
        """Write a checkpoint, unless a weight is no longer finite."""
        state = self.state_dict()
        when = f"before update {self.updates}; {path} is the last good checkpoint"
        refuse_nonfinite(state["agent"], "learner", when)
        save_checkpoint(path, state)


def recordings(args: Any) -> list[Path]:
    """List the files of demonstrations in args.data. UserError if there are none."""
    data = Path(args.data)
    files = numbered(data) if data.is_dir() else [data]
    if not files or not files[0].exists():
        raise UserError(
            f"no demonstrations in {data}: python robot.py record --task {args.task} makes them"
        )
    return files


def refuse_other_demonstrations(then: dict[str, Any], now: dict[str, Any], data: str) -> None:
    """Raise UserError if a run would go on with other demonstrations than it began with."""
    if then == now:
        return
    if then["steps"] == now["steps"]:
        difference = f"{now['steps']} steps as then, but other ones"
    else:
        difference = f"{then['steps']} steps then, {now['steps']} now"
    raise UserError(
        f"the demonstrations have changed: {difference} in {data}. A run goes on with those it "
        "began with: put them back, or begin another run with --run-dir DIR"
    )
