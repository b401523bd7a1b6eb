"""Methods compared like with like: same demonstrations, same stage-I policy, same evaluation episodes, several seeds.

    python -m benchmarks.compare --task lift --methods poco,qc,qc-fql,rlpd-ac,dsrl-na --seeds 3
    python -m benchmarks.compare --task lift --methods "poco,poco --clip inf,poco --act posterior"   # POCO's variants
    python -m benchmarks.compare --task lift --ablation clip --seeds 3     # also guidance, candidates, temperature
    python -m benchmarks.compare --task lift --methods poco,qc --seeds 3 --online-steps 6000    # flags for every run

Runs go to runs/<task>-<method>-s<seed>/ and start from runs/<task>-bc-s<seed>, trained if missing. A finished run is
skipped and an interrupted one continued, so the same command picks up where it stopped, adds seeds and adds methods
(a run that is there and was made with other flags is refused); with --finished it shows what is there so far.
An ablation is POCO with several values of one argument; 'poco' among them is the one with the preset's own value.
Writes --out (default runs/compare-<task>, runs/<ablation>-<task>).csv, .md (the table), .png (environment steps on x)
and -time.png (seconds).
Cost on two cores, preset cpu, Lift: 10 to 45 minutes a run.
Not here: behaviour cloning as a run (it is step 0 of the others).
"""
import argparse
import csv
import importlib
import sys
from pathlib import Path

import numpy as np

import train_online
from logbook import UserError, cli, read_args
from logbook.figure import PALETTE, read_run
from train_offline import parse as parse_run, resolve_preset

# method: (module, its flags, the way of acting that it delivers)
METHODS = {
    "poco": ("train_online", [], "policy"),
    "poco-posterior": ("train_online", ["--act", "posterior"], "posterior"),
    "qc": ("baselines.qc", [], "best"),
    "qc-fql": ("baselines.fql", ["--variant", "qc-fql"], "policy"),
    "fql": ("baselines.fql", ["--variant", "fql"], "policy"),
    "rlpd-ac": ("baselines.rlpd", ["--variant", "rlpd-ac"], "policy"),
    "rlpd": ("baselines.rlpd", ["--variant", "rlpd"], "policy"),
    "dsrl-na": ("baselines.dsrl", ["--variant", "dsrl-na"], "policy"),
    "dsrl-sac": ("baselines.dsrl", ["--variant", "dsrl-sac"], "policy"),
    "dppo": ("baselines.dppo", [], "policy"),
    "reinflow": ("baselines.reinflow", [], "policy"),
    "ogpo": ("baselines.ogpo", ["--variant", "ogpo"], "policy"),
    "ogpo-plus": ("baselines.ogpo", ["--variant", "ogpo-plus"], "policy"),
    "ogpo-ca": ("baselines.ogpo", ["--variant", "ogpo-ca"], "policy"),
}
ABLATIONS = {                                 # of POCO's arguments: the paper's Figs. 9 and 10, and two more
    "clip": ("clip", (0.0, 0.15, 0.3, 0.6, float("inf"))),
    "guidance": ("guidance", (0.0, 0.1, 1.0, 3.0, 10.0)),
    "candidates": ("num_candidates", (4, 16, 64)),
    "temperature": ("temperature", (0.0001, 0.001, 0.01, 0.1, 1.0)),
}
SHARED = ("preset", "setting", "data", "demo_episodes", "hidden", "layers", "flow_steps", "batch_size",
          "pretrain_steps", "episode_limit", "reward_offset", "discount", "pessimism", "tau", "capacity",
          "warmup_steps", "online_steps", "updates_per_step", "online_learning_rate", "eval_every", "eval_episodes",
          "final_episodes")
MOSTLY = ("horizon", "normalize", "heads", "policy_tau", "demo_share")            # but for methods with their own
POCO = ("act", "num_candidates", "temperature", "guidance", "clip", "heads", "tau", "policy_tau",
        "pessimism")                          # in an ablation
FREE = ("threads", "workers", "device", "precision", "video", "overwrite")        # change no result, or hardly
OF_A_RUN = (*FREE, "seed", "run_dir", "resume", "eval", "checkpoint", "log_every", "save_every", "graph", "ray")
COLUMNS = ("method", "acting", "seed", "step", "successes", "episodes", "seconds")


# ---- the runs --------------------------------------------------------------------------------------------------------

