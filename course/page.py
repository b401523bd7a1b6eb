"""Write the interactive page: one HTML file that works offline, from a memory stick or a server.

    python -m course page               # writes runs/course/page.html in 20 seconds

Every setting of the sliders is a frame that is drawn now and stored in the page. The browser only
swaps pictures, so there is nothing to install in the lecture room. Not here: any computation in
the browser.
"""

import base64
import io
import json
from pathlib import Path

import torch
from PIL import Image

from poco import posterior, posterior_weights

from . import toy
from .toy import plt

ETAS = (0.05, 0.15, 0.5, 1.5, 5.0)
SAMPLES = (1, 4, 16, 64, 256)
BETAS = (0.3, 1.0, 3.0, 1e9)
ITERATIONS = (1, 2, 3, 5, 10)
QUALITY = 60  # of a frame, of 100: keeps the page small

TEXT = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>RL as inference: six habits</title>
<meta name="viewport" content="width=device-width">
<style>
body { font: 17px/1.5 system-ui, sans-serif; max-width: 800px; margin: 1.5em auto; padding: 0 1em }
img { width: 100%; border: 1px solid #ccc; border-radius: 6px }
label { display: grid; grid-template-columns: 13em 1fr 7em; gap: 1em; align-items: center }
input { width: 100% } output { font-weight: bold } h2 { margin-top: 2em }
</style></head><body>
<h1>RL as inference: six habits</h1>
<p>A demonstrator acts near one of six habits. The value grows to the right and upwards. Say what
you expect, then move a slider. The arrow keys work too.</p>
SECTIONS
<script>
const data = DATA;
for (const [name, part] of Object.entries(data)) {
  const sliders = part.sliders.map((_, i) => document.getElementById(name + i));
  const show = () => {
    let frame = part.frames;
    sliders.forEach((slider, i) => {
      frame = frame[+slider.value];
      document.getElementById(name + "value" + i).value = part.sliders[i][+slider.value];
    });
    document.getElementById(name).src = "data:image/webp;base64," + frame;
  };
  sliders.forEach(slider => slider.addEventListener("input", show));
  show();
}
</script></body></html>
"""

SECTION = """<h2>{title}</h2><p>{question}</p>
{sliders}<p><img id="{name}" alt="{title}"></p>
"""

SLIDER = """<label for="{name}{i}">{label}
<input id="{name}{i}" type="range" min="0" max="{last}" value="{start}" step="1">
<output id="{name}value{i}"></output></label>
"""

PARTS = (
    {
        "name": "particles",
        "title": "The E-step: temperature and number of candidates",
        "question": "Left is the exact posterior. Right are N candidates from the demonstrator; "
        "the area of a dot is its weight. At which temperature does one candidate take "
        "everything? Can four candidates follow the exact answer?",
        "labels": ("temperature eta", "candidates N"),
        "sliders": (tuple(f"{eta:g}" for eta in ETAS), tuple(str(n) for n in SAMPLES)),
        "start": (2, 3),
    },
    {
        "name": "loop",
        "title": "The loop: guidance and iteration",
        "question": "The critic is right near the habits and wrong elsewhere: there the truth is "
        "-2. What does the policy claim after ten iterations, and what does it get? What does the "
        "anchor to the demonstrations change?",
        "labels": ("guidance beta", "iteration"),
        "sliders": (("0.3", "1", "3", "no anchor"), tuple(str(k) for k in ITERATIONS)),
        "start": (1, 0),
    },
)


def _packed(figure) -> str:
    """Render a figure as a small WebP picture, as base64 text."""
    raw = io.BytesIO()
    figure.savefig(raw, dpi=95)
    plt.close(figure)
    small = io.BytesIO()
    Image.open(raw).convert("RGB").save(small, "WEBP", quality=QUALITY, method=6)
    return base64.b64encode(small.getvalue()).decode()


def _density(axis, p: torch.Tensor, title: str) -> None:
    """Draw probabilities on the grid."""
    side = int(len(p) ** 0.5)
    picture = (p / p.max()).sqrt().view(side, side).T  # the root shows small peaks too
    axis.imshow(picture, origin="lower", extent=(-1, 1, -1, 1), cmap="Blues", vmin=0, vmax=1)
    toy.draw_plane(axis, title=title)


def particle_frames() -> list[list[str]]:
    """Draw all frames of the first part: [eta][N]."""
    cells = toy.grid(81)
    prior, q = toy.demonstrator(cells), toy.value(cells)
    torch.manual_seed(0)
    candidates = toy.demonstrations(max(SAMPLES))[:, 0]
    frames = []
    for eta in ETAS:
        exact = posterior(prior, q, eta)
        row = []
        for n in SAMPLES:
            some = candidates[:n]
            weights = posterior_weights(toy.value(some)[None], eta)[0]
            ess = float(1 / weights.square().sum()) / n
            figure, (left, right) = plt.subplots(1, 2, figsize=(8, 4.3), layout="constrained")
            _density(left, exact, f"exact: E[Q] = {float((exact * q).sum()):.2f}")
            gain = float((weights * toy.value(some)).sum())
            toy.draw_plane(right, title=f"N = {n}: E[Q] = {gain:.2f}, ESS/N = {ess:.2f}")
            right.scatter(*some.T, s=6, color="0.6")
            right.scatter(*some.T, s=900 * weights, color=toy.BLUE, alpha=0.6, linewidths=0)
            row.append(_packed(figure))
        frames.append(row)
    return frames


def loop_frames() -> list[list[str]]:
    """Draw all frames of the second part: [beta][iteration]."""
    cells = toy.grid(81)
    prior, q, true = toy.demonstrator(cells), toy.value(cells), toy.true_value(cells)
    frames = []
    for beta in BETAS:
        pi, row, claims, gets = prior, [], [], []
        for iteration in range(1, max(ITERATIONS) + 1):
            pi = (prior + beta * posterior(pi, q, toy.ETA)) / (1 + beta)
            claims.append(float((pi * q).sum()))
            gets.append(float((pi * true).sum()))
            if iteration in ITERATIONS:
                row.append(_packed(_loop_figure(pi, claims, gets)))
        frames.append(row)
    return frames


def _loop_figure(pi, claims, gets):
    figure, (left, right) = plt.subplots(1, 2, figsize=(8, 4.3), layout="constrained")
    iterations = range(1, len(claims) + 1)
    _density(left, pi, f"the policy, iteration {len(claims)}")
    right.plot(iterations, claims, "o--", color=toy.ORANGE, lw=2, label="claimed")
    right.plot(iterations, gets, "o-", color=toy.GREEN, lw=2, label="true")
    right.axhline(0, color="0.85", zorder=0)
    right.set(xlim=(0.5, 10.5), ylim=(-1.2, 2.6), xlabel="iteration", ylabel="value")
    right.set_title(f"claims {claims[-1]:.2f}, gets {gets[-1]:.2f}")
    right.legend(loc="upper left")
    return figure


def write(path: Path) -> Path:
    """Write the page and return its path."""
    toy.start()
    frames = {"particles": particle_frames(), "loop": loop_frames()}
    sections, data = [], {}
    for part in PARTS:
        name = part["name"]
        sliders = [
            SLIDER.format(name=name, i=i, label=label, last=len(values) - 1, start=start)
            for i, (label, values, start) in enumerate(
                zip(part["labels"], part["sliders"], part["start"])
            )
        ]
        words = {"name": name, "title": part["title"], "question": part["question"]}
        sections.append(SECTION.format(sliders="".join(sliders), **words))
        data[name] = {"sliders": part["sliders"], "frames": frames[name]}
    text = TEXT.replace("SECTIONS", "".join(sections)).replace("DATA", json.dumps(data))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path
