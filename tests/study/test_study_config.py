"""Studies that cannot be: one line before anything runs. And the studies that are shipped."""

import json
import shlex
import sys
from collections import Counter
from pathlib import Path
from runpy import run_path

import pytest
from stand_in import ROOT, StandIn, small_study, write_study

from megavtp.config.load import to_yaml
from megavtp.errors import UserError
from megavtp.planning.flops import flops_per_step
from megavtp.study.answers import curves_page
from megavtp.study.cells import cells_of, links_of
from megavtp.study.config import CostConfig, load_study
from megavtp.study.costs import rates_of
from megavtp.study.curves import fit_results
from megavtp.study.pages import plan_page
from megavtp.study.recipes import Recipes
from megavtp.study.results import rows_of
from megavtp.study.runner import run_study

SHIPPED = sorted((ROOT / "configs" / "study").glob("*.yaml"))


def axis(stage: str, *settings: str) -> dict:
    return {"axes": {"objectives": {"joint": {stage: list(settings)}}}}


@pytest.mark.parametrize("changes, said", [
    (axis("tokeniser", "seed=1"), "axes.objectives.joint.tokeniser: no stage has this name; use tokenizer, decoder"),
    (axis("decoder", "seed=1"), "axes.objectives.joint.decoder: the study has no decoder; name decoder.recipe"),
    (axis("tokenizer", "objectives.contrastiv.weight=0"),
     "tokenizer of objectives joint: objectives.contrastiv.weight: unknown key; did you mean objectives.contrastive"),
    (axis("dit", "model.depht=2"), "dit of objectives joint: model.depht: unknown key; did you mean model.depth"),
    (axis("tokenizer", "model.patch_size=24"), "tokenizer of objectives joint: model.image_size = 64"),
    (axis("tokenizer", "output_dir=x"), "tokenizer of objectives joint: output_dir is set by the study itself"),
    (axis("tokenizer", "train.steps=7"), "train.steps is set by the study itself"),
    (axis("dit", "seed=7"), "dit of objectives joint: seed is set by the study itself"),
    ({"axes": {"a/b": {"c": {}}}}, "axes.a/b: the name 'a/b' becomes a folder's"),
    ({"axes": {"seed": {"a": {}}}}, "axes.seed: the table of results has a column of this name"),
    ({"axes": {"size": {}}}, "axes.size: no choice sets anything; give one a setting, or leave the axis out"),
    ({"axes": {"size": {"s": {}, "b": {"dit": []}}}}, "axes.size: no choice sets anything"),
    ({"looks": []}, "looks: name the steps"),
    ({"looks": [100, 100]}, "looks = \\[100, 100\\]: must be whole numbers above 0, each larger"),
    ({"looks": [10]}, "train.optimizer.warmup_steps = 20 exceeds train.steps = 10"),
    ({"looks": [100, 2000], "looks_at": "checkpoints"}, "2000 is beyond the tokenizer's train.steps = 900"),
    ({"seeds": []}, "seeds: name one at least"),
    ({"seeds": [1, 1]}, "seeds = \\[1, 1\\]: must be whole numbers from 0 on, each once"),
    ({"tokenizer": {}}, "tokenizer.recipe: name the recipe"),
    ({"tokenizer": {"recipe": "nowhere.yaml"}}, "nowhere.yaml: no such config file"),
    ({"dit": {}}, "measures.generation needs a DiT"),
    ({"dit": {}, "measures": {"samples": "--classes all"}}, "measures.samples needs a DiT"),
    ({"measures": {}}, "measures: the study measures nothing"),
    ({"measures": {"generation": "--reference 'data"}}, "measures.generation = --reference 'data: is no command line"),
    ({"measures": {"generation": "--reference data --seed 5"}}, "measures.generation: --seed is set by the study"),
    ({"measures": {"tokenizer": "--data data --ou=x"}}, "measures.tokenizer: --out is set by the study itself; leave"),
    ({"latents": "--label group"}, "latents: the DiT needs a data set"),
    ({"launcher": " "}, "launcher: name what starts the processes"),
    ({"curves": {"x": "hours"}}, "curves.x = hours: must be flops, samples or an axis \\(objectives\\)"),
    ({"curves": {"x": "objectives"}}, "curves.x = objectives: its choice 'joint' is no number above 0"),
    ({"curves": {"better": {"generation/fd": "less"}}}, "curves.better.generation/fd: expected one of 'lower'"),
    ({"curves": {"repeats": "init"}}, "curves.repeats = init: must be an axis other than curves.x \\(objectives\\)"),
    ({"curves": {"baseline": "plain"}}, "curves.baseline = plain: must be a choice on one axis, other than"),
    ({"curves": {"held_out": -1}}, "curves.held_out = -1: must be at least 0"),
    ({"cost": {"flops_per_second": 0}}, "cost.flops_per_second = 0.0: must be above 0"),
    ({"seed": 3}, "seed: unknown key; did you mean seeds"),
])
def test_a_study_that_cannot_be_is_refused_in_one_line(changes, said, tmp_path):
    with pytest.raises(UserError, match=said):
        run_study(small_study(tmp_path, **changes), StandIn())
    assert [path.name for path in tmp_path.iterdir()] == ["study.yaml"]


