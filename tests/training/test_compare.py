"""The comparison of methods: what it computes, what it skips, and what it refuses to compare."""

import csv
import importlib
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import train_online
from benchmarks import compare, fairness, jobs, scores
from benchmarks.jobs import Job
from logbook import Logbook, UserError, read_run
from logbook.options import parse

SUCCESS = {0: [1, 2], 100: [2, 1], 200: [3, 4]}  # step: successes of 4 episodes, of seeds 0 and 1
TIMES = ["success", "time/env", "time/critic", "time/eval"]


def fake_run(method, seed, acting="policy", last=200, task="lift", **args):
    """Make a run folder with known evaluations.

    It spends 1 s per logged interval of 100 steps, and 9 s evaluating.
    """
    folder = Job(task, method, seed).folder
    settings = {"online_steps": 200, "preset": "cpu", "seed": seed, "task": task} | args
    book = Logbook.create(folder, settings, TIMES, overwrite=True)
    for step, successes in SUCCESS.items():
        if step > last:
            break
        if step:
            book.log(step, success=0.5, **{"time/env": 0.25, "time/critic": 0.75, "time/eval": 9.0})
        episodes = [
            {"seed": i, "success": i < successes[seed], "length": 5, "return": 1.0}
            for i in range(4)
        ]
        book.evaluation(step, acting if step else "policy", episodes)
    book.close()
    if last == 200:
        (folder / "curve.png").touch()
    return folder


def finish(folder):
    """Add what a run lacks that was interrupted after step 100."""
    book = Logbook.resume(folder, TIMES)
    book.evaluation(200, "policy", [{"seed": 0, "success": True, "length": 5, "return": 1.0}])
    book.close()
    (folder / "curve.png").touch()


class Ended:
    """A process that has ended."""

    def __init__(self, code=0):
        self.returncode = code

    def poll(self):
        return self.returncode


class Endless(Ended):
    """A process that runs until it is told to save and end."""

    def __init__(self):
        super().__init__(None)

    def terminate(self):
        self.returncode = 0

    def wait(self):
        assert self.returncode == 0, "told to end first"


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def started(monkeypatch):
    """The commands of the runs that are started; each makes its folder at once."""
    commands = []

    def start(job, flags):
        commands.append(jobs.command(job, flags))
        if job.begun:
            finish(job.folder)
        else:
            own = dict(zip(fairness.names_of(job.own_flags), job.own_flags[1::2]))
            values = {name: float(value) for name, value in own.items()}
            fake_run(job.method, job.seed, job.kind.delivers, task=job.task, **values)
        return Ended()

    monkeypatch.setattr(jobs, "start", start)
    return commands


@pytest.fixture
def nothing_starts(monkeypatch):
    monkeypatch.setattr(jobs, "start", lambda job, flags: pytest.fail("a run was started"))


# ---- scores --------------------------------------------------------------------------------------


def test_the_table_holds_area_end_dip_and_steps_to_90_percent():
    for seed in (0, 1):
        fake_run("qc", seed, "best")
    rows = [row for seed in (0, 1) for row in scores.rows_of(Job("lift", "qc", seed))]
    found = scores.curves(rows, "lift", "qc", "best")
    assert found.steps.tolist() == [0, 100, 200] and found.seconds.tolist() == [0, 1, 2]
    assert found.success.tolist() == [[0.25, 0.5, 0.75], [0.5, 0.25, 1.0]]
    cells = scores.summary(found)
    assert cells == ["2", "38", "50.0", "88", "75-100", "25", "1 of 2 seeds", "0.0"]
    assert "| qc | best | 2 |" in scores.table(rows)
    one = scores.summary(scores.curves([r for r in rows if r["seed"] == 0], "lift", "qc", "best"))
    assert one[3:7] == ["75", "", "0", "none"]  # no interval over one seed


def test_the_area_begins_at_the_first_evaluation():
    found = scores.Curves(np.array([100, 200]), np.array([[0.5, 1.0]]), np.array([0.0, 120.0]))
    assert scores.summary(found)[2] == "75.0" and scores.summary(found)[-1] == "2.0"


