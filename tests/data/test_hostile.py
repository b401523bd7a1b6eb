"""Altered files of demonstrations load or are refused: no traceback, hang, crash or large memory.

    python -m pytest tests/data/test_hostile.py
    python tests/data/fuzz.py hdf5 10000 0        # longer, by hand

In a process of their own, since a damaged HDF5 file could crash the library itself.
"""

import os
import re
import subprocess
import sys

import fuzz
import pytest

FILES = 400


@pytest.mark.parametrize("kind", ["hdf5", "npz"])
def test_altered_files_load_or_are_refused_in_one_sentence(kind):
    command = [sys.executable, fuzz.__file__, kind, str(FILES), "0"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    loaded, refused = map(int, re.findall(r"\d+", done.stdout.splitlines()[-1]))
    assert loaded + refused == FILES and min(loaded, refused) > 3


@pytest.mark.parametrize("kind", ["hdf5", "npz"])
def test_unaltered_files_load(kind, tmp_path):
    """Otherwise the test above would show nothing."""
    for source in fuzz.sources(tmp_path, kind):
        assert fuzz.outcome(source, kind) == "loaded"