def test_what_a_study_writes_of_itself_is_that_study(tmp_path):
    written = {"dit": {}, "measures": {"tokenizer": "--data data"}, "latents": None}
    for changes in ({}, written):
        study = small_study(tmp_path, **changes)
        (tmp_path / "again.yaml").write_text(to_yaml(study))
        assert load_study(tmp_path / "again.yaml") == study


def test_a_measure_that_no_cell_has_and_too_few_points_are_told(tmp_path):
    other = small_study(tmp_path, curves={"better": {"generation/gfid": "lower"}})
    run_study(other, StandIn(), lambda line: None)
    page = curves_page(other, fit_results(other, rows_of(cells_of(other))), 16, 16)
    why = "no cell has this measure; there are generation/fd, knn/group_top1"
    assert page.splitlines()[-1] == f"curves.better.generation/gfid: {why}"
    few = small_study(tmp_path, looks=[100, 200, 400], output_dir=str(tmp_path / "few"))
    run_study(few, StandIn(), lambda line: None)
    told = (tmp_path / "few" / "results.json").read_text()
    assert "generation/fd of objectives=joint: 3 points, a fit needs 4 at different places" in told


def test_a_place_that_cannot_be_written_is_told(tmp_path):
    study = small_study(tmp_path, output_dir=str(tmp_path / "study.yaml" / "out"))
    with pytest.raises(UserError, match="study.yaml/out: cannot be written \\(Not a directory\\)"):
        run_study(study, StandIn())


def test_a_damaged_record_is_told(tmp_path):
    study = small_study(tmp_path)
    run_study(study, StandIn(), lambda line: None)
    record = tmp_path / "out" / "joint" / "step-00000100" / "pretrain" / "link.json"
    record.write_text("{")
    with pytest.raises(UserError, match="link.json is damaged or of another kind .* remove .*pretrain, to have it"):
        run_study(study, StandIn())


def commands(study) -> dict[str, list[str]]:
    return {link.kind: shlex.split(link.shown(["deepspeed"])) for link in links_of(cells_of(study))}


