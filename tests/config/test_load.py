import json
from dataclasses import fields, is_dataclass, replace
from typing import get_type_hints

import pytest
import yaml

from megavtp.config.load import from_dict, load_config, to_dict, to_yaml
from megavtp.config.schema import DEMO_CONFIG, Config
from megavtp.config.typed import all_keys
from megavtp.errors import UserError


@pytest.fixture
def recipe(tmp_path):
    def write(text, name="recipe.yaml"):
        path = tmp_path / name
        path.write_text(text)
        return path

    return write


def refused(match, path, *args):
    with pytest.raises(UserError, match=match) as error:
        load_config(path, Config, *args)
    assert "\n" not in str(error.value)


def test_an_empty_file_is_all_defaults(recipe):
    assert load_config(recipe(""), Config) == Config()
    assert load_config(recipe("model:\ntrain:  # all keys commented out\n"), Config) == Config()


def test_the_demo_is_small():
    assert load_config(DEMO_CONFIG, Config).model.size == "tiny"


def test_values_keep_their_types(recipe):
    config = load_config(recipe(
        "train: {optimizer: {lr: 1e-3, weight_decay: 0, betas: [0.9, 5e-1], lr_scale: {text: 2}}}\n"
        "model: {image_size: 128, text: {vocab_size: null}, vision: {layer_scale: 1.0e-5}}\n"
        "evaluation: {templates: ['{}', 'an icon of {}']}\n"
        "parallel: {zero_stage: 3}\n"
    ), Config)
    optimizer = config.train.optimizer
    assert (optimizer.lr, optimizer.betas, optimizer.lr_scale) == (1e-3, (0.9, 0.5), {"text": 2.0})
    assert isinstance(optimizer.weight_decay, float)
    assert config.model.text.vocab_size is None and config.model.vision.layer_scale == 1e-5
    assert config.evaluation.templates == ("{}", "an icon of {}")


@pytest.mark.parametrize(("line", "match"), [
    ("train: {steps: 1.5}", r"train\.steps: expected an integer, got 1\.5"),
    ("train: {steps: true}", r"train\.steps: expected an integer, got True \(bool\)"),
    ("train: {steps: '10'}", r"train\.steps: expected an integer, got '10'"),
    ("train: {steps: null}", r"train\.steps: expected an integer, got None \(null\)"),
    ("train: {optimizer: {lr: fast}}", r"train\.optimizer\.lr: expected a number, got 'fast'"),
    ("train: {optimizer: {lr: true}}", r"train\.optimizer\.lr: expected a number"),
    ("train: {optimizer: {lr: .nan}}", r"train\.optimizer\.lr: must be finite"),
    ("train: {optimizer: {lr: 1e999}}", r"train\.optimizer\.lr: must be finite"),
    ("train: {optimizer: {betas: [0.9]}}", r"train\.optimizer\.betas: expected a list of 2 numbers"),
    ("train: {optimizer: {betas: [0.9, x]}}", r"train\.optimizer\.betas\[1\]: expected a number"),
    ("train: {optimizer: {lr_scale: {1: 2}}}", r"train\.optimizer\.lr_scale: expected a mapping"),
    ("train: [1]", r"train: expected a mapping of keys"),
    ("parallel: {zero_stage: 4}", r"parallel\.zero_stage: expected one of 0, 1, 2, 3, 'auto', got 4"),
    ("parallel: {zero_stage: true}", r"parallel\.zero_stage: expected one of"),
    ("telemetry: {wandb: off}", r"telemetry\.wandb: expected one of 'disabled', 'offline', 'online', got False"),
    ("telemetry: {tensorboard: 1}", r"telemetry\.tensorboard: expected true or false"),
    ("output_dir: 3", r"output_dir: expected a string"),
    ("model: {vision: {width: x}}", r"model\.vision\.width: expected an integer or null"),
    ("evaluation: {templates: '{}'}", r"evaluation\.templates: expected a list of strings"),
    ("- 1", r"expected a mapping of keys, got list"),
])
def test_a_wrong_type_names_path_expected_and_got(recipe, line, match):
    refused(match, recipe(line))


