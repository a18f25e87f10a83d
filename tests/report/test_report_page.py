"""The report: what stands in it, that it is the same when made again, and that nothing in a folder can harm it."""

import json
import re
import shutil
import sys
from html.parser import HTMLParser
from pathlib import Path
from runpy import run_path

import pytest
import yaml
from made_up_run import GENERATION, METRICS, dit_run, event, line, picture, tokenizer_run, write
from PIL import Image

from megavtp.errors import UserError
from megavtp.report import charts, render_page
from megavtp.report.folder import read_runs
from megavtp.report.measures import read_measures, tables
from megavtp.report.pictures import read_picture, read_pictures
from megavtp.report.series import groups_of
from megavtp.report.summary import commands, differing, facts, notes, settings_of, state, warnings

TOOL = Path(__file__).parents[2] / "tools" / "report.py"
SECTIONS = ["runs", "warnings", "measures", "curves", "pictures", "settings", "again"]


class Page(HTMLParser):
    """The elements of a page: ids of sections, tags, attributes, and the text outside of style sheets."""

    def __init__(self, html):
        super().__init__()
        self.sections, self.tags, self.attributes, self.text = [], [], [], ""
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag == "section":
            self.sections.append(dict(attrs)["id"])

    def handle_data(self, data):
        if self.tags[-1:] != ["style"]:
            self.text += data


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("runs")
    return [tokenizer_run(root / "joint"), dit_run(root / "dit")]


@pytest.fixture(scope="module")
def html(folders):
    return render_page(folders)


def test_every_section_is_there_and_filled(html, folders):
    page = Page(html)
    assert page.sections == SECTIONS
    for text in (
        "joint", "dit", "Diffusion transformer", "launchers/pretrain.py --config tiny.yaml train.steps=40", "node7",
        "commit abc123def456", "finished, 40 steps", "step 40 of 100", "Loss terms".lower(), "Gradient norms".lower(),
        "Learning rate", "Images per second", "Model FLOP utilisation", "Time spent waiting for data", "22.50 dB",
        "63.2 %", "20.5 %", "174.5", "untrained", "noise", "left out: generation/recall: too few", "no FID",
        "Pictures drawn with guidance", "Step 10: reconstructions", "weights from elsewhere", "train.batch_size",
    ):
        assert text in page.text, text
    assert page.tags.count("svg") == page.tags.count("figure") - page.tags.count("img") > 10
    assert page.tags.count("img") == 4 + 1 + 1  # four of the six made while training, and those at the top


def test_it_stands_alone(html):
    page = Page(html)
    assert not {"script", "link", "iframe", "object"} & set(page.tags)
    for name, value in page.attributes:
        if name in ("src", "href", "xlink:href"):
            assert value.startswith(("data:image/", "#")), value
    assert "url(http" not in html and "@import" not in html


def test_equal_folders_give_equal_bytes(html, folders, tmp_path, monkeypatch):
    assert render_page(folders[:1]) == render_page(folders[:1])
    monkeypatch.setattr(sys, "argv", ["report.py", *map(str, folders), "--out", str(tmp_path / "new" / "page.html")])
    with pytest.raises(SystemExit) as end:
        run_path(str(TOOL), run_name="__main__")
    assert end.value.code == 0
    assert (tmp_path / "new" / "page.html").read_text() == html and len(list((tmp_path / "new").iterdir())) == 1


def test_what_is_hostile_is_text(tmp_path):
    evil = "<script>alert(1)</script>\"' onload=x {{ 7 * 7 }}"
    folder = tmp_path / "a<b>&run"
    records = [
        event("started", 0, command=evil, machine={"host": evil}, layout=[1], versions=evil),
        event("note", 0, note=evil), line(1, {evil: 1.0, "</svg>": 2.0}),
        event("picture", 1, name=evil, path="pictures/step-000001.png"), event("skipped", 1, terms=evil, replay=7),
        event("data_changed", 1, keys={"a": evil}), event("evaluation", 1, **{"a/" + evil: 1.0}),
    ]
    write(folder, {"train": {"steps": 3, "batch_size": 2}, "objectives": {evil: evil}, "data": {"root": evil}}, records)
    picture(folder / "pictures" / "step-000001.png")
    picture(folder / "'onerror=x <img>.png")
    metrics = {evil: 1.0, "reconstruction/psnr": 1.0}
    (folder / "evaluation.json").write_text(json.dumps({"metrics": metrics, evil: metrics, "notes": [evil]}))
    html = render_page([folder])
    page = Page(html)
    assert "script" not in page.tags and not {name for name, _ in page.attributes if name.startswith("on")}
    assert evil in page.text and "alert(1)" in page.text and "49" not in re.findall(r"onload=x (\S+)", page.text)


