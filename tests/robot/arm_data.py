"""Small recordings and settings of an arm, made without any simulator."""

from pathlib import Path

import numpy as np

from arms.episodes import Episode, layout, next_file
from arms.settings import parse_args

TASK = layout("insert-usb", {"joints": 6, "gripper": 1, "eef": 9})
FLAGS = [
    *("--preset", "cpu", "--task", "insert-usb", "--hidden", "32", "--layers", "2"),
    *("--flow-steps", "2", "--batch-size", "16", "--num-candidates", "4"),
    *("--pretrain-steps", "20", "--warmup-steps", "25", "--save-every", "20", "--device", "cpu"),
    "--no-realtime",
]


def settings(folder, *flags):
    """Settings of a run in `folder`, whose demonstrations are in folder/demos."""
    folders = ["--data", str(folder / "demos"), "--run-dir", str(folder / "run")]
    return parse_args(["train", *FLAGS, *folders, *flags])


def write_episode(folder, seed, steps=30, outcome="success"):
    """Write the next episode of a folder; returns its path."""
    rng = np.random.default_rng(seed)
    episode = Episode(rng.normal(size=TASK.obs_dim))
    for _ in range(steps):
        action = rng.uniform(-1, 1, TASK.action_dim)
        episode.add(action, action, rng.normal(size=TASK.obs_dim))
    episode.outcome = outcome
    path = next_file(folder)[1]
    Path(folder).mkdir(parents=True, exist_ok=True)
    episode.save(path, TASK, outcome == "success")
    return path
