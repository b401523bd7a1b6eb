"""The comparison of methods: what it computes from runs, what it skips, and what it refuses to
compare."""

import csv
import importlib

import numpy as np
import pytest

import train_offline
import train_online
from benchmarks import compare
from logbook import Logbook, UserError
from logbook.figure import read_run

SUCCESS = {0: [1, 2], 100: [2, 1], 200: [3, 4]}  # step: successes of 4 episodes, of seeds 0 and 1


def fake_run(method, seed, acting="policy", last=200, **args):
    """A run folder with known evaluations; it spends 1 s per logged interval of 100 steps, and 9 s
    evaluating."""
    settings = {"online_steps": 200, "preset": "cpu", "seed": seed} | args
    book = Logbook.create(
        compare.folder_of("lift", method, seed),
        settings,
        ["success", "time/env", "time/critic", "time/eval"],
    )
    for step, successes in SUCCESS.items():
        if step > last:
            break
        if step:
            book.log(step, success=0.5, **{"time/env": 0.25, "time/critic": 0.75, "time/eval": 9.0})
        book.evaluation(
            step,
            acting if step else "policy",
            [
                {"seed": i, "success": i < successes[seed], "length": 5, "return": 1.0}
                for i in range(4)
            ],
        )
    book.close()
    if last == 200:
        (book.folder / "curve.png").touch()


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_the_table_holds_area_end_dip_and_steps_to_90_percent():
    for seed in (0, 1):
        fake_run("qc", seed, "best")
    rows = [row for seed in (0, 1) for row in compare.rows_of("lift", "qc", seed)]
    steps, success, seconds = compare.curves(rows, "qc", "best")
    assert steps.tolist() == [0, 100, 200] and seconds.tolist() == [0, 1, 2]
    assert success.tolist() == [[0.25, 0.5, 0.75], [0.5, 0.25, 1.0]]
    method, acting, seeds, start, area, end, band, dip, to_90, total = compare.summary(
        rows, "qc", "best"
    )
    assert (method, acting, seeds, start, end, dip, total) == (
        "qc",
        "best",
        "2",
        "38",
        "88",
        "25",
        "2",
    )
    assert (
        area == f"{100 * np.mean([0.5, 0.5]):.1f}" and band == "75-100" and to_90 == "1 of 2 seeds"
    )
    assert "| qc | best | 2 |" in compare.table(rows, ["qc"])
    one = compare.summary([row for row in rows if row["seed"] == 0], "qc", "best")
    assert one[5:9] == ["75", "", "0", "none"]  # no interval over one seed


def test_the_bootstrap_interval_is_over_seeds():
    low, high = compare.interval(np.array([[0.0, 0.5], [1.0, 0.5]]))
    assert low.tolist() == [0.0, 0.5] and high.tolist() == [1.0, 0.5]


def test_finished_runs_are_skipped_interrupted_ones_continued_and_files_written(
    monkeypatch, capsys
):
    fake_run("poco", 0)
    fake_run("poco_clip_inf", 0, last=100)
    compare.folder_of("lift", "poco --clip inf", 0).joinpath("last.pt").touch()
    calls = []

    def main(argv):
        calls.append(argv)
        book = Logbook.resume(
            "runs/lift-poco_clip_inf-s0", ["success", "time/env", "time/critic", "time/eval"]
        )
        book.evaluation(200, "policy", [{"seed": 0, "success": True, "length": 5, "return": 1.0}])
        book.close()
        (book.folder / "curve.png").touch()

    monkeypatch.setattr(train_online, "main", main)
    compare.main(["--methods", "poco,poco --clip inf", "--seeds", "1"])
    assert calls == [["--resume", "runs/lift-poco_clip_inf-s0"]]
    with open("runs/compare-lift.csv", newline="") as file:
        assert [row["method"] for row in csv.DictReader(file)] == ["poco"] * 3 + [
            "poco --clip inf"
        ] * 3
    for name in ("compare-lift.png", "compare-lift-time.png"):
        assert (compare.Path("runs") / name).read_bytes()[:4] == b"\x89PNG"
    assert "| poco --clip inf | policy |" in capsys.readouterr().out