def test_a_run_in_words(folders):
    joint, dit = read_runs(folders)
    assert state(joint) == ("finished", "finished, 40 steps") and state(dit) == ("going", "step 40 of 100")
    told = facts(joint)
    assert told["Layout"] == "tp 1, pp 1, dp 2, ZeRO 1" and told["Batch"] == "64 a step, 2,560 samples seen"
    assert told["Training time"] == "00:20, 0.5 s a step"
    assert told["Machine"] == "2 processes on one machine; node7: 2 x H100, 64 CPU cores, 512.0 GiB"
    assert facts(dit)["Command, machine, code"] == "not recorded" and facts(dit)["Layout"] == "tp 1, pp 1, ZeRO auto"
    joined = "\n".join(warnings(joint))
    for text in (
        "went on with other data, as these changed: data.root", "1 step was skipped", "15 (contrastive/loss)",
        "source was 0123abcd (last started at step 0), 4567cdef (last started at step 20)", "--replay 15",
        "At step 12 nothing is learnt; try less",
        "2 bad samples were replaced", "Started again once", "1 step was left out of the means",
    ):
        assert text in joined, text
    assert "still nothing" not in joined  # of the same term, as every start may warn of it
    assert warnings(dit) == []
    assert commands(joint) == [
        ("From the configuration that ran, into a folder of its own", f"deepspeed --num_accelerators 2 launchers/"
         f"pretrain.py --config {joint.path}/config.yaml output_dir={joint.path}_again"),
        ("As it was started (launcher: deepspeed)", "launchers/pretrain.py --config tiny.yaml train.steps=40"),
    ]


def test_runs_of_one_kind_are_set_side_by_side(tmp_path):
    runs = read_runs([tokenizer_run(tmp_path / "a" / "run"), tokenizer_run(tmp_path / "b" / "run", batch_size=32)])
    assert [run.label for run in runs] == ["a/run", "b/run"]
    changed = settings_of(runs)
    assert {setting.key: setting.values for setting in differing(changed)} == {"train.batch_size": ["64", "32"]}
    assert {setting.key: setting.default for setting in changed}["train.steps"] == "67600"
    loss = groups_of(runs)[0].panels[0]
    assert loss.title == "contrastive" and [curve.run for curve in loss.curves] == [0, 1]
    assert loss.curves[1].steps.tolist() == [10, 20, 30, 40] and loss.curves[1].values[0] == 0.5
    while_training = {panel.title: panel for panel in groups_of(runs)[1].panels}
    assert while_training["knn/group_top1"].curves[0].values.tolist() == [0.3, 0.632]
    assert while_training["knn/group_top1"].level == 0.205


def test_measures_stand_beside_chance_and_the_best_is_marked(tmp_path):
    runs = read_runs([tokenizer_run(tmp_path / "a"), tokenizer_run(tmp_path / "b")])
    better = {**METRICS, "reconstruction/lpips_vgg": 0.2, "reconstruction/psnr": 22.0}
    (runs[1].path / "evaluation.json").write_text(json.dumps({"step": 40, **better}))  # as a run itself writes it
    (table,) = tables(runs, [read_measures(run) for run in runs])
    assert table.columns == ["a", "b", "a: untrained"] and table.runs == [0, 1, None] and table.has_chance
    rows = {row.name: row for row in table.rows}
    assert [cell.best for cell in rows["reconstruction/psnr"].cells] == [True, False, False]
    assert [cell.best for cell in rows["reconstruction/lpips_vgg"].cells] == [False, True, False]
    assert not any(cell.best for cell in rows["samples"].cells)
    assert rows["knn/group_top1"].chance.text == "20.5 %" and rows["knn/group_top1"].cells[0].share == 63.2
    assert [cell.text for cell in rows["reconstruction/psnr"].cells] == ["22.50 dB", "22.00 dB", "6.30 dB"]


def test_long_curves_are_averaged(tmp_path):
    records = [line(step, {"a/loss": float(step)}) for step in range(1, 1001)]
    config = {"train": {"steps": 1000}, "flow_matching": {"time_mu": 0}}
    curve = groups_of(read_runs([write(tmp_path / "run", config, records)]))[0].panels[0].curves[0]
    assert len(curve.steps) == 300 and curve.steps[0] == 2.5 and (curve.steps == curve.values).all()


def test_a_few_huge_values_are_cut_off_and_told(tmp_path):
    norms = [9.6e7, *(1.0 + step % 3 for step in range(2, 51))]
    records = [line(step, {"a/loss": 1 / step}, grad_norm=norm) for step, norm in enumerate(norms, 1)]
    config = {"train": {"steps": 50}, "flow_matching": {"time_mu": 0}}
    folder = write(tmp_path / "run", config, records)
    panels = {panel.title: panel for group in groups_of(read_runs([folder])) for panel in group.panels}
    assert panels["All weights"].largest == 9.6e7 and panels["All weights"].top == 3.5
    assert panels["a/loss"].top is None and panels["Learning rate"].top is None
    assert Page(render_page([folder])).text.count("up to 9.6e+07, cut off") == 1


