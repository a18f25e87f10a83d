"""What a start without arguments trains on, and what --dry-run prints."""

from __future__ import annotations

from launched import deepspeed, run, steps_done, succeed

from megavtp.config.load import load_config
from megavtp.config.schema import DEMO_CONFIG, Config
from megavtp.config.validate import validate
from megavtp.data.sources import named
from megavtp.pretraining.source import make_source


def test_a_recipe_makes_its_data_at_the_first_start_only(tmp_path, monkeypatch):
    made = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(named.SOURCES, "emoji", lambda root: (made.append(str(root)), root.mkdir(parents=True)))

    def start(recipe, *overrides):
        made.clear()
        make_source(validate(load_config(recipe, Config, overrides), 1), 0)
        return list(made)

    assert start(DEMO_CONFIG) == ["data/emoji"]
    assert start(DEMO_CONFIG) == []
    # A mistyped data.root is no order for emoji, also not in what the run would write down of itself.
    assert start(DEMO_CONFIG, "data.root=data/emojis") == []
    assert load_config(DEMO_CONFIG, Config, ["data.root=data/emojis"]).data.source is None
    assert load_config(DEMO_CONFIG, Config, ["data.root=data/emoji/"]).data.source == "emoji"
    (tmp_path / "own.yaml").write_text("data: {root: mine, source: emoji}\n")
    assert start(tmp_path / "own.yaml") == ["mine"]
    (tmp_path / "none.yaml").write_text("data: {root: other}\n")
    assert start(tmp_path / "none.yaml") == [] and not (tmp_path / "other").exists()
    assert load_config(DEMO_CONFIG.with_name("decoder_emoji.yaml"), Config).data.source == "emoji"


def test_a_dry_run_is_of_the_processes_it_was_started_with(recipe, tmp_path):
    with deepspeed(1, ["--config", recipe, "--dry-run"], tmp_path / "log") as launched:
        launched.wait_until_gone(120)
    assert "layout     1 process =" in launched.output and "Traceback" not in launched.output, launched.output


def test_dry_run_without_a_recipe_describes_the_demo(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    ranks = run(["--dry-run"], 2, tmp_path / "logs")
    assert [process.exitcode for process in ranks.processes] == [0, 0] and "Traceback" not in ranks.output
    for word in ("contrastive", "self_distillation", "reconstruction", "data/emoji", "runs/demo"):
        assert word in ranks.output
    assert [path.name for path in tmp_path.iterdir()] == ["logs"]  # it wrote nothing


def _tell_what_the_engine_gets(rank):
    from megavtp.parallel import deepspeed_adapter as adapter

    inner = adapter.build_config

    def build_config(*arguments):
        config = inner(*arguments)
        print("engine", config["zero_optimization"]["sub_group_size"], config["steps_per_print"], flush=True)
        return config

    adapter.build_config = build_config


def test_a_deepspeed_file_reaches_the_engine(recipe, tmp_path):
    file = tmp_path / "deepspeed.json"
    command = ["--config", recipe, "--deepspeed_config", str(file), f"output_dir={tmp_path / 'run'}", "train.steps=1"]
    file.write_text('{"steps_per_print": 7, "zero_optimization": {"sub_group_size": 5000}}')
    succeed([*command, "deepspeed.steps_per_print=8"], 1, tmp_path / "logs", _tell_what_the_engine_gets)
    assert "engine 5000 8" in "".join(log.read_text() for log in (tmp_path / "logs").iterdir())
    assert list(steps_done(tmp_path / "run")) == [1]
    file.write_text('{"train_batch_size": 64}')
    ranks = run(command, 1, tmp_path / "refused")
    assert [process.exitcode for process in ranks.processes] == [2]
    assert "deepspeed.train_batch_size: is MegaVTP's to set" in ranks.errors[0]


def test_dry_run_on_many_ranks_speaks_once(recipe, tmp_path):
    ranks = run(["--config", recipe, "--dry-run", "parallel.tp=2"], 4, tmp_path)
    assert [process.exitcode for process in ranks.processes] == [0] * 4, ranks.output
    assert sum(bool(log.read_text()) for log in ranks.logs) == 1