def test_the_bootstrap_interval_is_over_seeds():
    assert scores.interval(np.array([0.0, 1.0])) == (0.0, 1.0)
    assert scores.interval(np.array([0.5, 0.5, 0.5])) == (0.5, 0.5)
    low, high = scores.interval(np.array([0.0, 0.5, 1.0]))
    assert 0 <= low < 0.25 and 0.75 < high <= 1


def test_several_tasks_make_one_table_and_a_panel_each(started, capsys):
    compare.main(["--tasks", "lift,can", "--methods", "poco,qc", "--seeds", "1"])
    out = capsys.readouterr().out
    assert "| task | method |" in out and "| can | qc | best | 1 |" in out
    rows = scores.read_rows(Path("runs/compare-lift-can.csv"))
    assert [row["task"] for row in rows[:1] + rows[-1:]] == ["lift", "can"] and len(started) == 4


def test_a_table_is_drawn_again_without_its_runs(started, capsys):
    compare.main(["--methods", "poco,qc", "--seeds", "1"])
    first = capsys.readouterr().out
    Path("runs").rename("elsewhere")
    compare.main(["--table", "elsewhere/compare-lift.csv", "--out", "again/lift"])
    table = [line for line in first.splitlines() if line.startswith("|")]
    assert "\n".join(table) in capsys.readouterr().out
    for name in ("lift.png", "lift-time.png"):
        assert Path("again", name).read_bytes()[:4] == b"\x89PNG"
    Path("mine.csv").write_text("step,success\n")
    with pytest.raises(UserError, match="mine.csv is no table of a comparison"):
        compare.main(["--table", "mine.csv"])


# ---- which runs are made -------------------------------------------------------------------------


def test_finished_runs_are_skipped_interrupted_ones_continued_and_files_written(started, capsys):
    fake_run("poco", 0)
    fake_run("poco --clip inf", 0, last=100)
    Job("lift", "poco --clip inf", 0).folder.joinpath("last.pt").touch()
    compare.main(["--methods", "poco,poco --clip inf", "--seeds", "1"])
    assert started == [["--resume", "runs/lift-poco_clip_inf-s0"]]
    with open("runs/compare-lift.csv", newline="") as file:
        methods = [row["method"] for row in csv.DictReader(file)]
    assert methods == ["poco"] * 3 + ["poco --clip inf"] * 3
    for name in ("compare-lift.png", "compare-lift-time.png"):
        assert Path("runs", name).read_bytes()[:4] == b"\x89PNG"
    assert "| poco --clip inf | policy |" in capsys.readouterr().out


def test_a_run_killed_between_its_last_two_evaluations_is_not_finished():
    folder = fake_run("poco", 0, "posterior")
    assert jobs.finished(folder)
    book = Logbook(folder, {}, [])
    for step, acting in ((200, "policy"), (100, "posterior")):
        book.evaluation(step, acting, [{"seed": 0, "success": True, "length": 5, "return": 1.0}])
    text = (folder / "eval.csv").read_text()
    lines = [line for line in text.splitlines(True) if "200,posterior" not in line]
    (folder / "eval.csv").write_text("".join(lines))
    assert not jobs.finished(folder)
    (folder / "eval.csv").write_text(text)
    (folder / "curve.png").unlink()  # before the second one began
    assert not jobs.finished(folder)


def test_finished_shows_what_is_there_and_runs_nothing(nothing_starts, capsys):
    with pytest.raises(UserError, match="none of these runs is finished"):
        compare.main(["--methods", "poco", "--finished"])
    fake_run("poco", 0)
    fake_run("poco", 1, last=100)
    fake_run("qc", 1, "best")
    compare.main(["--methods", "poco,qc,fql", "--seeds", "3", "--finished"])
    text = capsys.readouterr().out
    assert "| poco | policy | 1 |" in text and "| qc | best | 1 |" in text and "fql" not in text


