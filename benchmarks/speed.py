"""How fast are an update, acting and the simulators, and how near the processor's own rate?

    python -m benchmarks.speed                    # paper size, 2 minutes
    python -m benchmarks.speed --preset cpu --tasks lift

The rate of plain matrix products is measured in the same run, between the updates, because the
speed of a shared machine drifts. Acting and simulators use one thread, as in a rollout worker.
Writes runs/speed-<preset>.json, or --out.
Not here: learning curves (python -m logbook RUN), interaction and learning together (rollouts.py).
"""

import json
import platform
import resource
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import nn

import envs
from logbook import Clock, UserError, cli
from logbook.options import Count, CountOrZero, parse
from replay import Batch
from train_offline import Acting, Simulation, setup
from train_online import POCO, Args

CANDIDATES = 32  # of the posterior that acts


@dataclass
class Measurement:
    """What to measure."""

    preset: Literal["paper", "cpu"] = "paper"  # whose sizes
    updates: Count = 20  # timed updates, after 5 to warm up
    threads: CountOrZero = 0  # CPU threads of the update; 0 leaves the choice to torch
    tasks: tuple[str, ...] = tuple(envs.TASKS)  # whose simulators to step
    out: str | None = None  # JSON file; default runs/speed-<preset>.json

    kept: ClassVar[tuple[str, ...]] = ()

    @classmethod
    def defaults(cls, known: dict[str, str | None]) -> dict[str, Any]:
        return {}


# ---- the update ----------------------------------------------------------------------------------


def network_flops(args: Args, inputs: int, outputs: int) -> int:
    """Count the multiply-adds of one forward row through an MLP, times two."""
    hidden = (args.layers - 1) * args.hidden**2
    return 2 * (inputs * args.hidden + hidden + args.hidden * outputs)


def update_flops(args: Args, obs_dim: int, action_dim: int) -> dict[str, int]:
    """Count the matrix-product work of one update; a backward pass costs twice the forward."""
    cells = args.horizon * action_dim
    candidates = args.batch_size * args.num_candidates
    distilled = args.batch_size * (args.particles or args.num_candidates)
    policy = network_flops(args, obs_dim + cells + 1, cells)
    critic = args.heads * network_flops(args, obs_dim + cells, 1)
    return {
        "e_step": candidates * (args.flow_steps * policy + critic),
        "m_step": 3 * (distilled + args.batch_size) * policy,
        "critic": args.batch_size * (args.flow_steps * policy + 4 * critic),
    }


def matmul_rate(args: Args, device: torch.device, dtype: torch.dtype, repeats: int = 30) -> float:
    """Measure the FLOP/s of a plain product of the E-step's shape, of at most 8192 rows."""
    rows = min(args.batch_size * args.num_candidates, 8192)
    a = torch.randn(rows, args.hidden, device=device, dtype=dtype)
    b = torch.randn(args.hidden, args.hidden, device=device, dtype=dtype)
    for _ in range(3):
        a @ b
    start = finish(device)
    for _ in range(repeats):
        a @ b
    return 2 * rows * args.hidden**2 * repeats / (finish(device) - start)


