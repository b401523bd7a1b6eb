"""Which file is trained on: named, found, downloaded or made.

    python -m pytest tests/data/test_obtain.py

Not here: the downloads themselves (test_download.py).
"""

import shutil

import pytest

import demos

pytestmark = pytest.mark.sim


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demos")
    return demos.collect("lift", 1, 1, folder / "lift.hdf5", progress=False)


@pytest.fixture
def places(tmp_path, monkeypatch):
    """An empty home and working directory; making and downloading write a word."""

    def collect(task, episodes, seed, path, workers, **_):
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"made {episodes} {seed}")

    def fetch(task):
        target = demos.download.places(task)[0]
        target.parent.mkdir(parents=True)
        target.write_text("downloaded")
        return target

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setattr(demos, "collect", collect)
    monkeypatch.setattr(demos.download, "fetch", fetch)
    return tmp_path


def test_the_cpu_preset_makes_its_own_once(places, capsys):
    (places / "home/.robomimic/lift/mh").mkdir(parents=True)
    # The public file is not looked for: the data are the same everywhere.
    (places / "home/.robomimic/lift/mh/low_dim_v15.hdf5").write_text("public")
    path = demos.obtain("lift", "cpu", None, 7, 3)
    assert path.read_text() == "made 7 3" and "made just now" in capsys.readouterr().out
    path.write_text("kept")
    assert demos.obtain("lift", "cpu", None, 7, 3).read_text() == "kept"
    assert "made earlier" in capsys.readouterr().out


def test_the_paper_preset_looks_then_downloads_then_makes(places, capsys, monkeypatch):
    path = demos.obtain("can", "paper")
    assert path.read_text() == "downloaded" and "downloading" in capsys.readouterr().out
    path.write_text("mine")
    assert demos.obtain("can", "paper").read_text() == "mine" and "found" in capsys.readouterr().out

    def offline(*_):
        raise demos.download.DownloadError("no mirror delivered")

    monkeypatch.setattr(demos.download, "fetch", offline)
    assert demos.obtain("lift", "paper", None, 300).read_text() == "made 300 0"
    assert "no mirror delivered. Making 300 episodes instead" in capsys.readouterr().out


@pytest.mark.parametrize("preset", ["cpu", "paper"])
def test_a_named_file_is_taken_and_never_made(places, preset, path):
    assert demos.obtain("lift", preset, "~/some.hdf5") == places / "home/some.hdf5"
    (places / "home").mkdir()
    shutil.copy(path, places / "home/some.hdf5")
    assert demos.env_args("~/some.hdf5") == demos.env_args(path)


def test_a_resumed_run_makes_its_own_missing_file_again(places):
    path = demos.obtain("lift", "cpu")
    path.unlink()
    assert demos.obtain("lift", "cpu", str(path)).read_text() == "made 20 0"


def test_play_that_serves_the_task_has_a_name_of_its_own(places, monkeypatch):
    """The presets' play data differ: one must never be taken for the other."""

    def offline(*_):
        raise demos.download.DownloadError("no mirror delivered")

    monkeypatch.setattr(demos.download, "fetch", offline)
    assert demos.obtain("scene", "cpu", None, 5) != demos.obtain("scene", "paper", None, 5)
