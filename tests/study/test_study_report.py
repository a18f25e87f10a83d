"""The page of a study: its answer stands first, it is the same when made again, and it says what is missing."""

import shutil
import sys
from html.parser import HTMLParser
from pathlib import Path
from runpy import run_path

import numpy as np
import pytest
import stand_in
from stand_in import StandIn, small_study, write_study

from megavtp.errors import UserError
from megavtp.report.charts import Fitted, draw_fitted
from megavtp.study.report import render_study, study_file
from megavtp.study.runner import run_study

TOOL = Path(__file__).parents[2] / "tools" / "report.py"


class Text(HTMLParser):
    def __init__(self, html: str):
        super().__init__()
        self.text, self.tags = "", []
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        assert not any(name in ("src", "href") and not value.startswith(("data:image/", "#")) for name, value in attrs)

    def handle_data(self, data):
        self.text += data


def quiet(line: str) -> None:
    pass


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("study")
    assert run_study(small_study(folder), StandIn(), quiet) == 0
    return folder


def test_the_answer_stands_first_with_place_interval_and_noise(finished):
    page = Text(render_study(finished / "study.yaml"))
    answer = page.text[page.text.index("The answer") : page.text.index("Failed and missing")]
    assert "The study compares objectives: joint, ae, at 4 looks with 2 seeds of the DiT." in answer
    assert "generation/fd (lower is better): objectives=joint is better than objectives=ae from " in answer
    assert "FLOP on (95 %: " in answer and "the standard deviation between repetitions is 0.1414" in answer
    assert "Their last points are 25 at " in answer and "not finished" not in answer
    assert "joint/step-00000100/seed-0" in page.text and page.tags.count("svg") == 1 and "script" not in page.tags


def test_a_baseline_is_what_the_others_are_compared_with(tmp_path, monkeypatch):
    """The verdict of each measure comes first, then each line beside the baseline, and no other pairs."""
    ways = {"worse": lambda steps: 50.0 + 100 / steps, "like": lambda steps: 40.0 + 0.01 * (steps % 300 - 100) / 100}
    monkeypatch.setattr(stand_in, "CURVES", stand_in.CURVES | ways)
    off = {"tokenizer": ["objectives.contrastive.weight=0"]}
    curves = {"better": {"generation/fd": "lower"}, "held_out": 0, "baseline": "ae"}
    choices = {"joint": {}, "ae": off, "worse": off, "like": off}
    study = small_study(tmp_path, axes={"objectives": choices}, curves=curves)
    assert run_study(study, StandIn(), quiet) == 0
    text = Text(render_study(tmp_path / "study.yaml")).text
    answer = text[text.index("The answer") : text.index("Failed and missing")].strip().splitlines()
    said = "generation/fd (lower is better), beside the baseline ae, at the end of what both were run for: better: "
    assert answer[2].startswith(f"{said}objectives=joint (by the fitted curves from ")
    assert "; not better: objectives=worse; undecided: objectives=like (better in " in answer[2]
    assert len(answer) == 6 and all("objectives=ae" in line for line in answer[3:])


def test_by_file_and_by_folder_and_twice_it_is_the_same_answer(finished, tmp_path, monkeypatch):
    pages = []
    for number, place in enumerate((finished / "out", finished / "out", finished / "study.yaml")):
        out = tmp_path / f"{number}.html"
        monkeypatch.setattr(sys, "argv", ["report.py", str(place), "--out", str(out)])
        with pytest.raises(SystemExit) as end:
            run_path(str(TOOL), run_name="__main__")
        assert end.value.code == 0
        pages.append(out.read_bytes())
    assert pages[0] == pages[1]
    answers = [page[page.index(b"The answer") : page.index(b'id="cells"')] for page in pages]
    assert answers[0] == answers[2]


def test_a_study_that_is_not_finished_says_so_and_names_what_failed(tmp_path):
    broken = "ae/step-00000200/latents"
    study = small_study(tmp_path)
    assert run_study(study, StandIn(broken), quiet) == 1
    text = Text(render_study(tmp_path / "study.yaml")).text
    assert "It is not finished: 14 of 16 cells have a result, and what follows is preliminary." in text
    assert "cannot be said yet (generation/fd of objectives=ae: 3 points, a fit needs 4" in text
    assert f"latents in {tmp_path}/out/{broken} (exit status 1: RuntimeError: no room); its log is" in text


def test_a_study_of_one_look_says_how_far_the_repeated_choices_are_apart(tmp_path):
    """An axis of repetitions is none to compare: each counts once, with the mean over the DiT's seeds, which differ by
    0.2 here, the repetitions by 0.1."""
    study = small_study(
        tmp_path, looks=[100], curves={
            "better": {"generation/fd": "lower", "knn/group_top1": "higher"}, "held_out": 0, "repeats": "init",
        },
        axes={"init": {"a": {}, "b": {"tokenizer": ["seed=1"]}}, "objectives": {
            "joint": {}, "ae": {"tokenizer": ["objectives.contrastive.weight=0"]},
        }},
    )
    assert run_study(study, StandIn(), quiet) == 0
    text = Text(render_study(tmp_path / "study.yaml")).text
    assert "compares objectives: joint, ae, at 1 look with 2 seeds of the DiT, each for all of init: a, b." in text
    ends = "objectives=joint 60.05 (mean of 2, standard deviation 0.071); objectives=ae 40.05 (mean of 2, standard "
    assert f"{ends}deviation 0.071). The difference is 20 (95 %: " in text
    assert "standard deviation between repetitions 0.07071 (2 places, 2 degrees of freedom)" in text
    # The tokenizer's number stands in both rows of a repetition, and is the same in all.
    assert "objectives=joint 0.1; objectives=ae 0.1. The difference is 0." in text
    assert "knn/group_top1: nothing was repeated that it depends on" in text and "a fit needs" not in text


def test_a_study_that_has_not_begun_has_a_page(tmp_path):
    text = Text(render_study(write_study(tmp_path))).text
    assert "0 of 16 cells have a result" in text and "There is no curve: no cell has a result yet" in text


def test_a_copy_of_a_study_is_told(finished, tmp_path):
    shutil.copytree(finished / "out", tmp_path / "copy")
    with pytest.raises(UserError, match="copy has a copy of the study whose folder is .*out, seen from here"):
        study_file([tmp_path / "copy"])


def test_a_study_is_named_alone(finished, tmp_path):
    assert study_file([tmp_path]) is None
    with pytest.raises(UserError, match="is a study, which has a page of its own; name it alone"):
        study_file([finished / "out", tmp_path])


@pytest.mark.parametrize(("ends", "first"), [((2e12, 2e14), "2T"), ((1e12, 3e12), "1T"), ((1e15, 1e22), "1P")])
def test_places_on_the_axis_are_few_and_have_prefixes(ends, first):
    x = np.geomspace(*ends, 5)
    drawn = Text(draw_fitted("fd", [Fitted(0, np.stack([x, x / x[0]], 1), np.empty((0, 4)))])).text.split()
    places = [word for word in drawn if word[-1] in "TPEZ"]
    assert places[0] == first and 2 <= len(places) <= 8
