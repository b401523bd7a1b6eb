"""Figures are drawn from CSV files alone, and never cost a run.

python -m pytest tests/training/test_figure.py      # 20 s
"""

import os
import subprocess
import sys

import numpy as np
import pytest
from logbooks import ROOT, episodes, fill, full_disk, small_run

from logbook import UserError, curve, wilson
from logbook.__main__ import main
from logbook.figure import (
    draw,
    draw_grid,
    draw_ranking,
    draw_run,
    draw_runs,
    finish_axes,
    label_ends,
    new_figure,
    save_figure,
)
from logbook.series import Series, read_series

BLUE, ORANGE, GREY, DASHED = (0, 114, 178), (213, 94, 0), (153, 153, 153), (77, 77, 77)
SHADE = (237, 237, 237)  # of the warm-up


def colors(path):
    from matplotlib.image import imread

    assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    pixels = (imread(path)[..., :3] * 255).round().astype(int).reshape(-1, 3)
    found, count = np.unique(pixels, axis=0, return_counts=True)
    return {tuple(color): n for color, n in zip(found.tolist(), count.tolist())}


def axes_of(folders):
    axes = new_figure(7, 4)[1]
    draw_runs(axes, folders, read_series(folders))
    return axes


def labelled(axes):
    """Return the lines that the legend names."""
    return {
        line.get_label(): line for line in axes.get_lines() if not line.get_label().startswith("_")
    }


@pytest.fixture
def seeds(tmp_path):
    """Three finished runs that differ in the seed."""
    books = []
    for seed, top in ((0, 8), (1, 10), (2, 9)):
        books.append(small_run(tmp_path / f"lift-poco-s{seed}", seed=seed, act="policy"))
        fill(books[-1], top)
    return [book.folder for book in books]


# one run


def test_curve_is_drawn_from_the_csv_files_alone(book):
    fill(book, 8)
    for events in book.folder.glob("events*"):
        events.unlink()
    assert curve(book.folder) == book.folder / "curve.png"
    found = colors(book.folder / "curve.png")
    assert all(found.get(color, 0) > 50 for color in (BLUE, ORANGE, GREY, DASHED)), found
    before = (book.folder / "curve.png").read_bytes()
    book.evaluation(2000, "policy", episodes([1]))
    curve(book.folder)
    assert (book.folder / "curve.png").read_bytes() != before


def test_curve_plots_success_in_percent_with_wilson_intervals(book):
    fill(book, 10)
    axes = new_figure(7, 4)[1]
    draw_run(axes, book.folder)
    lines = labelled(axes)
    assert lines["behaviour cloning, 30 %"].get_ydata()[0] == 30
    collecting = lines["while collecting, last 20 episodes"]
    assert list(collecting.get_ydata()[:2]) == [2.5, 5.0]  # nan at 0 is left out
    policy = axes.containers[0]
    assert policy.get_label() == "evaluated: policy (95 % interval)"
    assert list(policy.lines[0].get_xdata()) == [0, 500, 1000]
    assert list(policy.lines[0].get_ydata()) == [30, 60, 100]
    bars = [(segment[0, 1], segment[1, 1]) for segment in policy.lines[2][0].get_segments()]
    expected = [100 * np.array(wilson(successes, 10)) for successes in (3, 6, 10)]
    assert bars == [pytest.approx(interval) for interval in expected]
    assert axes.get_title() == "lift, poco, seed 0, preset cpu"
    assert axes.get_xlabel() == "environment steps"


def test_curve_says_who_collects_and_shades_the_warm_up(tmp_path):
    book = small_run(tmp_path / "run", act="posterior")
    columns = ["step", "warmup", "success"]
    rows = [["250", "1", "0.5"], ["500", "1", "0.5"], ["750", "0", "0.5"]]
    book._rewrite("progress.csv", columns, rows)
    book.evaluation(750, "policy", episodes([1, 0]))
    axes = new_figure(7, 4)[1]
    draw_run(axes, book.folder)
    labels = axes.get_legend_handles_labels()[1]
    assert "collects: posterior, evaluated: policy (95 % interval)" in labels
    shade = dict(zip(labels, axes.get_legend_handles_labels()[0]))["critic warm-up"]
    assert (shade.get_x(), shade.get_width()) == (0, 500)
    draw([book.folder])
    assert colors(book.folder / "curve.png").get(SHADE, 0) > 1000


@pytest.mark.parametrize("args", [{"method": "poco", "setting": "online"}, {"method": "rlpd-ac"}])
def test_curve_calls_what_was_not_cloned_untrained(tmp_path, args):
    book = small_run(tmp_path / "run", **args)
    fill(book, 10)
    axes = new_figure(7, 4)[1]
    draw_run(axes, book.folder)
    names = list(labelled(axes))
    assert "untrained, 30 %" in names and not any("cloning" in name for name in names)


def test_curve_of_a_run_without_rows_is_an_empty_picture_and_of_no_run_an_error(book, tmp_path):
    assert len(colors(draw([book.folder]))) > 1
    with pytest.raises(UserError, match="not a run folder"):
        draw([tmp_path])


