"""Wrong command lines of every tool and launcher: one line that names the thing, status 2, and nothing left behind."""

from __future__ import annotations

import shlex
import sys
from dataclasses import replace
from pathlib import Path
from runpy import run_path

import pytest

from megavtp import options
from megavtp.decoder.launcher import train_decoder
from megavtp.dit.launcher import train_dit
from megavtp.errors import UserError
from megavtp.evaluation.distances import measure
from megavtp.launch.doctor import check
from megavtp.pretraining.launcher import pretrain

ROOT = Path(__file__).parents[1]
sys.path += [str(ROOT / "tests" / "sampling"), str(ROOT / "tests" / "extraction")]
from picture_shards import write_shards  # noqa: E402
from sampling_fakes import STATISTICS, TOKENIZER, tokenizer_facts, write_dit  # noqa: E402

# What precedes the arguments of a row. In the folder of the tests there are: tok (a tokenizer), dit, set/train and
# set/test (shards), bare (the same without labels), file, full/file, empty (a folder), tiny.yaml, study.yaml.
EVALUATE = "tools/evaluate.py --checkpoint tok --data set "
MEASURE = "tools/evaluate.py generation --reference set/train "
OWN = MEASURE + "--samples-from set/test "
DRAWN = MEASURE + "--dit dit --tokenizer tok "
EXTRACT = "tools/extract_latents.py --tokenizer tok --data set --out new "
SAMPLE = "tools/sample.py --dit dit --tokenizer tok --out new.png "
CONVERT = "tools/convert_checkpoint.py --from tok --to native --out new "
IMAGES = "tools/prepare_data.py images --from full --out new "
EMOJI = "tools/prepare_data.py emoji --out new "
INDEX = "tools/prepare_data.py index set/train "
CHECK = "tools/prepare_data.py check set "
PLAN = "tools/plan.py --gpus 8 "
REPORT = "tools/report.py empty "
STUDY = "tools/study.py plan study.yaml "
DOCTOR, PRETRAIN = "launchers/doctor.py ", "launchers/pretrain.py --config tiny.yaml --dry-run "
DIT = "launchers/train_dit.py --config dit.yaml --dry-run "
LONG = "x" * 300
HUGE = "9" * 5000