DAMAGE = {
    "metrics.jsonl": ('{"kind": "step", "step": 1, "terms": 3}\n{"kind": 5, "step": 1}\n{"kin', "2 lines are damaged"),
    "evaluation.json": ("{", "evaluation.json is damaged"),
    "generation.json": ('{"metrics": {"a/b": "c"}}', "generation.json is damaged"),
    "own.json": ('{"metrics": {"a/b": 1}, "notes": 3}', "own.json is damaged"),
    "samples.png": ("no picture", "samples.png is left out: it is no whole picture"),
    "pictures/step-000040.png": ("", "step-000040.png is left out"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_file_is_left_out_and_named(name, tmp_path):
    text, told = DAMAGE[name]
    folder = tokenizer_run(tmp_path / "run")
    (folder / name).write_text(text)
    (run,) = read_runs([folder])
    found = read_measures(run)
    assert len(read_pictures(run)) == (4 if name.startswith("pictures/") else 5)
    lines = [line for line in warnings(run) if told in line]
    assert len(lines) == 1 and "\n" not in lines[0], warnings(run)
    assert ("evaluation.json" in found) == (name != "evaluation.json")


def test_one_of_dozens_of_pictures_is_small(tmp_path):
    noise = Image.effect_noise((900, 600), 80).convert("RGB")
    noise.save(tmp_path / "noise.png")
    whole, small = (read_picture(tmp_path / "noise.png", "noise", tmp_path, [], small) for small in (False, True))
    assert (whole.width, whole.height) == (900, 600) and (small.width, small.height) == (512, 341)
    assert small.data.startswith("data:image/jpeg") and len(small.data) < len(whole.data) / 3


def test_a_run_that_has_not_begun(tmp_path):
    folder = dit_run(tmp_path / "run")
    (folder / "metrics.jsonl").unlink()
    (folder / "generation.json").write_text(json.dumps({**GENERATION, "metrics": {}, "compare": {}}))
    (run,) = read_runs([folder])
    assert state(run) == ("waiting", "no step of 100 done yet") and "metrics.jsonl is missing" in warnings(run)[0]
    assert "No line of steps was recorded yet." in render_page([folder])


FOREIGN = {
    "nowhere": "nowhere is no folder; name the output folder of a run",
    "file": "file is no folder",
    "empty": "empty holds no config.yaml",
    "other": "config.yaml is not a run's",
    "list": "config.yaml: expected a mapping of keys",
    "broken": "config.yaml, line 1",
}


@pytest.mark.parametrize("name", FOREIGN)
def test_a_foreign_folder_is_one_line(name, tmp_path, monkeypatch, capsys):
    for other in ("empty", "other", "list", "broken"):
        (tmp_path / other).mkdir()
    (tmp_path / "file").write_text("text")
    (tmp_path / "other" / "config.yaml").write_text(yaml.safe_dump({"train": {"epochs": 3}}))
    (tmp_path / "list" / "config.yaml").write_text("[1]")
    (tmp_path / "broken" / "config.yaml").write_text("{")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["report.py", name, "--out", "page.html"])
    with pytest.raises(SystemExit) as end:
        run_path(str(TOOL), run_name="__main__")
    told = capsys.readouterr().err
    assert end.value.code == 2 and told.count("\n") == 1 and FOREIGN[name] in told and told.startswith("error: ")
    assert not Path("page.html").exists()


def test_a_run_is_named_once(tmp_path):
    folder = dit_run(tmp_path / "run")
    with pytest.raises(UserError, match="is named more than once"):
        read_runs([folder, folder / ".." / "run"])


def test_a_run_inside_of_a_run_is_pointed_out(tmp_path):
    outer = dit_run(tmp_path / "run")
    inner = dit_run(outer / "decoder")
    runs = read_runs([outer, inner])
    assert [run.label for run in runs] == ["run", "decoder"] and notes(runs[0], runs) == []
    assert notes(runs[0], runs[:1]) == [f"{inner} holds a run of its own, which is not shown"]


def test_without_matplotlib_a_line_says_so(folders, monkeypatch):
    monkeypatch.setattr(charts.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r'not installed: pip install "megavtp\[eval\]"'):
        render_page(folders)


def test_the_folder_may_have_moved(folders, tmp_path):
    """Paths of pictures in metrics.jsonl are of where the run was."""
    moved = shutil.copytree(folders[0], tmp_path / "elsewhere")
    (run,) = read_runs([moved])
    assert read_pictures(run)[0].caption == "Step 10: reconstructions"
