import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import made_runs as made
import pandas as pd
import pytest

from evals.__main__ import main
from evals.report.html import page as html
from evals.report.runs import load

BENCHMARKS = Path(__file__).parents[3] / "docs" / "benchmarks"
PROBE = """
(async () => {
  const root = document.documentElement, told = { broken: [] };
  addEventListener("securitypolicyviolation", (e) => told.broken.push(e.violatedDirective));
  addEventListener("error", (e) => told.broken.push(e.message));
  const plots = document.querySelectorAll(".plot").length;
  while (Number(root.dataset.drawn) !== plots) await new Promise((f) => setTimeout(f, 50));
  told.plots = plots;
  told.drawn = document.querySelectorAll(".plot svg.marks").length;
  told.marks = document.querySelectorAll(".plot svg.marks .mark-symbol path").length;
  told.wide = root.scrollWidth - root.clientWidth;
  told.fetched = performance.getEntriesByType("resource").length;

  const table = document.querySelector("table"), head = table.tHead.rows[0].cells[3];
  const column = () => [...table.tBodies[0].rows].map((row) => row.cells[3].textContent);
  head.firstElementChild.click();
  told.up = [head.getAttribute("aria-sort"), column()];
  head.firstElementChild.click();
  told.down = [head.getAttribute("aria-sort"), column()];

  const link = document.querySelector(".lines a"), row = document.querySelector(link.hash);
  told.folded = !row.checkVisibility();
  link.click();
  await new Promise((f) => setTimeout(f, 200));
  told.unfolded = row.checkVisibility();

  const ink = () => getComputedStyle(document.querySelector(".plot svg.marks text")).fill;
  const before = ink();
  document.getElementById("theme").click();
  await new Promise((f) => setTimeout(f, 2000));
  told.recolored = ink() !== before;
  const button = document.querySelectorAll(".legend button")[2];
  button.click();
  told.pressed = button.getAttribute("aria-pressed");
  document.title = JSON.stringify(told);
})();
"""


