"""How fast are an update, acting and the simulators, and what share of the processor's own product rate is the update?

    python -m benchmarks.speed                    # paper size, 2 minutes; writes benchmarks/speed-paper.json
    python -m benchmarks.speed --preset cpu --tasks lift

The product rate is measured in the same run, between the updates, because the speed of a shared machine drifts. Acting
and simulators use one thread, as in a rollout worker.
Not here: learning curves (python -m logbook RUN_DIR), interaction and learning together (benchmarks.rollouts).
"""
import json
import platform
import resource
import time
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import tyro

import envs
from logbook import Clock, UserError, check_numbers, cli
from replay import Batch
from train_offline import Acting, make_policy, preset_defaults, setup
from train_online import POCO, Args


@dataclass
class Speed:
    preset: Literal["paper", "cpu"] = "paper"  # whose sizes to measure
    updates: int = 20                          # timed updates, after 5 to warm up
    threads: int = 0                           # CPU threads of the update; 0 leaves torch's own choice
    tasks: tuple[str, ...] = tuple(envs.TASKS)  # whose simulators to step
    out: str | None = None                     # JSON file; default benchmarks/speed-<preset>.json


def network_flops(args, inputs, outputs):
    """Multiply-adds of one forward row through an MLP, times two."""
    return 2 * (inputs * args.hidden + (args.layers - 1) * args.hidden ** 2 + args.hidden * outputs)


def update_flops(args, obs_dim, action_dim):
    """Matrix-product work of one update; a backward pass costs twice the forward."""
    cells, rows = args.horizon * action_dim, args.batch_size * args.num_candidates
    policy = network_flops(args, obs_dim + cells + 1, cells)
    critic = args.heads * network_flops(args, obs_dim + cells, 1)
    return {"e_step": rows * args.flow_steps * policy + rows * critic,
            "m_step": 3 * (rows + args.batch_size) * policy,
            "critic": args.batch_size * (args.flow_steps * policy + 4 * critic)}


def matmul_rate(args, device, dtype, repeats=30):
    """FLOP/s of a plain product of the E-step's shape, rows limited to 8192."""
    rows = min(args.batch_size * args.num_candidates, 8192)
    a = torch.randn(rows, args.hidden, device=device, dtype=dtype)
    b = torch.randn(args.hidden, args.hidden, device=device, dtype=dtype)
    for _ in range(3):
        a @ b
    start = finish(device)
    for _ in range(repeats):
        a @ b
    return 2 * rows * args.hidden ** 2 * repeats / (finish(device) - start)


def finish(device):
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def timed_updates(speed, args, agent):
    """Seconds of each update of random chunks, and the product rate measured before each."""
    device, size, obs_dim = agent.device, args.batch_size, len(agent.policy.obs_mean)
    dtype = torch.bfloat16 if args.precision == "bfloat16" else torch.float32
    batch = Batch(torch.randn(size, obs_dim), torch.rand(size, args.horizon, agent.policy.action_dim) * 2 - 1,
                  torch.ones(size, args.horizon), torch.rand(size), torch.full((size,), 0.95),
                  torch.randn(size, obs_dim))
    batch = Batch(*(value.to(device) for value in batch))
    for _ in range(5):                                           # of which --graph captures the fourth
        agent.update(batch, warmup=False)
    agent.clock.split()
    seconds, rates = [], []
    for _ in range(speed.updates):
        rates.append(matmul_rate(args, device, dtype))
        start = finish(device)
        agent.update(batch, warmup=False)
        seconds.append(finish(device) - start)
    return np.array(seconds), np.array(rates)


def updates(speed, args, policy):
    """Median seconds of an update, mean ones of its phases, share of the product rate; on CUDA also as one graph."""
    agent = POCO(args, policy, Clock())
    seconds, rates = timed_updates(speed, args, agent)
    agent.clock = Clock(partial(finish, agent.device))           # waits after each phase, which makes an update slower
    timed_updates(speed, args, agent)
    phases = {name: value / speed.updates for name, value in agent.clock.split().items()}
    flops = update_flops(args, len(policy.obs_mean), policy.action_dim)
    report = {"update_seconds": np.median(seconds), "updates_per_second": 1 / np.median(seconds),
              "phase_seconds": phases,
              "phase_gflops": {name: flops[name] / value / 1e9 for name, value in phases.items()},
              "gflop_per_update": sum(flops.values()) / 1e9, "matmul_gflops": np.median(rates) / 1e9,
              "share_of_matmul_rate": np.median(sum(flops.values()) / seconds / rates)}
    if agent.device.type == "cuda":
        seconds, rates = timed_updates(speed, args, POCO(replace(args, graph=True), policy, Clock()))
        report |= {"graph_update_seconds": np.median(seconds),
                   "graph_share_of_matmul_rate": np.median(sum(flops.values()) / seconds / rates)}
    return report