# Numbers: negative, zero where it makes no sense, absurd, no number. Each option of each tool once or more.
NUMBERS = {
    EVALUATE: "max-samples=0 max-samples=-1 max-samples=1e3 batch-size=0 batch-size=1000000000000",
    OWN: "samples=0 samples=1000000000000 reference-samples=-5 size=0 size=100000 batch-size=0 seed=-1",
    DRAWN: "steps=0 steps=1000000000000 shift=0 shift=nan guidance=-1 guidance=inf guided-channels=0 diffusion=nan "
           "diffusion=-1 interval=0.5 interval=1,0 interval=nan,1 interval=0,2",
    EXTRACT: "workers=-1 workers=1000000000000 workers=two batch-size=0 max-bad=-1 max-bad=1000000000000",
    SAMPLE: "per-class=0 per-class=-3 per-class=1000000000000 batch-size=-1 steps=-1 shift=-1 "
            f"seed=99999999999999999999 batch-size={HUGE}",
    IMAGES: "test-fraction=1 test-fraction=-0.1 test-fraction=nan vocab-size=0 vocab-size=999999999999 shard-size=0 "
            "seed=-1 workers=-1 workers=100000 size=-1 size=1000000 max-bad=-1 max-pixels=0",
    EMOJI: "size=7 size=2049 vocab-size=999999999999 workers=-2 shard-size=-1 test-fraction=2",
    INDEX: "vocab-size=-1 vocab-size=8 vocab-size=999999999999 max-bad=-1",
    CHECK: "workers=-1 workers=1000000000000 max-pixels=-1",
    "tools/plan.py ": "gpus=0 gpus=-8 gpus=1000000000000",
    PLAN: "memory=0 memory=nan memory=-80 memory=inf gpus-per-node=0 margin=1 margin=-0.1 margin=nan top=0 top=100000 "
          "rehearse=-1 rehearse=1000000000000",
    STUDY: "gpus=0 gpus=-8 gpus=1e3 utilization=0 utilization=1.5 utilization=nan",
    DOCTOR: "megabytes=-5 megabytes=0 megabytes=1000000000000 timeout=0 timeout=-1 timeout=nan timeout=inf",
}
# Places to write at: below a file, where nobody can make a file, a folder for a file and the reverse.
PLACES = {
    EVALUATE + "--out": "file/x.json /proc/x/y.json empty .",
    EVALUATE + "--pictures": f"file/x.png /proc/x.png empty {LONG}",
    OWN + "--out": "file/x.json /proc/x.json empty", OWN + "--save-reference": "file/x.npz x.txt /proc/x.npz",
    OWN + "--reference-features": "file/x.safetensors x.npz /proc/x.safetensors empty",
    EXTRACT + "--out": f"file file/x /proc/x {LONG}",
    SAMPLE + "--out": f"file/x.npz file/x /proc/x.png full x.jpg {LONG}.png",
    CONVERT + "--out": f"file full file/x /proc/x {LONG}", IMAGES + "--out": "file file/x /proc/x",
    EMOJI + "--out": "file file/x /proc/x", REPORT + "--out": f"file/x.html /proc/x.html empty x.pdf {LONG}.html",
}
OTHERS = [
    (EVALUATE + "--no-such", "unrecognized arguments: --no-such"),
    (OWN + "--no-such", "unrecognized arguments: --no-such"),
    (EXTRACT + "--no-such 3", "unrecognized arguments: --no-such"),
    (SAMPLE + "more", "unrecognized arguments: more"),
    (CONVERT + "--no-such", "unrecognized arguments: --no-such"),
    (IMAGES + "--no-such", "unrecognized arguments: --no-such"),
    (PLAN + "--no-such", "unrecognized arguments: --no-such"),
    (DOCTOR + "more", "unrecognized arguments: more"),
    (PRETRAIN + "--no-such", "unrecognized arguments: --no-such"),
    (DIT + "--no-such", "unrecognized arguments: --no-such"),
    ("tools/prepare_data.py", "the following arguments are required: command"),
    ("tools/plan.py", "required: --gpus"),
    ("tools/report.py --out x.html", "the following arguments are required: RUN"),
    (REPORT, "required: --out"),
    (REPORT + "--out x.html", "empty holds no config.yaml"),
    ("tools/report.py nowhere --out x.html", "nowhere is no folder"),
    ("tools/report.py set --out x.html", "set holds no config.yaml"),
    ("tools/report.py file --out x.html", "file is no folder"),
    ("tools/evaluate.py --data set", "required: --checkpoint"),
    ("launchers/train_dit.py", "name a recipe with --config"),
    ("launchers/train_decoder.py", "name a recipe with --config"),
    ("launchers/train_decoder.py --config tiny.yaml --dry-run", "trains the pixel decoder alone: set objectives"),
    (PRETRAIN + "objectives.reconstruction.frozen_encoder=true", "is trained by launchers/train_decoder.py"),
    (PRETRAIN + "objectives.adversarial.weight=1", "are of the decoder's own training"),
    (PRETRAIN + "objectives.reconstruction.decoder_momentum=0.9", "are of the decoder's own training"),
    (PRETRAIN + "data.source=emojis", "data.source = emojis: no such source; choose one of emoji"),
    # what is to be read: missing, another kind, below a file, a name that no system takes
    (EVALUATE + "--data nowhere", "nowhere/test"),
    (EVALUATE + "--data file", "file"),
    (EVALUATE + "--checkpoint nowhere", "nowhere"),
    (EVALUATE + "--checkpoint file", "file"),
    (EVALUATE + "--checkpoint empty", "empty is no tokenizer"),
    (EVALUATE + "--checkpoint /etc/passwd/x", "--checkpoint: /etc/passwd/x cannot be reached (Not a directory)"),
    (EVALUATE + f"--data {LONG}", "cannot be reached (File name too long)"),
    (EVALUATE + "--split ../file", "file"),
    (EVALUATE + f"--split {LONG}", "File name too long"),
    (EVALUATE + "--captions nowhere", "nowhere"),
    (EVALUATE + f"--captions {LONG}", "File name too long"),
    (EVALUATE + "--captions empty", "empty"),
    (EVALUATE + "--inception nowhere", "nowhere"),
    (EVALUATE + "--inception empty", "empty"),
    (EVALUATE + "--timm vit_tiny", "--timm: expected 2 arguments"),
    (EVALUATE + "--timm vit_tiny file --inception file", "not allowed with argument"),
    (EVALUATE + "--timm vit_tiny file", "--timm vit_tiny"),
    (EVALUATE + "--probe pixels", "--probe: invalid choice: 'pixels'"),
    (EVALUATE + "--probe latents", "--probe: group: too few training samples a class: 4 of 3 classes"),
    (EVALUATE + "--probe latents --split train", "--probe: set has no train split other than the measured one"),
    (EVALUATE + "--data bare --probe features", "--probe: no label / subgroup / group with two or more classes"),
    (EVALUATE + "--device cuda:99", "--device cuda:99: no such device"),
    (EVALUATE + "--device meta", "--device meta: no such device"),
    (MEASURE + "--samples-from file", "file"),
    (MEASURE + "--samples-from empty", "empty"),
    (OWN + "--size 8 --reference nowhere", "nowhere"),
    (OWN + "--inception file", "file"),
    (OWN + "--timm vit_tiny file", "--timm vit_tiny"),
    (OWN + "--equal-classes", "--equal-classes belongs to --label"),
    (OWN + "--dit dit", "not allowed with argument"),
    (OWN + "--tokenizer tok", "--tokenizer belongs to --dit"),
    (MEASURE + "--dit dit", "--dit needs --tokenizer"),
    (MEASURE + "--dit tok --tokenizer tok", "it has no checkpoint.json"),
    (MEASURE + "--dit empty --tokenizer tok", "empty"),
    (DRAWN + "--size 64", "--size is for --samples-from"),
    (DRAWN + "--method dopri5 --steps 3", "dopri5 chooses its steps"),
    (DRAWN + "--method other", "invalid choice: 'other'"),
    (EXTRACT + "--data nowhere", "nowhere"),
    (EXTRACT + "--data file", "file"),
    (EXTRACT + "--tokenizer file", "file"),
    (EXTRACT + "--tokenizer dit", "holds a DiT, no tokenizer"),
    (EXTRACT + "--out full", "full exists and was not made by an extraction"),
    (EXTRACT + "--label nowhere", "nowhere"),
    (EXTRACT + "--precision fp8", "invalid choice: 'fp8'"),
    (SAMPLE + "--classes 9", "--classes 9: the DiT has 3"),
    (SAMPLE, "give --classes"),
    (SAMPLE + "--classes 1 --caption text", "no --caption"),
    (SAMPLE + "--classes ,", "--classes"),
    (SAMPLE + "--classes all --method dopri5 --shift 0.5", "dopri5 chooses its steps"),
    (SAMPLE + "--classes all --guided-channels 17", "guided channels 17: the latents have 16"),
    (CONVERT + "--from nowhere", "--from nowhere does not exist"),
    (CONVERT + "--from file --from-format native", "file"),
    (CONVERT + "--from empty", "empty has neither"),
    (CONVERT + "--module-prefix", "--module-prefix is for --to lightningdit"),
    (CONVERT + "--to lightningdit", "is a tokenizer; --to lightningdit"),
    (CONVERT + "--to other", "invalid choice: 'other'"),
    (CONVERT + "--statistics file", "file"),
    (CONVERT + "--decoder empty", "empty"),
    (CONVERT + "--captions nowhere", "nowhere does not exist"),
    (CONVERT + "--from dit --tokenizer empty", "empty"),
    (IMAGES + "--from nowhere", "--from nowhere does not exist"),
    (IMAGES + "--from file", "file is neither a folder nor"),
    (IMAGES + "--from empty", "no usable image"),
    (IMAGES.replace("full", "pictures") + "--out full", "full exists; choose another --out"),
    (IMAGES.replace("full", "pictures") + "--out full --overwrite", "full holds no dataset.json"),
    ("tools/prepare_data.py index file", "file is not a folder"),
    ("tools/prepare_data.py index empty", "empty"),
    ("tools/prepare_data.py check empty", "empty"),
    ("tools/prepare_data.py check nowhere", "nowhere is not a folder"),
    (PLAN + "--rehearse 8", "--rehearse 8: the ranks of 8 GPUs are 0 to 7"),
    (PLAN + "--rehearse 0 parallel.tp=8", "is not a multiple of parallel.tp = 8: use a tp that divides it"),
    (PLAN + "--rehearse 0 parallel.pp=3", "is not a multiple of parallel.tp x parallel.pp = 3"),
    (PLAN + "--device abacus", "device abacus: not known"),
    (PLAN + "--config nowhere.yaml", "nowhere.yaml: no such config file"),
    (PLAN + f"--config {ROOT / 'configs/dit/dit_xl.yaml'}", "this is a DiT; --rehearse RANK plays its own"),
    (PLAN + "train.setps=3", "did you mean train.steps?"),
    (PLAN + "model.text.vocab_size=-8", "model.text.vocab_size = -8: must be between 1 and 16777216"),
    ("tools/study.py", "the following arguments are required: command"),
    ("tools/study.py run", "the following arguments are required: study"),
    ("tools/study.py run nowhere.yaml", "nowhere.yaml: no such config file"),
    ("tools/study.py status study.yaml", "looks = [40]: 40 is beyond the tokenizer's train.steps = 12"),
    (STUDY + "looks=[4] axes.size.s={tokeniser:[]}", "axes.size.s.tokeniser: no stage has this name"),
    (STUDY + "looks=[4] axes.size.s={tokenizer:[model.sice=s]}", "tokenizer of size s: model.sice: unknown key"),
    ("tools/study.py results study.yaml looks=[4] output_dir=file/x", "results.lock: cannot be written (Not a dir"),
    ("tools/study.py plan study.yaml --device h100 looks=[40]", "looks = [40]: 40 is beyond the tokenizer's train"),
    ("tools/study.py plan study.yaml --device h100 looks", "unrecognized arguments: looks"),
    ("tools/study.py run study.yaml looks=[4] --launch cloud", "argument --launch: invalid choice: 'cloud'"),
    (STUDY + "lokks=[4]", "lokks: unknown key; did you mean looks?"),
    (STUDY + "looks=[4] --gpus 8 --device abacus", "device abacus: not known"),
    # words that are empty, or no text
    (EVALUATE + "--data ''", "'' is empty where a value belongs"),
    (EXTRACT + "--out=", "'--out=' is empty"),
    (SAMPLE + "--out ''", "'' is empty"),
    (DOCTOR + "--shared ''", "'' is empty"),
    (EVALUATE + "--out a\udcff.json", r"a\udcff.json' holds bytes that are no UTF-8"),
    (EXTRACT + "--out a\0b", r"'a\x00b' holds bytes that are no UTF-8"),
    (PRETRAIN + "output_dir=a\udcff", r"output_dir=a\udcff' holds bytes that are no UTF-8"),
    # settings of a run
    (PRETRAIN + "output_dir=", "output_dir: expected a string"),
    (PRETRAIN + "data.root=''", "data.root: expected a string"),
    (PRETRAIN + "train.steps=0", "train.steps = 0: must be at least 1"),
    (PRETRAIN + "train.steps=1000000000000", "train.steps = 1000000000000: must be at most 1,000,000,000"),
    (PRETRAIN + "train.batch_size=1000000000000", "train.batch_size = 1000000000000: must be at most 16,777,216"),
    (PRETRAIN + "data.workers=1000000000000", "data.workers = 1000000000000: must be at most 1,024"),
    (PRETRAIN + "data.workers=-1", "data.workers = -1: must be at least 0"),
    (PRETRAIN + "parallel.timeout=1e300", "parallel.timeout = 1e+300: must be between 0 and 10000000"),
    (PRETRAIN + "model.vision.mlp_ratio=1e300", "model.vision.mlp_ratio = 1e+300: must give from 1 to"),
    (PRETRAIN + "model.vision.width=1000000000000", "model.vision.width = 1000000000000: must be between 1 and 65536"),
    (PRETRAIN + f"train.steps={HUGE}", "quote it if it is text"),
    (PRETRAIN + "seed=99999999999999999999", "a whole number is beyond 64 bits"),
    (PRETRAIN + "train.optimizer.lr=.nan", "train.optimizer.lr: must be finite"),
    (PRETRAIN + "train..steps=3", "an override is written key=value"),
    (PRETRAIN + "--config empty", "empty: cannot read the config file"),
    (PRETRAIN + "--deepspeed_config nowhere.json", "nowhere.json: no such config file"),
    (PRETRAIN + f"--config {LONG}", "cannot be reached (File name too long)"),
    (DIT + "model.width=-4", "model.width = -4: must be between 1 and 65536"),
    (DIT + "model.depth=1000000000000", "model.depth = 1000000000000: must be between 1 and 256"),
    (DIT + "--config tiny.yaml", "unknown key"),
]
ROWS = [
    *((f"{command}--{option.replace('=', ' ')}", f"--{option.partition('=')[0]}: ")
      for command, numbers in NUMBERS.items() for option in numbers.split()),
    *((f"{option} {place}", f"{option.split()[-1]}: ")
      for option, places in PLACES.items() for place in places.split()),
    *OTHERS,
]