def test_a_new_run_gets_its_own_flags_and_those_of_all(started):
    method = "poco-posterior --clip 0"
    command = ["--methods", method, "--seeds", "1", "--first-seed", "1", "--online-steps", "9"]
    compare.main([*command, "--threads", "2"])
    given = "--task lift --seed 1 --act posterior --clip 0 --online-steps 9 --threads 2"
    added = "--workers 1 --run-dir runs/lift-poco-posterior_clip_0-s1 --overwrite"
    assert [" ".join(argv) for argv in started] == [f"{given} {added}"]


def test_two_runs_at_a_time_but_never_two_that_train_the_same_stage_one(monkeypatch):
    """Stage I's folder is shared by the methods of a seed: the first of them trains it."""
    running = []
    overlaps = set()

    class Slow(Ended):
        """A run whose stage I takes two looks, and its stage II two more, poco's eight."""

        def __init__(self, job):
            super().__init__(None)
            self.job = job
            self.looks = 0

        def poll(self):
            self.looks += 1
            job = self.job
            if self.looks == 2:
                fake_run(job.method, job.seed, job.kind.delivers, last=100)
            if self.looks == (10 if job.method == "poco" else 4):
                fake_run(job.method, job.seed, job.kind.delivers)
                running.remove(job)
                self.returncode = 0
            return self.returncode

    def start(job, flags):
        for other in running:
            overlaps.add((other, job, (other.folder / "args.json").exists()))
        running.append(job)
        assert len(running) <= 2
        return Slow(job)

    monkeypatch.setattr(jobs, "start", start)
    monkeypatch.setattr(jobs.time, "sleep", lambda seconds: None)
    poco = Job("lift", "poco", 0)
    qc = Job("lift", "qc", 0)
    other_seed = Job("lift", "qc", 1)
    assert jobs.run_all([poco, qc, other_seed], [], parallel=2)
    assert overlaps == {(poco, other_seed, False), (poco, qc, True)}


def test_an_interrupted_comparison_lets_its_runs_save(monkeypatch, capsys):
    processes = []

    def start(job, flags):
        processes.append(Endless())
        signal.raise_signal(signal.SIGTERM)
        return processes[-1]

    monkeypatch.setattr(jobs, "start", start)
    compare.main(["--methods", "poco,qc", "--seeds", "1"])
    assert [process.returncode for process in processes] == [0]
    assert "interrupted; the same command continues" in capsys.readouterr().out


def test_a_run_that_fails_is_named_after_the_others_have_ended(monkeypatch, started):
    made = jobs.start
    monkeypatch.setattr(
        jobs, "start", lambda job, flags: Ended(2) if job.method == "poco" else made(job, flags)
    )
    with pytest.raises(UserError, match="failed: runs/lift-poco-s0 .see runs/lift-poco-s0.log"):
        compare.main(["--methods", "poco,qc", "--seeds", "1"])
    assert jobs.finished(Job("lift", "qc", 0).folder)


def test_a_run_is_a_process_that_writes_a_log(monkeypatch):
    calls = []
    monkeypatch.setattr(
        subprocess, "Popen", lambda argv, **kwargs: calls.append((argv, kwargs)) or Ended()
    )
    jobs.start(Job("lift", "qc", 3), ["--preset", "cpu"])
    argv, kwargs = calls[0]
    assert argv[:4] == [sys.executable, "-m", "baselines.qc", "--task"] and "--preset" in argv
    assert kwargs["stdout"].name == "runs/lift-qc-s3.log"
    assert kwargs["env"]["OMP_NUM_THREADS"] == "1"