@pytest.mark.parametrize(("key", "meant"), [
    ("train.lr", "train.optimizer.lr"),
    ("model.vison.width", "model.vision.width"),
    ("model.vision.widht", "model.vision.width"),
    ("batch_size", "train.batch_size"),
    ("zero_stage", "parallel.zero_stage"),
    ("train.optimizer.weight_deacy", "train.optimizer.weight_decay"),
    ("objectives.clip.micro_batch", "objectives.contrastive.micro_batch"),
])
def test_an_unknown_key_suggests_the_nearest(recipe, key, meant):
    nested = value = {}
    *sections, last = key.split(".")
    for section in sections:
        value = value.setdefault(section, {})
    value[last] = 1
    match = rf"unknown key; did you mean {meant}".replace(".", r"\.")
    if sections and sections[-1] in hints_of_all():  # the section exists, so the file's error names the same key
        refused(match, recipe(yaml.safe_dump(nested)))
    refused(match, recipe(""), [f"{key}=1"])


def hints_of_all():
    return {path.rpartition(".")[2] for path in all_keys(Config)}


def test_a_key_near_nothing_suggests_nothing(recipe):
    refused(r"^zzzzqq: unknown key; the keys", recipe("zzzzqq: 1"))


def test_a_number_as_a_key(recipe):
    refused(r"^3: unknown key", recipe("3: 1"))


@pytest.mark.parametrize(("text", "match"), [
    ("a: [1", r"recipe\.yaml, line \d+: "),
    ("train:\n  steps: 1\n  steps: 2\n", r"line 3: the key 'steps' is written twice"),
    ("train:\n\tsteps: 1\n", r"line 2: "),
    ("x: !!python/object/apply:os.system [ls]\n", r"line 1: could not determine a constructor"),
    ("? {a: 1}\n: 2\n", r"line 1: "),
])
def test_bad_yaml_names_file_and_line(recipe, text, match):
    refused(match, recipe(text))


def aliases(first, *parts):
    """A value that stands for 8^8 of the first."""
    lines = [f"a0: &a0 {first}"]
    lines += [f"a{i}: &a{i} {parts[0]}{', '.join([f'*a{i - 1}'] * 8)}{parts[1]}" for i in range(1, 9)]
    return "\n".join(lines)


@pytest.mark.parametrize(("text", "match"), [
    (aliases("[x]", "[", "]"), r"recipe\.yaml, line \d: more than 10,000 values"),
    (aliases("{x: 1}", "{<<: [", "]}"), r"recipe\.yaml, line \d: more than 10,000 values"),
    ("train: &a {steps: *a}", r"recipe\.yaml, line 1: more than 10,000 values"),
    ("\n".join(f"k{i}: 1" for i in range(9_999)), r"line 5001: more than 10,000 values"),
    ("a: " + 5000 * "[", r"line 1: nested too deeply, 32 levels are the most"),
    ("deepspeed: " + 40 * "{a: " + "1" + 40 * "}", r"line 1: nested too deeply"),
    ("? " + 100_000 * "k" + "\n: 1", r"^k{100}: unknown key"),
    ("train: {steps: " + 100_000 * "x" + "}", r"^train\.steps: expected an integer.*x \[\.\.\.\] x"),
    ("train: {steps: 1" + 5000 * "0" + "}", r"a value is not what its form or tag says \(Exceeds the limit"),
    ("train: {steps: 1" + 400 * "0" + "}", r"a whole number is beyond 64 bits"),
    ("train: {optimizer: {lr: 0x1" + 9000 * "0" + "}}", r"a whole number is beyond 64 bits"),
    (r'output_dir: "a\0b"', r"'a\\x00b' holds NUL or half of a surrogate pair"),
    (r'output_dir: "\ud800"', r"'\\ud800' holds NUL or half of a surrogate pair"),
    ("output_dir: 2024-99-99", r"not what its form or tag says \(month must be in 1\.\.12\); quote it"),
    ("seed: !!int x", r"not what its form or tag says"),
    ("seed: !!bool x", r"not what its form or tag says"),
    ("seed: !!timestamp x", r"not what its form or tag says"),
    ("output_dir: ''", r"output_dir: expected a string, got ''"),
])
def test_what_no_recipe_holds_is_refused_at_once(recipe, text, match):
    refused(match, recipe(text))


def test_anchors_and_merges_of_usual_size(recipe):
    config = load_config(recipe(
        "model: {vision: &tower {width: 64, depth: 2}, decoder: {<<: *tower, heads: 2}}\ntrain: {steps: &n 7}\n"
        "evaluation: {every: *n}"
    ), Config)
    assert (config.model.decoder.width, config.model.decoder.heads, config.evaluation.every) == (64, 2, 7)


def test_unreadable_files(recipe, tmp_path):
    refused(r"nothing\.yaml: no such config file", tmp_path / "nothing.yaml")
    refused(r"cannot read the config file", tmp_path)
    path = tmp_path / "binary.yaml"
    path.write_bytes(b"\xff\xfe\x00")
    refused(r"cannot read the config file", path)
    refused(r"recipe\.yaml: unacceptable character #x0000", recipe("a: b\0c"))