def test_a_run_killed_between_its_last_two_evaluations_is_not_finished():
    fake_run("poco", 0, "posterior")
    folder = compare.folder_of("lift", "poco", 0)
    assert compare.finished(folder)
    book = Logbook(folder, {}, [])
    book.evaluation(200, "policy", [{"seed": 0, "success": True, "length": 5, "return": 1.0}])
    book.evaluation(100, "posterior", [{"seed": 0, "success": True, "length": 5, "return": 1.0}])
    text = (folder / "eval.csv").read_text()
    (folder / "eval.csv").write_text(
        "".join(line for line in text.splitlines(True) if "200,posterior" not in line)
    )
    assert not compare.finished(folder)
    (folder / "eval.csv").write_text(text)
    (folder / "curve.png").unlink()  # before the second one began
    assert not compare.finished(folder)


def test_finished_shows_what_is_there_and_runs_nothing(monkeypatch, capsys):
    monkeypatch.setattr(train_online, "main", lambda argv: pytest.fail("a run was started"))
    with pytest.raises(UserError, match="none of these runs is finished"):
        compare.main(["--methods", "poco", "--finished"])
    fake_run("poco", 0)
    fake_run("poco", 1, last=100)
    fake_run("qc", 1, "best")
    compare.main(["--methods", "poco,qc,fql", "--seeds", "3", "--finished"])
    text = capsys.readouterr().out
    assert "| poco | policy | 1 |" in text and "| qc | best | 1 |" in text and "fql" not in text


def test_a_new_run_gets_its_own_flags_and_those_of_all(monkeypatch):
    calls = []
    monkeypatch.setattr(train_online, "main", calls.append)
    compare.main(
        [
            "--methods",
            "poco-posterior --clip 0",
            "--seeds",
            "1",
            "--first-seed",
            "4",
            "--online-steps",
            "9",
        ]
    )
    assert calls == [
        [
            "--task",
            "lift",
            "--seed",
            "4",
            "--act",
            "posterior",
            "--clip",
            "0",
            "--online-steps",
            "9",
            "--run-dir",
            "runs/lift-poco-posterior_clip_0-s4",
            "--overwrite",
        ]
    ]


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
def test_a_run_that_is_there_does_not_pass_for_one_made_with_other_flags(flags, monkeypatch):
    fake_run("poco", 0, clip=0.6, normalize=True, horizon=5, data="data/x.hdf5")
    with pytest.raises(
        UserError,
        match="lift-poco-s0 was made with (online_steps 200, not 300|clip 0.6, not 0.3|"
        "normalize True, not False|horizon 5, not 3)",
    ):
        compare.main(["--methods", "poco", "--seeds", "1", *flags])
    (compare.folder_of("lift", "poco", 0) / "curve.png").unlink()  # interrupted, then
    (compare.folder_of("lift", "poco", 0) / "last.pt").touch()
    with pytest.raises(UserError, match="was made with"):
        compare.main(["--methods", "poco", "--seeds", "1", *flags])
    calls = []
    monkeypatch.setattr(train_online, "main", calls.append)
    compare.main(
        [
            "--methods",
            "poco",
            "--seeds",
            "1",
            "--online-steps",
            "200",
            "--clip",
            "0.60",
            "--threads",
            "2",
            "--data",
            "./data/x.hdf5",
            "--preset",
            "auto",
            "--device",
            "cpu",
        ]
    )
    assert calls == [["--resume", "runs/lift-poco-s0"]]


@pytest.mark.parametrize(
    "flags",
    [["--seed", "7"], ["--seed=7"], ["--run-dir", "runs/x"], ["--run_dir=runs/x"], ["--overwrite"]],
)
def test_what_differs_from_run_to_run_is_not_set_for_all(flags, monkeypatch):
    monkeypatch.setattr(train_online, "main", lambda argv: pytest.fail("a run was started"))
    with pytest.raises(
        UserError, match="each run has its own --(seed|run-dir|overwrite): leave it out"
    ):
        compare.main(["--methods", "poco", *flags])


