"""Where the loop has a hole, what follows is as slow as all else: a slow policy, a stopped process, a pushed arm."""
import contextlib
import os
import subprocess
import time

import numpy as np
import pytest

from arms.senses import PERIOD
from logbook import UserError
from robot import LATE
from test_robot_care import Person, ahead, plain, space


def clocked(rig):
    """The moments of the loop's own commands, without the watchdog's."""
    moments, send = [], rig._send
    rig._send = lambda *target: moments.append(time.monotonic()) or send(*target)
    return moments


@pytest.mark.realtime
@pytest.mark.parametrize("seconds", [0.06, 0.1, 0.25])
def test_after_a_slow_policy_a_whole_period_follows_every_command(seconds):
    rig, _ = plain(Person(space), realtime=True)

    def act(obs):
        time.sleep(seconds)
        return np.tile(np.array([0.7, 0.7, 0, 0, 0, 0, -0.5], np.float32), (4, 1))
    with rig:
        moments = clocked(rig)
        take = rig.episode(act, 0)
        gaps = np.diff(moments)
    assert take.steps == 10 and gaps.min() > PERIOD / 2, gaps
    places = np.array(take.pieces[0]["obs"])[:, 7:10]
    moved = np.linalg.norm(np.diff(places, axis=0), axis=1)
    assert moved[4:].min() > 0.004, moved                           # metres: what a command did is in the next view