@pytest.fixture(scope="module")
def world(tmp_path_factory, recipe):
    folder = tmp_path_factory.mktemp("world")
    (folder / "tok").symlink_to(TOKENIZER)
    write_dit(folder / "dit", replace(tokenizer_facts(), statistics=STATISTICS))
    for split in ("train", "test"):
        write_shards(folder / "set" / split, [4])
        write_shards(folder / "bare" / split, [4], meta=lambda number: {"name": f"picture {number}"})
    (folder / "file").write_text("text")
    (folder / "empty").mkdir()
    (folder / "full").mkdir()
    (folder / "pictures").mkdir()
    (folder / "pictures" / "a.png").write_bytes(b"no picture")
    (folder / "full" / "file").write_text("text")
    (folder / "tiny.yaml").symlink_to(recipe)
    (folder / "study.yaml").write_text(
        "{tokenizer: {recipe: tiny.yaml}, looks: [40], looks_at: checkpoints, measures: {tokenizer: --data set}}\n"
    )
    (folder / "dit.yaml").write_text("model: {width: 48, depth: 2, heads: 4}\n")
    return folder


def run(words: list[str], monkeypatch, capsys) -> tuple[int, str]:
    """In this process: a new one would spend seconds on imports. Status, and what stands on stderr."""
    monkeypatch.setattr(sys, "argv", words)
    launchers = {"pretrain.py": pretrain, "train_decoder.py": train_decoder, "train_dit.py": train_dit}
    entries = {"doctor.py": check.main} | {name: launch.__self__.main for name, launch in launchers.items()}
    script = ROOT / words[0]
    try:
        status = entries[script.name]() if script.name in entries else run_path(str(script), run_name="__main__")
    except UserError as error:
        status, line = 2, f"error: {error}\n"  # as what calls a launcher's entry tells it
    except SystemExit as end:
        status, line = end.code, ""
    return status, line + capsys.readouterr().err