def finish(device: torch.device) -> float:
    """Wait for a GPU and return the time."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def random_batch(args: Args, policy: nn.Module) -> Batch:
    size = args.batch_size
    batch = Batch(
        obs=torch.randn(size, policy.obs_dim),
        chunk=torch.rand(size, args.horizon, policy.action_dim) * 2 - 1,
        valid=torch.ones(size, args.horizon),
        returns=torch.rand(size),
        bootstrap=torch.full((size,), 0.95),
        next_obs=torch.randn(size, policy.obs_dim),
    )
    return Batch(*(value.to(policy.device) for value in batch))


def timed_updates(count: int, args: Args, agent: POCO) -> tuple[np.ndarray, np.ndarray]:
    """Return the seconds of each update, and the product rate measured before each."""
    dtype = torch.bfloat16 if args.precision == "bfloat16" else torch.float32
    batch = random_batch(args, agent.policy)
    for _ in range(5):  # a captured graph is made in the fourth
        agent.update(batch, warmup=False)
    agent.clock.split()
    seconds = []
    rates = []
    for _ in range(count):
        rates.append(matmul_rate(args, agent.device, dtype))
        start = finish(agent.device)
        agent.update(batch, warmup=False)
        seconds.append(finish(agent.device) - start)
    return np.array(seconds), np.array(rates)


def measure_updates(count: int, args: Args, policy: nn.Module) -> dict[str, Any]:
    """Measure an update: median seconds, mean seconds of its phases, share of the product rate.

    On CUDA also as one captured graph.
    """
    agent = POCO(args, policy, Clock())
    seconds, rates = timed_updates(count, args, agent)
    # A clock that waits after each phase makes an update slower, so the phases are timed apart.
    agent.clock = Clock(partial(finish, agent.device))
    timed_updates(count, args, agent)
    phases = {name: value / count for name, value in agent.clock.split().items()}
    flops = update_flops(args, policy.obs_dim, policy.action_dim)
    total = sum(flops.values())
    report = {
        "update_seconds": np.median(seconds),
        "updates_per_second": 1 / np.median(seconds),
        "phase_seconds": phases,
        "phase_gflops": {name: flops[name] / value / 1e9 for name, value in phases.items()},
        "gflop_per_update": total / 1e9,
        "matmul_gflops": np.median(rates) / 1e9,
        "share_of_matmul_rate": np.median(total / seconds / rates),
    }
    if agent.device.type == "cuda":
        from distributed.graph import CapturedPOCO

        seconds, rates = timed_updates(count, args, CapturedPOCO(args, policy, Clock()))
        report["graph_update_seconds"] = np.median(seconds)
        report["graph_share_of_matmul_rate"] = np.median(total / seconds / rates)
    return report


# ---- acting and the simulators -------------------------------------------------------------------


def acting_seconds(args: Args, policy: nn.Module) -> dict[str, float]:
    """Measure one chunk for one state: median seconds from the policy and from the posterior."""
    agent = POCO(args, policy, Clock())
    obs = np.zeros((1, policy.obs_dim), np.float32)
    rng = np.random.default_rng(0)
    bare = Acting(agent.actor)
    posterior = Acting(agent.actor, agent.critic, CANDIDATES, args.temperature, args.pessimism)
    return {
        "policy": median_seconds(lambda: bare(obs, rng)),
        f"best_of_{CANDIDATES}": median_seconds(lambda: posterior(obs, rng)),
    }


def median_seconds(function: Callable[[], Any], repeats: int = 100) -> float:
    function()
    times = [time.perf_counter()]
    for _ in range(repeats):
        function()
        times.append(time.perf_counter())
    return float(np.median(np.diff(times)))


def steps_per_second(env: Any, steps: int) -> float:
    """Step under random actions; resets are not counted."""
    rng = np.random.default_rng(0)
    seconds = 0.0
    env.reset(seed=0)
    for _ in range(steps):
        action = rng.uniform(-1, 1, env.action_space.shape).astype(np.float32)
        start = time.perf_counter()
        _, _, terminated, truncated, _ = env.step(action)
        seconds += time.perf_counter() - start
        if terminated or truncated:
            env.reset()
    return steps / seconds


def environment_rates(name: str, rounds: int = 4) -> dict[str, float]:
    """Measure steps/s of our environment and, on robosuite's tasks, of robosuite as it comes.

    In turn, the best of `rounds`.
    """
    task = envs.get_task(name)
    made = {"here": envs.make_env(task)}
    if task.suite == "robosuite":
        from simulators.robosuite_env import RobosuiteEnv

        class PlainRobosuite(RobosuiteEnv):
            patched = False

        made["robosuite"] = PlainRobosuite(task)
    for env in made.values():
        steps_per_second(env, 5)  # the first steps compile and load
    rates = dict.fromkeys(made, 0.0)
    for _ in range(rounds):
        for way, env in made.items():
            rates[way] = max(rates[way], steps_per_second(env, 100))
    for env in made.values():
        env.close()
    return rates


# ---- the report ----------------------------------------------------------------------------------


def peak_memory(device: torch.device) -> float:
    """Return the most memory used so far, in GB: the GPU's, or this process's on Linux."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 1e9
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e9


def show(report: dict[str, Any]) -> None:
    print(
        f"{report['gflop_per_update']:.0f} GFLOP per update, "
        f"{1e3 * report['update_seconds']:.1f} ms: {report['updates_per_second']:.2f} updates/s, "
        f"{report['peak_memory_gb']:.1f} GB"
    )
    for name, value in report["phase_seconds"].items():
        rate = report["phase_gflops"][name]
        print(f"  {name:8s} {1e3 * value:8.1f} ms   {rate:7.0f} GFLOP/s")
    print(
        f"{report['precision']} matrix product {report['matmul_gflops']:.0f} GFLOP/s; "
        f"the whole update: {100 * report['share_of_matmul_rate']:.0f} % of it"
    )
    if "graph_update_seconds" in report:
        print(
            f"as one CUDA graph: {1e3 * report['graph_update_seconds']:.2f} ms, "
            f"{100 * report['graph_share_of_matmul_rate']:.0f} %"
        )
    chunks = [f"{way} {1e3 * value:.2f} ms" for way, value in report["acting_seconds"].items()]
    print(f"one chunk: {', '.join(chunks)}")
    for task, rates in report["env_steps_per_second"].items():
        print(
            f"{task}: " + ", ".join(f"{rate:.0f} env steps/s {way}" for way, rate in rates.items())
        )


def main(argv: list[str] | None = None) -> None:
    asked = parse(Measurement, argv)
    for task in asked.tasks:
        if task not in envs.TASKS:
            raise UserError(f"unknown task '{task}'; tasks: {', '.join(envs.TASKS)}")
    flags = ["--task", "lift", "--preset", asked.preset, "--threads", str(asked.threads)]
    args = parse(Args, flags)
    device = setup(args)
    policy = Simulation(args).make_policy(device)
    report = {
        "preset": asked.preset,
        "device": device.type,
        "machine": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "precision": args.precision,
    }
    report |= measure_updates(asked.updates, args, policy)
    report["peak_memory_gb"] = peak_memory(device)
    torch.set_num_threads(1)
    report["acting_seconds"] = acting_seconds(args, policy)
    report["env_steps_per_second"] = {task: environment_rates(task) for task in asked.tasks}
    show(report)
    out = Path(asked.out or f"runs/speed-{asked.preset}.json")
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(report, indent=2) + "\n")
    print(out)


if __name__ == "__main__":
    cli(main)
