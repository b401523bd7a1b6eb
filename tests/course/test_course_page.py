"""The interactive page in a real browser: every slider position shows its own picture, offline."""

import html
import json
import re
import shutil
import subprocess

import pytest

from course import page

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
# Runs in the browser: move each slider as a user would, and note what is shown.
MOVE = """<script>
(async () => {
  const seen = {};
  const pen = document.createElement("canvas").getContext("2d");
  for (const [name, part] of Object.entries(data)) {
    const image = document.getElementById(name);
    const sliders = [0, 1].map(i => document.getElementById(name + i));
    seen[name] = [];
    for (let a = 0; a <= +sliders[0].max; a++) for (let b = 0; b <= +sliders[1].max; b++) {
      [a, b].forEach((value, i) => {
        sliders[i].value = value;
        sliders[i].dispatchEvent(new Event("input"));
      });
      await new Promise(done => { image.onload = done; setTimeout(done, 500); });
      pen.drawImage(image, 0, 0, 80, 40);  // what is really shown, not only its address
      const pixels = Array.from(pen.getImageData(0, 0, 80, 40).data).join();
      const labels = [0, 1].map(i => document.getElementById(name + "value" + i).value);
      seen[name].push({labels, width: image.naturalWidth, pixels});
    }
  }
  const loaded = performance.getEntriesByType("resource").map(one => one.name.slice(0, 5));
  const report = document.createElement("pre");
  report.id = "report";
  report.textContent = JSON.stringify({seen, loaded});
  document.body.append(report);
})();
</script></body>"""


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    return page.write(tmp_path_factory.mktemp("page") / "page.html")


def test_the_page_is_one_small_file_without_addresses(written):
    text = written.read_text()
    assert written.stat().st_size < 1_000_000
    assert not re.search(r"https?://|src=\"(?!data)|@import|<link", text)


def test_moving_a_slider_changes_the_picture(written, tmp_path):
    browser = next((path for name in BROWSERS if (path := shutil.which(name))), None)
    if browser is None:
        pytest.skip("no Chromium here: apt-get install chromium")
    moved = tmp_path / "moved.html"
    moved.write_text(written.read_text().replace("</body>", MOVE))
    options = (
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        f"--user-data-dir={tmp_path}/user",
    )
    done = subprocess.run(
        [browser, *options, "--virtual-time-budget=60000", "--dump-dom", moved.as_uri()],
        capture_output=True,
        text=True,
        timeout=120,
    )
    found = re.search(r'<pre id="report">(.*?)</pre>', done.stdout, re.S)
    assert found, done.stderr[-2000:]
    report = json.loads(html.unescape(found[1]))
    assert set(report["loaded"]) <= {"data:"}  # nothing came over a network
    for part in page.PARTS:
        shown = report["seen"][part["name"]]
        first, second = part["sliders"]
        assert [one["labels"] for one in shown] == [[a, b] for a in first for b in second]
        assert len({one["pixels"] for one in shown}) == len(shown) == len(first) * len(second)
        assert all(one["width"] > 500 for one in shown)