BACKEND = "module://matplotlib_inline.backend_inline"  # what Colab, Kaggle and VS Code set
SCRIPT = (
    "import sys; from logbook import cli, curve; cli(lambda: print('done:', curve(sys.argv[1])))"
)


def finish(folder, **environment):
    """End a run in another process."""
    command = [sys.executable, "-c", SCRIPT, str(folder)]
    environment = os.environ | environment
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


@pytest.mark.parametrize("backend", [BACKEND, "nonsense"])
def test_a_backend_that_is_not_installed_does_not_stop_the_curve(book, backend):
    fill(book, 8)
    out = finish(book.folder, MPLBACKEND=backend)
    assert (out.returncode, out.stderr) == (0, "")
    assert out.stdout == f"done: {book.folder}/curve.png\n" and (book.folder / "curve.png").exists()


def test_a_curve_that_cannot_be_drawn_is_one_line_and_the_run_is_done(book, tmp_path):
    fill(book, 8)
    (tmp_path / "matplotlib.py").write_text("raise ValueError('broken here')")
    out = finish(book.folder, PYTHONPATH=str(tmp_path))
    assert (out.returncode, out.stdout) == (0, f"done: {book.folder}\n")
    assert out.stderr == f"{book.folder}/curve.png was not drawn: broken here\n"


def test_a_full_disk_costs_the_curve_alone(book, capsys):
    fill(book, 8)
    with full_disk(1000):
        assert curve(book.folder) == book.folder
    assert capsys.readouterr().err.endswith("curve.png was not drawn: File too large\n")
    with full_disk(1000), pytest.raises(UserError, match="cannot write .*curve.png: File too"):
        draw([book.folder])


# several runs


def test_three_seeds_become_a_mean_and_a_band(seeds):
    axes = axes_of(seeds)
    policy = labelled(axes)["collects: policy, evaluated: policy"]
    assert list(policy.get_ydata()) == [30, 60, 90]
    band = axes.collections[0].get_paths()[0].vertices
    assert band[:, 1].min() == 30 and band[:, 1].max() == 100
    assert band[band[:, 0] == 1000][:, 1].min() == 80
    assert axes.get_title() == "lift, 3 seeds: mean, band from the lowest to the highest"


def test_two_seeds_are_drawn_singly_without_a_band(seeds):
    axes = axes_of(seeds[:2])
    assert not axes.collections and axes.get_title() == "lift, 2 seeds"
    blue = [line for line in axes.get_lines() if line.get_color() == "#0072b2"]
    assert [list(line.get_ydata()) for line in blue] == [[30, 60, 80], [30, 60, 100]]
    assert len(labelled(axes)) == 2  # one entry for policy, one for posterior


def test_policy_and_posterior_differ_in_colour_and_methods_in_line_style(seeds, tmp_path):
    other = small_run(tmp_path / "lift-poco-posterior-s0", act="posterior")
    fill(other, 9)
    lines = labelled(axes_of([*seeds, other.folder]))
    styles = {
        label: (line.get_color(), line.get_linestyle(), line.get_marker())
        for label, line in lines.items()
    }
    assert styles == {
        "collects: policy, evaluated: policy": ("#0072b2", "-", "o"),
        "collects: policy, evaluated: posterior": ("#d55e00", "-", "o"),
        "collects: posterior, evaluated: policy": ("#0072b2", "--", "s"),
        "collects: posterior, evaluated: posterior": ("#d55e00", "--", "s"),
    }


def test_seeds_are_compared_only_where_all_were_evaluated(seeds, tmp_path):
    late = small_run(tmp_path / "lift-poco-s3", act="policy")
    late.evaluation(1000, "policy", episodes([1]))  # says nothing of the steps before
    policy = labelled(axes_of([*seeds, late.folder]))["collects: policy, evaluated: policy"]
    assert list(policy.get_xdata()) == [1000]


def test_runs_of_several_tasks_are_named_by_task(seeds, tmp_path):
    can = small_run(tmp_path / "elsewhere/lift-poco-s0", task="can", act="policy")
    fill(can, 5)
    axes = axes_of([*seeds, can.folder])
    assert axes.get_title().startswith("can and lift, 1 to 3 seeds")
    assert axes.get_xlabel() == "environment steps"
    names = ("can, lift-poco, collects: policy", "lift, lift-poco, collects: policy")
    ways = ("policy", "posterior")
    expected = {f"{name}, evaluated: {way}" for name in names for way in ways}
    assert set(labelled(axes)) == expected


def test_runs_without_evaluations_show_the_success_while_collecting(tmp_path):
    """As an arm's do, which are evaluated afterwards."""
    book = small_run(tmp_path / "usb-robot-s0", act="posterior")
    for step in (10, 20):
        book.log(step, success=step / 100)
    (line,) = labelled(axes_of([book.folder] * 2)).items()
    assert line[0] == "collects: posterior, evaluated: last 20 episodes"
    assert list(line[1].get_ydata()) == [10, 20]