@pytest.mark.parametrize("own", ["--seed 7", "--seed=7", "--run-dir runs/x", "--task can"])
def test_nor_does_a_method_set_it_for_all_its_seeds(own, monkeypatch):
    """Three runs of seed 7 would pass for seeds 0 to 2, with an interval of no width."""
    monkeypatch.setattr(train_online, "main", lambda argv: pytest.fail("a run was started"))
    with pytest.raises(UserError, match="each run has its own --(seed|run-dir|task): leave it out"):
        compare.main(["--methods", f"poco {own}"])


def test_runs_of_different_settings_are_not_compared_unless_that_is_what_is_compared():
    fake_run("poco", 0)
    fake_run("qc", 0, "best", preset="paper")
    for seed in (0, 1):  # data made here: one file per seed
        fake_run("qc-fql", seed, data=f"data/lift-scripted-20-s{seed}.hdf5")
    fake_run("poco", 1, data="mine.hdf5")
    own = [compare.folder_of("lift", "qc-fql", seed) for seed in (0, 1)]
    compare.refuse_unlike(own, ["qc-fql"])
    with pytest.raises(UserError, match="data.*mine"):
        compare.refuse_unlike([*own, compare.folder_of("lift", "poco", 1)], ["poco", "qc-fql"])
    folders = [compare.folder_of("lift", method, 0) for method in ("poco", "qc")]
    with pytest.raises(UserError, match="preset"):
        compare.refuse_unlike(folders, ["poco", "qc"])
    for own in ("qc --preset paper", "qc --preset=paper"):
        compare.refuse_unlike(folders, ["poco", own])
    with pytest.raises(UserError, match="sac.*poco"):
        compare.main(["--methods", "sac"])
    assert read_run(folders[0])[1]["policy"][0.0] == (1, 4)


def test_one_and_one_point_nought_are_the_same_setting():
    """As in the runs of this repository: benchmarks/can/poco-s0 and poco-s1."""
    fake_run("poco", 0, updates_per_step=1)
    fake_run("poco", 1, updates_per_step=1.0)
    compare.main(["--methods", "poco", "--seeds", "2"])
    fake_run("poco", 1, updates_per_step=1.5)
    with pytest.raises(UserError, match="differ in updates_per_step: 1 in .*, 1.5 in"):
        compare.main(["--methods", "poco", "--seeds", "2"])


def test_seeds_of_one_method_that_were_made_with_different_flags_are_not_averaged():
    """--num-candidates 4 for the first seed, then two seeds without it; where a run ran, when it
    saved may differ."""
    fake_run("poco", 0, num_candidates=4, device="cpu", save_every=100, checkpoint=None)
    fake_run(
        "poco",
        1,
        num_candidates=4,
        device="cuda",
        save_every=500,
        checkpoint="runs/lift-bc-s1",
        graph=False,
    )
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
    """--methods poco --horizon 3, then poco,qc without it; fql, rlpd-ac and ogpo-ca have values of
    their own."""
    settings = {
        "horizon": 5,
        "normalize": True,
        "heads": 2,
        "policy_tau": 0.005,
        "demo_share": None,
    }
    fake_run("qc", 0, "best", **settings)
    fake_run("fql", 0, **settings | {"horizon": 1})
    fake_run("rlpd-ac", 0, **settings | {"heads": 10, "demo_share": 0.5})
    fake_run("ogpo-ca", 0, **settings | {"heads": 10, "policy_tau": 0.01})
    fake_run("poco", 0, **settings)
    fake_run(f"poco {flag}", 0, **settings | {name: value})
    compare.main(["--methods", "poco,qc,fql,rlpd-ac,ogpo-ca", "--seeds", "1"])
    compare.main(["--methods", f"poco {flag},qc", "--seeds", "1"])  # that is what is compared
    fake_run("poco", 0, **settings | {name: value})
    with pytest.raises(UserError, match=f"differ in {name}"):
        compare.main(["--methods", "poco,qc,fql,rlpd-ac,ogpo-ca", "--seeds", "1"])


