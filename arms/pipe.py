"""What goes between the arm's process and its learner's: weights as one vector, words that never stop who says them.

    from arms.pipe import Outlet, flat, unflatten
    outlet = Outlet(connection)                       # of multiprocessing.Pipe(), the learner's end
    outlet.send({"updates": 40})                      # returns at once; what does not fit is sent later, merged
    outlet.poll(0.2), outlet.recv_bytes()             # the connection's own
    unflatten(flat(modules), copies)                  # copies of these networks, now with their numbers

Not here: what is said (learner.py), the same between machines (distributed/arm.py).
"""
import select

import torch


def flat(modules):
    """All numbers of these networks as one vector, statistics included."""
    return torch.cat([value.detach().cpu().flatten() for module in modules for value in module.state_dict().values()])


def unflatten(vector, modules):
    """The inverse: write a vector of `flat` into these networks."""
    values = [value for module in modules for value in module.state_dict().values()]
    for value, part in zip(values, vector.split([value.numel() for value in values])):
        value.copy_(part.view_as(value))


class Outlet:
    """Dicts go out as soon as there is room; of those that wait only the newest value of each key is kept."""

    def __init__(self, connection):
        self.connection, self.kept = connection, {}

    def send(self, words):
        self.kept |= words
        self._flush()

    def poll(self, seconds):
        self._flush()                                 # what waited, once somebody has listened
        return self.connection.poll(seconds)

    def recv_bytes(self):
        return self.connection.recv_bytes()

    def _flush(self):
        # The arm listens once an episode, and its operator may take a break: a full pipe must not stop the learning.
        # Writable: three quarters of it are free, far more than a dict of numbers needs. Last words fit in any case,
        # and nobody would send them later.
        if self.kept and ("failed" in self.kept or select.select([], [self.connection], [], 0)[1]):
            self.connection.send(self.kept)
            self.kept = {}