def test_many_methods_become_a_ranking_with_names_at_the_right(tmp_path):
    steps = np.array([0, 1000])
    finals = [97, 99, 100, 27, 88, 82]
    series = [
        Series(f"method-{i}", None, "policy", steps, np.array([[40, final]] * 3))
        for i, final in enumerate(finals)
    ]
    figure, axes = new_figure(7, 4)
    draw_ranking(axes, series)
    finish_axes(axes)
    save_figure(figure, tmp_path / "ranking.png")
    names = [text.get_text() for text in axes.texts]
    assert names[:3] == ["method-2 100 %", "method-1 99 %", "method-0 97 %"]
    widths = [line.get_linewidth() for line in axes.get_lines()]
    assert widths == [2.2, 2.2, 2.2, 1.2, 1.2, 1.2]
    colours = [line.get_color() for line in axes.get_lines()]
    assert colours[2] == "#0072b2" and len(set(colours)) == 6  # method-0 is blue wherever it ranks
    heights = [text.get_position()[1] for text in axes.texts]
    assert -np.diff(heights).max() > 4.9, "names overlap"


def test_names_at_the_bottom_are_pushed_upwards():
    axes = new_figure(7, 4)[1]
    label_ends(axes, [(10, 1.0, "a", "k"), (10, 0.0, "b", "k"), (10, 0.0, "c", "k")])
    heights = [text.get_position()[1] for text in axes.texts]
    assert heights[-1] == -1 and -np.diff(heights).max() > 4.9


@pytest.fixture
def drawn(monkeypatch):
    """The figures that would have been written."""
    figures = []
    monkeypatch.setattr("logbook.figure.save_figure", lambda figure, path: figures.append(figure))
    return figures


def test_a_grid_has_a_panel_per_task_in_the_order_given(seeds, tmp_path, drawn):
    can = small_run(tmp_path / "can-poco-s0", task="can", act="posterior")
    fill(can, 5)
    draw_grid([*seeds, can.folder], tmp_path / "grid.png")
    lift, can = drawn[0].axes
    assert lift.get_title() == "lift (3 seeds)\ncollects: policy"
    assert can.get_title() == "can (1 seed)\ncollects: posterior"
    assert lift.get_ylabel() == "success (%)"
    assert lift.get_xlabel() == can.get_xlabel() == "environment steps"
    assert len(lift.collections) == 2 and not can.collections  # bands
    (legend,) = drawn[0].legends
    names = [text.get_text() for text in legend.get_texts()]
    assert names == ["evaluated: policy", "evaluated: posterior"]  # for both panels


def test_a_grids_legend_names_what_any_panel_holds(seeds, tmp_path, drawn):
    """Runs that collect in two ways stand in one panel, and a third way in another."""
    other = small_run(tmp_path / "lift-poco-posterior-s0", act="posterior")
    qc = small_run(tmp_path / "can-qc-s0", task="can")
    fill(other, 9)
    qc.evaluation(0, "best", episodes([1]))
    qc.evaluation(100, "best", episodes([1]))
    draw_grid([*seeds, other.folder, qc.folder], tmp_path / "grid.png")
    assert drawn[0].axes[0].get_title() == "lift (1 to 3 seeds)"
    names = {text.get_text() for text in drawn[0].legends[0].get_texts()}
    pairs = [(one, way) for one in ("policy", "posterior") for way in ("policy", "posterior")]
    expected = {f"collects: {one}, evaluated: {way}" for one, way in pairs}
    assert names == expected | {"evaluated: best"}


# the command line


def test_the_command_line_draws_one_several_or_a_grid(seeds, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    main([str(seeds[0])])
    main([*map(str, seeds)])
    main(["--grid", "--out", "grid.png", *map(str, seeds)])
    assert capsys.readouterr().out == f"{seeds[0]}/curve.png\ncurves.png\ngrid.png\n"
    for picture in (seeds[0] / "curve.png", tmp_path / "curves.png", tmp_path / "grid.png"):
        assert len(colors(picture)) > 20
    with pytest.raises(UserError, match="--out FILE"):
        main(["--grid", str(seeds[0])])
    with pytest.raises(UserError, match="at least one run folder"):
        main([])


@pytest.mark.parametrize("module", ["logbook", "benchmarks.summary"])
def test_help_is_the_docstring_and_no_error(module):
    command = [sys.executable, "-m", module, "--help"]
    out = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert out.returncode == 0 and f"python -m {module}" in out.stdout and not out.stderr


def test_wilson_interval_matches_published_values():
    """Newcombe (1998), Table I: 81/263, 15/148, 0/20, 1/29."""
    published = (
        ((81, 263), (0.2553, 0.3662)),
        ((15, 148), (0.0624, 0.1605)),
        ((0, 20), (0.0, 0.1611)),
        ((1, 29), (0.0061, 0.1718)),
    )
    for counts, expected in published:
        assert wilson(*counts) == pytest.approx(expected, abs=5e-5)
    assert wilson(20, 20)[1] == 1.0
