"""Shared by all tests: the project on the path, one thread, no display, repeatable examples."""

import os
import re
import sys
from pathlib import Path

os.environ.setdefault("MUJOCO_GL", "disable")
os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).parent.parent))

import pytest  # noqa: E402
import torch  # noqa: E402
from _pytest.runner import runtestprotocol  # noqa: E402
from hypothesis import Phase, settings  # noqa: E402

torch.set_num_threads(1)
settings.register_profile("dev", deadline=None, print_blob=True)
settings.register_profile("ci", deadline=None, print_blob=True, derandomize=True)
settings.register_profile(
    "mutants",
    deadline=None,
    derandomize=True,
    max_examples=20,
    database=None,
    phases=(Phase.explicit, Phase.generate),
)  # a failure need not be shrunk
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci" if os.environ.get("CI") else "dev"))

REPEATED = []  # attempts that failed in real time


def pytest_itemcollected(item):
    """`pytest -k eq17` selects the tests whose docstring cites Eq. 17."""
    for cited in re.findall(
        r"Eq\. ([0-9, =Eq.-]+)", getattr(getattr(item, "obj", None), "__doc__", None) or ""
    ):
        item.extra_keyword_matches.update(f"eq{number}" for number in re.findall(r"\d+", cited))


def pytest_configure(config):
    config.addinivalue_line("markers", "sim: steps a simulator")
    config.addinivalue_line("markers", "slow: takes more than a few seconds")
    config.addinivalue_line("markers", "realtime: waits for the clock; has five attempts")


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_protocol(item, nextitem):
    """Run a test of real time again: an arm must hold where the machine itself stalled."""
    if item.get_closest_marker("realtime") is None:
        return None
    item.ihook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
    reports = runtestprotocol(item, log=False, nextitem=nextitem)
    for _ in range(4):
        if not any(report.failed for report in reports):
            break
        REPEATED.append(item.name)
        item._initrequest()  # new fixtures
        reports = runtestprotocol(item, log=False, nextitem=nextitem)
    for report in reports:
        item.ihook.pytest_runtest_logreport(report=report)
    item.ihook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)
    return True


def pytest_terminal_summary(terminalreporter):
    """Say which adapters really ran, whether Ray did, and what ran again: easily overlooked."""
    if REPEATED:
        terminalreporter.write_line(f"failed in real time and ran again: {', '.join(REPEATED)}")
    if any(
        "test_distributed_ray" in one.nodeid for one in terminalreporter.stats.get("skipped", [])
    ):
        terminalreporter.write_line(
            "Ray is not installed, so distributed/ was tested without: pip install ray==2.60.0"
        )
    reports = {
        kind: [
            one.nodeid
            for one in terminalreporter.stats.get(kind, [])
            if "test_adapters" in one.nodeid
        ]
        for kind in ("passed", "failed", "skipped")
    }
    ran = [
        name
        for name in ("pi05", "smolvla", "groot")
        if any(name in one for one in reports["passed"] + reports["failed"])
    ]
    if ran or reports["skipped"]:
        from lerobot_here import missing

        why = f"; not installed: {', '.join(missing())}" if missing() else ""
        terminalreporter.write_line(
            f"VLA adapters run on the library's own classes: {', '.join(ran) or 'none'}{why}"
        )