def test_the_commands_of_a_chain(tmp_path):
    decoder = {"recipe": str(ROOT / "configs/demo/decoder_emoji.yaml"), "settings": ["train.steps=30"]}
    study = small_study(
        tmp_path, looks=[100], seeds=[3], decoder=decoder, **axis("tokenizer", "model.bottleneck=32", "seed=5"),
        measures={"tokenizer": "--data data", "generation": "--reference data", "samples": "--classes all"},
    )
    found, place = commands(study), f"{tmp_path}/out/joint/step-00000100"
    checkpoint = f"{place}/pretrain/run/checkpoints/step-00000100"
    assert found["pretrain"][:2] == ["deepspeed", "launchers/pretrain.py"]
    assert {"seed=5", "train.steps=100", f"output_dir={place}/pretrain/run"} <= set(found["pretrain"])
    # The decoder's model is the tokenizer's.
    assert {f"model.init_from={checkpoint}", "model.bottleneck=32"} <= set(found["decoder"])
    assert "seed=5" not in found["decoder"]
    decoded = f"{place}/decoder/run/checkpoints/step-00000030"
    assert found["convert"] == shlex.split(
        f"python tools/convert_checkpoint.py --from {checkpoint} --decoder {decoded} --to hf-vtp "
        f"--out {place}/convert/tokenizer"
    )
    assert found["latents"][1:] == shlex.split(
        f"tools/extract_latents.py --tokenizer {checkpoint} --data data --label group "
        f"--out {place}/latents/latents"
    )
    assert {f"data.root={place}/latents/latents", "seed=3"} <= set(found["dit"])
    assert found["evaluate"][1:] == shlex.split(
        f"tools/evaluate.py --checkpoint {place}/convert/tokenizer --data data "
        f"--pictures {place}/evaluate/reconstructions.png --out {place}/evaluate/metrics.json"
    )
    drawn = (
        f"--dit {place}/seed-3/dit/run/checkpoints/step-00004000 --tokenizer {place}/convert/tokenizer --seed 3"
    )
    assert found["generate"][1:] == shlex.split(
        f"tools/evaluate.py generation {drawn} --reference data --out {place}/seed-3/generate/metrics.json"
    )
    assert found["draw"][1:] == shlex.split(
        f"tools/sample.py {drawn} --classes all --out {place}/seed-3/draw/samples.png"
    )


def test_cells_share_all_links_that_their_choices_do_not_change(tmp_path):
    axes = {
        "objectives": {"joint": {}, "ae": {"tokenizer": ["objectives.contrastive.weight=0"]}},
        "decoder": {"short": {}, "long": {"decoder": ["train.steps=30"]}},
        "size": {"deep": {}, "flat": {"dit": ["model.depth=2"]}},
    }
    decoder = {"recipe": str(ROOT / "configs/demo/decoder_emoji.yaml")}
    study = small_study(tmp_path, looks=[100], seeds=[0, 1], decoder=decoder, axes=axes)
    cells, out = cells_of(study), tmp_path / "out"
    assert len(cells) == len({cell.name for cell in cells}) == 16
    counts = Counter(link.kind for link in links_of(cells))
    assert counts == {
        "pretrain": 2, "latents": 2, "decoder": 4, "convert": 4, "evaluate": 4, "dit": 2 * 2 * 2, "generate": 16
    }
    last = {link.kind: link for link in cells[-1].links}
    assert last["latents"].folder == out / "ae/step-00000100/latents" and last["latents"].after == (last["pretrain"],)
    assert last["decoder"].folder == out / "ae/long/step-00000100/decoder"
    assert last["dit"].folder == out / "ae/flat/step-00000100/seed-1/dit"
    assert last["generate"].folder == out / "ae/long/flat/step-00000100/seed-1/generate"
    assert last["generate"].after == (last["dit"], last["convert"])


def test_looks_at_checkpoints_share_one_run(tmp_path):
    study = small_study(tmp_path, looks=[100, 400, 600], looks_at="checkpoints")
    pretrain = links_of(cells_of(study))[0]
    assert sum(link.kind == "pretrain" for link in links_of(cells_of(study))) == len(study.axes["objectives"])
    assert {"train.checkpoint_every=100", "train.keep_last=11"} <= set(pretrain.arguments)
    assert [path.name for path in pretrain.outputs] == ["step-00000100", "step-00000400", "step-00000600"]
    assert [cell.flops for cell in cells_of(study)][0] * 9 == pytest.approx(pretrain.flops)  # 900 steps


