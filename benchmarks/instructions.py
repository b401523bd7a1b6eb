"""Does the policy do as it is told? Two instructions, one scene and one head (Sec. V-F).

    python -m benchmarks.instructions --seed 0    # trains, then tells right and wrong: 20 minutes
    python -m benchmarks.instructions --resume runs/lift-vla-two-s0

The scene is Lift's. An episode asks either to lift the cube or to push it to the left; its seed
says which. The policy sees pictures, proprioception and the instruction, never the goal. After
training, each episode is played twice: once told the truth, once told the other instruction.
Writes runs/lift-vla-two-s<seed>/instructions.json.
Not here: the head (vla_head.py), the models that look and read (arms/adapters/pretrained.py).
"""

import copy
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import gymnasium
import numpy as np
import torch
from torch import Tensor

import envs
import train_offline
import train_online
import vla_head
from demos.lift import LiftDemonstrator
from demos.motion import CLOSED, REACH, Grasper, Motion
from demos.views import Seeing
from logbook import cli, load_checkpoint
from logbook.options import parse

LIFT = 0
PUSH = 1
INSTRUCTIONS = ("lift the red cube", "push the red cube to the left")
LEFT = 0.12  # metres of the cube's y; it begins within 3 cm of the middle
ON_TABLE = 0.84  # metres of the cube's z, which is 0.82 where it lies
CUBE = slice(9, 12)  # its position in the observation
EPISODES = 100  # of the report, half of them for each goal


class PushDemonstrator(Grasper):
    """Push the cube to the left with closed fingers: action (7,) = demonstrator(obs (19,))."""

    TURN = (0.0, 0.0)
    BESIDE = np.array([0.0, -0.05, 0.0])  # where the push begins, seen from the cube

    def _grasp_point(self) -> np.ndarray:
        return self.object + self.BESIDE

    def _hover(self) -> Motion:
        return super()._hover()[0], CLOSED

    def _descend(self) -> Motion:
        return super()._descend()[0], CLOSED

    def _pause(self) -> Motion:
        return super()._pause()[0], CLOSED

    def _close(self) -> Motion:
        self._enter("lift")
        return np.zeros(3), CLOSED

    def _lift(self) -> Motion:
        """Push at the height of the cube; try again where the hand has passed it."""
        offset = self.object - self.eef
        if offset[1] < 0 or self.phase_steps > 60:
            self._enter("release")
        velocity = self.gain * offset / REACH
        velocity[1] = self.lift_speed
        return velocity, CLOSED

    def _release(self) -> Motion:
        return super()._release()[0], CLOSED


EXPERTS = (LiftDemonstrator, PushDemonstrator)


class TwoGoals(gymnasium.Wrapper):
    """Lift, where the episode's seed says whether to lift the cube or to push it."""

    def __init__(self, env: gymnasium.Env):
        super().__init__(env)
        self.goal = LIFT
        self.obs = None  # the simulator's own observation, for the scripted experts

    def reset(self, **options):
        self.obs, info = self.env.reset(**options)
        self.goal = self.env.unwrapped.episode_seed % 2
        return self.obs, info

    def step(self, action):
        self.obs, _, _, _, info = self.env.step(action)
        lifted = info["success"]
        success = lifted if self.goal == LIFT else pushed(self.obs)
        base = self.env.unwrapped
        truncated = base.steps >= base.episode_limit and not success
        return self.obs, float(success), success, truncated, {"success": success}


def pushed(obs: np.ndarray) -> bool:
    """Say whether the cube lies on the left of the table."""
    _, y, z = obs[CUBE]
    return bool(y > LEFT and z < ON_TABLE)


@dataclass
class Args(vla_head.Args):
    """vla_head.py's flags; --demo-episodes counts those of each instruction."""

    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "cpu": {
            **vla_head.Args.presets["cpu"],
            "pretrain_steps": 3000,
            "online_steps": 8000,
            "capacity": 8000,
            "eval_every": 4000,
        },
        "paper": vla_head.Args.presets["paper"],
    }