# ---- what is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "flags",
    [
        ["--online-steps", "300"],
        ["--online_steps=300"],
        ["--no-video", "--clip", "0.3"],
        ["--no-normalize"],
        ["--horizon", "3"],
    ],
)
def test_a_run_that_is_there_does_not_pass_for_one_made_with_other_flags(flags, started):
    command = ["--methods", "poco", "--seeds", "1"]
    folder = fake_run("poco", 0, clip=0.6, normalize=True, horizon=5, data="data/x.hdf5")
    with pytest.raises(
        UserError,
        match="lift-poco-s0 was made with (online_steps 200, not 300|clip 0.6, not 0.3|"
        "normalize True, not False|horizon 5, not 3)",
    ):
        compare.main([*command, *flags])
    fake_run("poco", 0, last=100, clip=0.6, normalize=True, horizon=5, data="data/x.hdf5")
    (folder / "last.pt").touch()  # interrupted
    with pytest.raises(UserError, match="was made with"):
        compare.main([*command, *flags])
    same = (
        "--online-steps 200 --clip 0.60 --threads 2 --data ./data/x.hdf5 --preset cpu --device cpu"
    )
    compare.main([*command, *same.split()])
    assert started == [["--resume", "runs/lift-poco-s0"]]


@pytest.mark.parametrize(
    "flags",
    [["--seed", "7"], ["--seed=7"], ["--run-dir", "runs/x"], ["--run_dir=runs/x"], ["--overwrite"]],
)
def test_what_differs_from_run_to_run_is_not_set_for_all(flags, nothing_starts):
    with pytest.raises(
        UserError, match="each run has its own --(seed|run-dir|overwrite): leave it out"
    ):
        compare.main(["--methods", "poco", *flags])


@pytest.mark.parametrize("own", ["--seed 7", "--seed=7", "--run-dir runs/x", "--task can"])
def test_nor_does_a_method_set_it_for_all_its_seeds(own, nothing_starts):
    """Three runs of seed 7 would pass for seeds 0 to 2, with an interval of no width."""
    with pytest.raises(UserError, match="each run has its own --(seed|run-dir|task): leave it out"):
        compare.main(["--methods", f"poco {own}"])


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--methods", "sac"], "unknown method 'sac'; methods: poco"),
        (["--methods", "poco,"], "unknown method ''"),
        (["--tasks", "lift,lyft"], "unknown task 'lyft'; tasks: lift"),
        (["--seeds", "0"], "--seeds must be at least 1"),
        (["--parallel", "0"], "--parallel must be at least 1"),
    ],
)
def test_mistakes_on_the_command_line_are_named(argv, message, nothing_starts):
    with pytest.raises(UserError, match=message):
        compare.main(argv)


def test_runs_of_different_settings_are_not_compared_unless_that_is_what_is_compared():
    fake_run("poco", 0)
    fake_run("qc", 0, "best", preset="paper")
    for seed in (0, 1):  # data made here: one file per seed
        fake_run("qc-fql", seed, data=f"data/lift-scripted-20-s{seed}.hdf5")
    fake_run("poco", 1, data="mine.hdf5")
    own = [Job("lift", "qc-fql", seed) for seed in (0, 1)]
    fairness.refuse_unfair(own, is_ablation=False)
    with pytest.raises(UserError, match="data.*mine"):
        fairness.refuse_unfair([*own, Job("lift", "poco", 1)], is_ablation=False)
    pair = [Job("lift", method, 0) for method in ("poco", "qc")]
    with pytest.raises(UserError, match="preset"):
        fairness.refuse_unfair(pair, is_ablation=False)
    for own in ("qc --preset paper", "qc --preset=paper"):
        fake_run(own, 0, "best", preset="paper")
        fairness.refuse_unfair([pair[0], Job("lift", own, 0)], is_ablation=False)
    assert read_run(pair[0].folder)[1]["policy"][0.0] == (1, 4)


def test_one_and_one_point_nought_are_the_same_setting():
    """As in the runs of this repository: benchmarks/results/can/poco-s0 and poco-s1."""
    fake_run("poco", 0, updates_per_step=1)
    fake_run("poco", 1, updates_per_step=1.0)
    compare.main(["--methods", "poco", "--seeds", "2"])
    fake_run("poco", 1, updates_per_step=1.5)
    with pytest.raises(UserError, match="differ in updates_per_step: 1 in .*, 1.5 in"):
        compare.main(["--methods", "poco", "--seeds", "2"])


