"""Two policies side by side on the same evaluation episodes, as a GIF: README's picture.

    python -m benchmarks.film runs/lift-bc-s0 runs/lift-poco-s0 --task lift --seeds 1000003 1000005

Needs OpenGL; about a minute on one core. Not here: a run's own video (train_online.py --video).
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro
from PIL import Image, ImageDraw, ImageFont

import envs
from logbook import cli
from train_online import load_policy

TILE = 288  # pixels
EVERY = 3  # environment steps between pictures
LONGEST = 34  # pictures of an episode


@dataclass
class Args:
    """What can be asked."""

    runs: tyro.conf.Positional[tuple[str, ...]]  # checkpoints or run folders, left to right
    labels: tuple[str, ...] = ("behaviour cloning", "after POCO")
    task: str = "lift"
    seeds: tuple[int, ...] = (1_000_003, 1_000_005, 1_000_000)  # evaluation episodes
    episode_limit: int = 100
    out: str = "runs/policies.gif"


def film(policy, env, seed: int) -> tuple[list[np.ndarray], bool]:
    """Play an episode; return its pictures (S, S, 3) and whether it succeeded."""
    pictures = []

    def look(move):
        look.steps += 1
        if look.steps % EVERY == 0 or move.success:
            pictures.append(env.render())

    look.steps = 0
    _, success, _, _ = envs.run_episode(policy, env, seed, on_step=look)
    return pictures, success


def frame(clips: list[tuple[list[np.ndarray], bool]], labels: tuple[str, ...], t: int):
    """Lay the pictures at time t of several clips side by side, under their labels."""
    picture = Image.new("RGB", ((TILE + 4) * len(clips) - 4, TILE + 30), "white")
    draw = ImageDraw.Draw(picture)
    font = ImageFont.load_default(size=18)
    for place, ((pictures, success), label) in enumerate(zip(clips, labels)):
        tile = Image.fromarray(pictures[min(t, len(pictures) - 1)])
        picture.paste(tile.resize((TILE, TILE), Image.LANCZOS), (place * (TILE + 4), 30))
        if t >= len(pictures) - 1:
            label += ": success" if success else ": failure"
        draw.text((place * (TILE + 4) + 8, 4), label, fill="black", font=font)
    return picture.quantize(96)


def main() -> None:
    args = tyro.cli(Args, description=__doc__)
    env = envs.make_env(args.task, render_mode="rgb_array", episode_limit=args.episode_limit)
    policies = [load_policy(run) for run in args.runs]
    frames = []
    for seed in args.seeds:
        clips = [film(policy, env, seed) for policy in policies]
        longest = min(LONGEST, max(len(pictures) for pictures, _ in clips))
        frames += [frame(clips, args.labels, t) for t in range(longest + 3)]
    Path(args.out).parent.mkdir(parents=True, exist_ok=True)
    frames[0].save(
        args.out, save_all=True, append_images=frames[1:], duration=110, loop=0, optimize=True
    )
    print(args.out)


if __name__ == "__main__":
    cli(main)
