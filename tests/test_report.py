"""report.html: complete and unfinished runs, narrow screens, everything escaped, nothing fetched."""

import json
import re
import shlex
from html.parser import HTMLParser

import pytest

from conan_jax.errors import DataError
from conan_jax.train.pictures import HARD_NEGATIVES_ABOVE, scores
from conan_jax.train.report import PAGES, loss_charts, next_commands, phases, read_run, result_table, write_report
from conan_jax.train.smoothing import SMOOTHING_UPDATES

STAGES = ("pretrain", "weak", "supervised")
EXTRA = {
    "weak": {"alpha": 0.5},
    "supervised": {"loss/retrieval": 1.0, "positive_score/retrieval": 0.6, "negative_score/retrieval": 0.1,
                   "hard_negative_score/retrieval": 0.4, "replaced_low": 9.0, "replaced_drop": 2.0},
}


def make_run(folder, *, trained=STAGES, name="demo", records=60):
    folder.mkdir()
    steps = dict.fromkeys(STAGES, records * 10)
    config = {"name": name, "seed": 0, "model": {"hidden_size": 64},
              "evaluations": [{"name": "other", "main": False}, {"name": "held_out", "main": True}],
              "stages": [{"name": s, "kind": s, "steps": steps[s], "optimizer": {"learning_rate": 1e-3}} for s in STAGES]}
    put(folder / "config.json", config)
    put(folder / "bm25/evaluation.json", {"held_out": {"ndcg@10": 0.612, "recall@10": 0.7}})
    put(folder / "untrained/evaluation.json", {"held_out": {"ndcg@10": 0.031, "recall@10": 0.05}})
    for i, stage in enumerate(trained):
        extra = EXTRA.get(stage, {})
        lines = [{"step": 10 * (s + 1), "loss": 9.0 - s / 30 - i, "learning_rate": 1e-3, "grad_norm": 1.0 + s, "tokens_per_second": 12000.0,
                  "skipped": 0, "seconds": float(s), **extra} for s in range(records)]
        (folder / stage).mkdir()
        (folder / stage / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        put(folder / stage / "evaluation.json", {"held_out": {"ndcg@10": 0.1 + 0.1 * i, "recall@10": 0.2 + 0.1 * i, "ndcg@10/de": 0.42}})
    return folder


def put(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


class Page(HTMLParser):
    """Tags, text and attributes; refuses tags that do not close."""

    VOID = {"meta", "br", "path", "use", "rect", "img", "hr"}

    def __init__(self, html):
        super().__init__()
        self.open, self.tags, self.words, self.attributes = [], [], [], []
        self.feed(html)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)

    @property
    def text(self):
        return " ".join(" ".join(self.words).split())


def page_of(folder):
    return Page(write_report(folder).read_text(encoding="utf-8"))


def test_a_finished_run_shows_its_figures_curves_and_searches(tmp_path):
    run = make_run(tmp_path / "run")
    put(run / "summary.json", {"seconds": 512.4, "parameters": 4_718_592, "timings": {"prepare": 61.25}})
    put(run / "searches.json", {"read a file": [{"score": 0.71234, "id": "io.open", "summary": "Open file.", "text": "Open file."},
                                                {"score": 0.5, "id": "x.y", "text": "Only text."}]})
    page = page_of(run)
    for shown in ("demo", "0.300", "0.612", "0.031", "nDCG@10 after supervised", "4.7M", "4,718,592", "8 min 32 s", "1,800",
                  "io.open", "0.712", "Only text.", "9.000 \u2192 7.033", "Soft mask", "Hard negatives replaced", "Tokens per second",
                  "model", "hidden_size", "64", "held_out: nDCG@10 by language", "jax", "1 min 01 s"):
        assert shown in page.text, shown
    assert page.tags.count("svg") == 3 + 6
    assert {v for k, v in page.attributes if k == "aria-label"} >= {"nDCG@10 by stage", "loss of weak", "Learning rate"}
    assert write_report(run).read_bytes() == write_report(run).read_bytes()


def test_the_best_trained_figure_is_marked_and_baselines_never(tmp_path):
    table = result_table(read_run(make_run(tmp_path / "run")), "ndcg@10")
    assert table["columns"] == ["untrained", "BM25", *STAGES]
    (row,) = table["rows"]
    assert [c["text"] for c in row["cells"]] == ["0.031", "0.612", "0.100", "0.200", "0.300"]
    assert [c["best"] for c in row["cells"]] == [False, False, False, False, True]
    assert [c["baseline"] for c in row["cells"]] == [True, True, False, False, False]


def test_cards_are_written_once_for_both_pages():
    templates = {name: PAGES.loader.get_source(PAGES, name)[0] for name in ("evaluation.html", "report.html", "macros.html")}
    assert [name for name, text in templates.items() if 'class="cards"' in text] == ["macros.html"]
    assert all(text.count("{{ card_row(cards) }}") == 1 for name, text in templates.items() if name != "macros.html")
    card_row = PAGES.get_template("macros.html").module.card_row
    shown = Page(card_row([{"label": "time", "value": "1 s", "note": "<all>"}, {"label": "updates", "value": "9", "note": ""}]))
    assert shown.text == "time 1 s <all> updates 9" and shown.tags.count("div") == 2 and card_row([]).strip() == ""


@pytest.mark.parametrize("trained", [(), STAGES[:1], STAGES[:2]])
def test_an_unfinished_run_is_shown_as_far_as_it_is(tmp_path, trained):
    run = make_run(tmp_path / "run", trained=trained)
    if trained:
        with open(run / trained[-1] / "metrics.jsonl", "a") as file:
            file.write('{"step": 620, "lo')  # being written
        (run / trained[-1] / "evaluation.json").unlink()
    page = page_of(run)
    assert "0 / 600" in page.text and ("600 / 600" in page.text) == bool(trained)


def test_a_run_that_has_only_begun(tmp_path):
    put(tmp_path / "config.json", {"name": "bare", "stages": [{"name": "pretrain", "steps": 5}]})
    assert "No stage has been evaluated yet." in page_of(tmp_path).text


def test_one_point_empty_lines_and_numbers_that_are_not_finite(tmp_path):
    run = make_run(tmp_path / "run", trained=("pretrain",), records=1)
    lines = '{"step": 1, "loss": null, "grad_norm": 0.0}\n{"step": 2, "loss": 3.0, "grad_norm": NaN}\n'
    (run / "pretrain" / "metrics.jsonl").write_text(lines)
    assert "3.000 \u2192 3.000" in page_of(run).text


def test_losses_are_drawn_smoothed_for_each_dataset(tmp_path):
    run = make_run(tmp_path / "run", trained=("pretrain", "weak"))
    lines = [{"step": 10 * i, "loss": float(i % 7), "smoothed": {"loss": {"mean": 5.0 - i, "updates": 20}, "loss/web": {"mean": 2.0, "updates": 9}}}
             for i in range(1, 5)]
    (run / "weak" / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    charts = {chart["title"]: chart for chart in loss_charts(read_run(run))}
    assert "4.000 \u2192 1.000" in charts["weak"]["note"] and f"{SMOOTHING_UPDATES} updates" in charts["weak"]["note"]
    legend = Page(charts["weak"]["svg"])
    assert legend.tags.count("li") == 2 and legend.words[-1].strip() == "web"


def test_a_phase_has_one_time(tmp_path):
    run = make_run(tmp_path / "run")
    put(run / "timings.json", {"prepare": 61.25, "evaluate": 5.0, "pretrain": 100.0, "weak": 59.9})
    rows = phases(read_run(run))
    assert [row["name"] for row in rows] == ["prepare", *STAGES, "evaluate"]
    assert [row["time"] for row in rows] == ["1 min 01 s", "1 min 40 s", "59 s", "59 s", "5 s"]
    page = write_report(run).read_text()
    assert all(page.count(f"<tr><th>{row['name']}</th><td data-label=\"updates\">") == 1 for row in rows)


@pytest.mark.parametrize("trained, indexed, commands", [
    ((), False, []), (("pretrain",), False, []),
    (("pretrain", "weak"), False, ["encode", "eval", "export", "verify"]), (STAGES, True, ["search", "encode", "eval", "export", "verify"]),
])
def test_the_next_commands_name_the_run(tmp_path, monkeypatch, trained, indexed, commands):
    monkeypatch.chdir(tmp_path)
    run = make_run(tmp_path / "my run", trained=trained)
    for stage in trained:
        (run / stage / "checkpoints").mkdir()
    if indexed:
        (run / "index").mkdir()
    lines = [command["line"] for command in next_commands(read_run(run)) if command["line"]]
    assert [shlex.split(line)[1] for line in lines] == commands
    assert all({"my run", "exports/demo"} & set(shlex.split(line)) for line in lines)
    assert set(lines) <= set(Page(write_report(run).read_text()).words)


@pytest.mark.parametrize("hard, above", [(0.5, True), (0.2, False)])
def test_hard_negatives_above_positives_are_explained(hard, above):
    counts = [0] * 50
    counts[30] = 9
    found = {"alignment": 1.0, "uniformity": -2.0, "pairs": 9, "histogram": {
        "counts": {"positives": counts, "hard negatives": counts}, "means": {"positives": 0.3, "hard negatives": hard}}}
    assert (HARD_NEGATIVES_ABOVE in scores("set", found)["note"]) == above


def assert_fits_a_narrow_screen(html, pixels=390):
    """Nothing on the page is wider than the screen, and a unit of a chart is at least a pixel wide."""
    page = Page(html)
    assert ("content", "width=device-width, initial-scale=1") in page.attributes
    (css,) = re.findall(r"<style>\n:root(.*?)</style>", html, re.DOTALL)
    narrow = re.sub(r"@media \(min-width[^{]*\{(?:[^{}]*\{[^{}]*\})*[^{}]*\}", "", css)
    widths = [float(width) for width in re.findall(r"(?<!max-)(?<!-)\b(?:min-)?width: *([\d.]+)px", narrow)]
    assert all(width <= pixels - 60 for width in widths), widths
    assert not [value for name, value in page.attributes if name == "style" and re.search(r"width: *[\d.]+(?:px|pt|em)", value)]
    for svg in re.findall(r"<svg[^>]*>", html):
        (box,) = re.findall(r'viewBox="([^"]+)"', svg)
        assert float(box.split()[2]) <= pixels - 60 and not re.search(r'\s(?:width|height)="', svg)
    for attributes, body in re.findall(r"<table([^>]*)>(.*?)</table>", html, re.DOTALL):
        assert re.search(r'class="[^"]*(?:stacked|keys)', attributes)
        assert "keys" in attributes or all("data-label=" in cell for cell in re.findall(r"<td[^>]*>", body))


def test_the_page_fits_a_narrow_screen(tmp_path):
    run = make_run(tmp_path / "run")
    put(run / "timings.json", {"prepare": 1.0})
    html = write_report(run).read_text()
    assert_fits_a_narrow_screen(html)
    for broken in (html.replace("<table class=\"figures stacked\">", "<table style=\"min-width: 640px\">", 1),
                   html.replace("width=device-width", "width=1000"), html.replace(" viewBox", " width=\"600pt\" viewBox", 1)):
        with pytest.raises(AssertionError):
            assert_fits_a_narrow_screen(broken)


EVIL = '<script>alert("x")</script>&$x^2$'


def test_everything_is_escaped(tmp_path):
    run = make_run(tmp_path / "run", name=EVIL)
    config = json.loads((run / "config.json").read_text())
    config["model"][EVIL] = EVIL
    config["evaluations"][1]["name"] = EVIL
    config["stages"][0]["name"] = "a<b>$&"
    put(run / "config.json", config)
    (run / "pretrain").rename(run / "a<b>$&")
    put(run / "a<b>$&" / "evaluation.json", {EVIL: {"ndcg@10": 0.5, EVIL: 0.4}})
    put(run / "searches.json", {EVIL: [{"score": 0.5, "id": EVIL, "summary": EVIL, "text": EVIL}]})
    page = page_of(run)
    assert "script" not in page.tags
    assert page.text.count(EVIL) >= 8 and "a<b>$&" in page.text


def test_nothing_is_fetched_or_run(tmp_path):
    run = make_run(tmp_path / "run")
    html = write_report(run).read_text()
    page = Page(html)
    assert not {"script", "link", "iframe", "img", "object", "base"} & set(page.tags)
    references = [v for k, v in page.attributes if k in ("src", "href", "xlink:href", "action", "data")]
    assert all(v.startswith("#") for v in references)
    assert not re.search(r"url\((?!#)|@import", html) and "default-src 'none'" in html


def test_references_inside_charts_lead_somewhere_and_ids_are_single_or_equal(tmp_path):
    html = write_report(make_run(tmp_path / "run")).read_text()
    ids = re.findall(r' id="([^"]+)"', html)
    assert set(re.findall(r'url\(#([^)]+)\)|href="#([^"]+)"', html)) and len(ids) == len(set(ids))
    for a, b in re.findall(r'url\(#([^)]+)\)|href="#([^"]+)"', html):
        assert (a or b) in ids


def test_charts_follow_the_theme(tmp_path):
    html = write_report(make_run(tmp_path / "run")).read_text()
    charts = "".join(re.findall(r"<svg.*?</svg>", html, re.DOTALL))
    assert "var(--series-1)" in charts and "var(--muted)" in charts and "mathdefault" not in charts
    assert not re.findall(r"(?:stroke|fill): #0000", charts)


@pytest.mark.parametrize("file, content, message", [
    ("config.json", None, "is not the folder of a run"),
    ("config.json", "{", "config.json is not valid JSON"),
    ("summary.json", "[]", "summary.json must hold a JSON object"),
    ("pretrain/metrics.jsonl", '{"step": 1}\nnonsense\n{"step": 2}\n', "metrics.jsonl:2 is not JSON"),
])
def test_damage_is_named(tmp_path, file, content, message):
    run = make_run(tmp_path / "run")
    (run / file).unlink() if content is None else (run / file).write_text(content)
    with pytest.raises(DataError, match=message):
        write_report(run)
