"""The rows of progress.csv: means of what the updates returned, rates, and where the time went.

    report = Report(book, clock, phases=("env", "critic"))
    report.add(stats)                                 # after every update; no update waits for the CPU
    report.write(step, success=0.4)                   # a row

Not here: the files (see __init__.py).
"""
import copy

STATE = ("sums", "updates", "best", "seconds", "step", "written", "pending")


class Report:
    """Since the last row: sums of the statistics, on their device, and every phase's seconds; these also in all."""

    def __init__(self, book, clock, phases):
        self.book, self.clock = book, clock
        self.sums, self.updates, self.best, self.seconds = {}, 0, -1.0, dict.fromkeys(phases, 0.0)
        self.step, self.written, self.pending = 0, 0, dict(self.seconds)      # where this interval began; its seconds

    def add(self, stats):
        self.updates += 1
        for name, value in stats.items():
            total, count = self.sums.get(name, (0.0, 0))
            self.sums[name] = (total + value, count + 1)

    def write(self, step, **scalars):
        """A row of progress.csv: these numbers, the means, and what was done a second."""
        means, self.sums = {name: float(total) / count for name, (total, count) in self.sums.items()}, {}
        self._split()
        seconds, self.pending = self.pending, dict.fromkeys(self.seconds, 0.0)
        busy, steps, updates = sum(seconds.values()), step - self.step, self.updates - self.written
        self.book.log(step, **scalars, updates=self.updates, env_steps_per_s=steps / busy, updates_per_s=updates / busy,
                      **means, **{f"time/{name}": value for name, value in seconds.items()})
        self.step, self.written = step, self.updates

    def time_split(self):
        self._split()
        parts = ", ".join(f"{name} {value:.0f} s" for name, value in self.seconds.items())
        return f"stage II took {sum(self.seconds.values()):.0f} s: {parts}"

    def _split(self):
        for name, seconds in self.clock.split().items():
            self.seconds[name] += seconds
            self.pending[name] += seconds

    def state_dict(self):
        self._split()
        return {name: copy.copy(getattr(self, name)) for name in STATE}

    def load_state_dict(self, state, step):
        """What a resumed run counts on from; older checkpoints hold the sums alone: the row's time begins at step."""
        state = {"step": step, "written": state["updates"], "pending": self.pending} | state
        for name in STATE:
            setattr(self, name, copy.copy(state[name]))