class TwoInstructions(vla_head.SeenSimulation):
    """Lift's scene, where the policy is told which of two things to do."""

    stage_one = "vla-two-bc"
    method = "vla-two"
    others = INSTRUCTIONS[1:]
    lie = False  # tell the other instruction

    def make_env(self, render_mode: str | None = None) -> gymnasium.Env:
        return self._told(render_mode, every=1)

    def make_eval_env(self, render_mode: str | None = None) -> gymnasium.Env:
        return self._told(render_mode, every=self.args.horizon)

    def _told(self, render_mode: str | None, every: int) -> gymnasium.Env:
        env = TwoGoals(train_offline.Simulation.make_env(self, render_mode))

        def observe(images: Tensor, state: Tensor) -> Tensor:
            told = 1 - env.goal if self.lie else env.goal
            return self.backbone.observe(images, state, torch.tensor([told]))

        return Seeing(env, self.view, observe, vla_head.PROPRIOCEPTION, every)

    def demonstrations(self) -> dict[str, np.ndarray]:
        """Play the scripted experts until there are demo_episodes successes of each goal."""
        env = self.make_env()
        kept = {LIFT: [], PUSH: []}
        attempt = 0
        while min(map(len, kept.values())) < self.args.demo_episodes:
            rng = np.random.default_rng([self.args.seed, attempt])
            attempt += 1
            seed = int(rng.integers(2**31))
            goal = seed % 2
            if len(kept[goal]) == self.args.demo_episodes:
                continue
            episode = play(env, EXPERTS[goal](rng), seed)
            if episode[-1].success:
                kept[goal].append(episode)
        env.close()
        moves = [move for goal in kept for episode in kept[goal] for move in episode]
        print(f"{len(moves)} steps of demonstrations, {attempt} attempts", flush=True)
        return as_arrays(moves)


def play(env: gymnasium.Env, expert, seed: int) -> list[envs.Transition]:
    """Play one episode by the expert, which sees the simulator's own observation."""
    obs, _ = env.reset(seed=seed)
    moves = []
    ended = False
    while not ended:
        action = expert(env.env.obs)
        after, reward, terminated, truncated, info = env.step(action)
        moves.append(
            envs.Transition(obs, action, reward, after, terminated, truncated, info["success"])
        )
        obs = after
        ended = terminated or truncated
    return moves


def as_arrays(moves: list[envs.Transition]) -> dict[str, np.ndarray]:
    """Stack transitions as the replay takes them."""
    columns = dict(zip(envs.Transition._fields, zip(*moves)))
    del columns["success"]
    return {name: np.array(column, np.float32) for name, column in columns.items()}


# ---- the report ----------------------------------------------------------------------------------


def report(folder: Path) -> dict[str, Any]:
    """Compare right and wrong instructions for behaviour cloning and POCO; write a JSON file."""
    args = parse(Args, ["--eval", str(folder)], method=TwoInstructions.method)
    simulation = TwoInstructions(args)
    cpu = torch.device("cpu")
    cloned = train_offline.stage_one(args, simulation, cpu, simulation.demonstrations())
    if cloned is None:  # interrupted, where it had to be trained again
        return {}
    policy, _ = cloned
    weights = {
        "cloning": copy.deepcopy(policy.state_dict()),
        "poco": load_checkpoint(folder / "last.pt")["agent"]["actor"],
    }
    results = {}
    with envs.Evaluator(simulation.make_eval_env) as evaluator:
        for name, state in weights.items():
            policy.load_state_dict(state)
            for truth in ("right", "wrong"):
                simulation.lie = truth == "wrong"
                acting = train_offline.Acting(policy)
                result = evaluator.run(acting, EPISODES, train_offline.EVAL_SEED)
                goals = result.seed % 2
                results[f"{name}, {truth} instruction"] = {
                    "success": result.success_rate,
                    "interval": result.interval,
                    "lift": float(result.success[goals == LIFT].mean()),
                    "push": float(result.success[goals == PUSH].mean()),
                    "episodes": EPISODES,
                }
                print(f"{name}, {truth} instruction: {result}", flush=True)
    (folder / "instructions.json").write_text(json.dumps(results, indent=2) + "\n")
    return results


def main(argv: list[str] | None = None) -> None:
    train_online.main(argv, Args, train_online.POCO, TwoInstructions)
    args = parse(Args, argv, method=TwoInstructions.method)
    default = f"runs/{args.task}-{TwoInstructions.method}-s{args.seed}"
    folder = Path(args.eval or args.resume or args.run_dir or default)
    finished = (folder / "last.pt").is_file()
    if finished and load_checkpoint(folder / "last.pt")["world"]["steps"] >= args.online_steps:
        report(folder)


if __name__ == "__main__":
    cli(main)