def contents(folder: Path) -> dict[Path, int]:
    return {path: path.stat().st_size for path in folder.rglob("*")}


@pytest.mark.parametrize("command, said", ROWS, ids=[f"{i}-{said[:40]}" for i, (_, said) in enumerate(ROWS)])
def test_a_mistake_is_one_line_and_leaves_nothing(command, said, world, monkeypatch, capsys):
    monkeypatch.chdir(world)
    monkeypatch.setattr(measure, "load_efficientnet", lambda device: None)  # takes a moment, and an optional package
    before = contents(world)
    status, told = run(shlex.split(command), monkeypatch, capsys)
    assert status == 2, told
    assert told.startswith("error: ") and told.count("\n") == 1 and said in told, told
    assert len(told) < 2100 and contents(world) == before


def test_other_processes_of_a_launcher_leave_it_to_the_first_to_tell(monkeypatch, capsys, tmp_path):
    """One line, not one of each of a thousand; and only the first writes, which may be on another machine."""
    parser, waited = options.Options(), []
    parser.add_argument("--out", type=options.new_file())
    monkeypatch.setattr(options.time, "sleep", waited.append)
    monkeypatch.setenv("RANK", "3")
    assert parser.parse_args(["--out", "/proc/x/y"]).out == Path("/proc/x/y")
    for rank, seconds in (("0", []), ("3", [options._PATIENCE])):
        monkeypatch.setenv("RANK", rank)
        with pytest.raises(SystemExit) as end:
            parser.parse_args(["--out", str(tmp_path)])
        assert end.value.code == 2 and "is a folder; name a file" in capsys.readouterr().err and waited == seconds