def test_hours_are_from_the_given_rate_until_links_were_measured(tmp_path):
    study = small_study(tmp_path, looks=[100], seeds=[0])
    cells = cells_of(study)
    links = links_of(cells)
    pretrain = links[0]
    per_step = flops_per_step(Recipes(study, {"objectives": "joint"}).pretraining(100))["total"]
    assert pretrain.flops == 100 * per_step
    given = rates_of(links, study.cost)
    assert given.estimate(pretrain) == pytest.approx(pretrain.flops / 1e11)
    assert {link.kind: given.estimate(link) for link in links}["generate"] == 60

    run_study(study, StandIn(), lambda line: None)
    for link in links:  # as if a training took a second for each TFLOP, and a tool ten
        record = link.folder / "link.json"
        stored = json.loads(record.read_text())
        assert stored["whole"]
        record.write_text(json.dumps(stored | {"seconds": link.flops / 1e12 or 10.0}))
    measured = rates_of(links, study.cost)
    for link in links:
        assert measured.estimate(link) == pytest.approx(link.flops / 1e12 or 10.0)
    page = plan_page(study, cells, measured)
    total = sum(link.flops / 1e12 or 10.0 for link in links) / 3600
    assert f"{total:.2f} hours on this machine, of which 0.00 are left" in page
    unknown = plan_page(study, cells, rates_of([], CostConfig(flops_per_second=1e15)), 8)
    assert "not in the hours: evaluate, generate, latents" in unknown and "on 8 devices (" in unknown


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_the_shipped_studies_can_be_planned(path, monkeypatch):
    monkeypatch.chdir(ROOT)
    study = load_study(path)
    cells = cells_of(study)
    assert len({cell.name for cell in cells}) == len(cells) >= 8
    assert study.curves.better and all(cell.flops > 0 for cell in cells)
    assert Path(study.output_dir).name == path.stem


def tool(words: str, monkeypatch, capsys) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "argv", shlex.split(words))
    with pytest.raises(SystemExit) as end:
        run_path(str(ROOT / words.split()[0]), run_name="__main__")
    captured = capsys.readouterr()
    return int(end.value.code or 0), captured.out, captured.err


def test_the_tool_plans_tells_the_state_and_refuses_in_one_line(tmp_path, monkeypatch, capsys):
    path = write_study(tmp_path)
    status, out, _ = tool(f"tools/study.py plan {path} looks=[100] --gpus 8 --device h100", monkeypatch, capsys)
    assert status == 0 and "joint/step-00000100/seed-0" in out and "on 8 devices" in out
    status, out, _ = tool(f"tools/study.py plan {path} curves.held_out=1", monkeypatch, capsys)
    assert status == 0 and "nothing will be predicted: curves.held_out = 1 leaves 3 of 4 points" in out
    status, out, _ = tool(f"tools/study.py status {path}", monkeypatch, capsys)
    assert status == 0 and out.endswith("16 cells: 16 waiting\n")
    run_study(load_study(path), StandIn(), lambda line: None)
    status, out, _ = tool(f"tools/study.py results {path}", monkeypatch, capsys)
    assert status == 0 and "generation/fd (lower is better): objectives=joint is better than objectives=ae from " in out
    for words, said in (
        (f"plan {path} --device abacus --gpus 1", "device abacus: not known"),
        (f"plan {path} --gpus 0", "--gpus: must be a whole number"),
        (f"plan {path} --utilization 2", "--utilization: must be a number above 0"),
        (f"plan {path} lokks=[3]", "lokks: unknown key; did you mean looks"),
        ("status nowhere.yaml", "nowhere.yaml: no such config file"),
        ("", "the following arguments are required: command"),
    ):
        status, _, err = tool(f"tools/study.py {words}", monkeypatch, capsys)
        assert status == 2 and err.startswith("error: ") and err.count("\n") == 1 and said in err