def acting_seconds(agent, args, repeats=100):
    """Median seconds for one chunk of one state, drawn from the policy and from the posterior of 32 candidates."""
    rng, obs = np.random.default_rng(0), np.zeros((1, len(agent.policy.obs_mean)), np.float32)
    posterior = Acting(agent.actor, agent.critic, 32, args.temperature, args.pessimism)
    return {"policy": median_seconds(lambda: Acting(agent.actor)(obs, rng), repeats),
            "best_of_32": median_seconds(lambda: posterior(obs, rng), repeats)}


def median_seconds(function, repeats):
    function()
    times = [time.perf_counter()]
    for _ in range(repeats):
        function()
        times.append(time.perf_counter())
    return float(np.median(np.diff(times)))


class PlainRobosuite(envs.RobosuiteEnv):
    """robosuite as it comes: every sensor at every physics step, every controller's own way to the state."""

    def _read_sensors_once_per_step(self):
        pass

    def _read_arm_directly(self):
        pass


def steps_per_second(env, steps):
    """Under random actions, resets not counted."""
    rng, seconds = np.random.default_rng(0), 0.0
    env.reset(seed=0)
    for _ in range(steps):
        action = rng.uniform(-1, 1, env.action_space.shape).astype(np.float32)
        start = time.perf_counter()
        ended = any(env.step(action)[2:4])
        seconds += time.perf_counter() - start
        if ended:
            env.reset()
    return steps / seconds


def environment_rates(task, rounds=4):
    """Best of `rounds`, in turn: our environment's steps/s, and robosuite's own where the task is one of its."""
    made = {"here": envs.make_env(task)}
    if envs.TASKS[task].suite == "robosuite":
        made["robosuite"] = PlainRobosuite(envs.TASKS[task])
    for env in made.values():
        steps_per_second(env, 5)                                                  # its first steps compile and load
    rates = {name: max(steps_per_second(env, 100) for _ in range(rounds)) for name, env in made.items()}
    for env in made.values():
        env.close()
    return rates


def main():
    speed = tyro.cli(Speed, description=__doc__)
    check_numbers(speed, {"threads": 0})
    args = preset_defaults(Args, "lift", speed.preset)
    args.preset, args.threads = speed.preset, speed.threads
    if unknown := set(speed.tasks) - set(envs.TASKS):
        raise UserError(f"unknown tasks {', '.join(sorted(unknown))}; tasks: {', '.join(envs.TASKS)}")
    device = setup(args)
    policy = make_policy(args, device)
    report = {"preset": speed.preset, "device": device.type, "machine": platform.processor() or platform.machine(),
              "threads": torch.get_num_threads(), "torch": torch.__version__, "precision": args.precision}
    report |= updates(speed, args, policy)
    peak = torch.cuda.max_memory_allocated() if device.type == "cuda" else 0
    torch.set_num_threads(1)
    report["acting_seconds"] = acting_seconds(POCO(args, policy, Clock()), args)
    report["peak_memory_gb"] = (peak or 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss) / 1e9     # of Linux
    report["env_steps_per_second"] = {task: environment_rates(task) for task in speed.tasks}
    print(f"{report['gflop_per_update']:.0f} GFLOP per update, {1e3 * report['update_seconds']:.1f} ms: "
          f"{report['updates_per_second']:.2f} updates/s, {report['peak_memory_gb']:.1f} GB")
    for name, value in report["phase_seconds"].items():
        print(f"  {name:8s} {1e3 * value:8.1f} ms   {report['phase_gflops'][name]:7.0f} GFLOP/s")
    print(f"{args.precision} matrix product {report['matmul_gflops']:.0f} GFLOP/s; the whole update: "
          f"{100 * report['share_of_matmul_rate']:.0f} % of it")
    if "graph_update_seconds" in report:
        print(f"as one CUDA graph: {1e3 * report['graph_update_seconds']:.2f} ms, "
              f"{100 * report['graph_share_of_matmul_rate']:.0f} %")
    print("one chunk: " + ", ".join(f"{name} {1e3 * value:.2f} ms" for name, value in report["acting_seconds"].items()))
    for task, rates in report["env_steps_per_second"].items():
        print(f"{task}: " + ", ".join(f"{rate:.0f} env steps/s {way}" for way, rate in rates.items()))
    out = Path(speed.out or f"benchmarks/speed-{speed.preset}.json")
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    cli(main)