def parse(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False)
    parser.add_argument("--task", default="lift", help="default lift")
    parser.add_argument("--methods", help=f"of {', '.join(METHODS)}; each may carry its own flags; default poco,qc")
    parser.add_argument("--ablation", choices=ABLATIONS, help="instead of --methods: POCO with values of this argument")
    parser.add_argument("--seeds", type=int, default=3, help="how many, default 3")
    parser.add_argument("--first-seed", type=int, default=0, help="seeds are counted from here, default 0")
    parser.add_argument("--out", help="where the results go, without an ending; default runs/compare-<task>, or "
                        "runs/<ablation>-<task>")
    parser.add_argument("--finished", action="store_true", help="run nothing: show the finished runs alone")
    args, flags = parser.parse_known_args(argv)
    if args.seeds < 1:
        raise UserError(f"--seeds must be at least 1, got {args.seeds}")
    args.title, args.own = args.task, {}
    if args.ablation:
        if args.methods:
            raise UserError("--ablation chooses the methods itself: leave --methods out")
        methods, own = ablation(args.ablation, args.task, flags)
        args.methods, args.title = ",".join(methods), f"{args.task}, {args.ablation} (poco: {own:g})"
        args.own = {ABLATIONS[args.ablation][0]: own}
    args.out = args.out or f"runs/{args.ablation or 'compare'}-{args.task}"
    args.methods = [" ".join(method.split()) for method in (args.methods or "poco,qc").split(",")]
    given = [*flags, *" ".join(args.methods).split()]
    for name in {"task", "seed", "run_dir", "resume", "eval", "overwrite"}.intersection(names_of(given)):
        raise UserError(f"each run has its own --{name.replace('_', '-')}: leave it out (seeds: --seeds, --first-seed; "
                        "to repeat a run remove its folder)")
    unknown = {method.split()[0] if method else "" for method in args.methods} - set(METHODS)
    if unknown:
        raise UserError(f"unknown method {', '.join(sorted(unknown))!r}; methods: {', '.join(METHODS)}")
    return args, flags


def ablation(name, task, flags):
    """POCO with each value, in order, and the preset's own value, which needs no flag and so no run of its own."""
    field, values = ABLATIONS[name]
    flag = f"--{field.replace('_', '-')}"
    if field in names_of(flags):
        raise UserError(f"--ablation {name} sets {flag} itself: leave it out")
    own = getattr(parse_run(train_online.Args, ["--task", task, *flags]), field)
    return ["poco" if value == own else f"poco {flag} {value:g}" for value in sorted({*values, own})], own


def names_of(flags):
    """The arguments that flags set, in order: --no-normalize --heads=5 -> normalize, heads."""
    return sorted(flag[2:].split("=")[0].replace("-", "_").removeprefix("no_") for flag in flags if flag[:2] == "--")


def folder_of(task, method, seed):
    """Flags are part of the name: 'poco --clip inf' -> runs/lift-poco_clip_inf-s0."""
    return Path("runs") / f"{task}-{'_'.join(method.replace('--', '').split())}-s{seed}"


def finished(folder):
    """Whether every way of acting has its last evaluation; the curve is drawn after that."""
    if not (folder / "eval.csv").exists() or not (folder / "curve.png").exists():
        return False
    last = read_args(folder)["online_steps"]
    later = [steps for steps in read_run(folder)[1].values() if max(steps) > 0]      # before learning: one way alone
    return bool(later) and all(last in steps for steps in later)


def run(task, method, seed, flags):
    """One run, unless it is finished. False if the user interrupted it."""
    folder, (name, *own) = folder_of(task, method, seed), method.split()
    module, variant, _ = METHODS[name]
    done, begun = finished(folder), (folder / "last.pt").exists()
    if done or begun:
        refuse_other_flags(folder, module, task, [*variant, *own, *flags])
    if done:
        print(f"{folder}: finished", flush=True)
        return True
    if begun:
        argv = ["--resume", str(folder)]
    else:                                     # whatever is there was interrupted before it first saved
        argv = ["--task", task, "--seed", str(seed), *variant, *own, *flags, "--run-dir", str(folder), "--overwrite"]
    print(f"{folder}: python -m {module} {' '.join(argv)}", flush=True)
    importlib.import_module(module).main(argv)
    return finished(folder)


def refuse_other_flags(folder, module, task, flags):
    """A run that is there keeps the flags it was made with: it must not pass for one made with these."""
    stored, asked = read_args(folder), vars(parse_run(importlib.import_module(module).Args, ["--task", task, *flags]))
    asked["preset"] = resolve_preset(asked["preset"])[0]
    for name in [one for one in names_of(flags) if one in stored and one in asked and one not in FREE]:
        same = stored[name] == asked[name] or name == "data" and Path(stored[name]) == Path(asked[name]).expanduser()
        if not same:
            raise UserError(f"{folder} was made with {name} {stored[name]}, not {asked[name]}: move it away, or leave "
                            f"--{name.replace('_', '-')} out")