@pytest.mark.parametrize("name", compare.ABLATIONS)
def test_an_ablation_holds_the_presets_own_value_once_as_plain_poco(name):
    """Whatever task and preset: values in order, each once, and the flag is one that POCO takes."""
    for flags in (
        ["--preset", "cpu"],
        ["--preset", "paper"],
        ["--preset", "paper", "--setting", "online"],
    ):
        for task in ("lift", "square", "cube-triple"):
            methods, own = compare.ablation(name, task, flags)
            field = compare.ABLATIONS[name][0]
            settings = train_offline.parse(train_online.Args, ["--task", task, *flags])
            assert (
                methods.count("poco") == 1
                and own == getattr(settings, field)
                and len(set(methods)) == len(methods)
            )
            values = []
            for _, *own_flags in (method.split() for method in methods):
                one = train_offline.parse(train_online.Args, ["--task", task, *flags, *own_flags])
                values.append(getattr(one, field))
                changed = {
                    key for key, value in vars(one).items() if value != getattr(settings, key)
                }
                assert changed == ({field} if own_flags else set())
            assert values == sorted({*compare.ABLATIONS[name][1], own})


def test_ablations_of_lift_reuse_the_presets_run_and_cover_behaviour_cloning_and_no_clip():
    methods, own = compare.ablation("clip", "lift", ["--preset", "cpu"])
    assert own == 0.6
    assert methods == [
        "poco --clip 0",
        "poco --clip 0.15",
        "poco --clip 0.3",
        "poco",
        "poco --clip inf",
    ]
    assert (
        compare.ablation("clip", "square", ["--preset", "paper"])[0][1] == "poco"
    )  # 0.08, not listed
    assert compare.ablation("guidance", "lift", ["--preset", "cpu"])[0][0] == "poco --guidance 0"
    assert compare.ablation("candidates", "lift", ["--preset", "cpu"])[0][1:] == [
        "poco",
        "poco --num-candidates 64",
    ]


def test_an_ablation_runs_each_value_titles_its_figure_and_writes_its_own_files(monkeypatch):
    calls, titles = [], []
    cells = {
        "--clip 0": 0.0,
        "--clip 0.15": 0.15,
        "--clip 0.3": 0.3,
        "": 0.6,
        "--clip inf": float("inf"),
    }

    def main(argv):
        calls.append(argv)
        own = " ".join(argv[argv.index("--clip") :][:2]) if "--clip" in argv else ""
        fake_run(f"poco {own}".strip(), 0, clip=cells[own])

    monkeypatch.setattr(train_online, "main", main)
    plot = compare.figure
    monkeypatch.setattr(
        compare, "figure", lambda *args, **kwargs: titles.append(args[2]) or plot(*args, **kwargs)
    )
    command = ["--ablation", "clip", "--seeds", "1", "--preset", "cpu", "--heads", "3"]
    compare.main(command)
    assert [argv[argv.index("--run-dir") + 1] for argv in calls] == [
        "runs/lift-poco_clip_0-s0",
        "runs/lift-poco_clip_0.15-s0",
        "runs/lift-poco_clip_0.3-s0",
        "runs/lift-poco-s0",
        "runs/lift-poco_clip_inf-s0",
    ]
    assert (
        all(" ".join(argv).count("--heads 3") == 1 for argv in calls)
        and titles == ["lift, clip (poco: 0.6)"] * 2
    )
    assert {path.name for path in compare.Path("runs").glob("clip-lift*")} == {
        "clip-lift.csv",
        "clip-lift.md",
        "clip-lift.png",
        "clip-lift-time.png",
    }
    compare.main(command)
    assert len(calls) == 5  # all finished


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


def test_in_an_ablation_plain_poco_is_a_run_with_the_presets_own_value(monkeypatch):
    """The figure says so, and only that run has no flag of its own: --methods poco --clip 5 may
    have made it."""
    monkeypatch.setattr(train_online, "main", lambda argv: pytest.fail("a run was started"))
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


@pytest.mark.parametrize("name", compare.METHODS)
def test_every_method_names_a_script_that_takes_its_flags_and_delivers_its_way_of_acting(name):
    module, flags, acting = compare.METHODS[name]
    module = importlib.import_module(module)
    args = train_offline.parse(module.Args, ["--task", "lift", "--preset", "cpu", *flags])
    agents = [
        value
        for value in vars(module).values()
        if isinstance(value, type) and hasattr(value, "modes")
    ]
    assert any(acting in agent.modes for agent in agents) and getattr(args, "variant", name) in (
        name,
        "poco",
    )