class Page(HTMLParser):
    """What a page refers to, and what it would run."""

    def __init__(self, text):
        super().__init__()
        self.ids, self.links, self.tags, self.words = [], [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        given = dict(attributes)
        self.tags.append((tag, given))
        self.ids += [given["id"]] if "id" in given else []
        self.links += [given[name] for name in ("href", "src", "action") if name in given]

    def handle_data(self, data):
        if self.tags and self.tags[-1][0] not in ("script", "style"):
            self.words.append(data)

    @property
    def text(self):
        return " ".join(" ".join(self.words).split())


def test_a_page_needs_no_network_runs_nothing_of_its_data_and_has_every_row(folders):
    runs = load(folders)
    text = html.page(runs)
    page = Page(text)
    tags = [tag for tag, _ in page.tags]
    assert "img" not in tags
    assert not {"link", "iframe", "object"} & set(tags)
    scripts = [given for tag, given in page.tags if tag == "script"]
    assert [given for given in scripts if given.get("type") != "application/json"] == [{}, {}]
    assert all(link.startswith("#") for link in page.links)
    assert {link[1:] for link in page.links} <= set(page.ids)
    assert len(set(page.ids)) == len(page.ids)
    assert {row["anchor"] for run in runs for row in run.rows} <= set(page.ids)
    specs = re.findall(r'data-for="([^"]*)">(.*?)</script>', text)
    linked = set(re.findall(r'"href": "#(r[0-9-]*)"', " ".join(spec for _, spec in specs)))
    assert linked <= set(page.ids)
    assert made.EVIL in page.text
    assert f"failed: RuntimeError: {made.ERROR}" in page.text
    for section in ("pareto", "speed", "memory", "drift", "retrieval", "provenance"):
        assert section in page.ids
    assert len([key for key, _ in specs if "heat" in key]) == 3


def test_a_page_is_a_function_of_the_files(folders, tmp_path):
    (folders[2] / "drift").mkdir()
    answer = {"strategy": made.EVIL, "kl_p99": 0.125, "positions": 4096, "_timestamp": "now"}
    (folders[2] / "drift" / "x.json").write_text(json.dumps(answer))
    assert "0.125000 4,096" in Page(html.page(load(folders))).text
    elsewhere = [shutil.copytree(folder, tmp_path / "copy" / folder.name) for folder in folders]
    assert html.page(load(folders)) == html.page(load(elsewhere))


def test_the_committed_main_job_renders():
    page = Page(html.page(load([BENCHMARKS / "main-job"])))
    assert "less memory" in page.text
    assert {"pareto", "speed", "memory"} <= set(page.ids)
    assert {link[1:] for link in page.links} <= set(page.ids)


def test_a_run_without_rows_renders(tmp_path):
    page = Page(html.page(load([made.folder(tmp_path, "quick", [])])))
    assert "nothing was measured yet" in page.text
    assert "pareto" not in page.ids


def test_a_suite_made_of_others_is_a_run_per_part(tmp_path):
    rows = [r | {"suite": suite} for suite in ("decode", "drift") for r in made.rows(suite)]
    part = {"batch": [1], "context": [512], "dtype": "float32", "strategies": made.STRATEGIES}
    part |= {"windows": 1, "window": 512, "chunk": 64, "skip": 64, "repeats": 1, "warmup": 1}
    part |= {"decode_steps": 3}
    parts = {name: part | {"suite": name} for name in ("decode", "drift")}
    runs = load([made.folder(tmp_path, "full", rows, parts=parts)])
    assert [run.suite for run in runs] == ["decode", "drift"]
    assert {link[1:] for link in Page(html.page(runs)).links} <= set(Page(html.page(runs)).ids)


def test_a_kl_of_something_else_than_a_range_of_positions_is_no_part_of_its_chart(tmp_path):
    of_a_layer = {"layer": 3, "side": 0, "bits": 3}
    place = {"batch": 1, "context": 512, "case": of_a_layer}
    rows = made.named("int4", made.measured("kl", 0.01), **place)
    page = Page(html.page(load([made.folder(tmp_path, "sensitivity", rows)])))
    assert "layer 3, side 0, bits 3" in page.text
    assert "drift" not in page.ids


def test_the_command_writes_one_page_and_one_table_of_all_folders(folders, tmp_path, capsys):
    files = {kind: tmp_path / "all" / f"report.{kind}" for kind in ("html", "csv", "latex")}
    files["parquet"] = tmp_path / "all" / "report.parquet"
    flags = [str(part) for kind, path in files.items() for part in (f"--{kind}", path)]
    assert main(["report", *map(str, folders), *flags]) == 1, "a row failed"
    assert all((folder / "report.html").exists() for folder in folders)
    rows = [row for run in load(folders) for row in run.rows]
    for table in (pd.read_csv(files["csv"]), pd.read_parquet(files["parquet"])):
        assert table["strategy"].tolist() == [row["strategy"] for row in rows]
        assert table["value"].dropna().tolist() == pytest.approx(
            [row["value"] for row in rows if row["value"] is not None]
        )
    latex = files["latex"].read_text()
    assert latex.count(r"bytes\_held") == 8
    assert "int4 & failed" not in latex
    assert "{longtable}" in latex
    assert Page(files["html"].read_text()).ids


@pytest.fixture(scope="module")
def chromium():
    found = shutil.which("chromium") or shutil.which("google-chrome")
    if not found:
        pytest.skip("needs chromium, which draws the page as a reader sees it")
    return found


@pytest.mark.parametrize("width", [1280, 390])
def test_a_browser_draws_sorts_and_unfolds(chromium, folders, tmp_path, width):
    text = html.page(load(folders))
    text = text.replace("script-src ", f"script-src {html._digest(PROBE)} ", 1)
    text = text.replace("<body>", f'<body style="width: {width}px">', 1)
    start, end, rest = text.rpartition("</body>")  # the library has one in a string
    text = f"{start}<script>{PROBE}</script>{end}{rest}"
    path = tmp_path / "page.html"
    path.write_text(text, encoding="utf-8", newline="\n")
    flags = ["--no-sandbox", "--headless=new", "--disable-gpu", "--virtual-time-budget=30000"]
    flags += [f"--window-size={width},900", "--host-resolver-rules=MAP * ~NOTFOUND"]
    flags += [f"--user-data-dir={tmp_path / 'profile'}", "--enable-logging=stderr", "--dump-dom"]
    done = subprocess.run(
        [chromium, *flags, path.as_uri()], capture_output=True, text=True, timeout=120, check=True
    )
    assert "CONSOLE" not in done.stderr, done.stderr
    title = "".join(re.findall("<title>(.*?)</title>", done.stdout)[:1])
    assert title.startswith("{"), "the probe did not end"
    told = json.loads(title.replace("&amp;", "&").replace("&lt;", "<").replace("&gt;", ">"))
    assert told["broken"] == []
    assert told["fetched"] == 0
    assert told["plots"] == told["drawn"] == 8
    assert told["marks"] > 10
    assert told["wide"] <= 0
    assert told["folded"] is True
    assert told["unfolded"] is True
    assert told["recolored"] is True
    assert told["pressed"] == "false"
    order, column = told["up"]
    assert (order, column[0], column[-1]) == ("ascending", "20.0 (2.30x)", "failed")
    order, column = told["down"]
    assert (order, column[0], column[-1]) == ("descending", "47.0 (0.98x)", "failed")