def refuse_other_value(folder, own):
    """Plain poco stands for the preset's own value in an ablation: a run with another is not that point."""
    if not finished(folder) and not (folder / "last.pt").exists():
        return
    for name, value in own.items():
        if (stored := read_args(folder).get(name, value)) != value:
            raise UserError(f"{folder} was made with {name} {stored}, not with the preset's {value}: move it away")


def refuse_unlike(folders, methods, names=SHARED):
    """Comparing runs of different settings is the mistake this file exists to prevent."""
    own = {name for method in methods for name in names_of(method.split())}
    for name in sorted(set(names) - own):
        found = {_setting(folder, name): folder for folder in folders}
        if len(found) > 1:
            raise UserError(f"the runs differ in {name}: " + ", ".join(f"{value} in {folder}" for value, folder in
                            found.items()) + "; move the old ones away")


def known(folders):
    """The arguments that all these runs have stored: older ones lack the newest."""
    return set.intersection(*(set(read_args(folder)) for folder in folders))


def refuse_unlike_seeds(folders):
    """Seeds are averaged as one method: the names of the folders do not tell the flags that all runs were given."""
    refuse_unlike(folders, [], known(folders) - set(OF_A_RUN))


def refuse_unlike_most(task, jobs, methods):
    """What only some methods set to a value of their own is the same in all others."""
    for name in MOSTLY:
        folders = [folder_of(task, *job) for job in jobs if not has_its_own(job[0], name)]
        refuse_unlike(folders, methods, known(folders) & {name} if folders else ())


def has_its_own(method, name):
    """Whether a method declares an argument of the loop anew; the published FQL and RLPD choose single actions."""
    variant = method.split()[0]
    own = vars(importlib.import_module(METHODS[variant][0]).Args)["__annotations__"]
    return name in own or name == "horizon" and variant in ("fql", "rlpd")


def _setting(folder, name):
    args = read_args(folder)
    if isinstance(value := args.get(name), float) and value.is_integer():
        value = int(value)                                                  # presets once held 1 where flags hold 1.0
    return str(value).replace(f"-s{args.get('seed')}.", ".")       # data made here: one file per seed


# ---- what they reached -----------------------------------------------------------------------------------------------

def rows_of(task, method, seed):
    """Rows for the CSV: every evaluation of a run, with the seconds of stage II before it, evaluations not counted."""
    folder = folder_of(task, method, seed)
    steps, seconds = [0.0], [0.0]
    with open(folder / "progress.csv", newline="") as file:
        for row in csv.DictReader(file):
            steps.append(float(row["step"]))
            seconds.append(seconds[-1] + sum(float(value) for name, value in row.items() if name.startswith("time/")
                                             and name != "time/eval" and value))
    for acting, evaluations in read_run(folder)[1].items():
        for step, (successes, episodes) in sorted(evaluations.items()):
            yield dict(zip(COLUMNS, (method, acting, seed, int(step), successes, episodes,
                                     round(float(np.interp(step, steps, seconds)), 1))))


def curves(rows, method, acting):
    """steps (T,), success (S, T), seconds (T,) of one method, seed by seed; step 0 is that of the bare policy."""
    points = {}
    for row in rows:
        if row["method"] == method and (row["acting"] == acting or row["step"] == 0):
            points[row["seed"], row["step"]] = row["successes"] / row["episodes"], row["seconds"]
    seeds = sorted({seed for seed, _ in points})
    steps = sorted(set.intersection(*({step for one, step in points if one == seed} for seed in seeds)))
    table = np.array([[points[seed, step] for step in steps] for seed in seeds])              # (S, T, 2)
    return np.array(steps), table[..., 0], table[..., 1].mean(0)


def interval(values, draws=10_000):
    """95 % bootstrap interval of the mean over seeds: values (S, ...) -> low, high (...)."""
    pick = np.random.default_rng(0).integers(len(values), size=(draws, len(values)))
    return np.quantile(values[pick].mean(1), (0.025, 0.975), axis=0)


