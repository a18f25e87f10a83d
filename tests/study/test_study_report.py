"""The page of a study: its answer stands first, it is the same when made again, and it says what is missing."""

import sys
from html.parser import HTMLParser
from pathlib import Path
from runpy import run_path

import numpy as np
import pytest
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
    assert "FLOP on (95 %: " in answer and "the standard deviation between seeds is 0.1414" in answer
    assert "Their last points are 25 at " in answer and "not finished" not in answer
    assert "joint/step-00000100/seed-0" in page.text and page.tags.count("svg") == 1 and "script" not in page.tags


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
    """The stand-in's seeds differ by 0.2; an axis of repetitions is none to compare."""
    study = small_study(
        tmp_path, looks=[100], curves={"better": {"generation/fd": "lower"}, "held_out": 0, "repeats": "init"},
        axes={"init": {"a": {}, "b": {"tokenizer": ["seed=1"]}}, "objectives": {
            "joint": {}, "ae": {"tokenizer": ["objectives.contrastive.weight=0"]},
        }},
    )
    assert run_study(study, StandIn(), quiet) == 0
    text = Text(render_study(tmp_path / "study.yaml")).text
    assert "compares objectives: joint, ae, at 1 look with 2 seeds of the DiT, each for all of init: a, b." in text
    deviation = 0.2 / 3**0.5  # of four values, two on each side
    assert (
        f"objectives=joint 60 (mean of 4, standard deviation {deviation:.2g}); objectives=ae 40 (mean of 4, standard "
        f"deviation {deviation:.2g}). The difference is 20, with a standard error of {deviation / 2**0.5:.2g}."
    ) in text
    assert "a fit needs" not in text


def test_a_study_that_has_not_begun_has_a_page(tmp_path):
    text = Text(render_study(write_study(tmp_path))).text
    assert "0 of 16 cells have a result" in text and "No cell has a result yet." in text


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