def test_seeds_of_one_method_that_were_made_with_different_flags_are_not_averaged():
    """--num-candidates 4 for the first seed, then two seeds without it."""
    fake_run("poco", 0, num_candidates=4, device="cpu", save_every=100, checkpoint=None)
    where = {"device": "cuda", "save_every": 500, "checkpoint": "runs/lift-bc-s1", "graph": False}
    fake_run("poco", 1, num_candidates=4, **where)  # where a run ran, when it saved may differ
    compare.main(["--methods", "poco", "--seeds", "2"])
    fake_run("poco", 1, num_candidates=16, device="cpu", save_every=100, checkpoint=None)
    for flags in ([], ["--finished"]):
        with pytest.raises(
            UserError, match="differ in num_candidates: 4 in .*-s0, 16 in runs/lift-poco-s1"
        ):
            compare.main(["--methods", "poco", "--seeds", "2", *flags])


@pytest.mark.parametrize(
    "flag, name, value",
    [
        ("--horizon 3", "horizon", 3),
        ("--no-normalize", "normalize", False),
        ("--heads 5", "heads", 5),
        ("--policy-tau 1", "policy_tau", 1.0),
        ("--demo-share 0.5", "demo_share", 0.5),
    ],
)
def test_a_method_added_without_the_flags_of_the_first_is_not_compared_with_it(flag, name, value):
    """--methods poco --horizon 3, then poco,qc without it.

    fql, rlpd-ac and ogpo-ca have values of their own.
    """
    usual = {"horizon": 5, "normalize": True, "heads": 2, "policy_tau": 0.005, "demo_share": None}
    fake_run("qc", 0, "best", **usual)
    fake_run("fql", 0, **usual | {"horizon": 1})
    fake_run("rlpd-ac", 0, **usual | {"heads": 10, "demo_share": 0.5})
    fake_run("ogpo-ca", 0, **usual | {"heads": 10, "policy_tau": 0.01})
    fake_run("poco", 0, **usual)
    fake_run(f"poco {flag}", 0, **usual | {name: value})
    compare.main(["--methods", "poco,qc,fql,rlpd-ac,ogpo-ca", "--seeds", "1"])
    compare.main(["--methods", f"poco {flag},qc", "--seeds", "1"])  # that is what is compared
    fake_run("poco", 0, **usual | {name: value})
    with pytest.raises(UserError, match=f"differ in {name}"):
        compare.main(["--methods", "poco,qc,fql,rlpd-ac,ogpo-ca", "--seeds", "1"])


# ---- ablations -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", compare.ABLATIONS)
def test_an_ablation_holds_the_presets_own_value_once_as_plain_poco(name):
    """Whatever task and preset: values in order, each once, and the flag is one that POCO takes."""
    field, values = compare.ABLATIONS[name]
    for flags in (
        ["--preset", "cpu"],
        ["--preset", "paper"],
        ["--preset", "paper", "--setting", "online"],
    ):
        for task in ("lift", "square", "cube-triple"):
            methods, own = compare.ablation(name, task, flags)
            usual = vars(parse(train_online.Args, ["--task", task, *flags]))
            assert methods.count("poco") == 1 and len(set(methods)) == len(methods)
            assert own == usual[field]
            found = []
            for method in methods:
                own_flags = method.split()[1:]
                one = vars(parse(train_online.Args, ["--task", task, *flags, *own_flags]))
                found.append(one[field])
                changed = {key for key, value in one.items() if value != usual[key]}
                assert changed == ({field} if own_flags else set())
            assert found == sorted({*values, own})


def test_ablations_of_lift_reuse_the_presets_run_and_cover_behaviour_cloning_and_no_clip():
    cpu = ["--preset", "cpu"]
    methods, own = compare.ablation("clip", "lift", cpu)
    others = ["poco --clip 0", "poco --clip 0.15", "poco --clip 0.3"]
    assert own == 0.6 and methods == [*others, "poco", "poco --clip inf"]
    on_square = compare.ablation("clip", "square", ["--preset", "paper"])[0]
    assert on_square[1] == "poco"  # 0.08, which is not listed
    assert compare.ablation("guidance", "lift", cpu)[0][0] == "poco --guidance 0"
    assert compare.ablation("candidates", "lift", cpu)[0][1:] == [
        "poco",
        "poco --num-candidates 64",
    ]