def summary(rows, method, acting):
    """Cells of the table's row: area under the curve, final success, worst dip below step 0, steps to 90 %."""
    steps, success, seconds = curves(rows, method, acting)
    area = ((success[:, 1:] + success[:, :-1]) / 2 * np.diff(steps)).sum(1)                   # trapezoids, (S,)
    low, high = interval(success[:, -1])
    dips = (success[:, :1] - success).max(1)
    reached = [steps[np.argmax(one >= 0.9)] for one in success if (one >= 0.9).any()]
    to_90 = f"{np.mean(reached):,.0f}" if len(reached) == len(success) else f"{len(reached)} of {len(success)} seeds"
    band = f"{100 * low:.0f}-{100 * high:.0f}" if len(success) > 1 else ""            # of one seed there is none
    return [method, acting, str(len(success)), f"{100 * success[:, 0].mean():.0f}",
            f"{100 * np.mean(area / steps[-1]):.1f}", f"{100 * success[:, -1].mean():.0f}",
            band, f"{100 * dips.max():.0f}", to_90 if reached else "none", f"{seconds[-1]:.0f}"]


HEADER = ("method", "acting", "seeds", "start %", "mean over the run %", "end %", "95 % bootstrap", "worst dip",
          "steps to 90 %", "seconds")


def table(rows, methods):
    lines = ["| " + " | ".join(HEADER) + " |", "|---" * len(HEADER) + "|"]
    for method in methods:
        delivered = METHODS[method.split()[0]][2]
        found = {row["acting"] for row in rows if row["method"] == method and row["step"] > 0}
        for acting in sorted(found, key=lambda one: one != delivered):
            lines.append("| " + " | ".join(summary(rows, method, acting)) + " |")
    return "\n".join(lines)


def figure(rows, methods, title, path, time):
    """Mean over seeds and its bootstrap interval, of the way of acting that each method delivers."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    canvas = FigureCanvasAgg(Figure(figsize=(7.2, 4.2), layout="constrained"))
    axes = canvas.figure.add_subplot()
    for index, method in enumerate(methods):
        steps, success, seconds = curves(rows, method, METHODS[method.split()[0]][2])
        x, color = seconds / 60 if time else steps, PALETTE[index % len(PALETTE)]
        axes.plot(x, 100 * success.mean(0), "o-" if index < len(PALETTE) else "s--", color=color, markersize=4,
                  linewidth=1.6, label=method)
        axes.fill_between(x, *(100 * interval(success)), color=color, alpha=0.15, linewidth=0)
    counts = sorted({len({row["seed"] for row in rows if row["method"] == method}) for method in methods})
    seeds = " to ".join(map(str, counts[:1] + counts[1:][-1:]))
    shown = "one seed" if counts == [1] else f"mean of {seeds} seeds, 95 % bootstrap interval"
    axes.set(title=f"{title}: {shown}", ylabel="success (%)", ylim=(-3, 103),
             xlabel="minutes of stage II, evaluation not counted" if time else "environment steps")
    if not time:
        axes.xaxis.set_major_formatter(lambda x, _: f"{x / 1000:g}k" if x else "0")
    axes.grid(axis="y", color="0.92")
    axes.spines[["top", "right"]].set_visible(False)
    canvas.figure.legend(loc="outside lower center", ncols=4, frameon=False, fontsize=9)
    canvas.figure.savefig(path, dpi=150)


def main(argv=None):
    args, flags = parse(sys.argv[1:] if argv is None else argv)
    jobs = [(method, seed) for seed in range(args.first_seed, args.first_seed + args.seeds) for method in args.methods]
    if args.finished:
        jobs = [job for job in jobs if finished(folder_of(args.task, *job))]
        args.methods = [method for method in args.methods if method in dict(jobs)]
        if not jobs:
            raise UserError("none of these runs is finished; without --finished they are made")
    for method, seed in jobs:
        if method == "poco":
            refuse_other_value(folder_of(args.task, method, seed), args.own)
        if not run(args.task, method, seed, flags):
            print("interrupted; the same command continues")
            return
    refuse_unlike([folder_of(args.task, *job) for job in jobs], args.methods, SHARED + POCO * bool(args.ablation))
    refuse_unlike_most(args.task, jobs, args.methods)
    for method in args.methods:
        refuse_unlike_seeds([folder_of(args.task, *job) for job in jobs if job[0] == method])
    rows = [row for job in jobs for row in rows_of(args.task, *job)]
    out = args.out
    Path(out).parent.mkdir(parents=True, exist_ok=True)
    with open(f"{out}.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    text = table(rows, args.methods)
    Path(f"{out}.md").write_text(text + "\n")
    figure(rows, args.methods, args.title, f"{out}.png", time=False)
    figure(rows, args.methods, args.title, f"{out}-time.png", time=True)
    print(f"{text}\n{out}.csv, .md, .png, -time.png")


if __name__ == "__main__":
    cli(main)