def test_overrides_win_and_are_yaml(recipe):
    path = recipe("train: {steps: 10}\nobjectives:\n")
    config = load_config(path, Config, [
        "train.steps=20", "train.optimizer.betas=[0.8, 0.9]", "train.optimizer.lr=3e-4", "model.text.vocab_size=null",
        "objectives.contrastive.weight=0", "train.optimizer.lr_scale.text=0.5", "train.steps=30",
        "deepspeed.zero_optimization.overlap_comm=true", "output_dir=runs/a=b", "--seed=4",
    ])
    assert config.train.steps == 30 and config.train.optimizer.betas == (0.8, 0.9)
    assert config.train.optimizer.lr == 3e-4 and config.model.text.vocab_size is None
    assert config.objectives.contrastive.weight == 0.0 and config.train.optimizer.lr_scale == {"text": 0.5}
    assert config.deepspeed == {"zero_optimization": {"overlap_comm": True}}
    assert config.output_dir == "runs/a=b" and config.seed == 4


@pytest.mark.parametrize(("override", "match"), [
    ("train.steps", r"an override is written key=value"),
    ("=3", r"an override is written key=value"),
    ("train=3", r"train: is a section; set one of its keys: train\.steps"),
    ("train.steps.more=3", r"train\.steps\.more: unknown key"),
    ("train.steps=[1", r"the value is not YAML"),
    ("train.steps=", r"expected an integer, got None"),
    ("train..steps=3", r"an override is written key=value"),
    ("deepspeed.\0=3", r"an override is written key=value"),
    ("deepspeed." + 5000 * "a." + "b=1", r"an override is written key=value"),
    ("train.steps=" + 5000 * "[", r"^train\.steps=\[{40}: the value is not YAML: nested too deeply"),
    ("train.steps=" + 5000 * "9", r"^train\.steps=9{40}: a value is not what its form or tag says"),
    ("output_dir=a\udcff", r"the value is not YAML: unacceptable character #xdcff"),
    ("deepspeed.a.b.c=1", r"^deepspeed\.a: expected a mapping of keys, got 3"),
])
def test_bad_overrides(recipe, override, match):
    refused(match, recipe("deepspeed: {a: 3}"), [override])


def test_a_deepspeed_file_is_merged_between_recipe_and_overrides(recipe):
    path = recipe("deepspeed: {steps_per_print: 1, zero_optimization: {overlap_comm: true, reduce_bucket_size: 5}}")
    extra = recipe(json.dumps({"zero_optimization": {"reduce_bucket_size": 6, "sub_group_size": 1e9}}), "ds.json")
    config = load_config(path, Config, ["deepspeed.steps_per_print=2"], extra)
    assert config.deepspeed == {
        "steps_per_print": 2,
        "zero_optimization": {"overlap_comm": True, "reduce_bucket_size": 6, "sub_group_size": 1e9},
    }


@pytest.mark.parametrize(("text", "match"), [
    ('{\n"a": }', r"ds\.json, line 2: not JSON"),
    ('{"a": 1, "a": 2}', r"ds\.json: the key 'a' is written twice"),
    ("[1]", r"ds\.json: expected a mapping of keys"),
    (5000 * '{"a": ' + "1" + 5000 * "}", r"ds\.json: nested too deeply"),
    (100 * '{"a": ' + "1" + 100 * "}", r"ds\.json: nested too deeply"),
    ('{"a": 1' + 50 * "0" + "}", r"ds\.json: a whole number is beyond 64 bits"),
    (r'{"a": "\ud800"}', r"ds\.json: '\\ud800' holds NUL or half"),
])
def test_a_bad_deepspeed_file(recipe, text, match):
    refused(match, recipe(""), (), recipe(text, "ds.json"))


def test_round_trips(recipe):
    config = load_config(DEMO_CONFIG, Config, ["train.optimizer.lr_scale.text=0.5"])
    config = replace(config, deepspeed={"aio": {"block_size": 1}})
    assert from_dict(to_dict(config), Config) == config
    assert from_dict(json.loads(json.dumps(to_dict(config))), Config) == config
    assert load_config(recipe(to_yaml(config)), Config) == config


def test_every_key_of_the_schema_is_frozen_and_typed():
    def walk(cls):
        assert cls.__dataclass_params__.frozen
        for field in fields(cls):
            kind = get_type_hints(cls)[field.name]
            if is_dataclass(kind):
                walk(kind)

    walk(Config)
    assert len(list(all_keys(Config))) == len(set(all_keys(Config)))
