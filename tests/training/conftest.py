"""A run's folder for the tests of logbook/."""

import pytest
from logbooks import small_run


@pytest.fixture
def book(tmp_path):
    return small_run(tmp_path / "lift-poco-s0")