def test_an_ablation_runs_each_value_titles_its_figure_and_writes_its_own_files(
    started, monkeypatch
):
    titles = []
    draw = compare.draw

    def spy(rows, path, title, over_time=False):
        titles.append(title)
        return draw(rows, path, title, over_time)

    monkeypatch.setattr(compare, "draw", spy)
    flags = ["--preset", "cpu", "--heads", "3"]
    for own in ("0", "0.15", "0.3", "inf"):
        assert f"poco --clip {own}" in compare.ablation("clip", "lift", flags)[0]
    command = ["--ablation", "clip", "--seeds", "1", *flags]
    compare.main(command)
    assert [argv[argv.index("--run-dir") + 1] for argv in started] == [
        "runs/lift-poco_clip_0-s0",
        "runs/lift-poco_clip_0.15-s0",
        "runs/lift-poco_clip_0.3-s0",
        "runs/lift-poco-s0",
        "runs/lift-poco_clip_inf-s0",
    ]
    assert all(" ".join(argv).count("--heads 3") == 1 for argv in started)
    assert titles == ["clip (poco: lift 0.6)"] * 2
    names = {path.name for path in Path("runs").glob("clip-lift*")}
    assert names == {f"clip-lift{end}" for end in (".csv", ".md", ".png", "-time.png")}
    compare.main(command)
    assert len(started) == 5  # all finished


def test_an_ablation_refuses_methods_its_own_flag_and_runs_that_differ_in_another_setting():
    for argv, message in (
        (["--methods", "poco"], "leave --methods out"),
        (["--clip", "1"], "--clip itself"),
        (["--clip=1"], "--clip itself"),
    ):
        with pytest.raises(UserError, match=message):
            compare.main(["--ablation", "clip", *argv])
    with pytest.raises(UserError, match="--num-candidates itself"):
        compare.main(["--ablation", "candidates", "--num_candidates", "8"])
    fake_run("poco", 0, temperature=0.01)
    for own in ("0", "0.15", "0.3", "inf"):
        fake_run(f"poco --clip {own}", 0, temperature=0.1 if own == "inf" else 0.01)
    with pytest.raises(UserError, match="temperature.*clip_inf"):
        compare.main(["--ablation", "clip", "--seeds", "1", "--preset", "cpu"])


def test_in_an_ablation_plain_poco_is_a_run_with_the_presets_own_value(nothing_starts):
    """The figure says so, and only that run has no flag of its own.

    --methods poco --clip 5 may have made it.
    """
    for own in ("0", "0.15", "0.3", "inf"):
        fake_run(f"poco --clip {own}", 0, clip=float(own))
    fake_run("poco", 0, clip=5.0)
    for flags in ([], ["--finished"]):
        with pytest.raises(
            UserError, match="lift-poco-s0 was made with clip 5.0, not with the preset's 0.6"
        ):
            compare.main(["--ablation", "clip", "--seeds", "1", "--preset", "cpu", *flags])
    compare.main(["--methods", "poco", "--seeds", "1"])
    fake_run("poco", 0, clip=0.6)
    compare.main(["--ablation", "clip", "--seeds", "1", "--preset", "cpu"])


@pytest.mark.parametrize("name", jobs.METHODS)
def test_every_method_names_a_script_that_takes_its_flags_and_delivers_its_way_of_acting(name):
    script, flags, delivers = jobs.METHODS[name]
    module = importlib.import_module(script)
    args = vars(parse(module.Args, ["--task", "lift", "--preset", "cpu", *flags]))
    agents = [value for value in vars(module).values() if isinstance(value, type)]
    assert any(delivers in vars(agent).get("modes", ()) for agent in agents)
    assert args.get("variant", name) in (name, "poco")
