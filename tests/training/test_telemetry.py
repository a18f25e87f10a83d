"""Telemetry: one read of the device per line, right averages, one line per step however often a run is resumed."""

import io
import json
import math
import shutil
from dataclasses import replace

import pytest
import torch
from operations import Operations

from megavtp.config.run import ParallelConfig, TrainConfig
from megavtp.config.schema import Config, TelemetryConfig
from megavtp.errors import UserError
from megavtp.nn.compiling import Compilation
from megavtp.parallel.mesh import SINGLE, Mesh
from megavtp.training import progress, trackers
from megavtp.training import telemetry as telemetry_module
from megavtp.training.metrics_file import MetricsFile, read_metrics
from megavtp.training.telemetry import Telemetry
from megavtp.training.watch import PATIENCE, Watch


class Clock:
    """A clock that the test moves."""

    def __init__(self, monkeypatch):
        self.now = 100.0
        monkeypatch.setattr(telemetry_module.time, "perf_counter", lambda: self.now)


class ListTracker:
    def __init__(self):
        self.got, self.closed = [], False

    def numbers(self, step, values):
        self.got.append((step, dict(values)))

    def picture(self, step, name, path):
        self.got.append((step, name, path))

    def close(self):
        self.closed = True


def make(tmp_path, log_every=4, total=100, rank=0, flops=0.0, peak_tflops=None, watches=()):
    config = Config(
        output_dir=str(tmp_path), train=TrainConfig(steps=total, batch_size=32),
        telemetry=TelemetryConfig(log_every=log_every, peak_tflops=peak_tflops),
    )
    return Telemetry(config, Mesh(dp_rank=rank), flops, watches=watches)


@pytest.fixture
def tracker(monkeypatch):
    """The only tracker of a run that starts at the beginning."""
    tracker = ListTracker()
    monkeypatch.setattr(telemetry_module, "open_trackers", lambda config, start: [tracker] if start == 0 else [])
    return tracker


def reduce_with(monkeypatch, function):
    monkeypatch.setattr(telemetry_module, "all_reduce", lambda vector, mesh, axis: function(vector))


def terms(step):
    return {"contrastive/loss": torch.tensor(float(step)), "reconstruction/l1": torch.tensor(0.5 * step)}


def lines(tmp_path, kind="step"):
    return [record for record in read_metrics(tmp_path / "metrics.jsonl") if record["kind"] == kind]


def run(telemetry, first, last, **changes):
    for step in range(first, last):
        telemetry.step(step, {**terms(step), **changes}, torch.tensor(float(step)), 0.1 * step, 0.0)


def test_a_line_holds_the_means_of_its_steps(tmp_path):
    telemetry = make(tmp_path, total=10)
    telemetry.start(0)
    run(telemetry, 0, 10)
    telemetry.close()
    first, second, last = lines(tmp_path)
    assert [first["step"], second["step"], last["step"]] == [4, 8, 10]  # the last step is not left out
    assert first["terms"] == {"contrastive/loss": 1.5, "reconstruction/l1": 0.75}
    assert second["terms"]["contrastive/loss"] == 5.5 and last["terms"]["contrastive/loss"] == 8.5
    assert second["grad_norm"] == 5.5 and second["grad_norm_max"] == 7 and second["lr"] == pytest.approx(0.7)
    assert last["eta_seconds"] == 0 and first["mfu"] is None and first["memory_gib"] > 0


def test_compiling_is_told_and_is_no_training_time(tmp_path, monkeypatch):
    clock, compiled = Clock(monkeypatch), Compilation()
    monkeypatch.setattr(telemetry_module, "COMPILED", compiled)
    telemetry = make(tmp_path, total=4)
    telemetry.start(0)
    for step in range(4):
        if step < 2:  # the second compiles what only it has
            compiled.seconds, compiled.graphs = compiled.seconds + 30.0, compiled.graphs + 5
            clock.now += 30.0
        clock.now += 2.0
        run(telemetry, step, step + 1)
    telemetry.close()
    events = lines(tmp_path, "compiled")
    assert [(e["step"], e["graphs"], e["seconds"]) for e in events] == [(1, 5, 30.0), (2, 10, 60.0)]
    assert lines(tmp_path)[0]["seconds_per_step"] == 2.0


def test_rates(tmp_path, monkeypatch):
    clock = Clock(monkeypatch)
    telemetry = make(tmp_path, flops=3e12, peak_tflops=10.0, total=12)
    telemetry.start(0)
    for step in range(8):
        clock.now += 2.0 if step < 4 else 1.0
        if step == 5:
            with telemetry.paused():
                clock.now += 60
        telemetry.step(step, terms(step), 1.0, 0.1, 0.5 * (step + 1))
    first, second = lines(tmp_path)
    assert first["seconds_per_step"] == 2 and first["images_per_second"] == 16
    assert first["mfu"] == pytest.approx(0.15) and first["data_wait"] == pytest.approx(0.25)
    assert first["eta_seconds"] == pytest.approx(8 * 2)
    assert second["seconds_per_step"] == 1 and second["mfu"] == pytest.approx(0.3)  # the pause does not count
    assert second["data_wait"] == pytest.approx(0.5) and second["grad_norm"] == 1.0
    assert second["eta_seconds"] == pytest.approx(4 * (0.7 * 2 + 0.3 * 1))


def test_samples_that_were_replaced_are_counted_over_all_ranks(tmp_path, monkeypatch):
    telemetry = make(tmp_path, log_every=2, total=6)
    telemetry.mesh = Mesh(dp=2)
    monkeypatch.setattr(telemetry_module, "all_reduce", lambda x, mesh, axis: x)  # the other rank has none
    telemetry.start(0)
    for step, replaced in enumerate((0, 3, 3, 3, 4, 5)):
        telemetry.step(step, terms(step), 1.0, 0.1, 0.0, bad_samples=replaced)
    assert [line["bad_samples"] for line in lines(tmp_path)] == [3, 0, 2]


def test_non_finite_steps_are_counted_and_left_out_of_the_means(tmp_path):
    telemetry = make(tmp_path)
    telemetry.start(0)
    for step in range(4):
        bad = {"contrastive/loss": torch.tensor(math.nan)} if step == 1 else {}
        norm = torch.tensor(math.inf if step in (1, 2) else 1.0)
        telemetry.step(step, {**terms(step), **bad}, norm, 0.1, 0.0)
    (line,) = lines(tmp_path)
    assert line["nonfinite_steps"] == 2 and line["terms"]["contrastive/loss"] == pytest.approx(5 / 3)
    assert line["grad_norm"] == line["grad_norm_max"] == 1
    run(telemetry, 4, 8, **{"contrastive/loss": torch.tensor(math.nan)})
    text = (tmp_path / "metrics.jsonl").read_text()
    assert "NaN" not in text and lines(tmp_path)[1]["terms"]["contrastive/loss"] is None


def test_gradient_norms_by_tower_stand_beside_the_terms(tmp_path, tracker):
    telemetry = make(tmp_path, log_every=2)
    telemetry.start(0)
    for step in range(2):
        towers = {"vision": torch.tensor(1.0 + step), "text": torch.tensor(math.nan if step else 3.0)}
        telemetry.step(step, terms(step), 1.0, 0.1, 0.0, tower_norms=towers)
    telemetry.close()
    (line,) = lines(tmp_path)
    assert line["tower_grad_norms"] == {"vision": 1.5, "text": 3.0} and line["nonfinite_steps"] == 1
    assert list(line["terms"]) == list(terms(0))
    assert tracker.got[0][1]["train/grad_norm/vision"] == 1.5


def test_the_device_is_read_once_a_line(tmp_path, monkeypatch):
    telemetry = make(tmp_path, log_every=20)
    telemetry.start(0)
    transfers = []
    original = torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda x: transfers.append(x.shape) or original(x))
    with Operations() as operations:
        run(telemetry, 0, 19)
        assert not operations.host_reads and not operations.calls["nonzero"] and not transfers
        run(telemetry, 19, 40)
    assert transfers == [(20 * 3 + 2,)] * 2
    assert not operations.host_reads and not operations.calls["nonzero"]


def test_a_term_of_some_steps_is_averaged_over_those(tmp_path):
    telemetry = make(tmp_path, log_every=3)
    telemetry.start(0)
    for step in range(6):
        telemetry.step(step, terms(step) | ({"monitor": torch.tensor(float(step))} if step % 3 else {}), 1.0, 0.1, 0.0)
    first, second = lines(tmp_path)
    assert first["terms"] == {"contrastive/loss": 1.0, "reconstruction/l1": 0.5, "monitor": 1.5}
    assert second["terms"]["monitor"] == 4.5 and first["nonfinite_steps"] == 0


def test_a_term_that_stays_low_is_told_once_in_words(tmp_path, tracker, capsys):
    watches = [
        Watch("contrastive/loss", 0.2, 4, "the loss is {value} of 1", "try less"),
        Watch("reconstruction/l1", 0.5, 4, "never", "nothing"),  # it never falls below 0.5
    ]
    telemetry = make(tmp_path, log_every=2, watches=watches)
    telemetry.start(0)
    # Low in lines 2 and 4, which are too early, in 6 and 8, which are too few, after a line without a number, and on.
    losses = [0.125] * 8 + [0.2] * 2 + [0.125] * 2 + [math.nan] * 2 + [0.125] * 40
    for step, loss in enumerate(losses):
        telemetry.step(
            step, {"contrastive/loss": torch.tensor(loss), "reconstruction/l1": torch.tensor(0.5)}, 1.0, 0.1, 0.0
        )
    telemetry.close()
    (warning,) = lines(tmp_path, "warning")
    assert warning["step"] == 14 + 2 * PATIENCE
    told = {"term": "contrastive/loss", "message": "the loss is 0.12 of 1", "remedy": "try less"}
    assert {key: warning[key] for key in told} == told
    assert capsys.readouterr().out.count("warning term=contrastive/loss message=the loss is 0.12 of 1 remedy=") == 1


def test_values_are_reduced_over_ranks_together(tmp_path, monkeypatch):
    calls = []

    def reduce(vector):
        calls.append(vector.shape)
        return vector + 10

    reduce_with(monkeypatch, reduce)
    telemetry = make(tmp_path)
    telemetry.start(0)
    run(telemetry, 0, 8)
    assert calls == [(14,), (14,)]
    assert lines(tmp_path)[0]["terms"]["contrastive/loss"] == 11.5


def test_other_ranks_take_part_but_write_nothing(tmp_path, tracker, monkeypatch):
    calls = []
    reduce_with(monkeypatch, lambda vector: calls.append(1) or vector)
    telemetry = make(tmp_path, rank=1)
    telemetry.start(0)
    run(telemetry, 0, 8)
    telemetry.event("checkpoint", step=8)
    telemetry.close()
    assert len(calls) == 2 and not tracker.got and not list(tmp_path.iterdir())


def test_a_resumed_run_has_each_step_once(tmp_path):
    telemetry = make(tmp_path)
    telemetry.start(0)
    run(telemetry, 0, 8)
    telemetry.event("checkpoint", step=8)
    run(telemetry, 8, 16)
    telemetry.event("evaluation", step=16, top1=0.5)
    with open(tmp_path / "metrics.jsonl", "ab") as file:
        file.write(b'{"kind": "step", "step": 20, "ter')  # killed while writing
    again = make(tmp_path)
    again.event("resumed", step=8)  # known before the file is open
    again.start(8)
    run(again, 8, 12)
    again.close()
    records = [(record["kind"], record["step"]) for record in read_metrics(tmp_path / "metrics.jsonl")]
    assert records == [("step", 4), ("step", 8), ("checkpoint", 8), ("resumed", 8), ("step", 12)]
    assert all(json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines())
    fresh = make(tmp_path)
    fresh.start(0)
    assert not list(read_metrics(tmp_path / "metrics.jsonl"))


def test_events_keep_their_fields_and_trackers_get_the_numbers(tmp_path, tracker):
    telemetry = make(tmp_path)
    telemetry.start(0)
    telemetry.event("evaluation", step=3, zero_shot=0.25, note="x", broken=math.nan, path=tmp_path, ids=["a", "b"])
    telemetry.picture(3, "reconstructions", tmp_path / "a.png")
    run(telemetry, 0, 4)
    telemetry.close()
    (event,) = lines(tmp_path, "evaluation")
    assert event["zero_shot"] == 0.25 and event["broken"] is None and event["ids"] == ["a", "b"]
    assert tracker.got[0] == (3, {"evaluation/zero_shot": 0.25})
    assert tracker.got[1] == (3, "reconstructions", tmp_path / "a.png")
    step, numbers = tracker.got[-1]
    assert step == 4 and numbers["contrastive/loss"] == 1.5 and numbers["train/images_per_second"] > 0
    assert "train/mfu" not in numbers and tracker.closed


def test_a_full_disk_is_a_user_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="metrics.jsonl: cannot be written"):
        MetricsFile(tmp_path / "file" / "metrics.jsonl", 0)


RECORD = {
    "kind": "step", "step": 20, "terms": {"contrastive/loss": 4.5, "self_distillation/ibot": 7.123456},
    "grad_norm": 1.25, "lr": 1e-3, "nonfinite_steps": 1, "images_per_second": 1234.5, "data_wait": 0.031,
    "mfu": 0.412, "memory_gib": 60.12, "eta_seconds": 3725.0,
}


def test_progress_text():
    text = progress.step_text(RECORD, 100)
    assert text == (
        "step 20/100 | ETA 1:02:05 | contrastive 4.5 ibot 7.123 | 1,234 img/s, data wait 3%, MFU 41.2% | "
        "grad 1.25, lr 0.001 | 60.1 GiB | 1 non-finite"
    )
    assert "MFU" not in progress.step_text({**RECORD, "mfu": None}, 100)
    assert [progress.duration(s) for s in (0, 754.4, 3600, 2 * 86400 + 3 * 3600 + 240)] == [
        "00:00", "12:34", "1:00:00", "2d 03:04",
    ]


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_terminal_gets_one_live_line_and_a_file_gets_plain_lines(monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    for stream in (Terminal(), io.StringIO()):
        line = progress.ProgressLine(stream)
        line.update(RECORD, 100)
        line.update(RECORD, 100)
        line.note({"kind": "checkpoint", "step": 20, "time": 0.0, "seconds": 1.23456})
        line.close()
        text = stream.getvalue()
        assert text.endswith("step 20: checkpoint seconds=1.235\n")
        if stream.isatty():
            live = text.split("\n")[0].split("\r\x1b[K")
            assert len(live) == 3 and live[0] == "" and all(len(part) == 39 for part in live[1:])
        else:
            assert text.count("\n") == 3 and "\r" not in text and "\x1b" not in text


def test_a_tracker_that_is_not_installed_is_named(monkeypatch):
    monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda name: None)
    trackers.check_trackers(TelemetryConfig())
    with pytest.raises(UserError, match="telemetry.wandb=offline needs the package wandb: pip install wandb"):
        trackers.check_trackers(TelemetryConfig(wandb="offline"))
    with pytest.raises(UserError, match="telemetry.tensorboard=true needs .* pip install tensorboard"):
        trackers.check_trackers(TelemetryConfig(tensorboard=True))


FAKE_WANDB = """
class errors:
    class Error(Exception): pass
calls = []
class Image:
    def __init__(self, path): self.path = path
class Run:
    def __init__(self, id): self.id = id
    def define_metric(self, *a, **k): pass
    def log(self, values): calls.append(values)
    def finish(self): calls.append("finish")
def init(**options):
    calls.append(options)
    if options["project"] == "refused": raise errors.Error("no API key\\nconfigured")
    return Run(options["id"] or "new%d" % len(calls))
"""


def test_wandb_goes_on_with_the_same_run_when_resumed(tmp_path, monkeypatch):
    (tmp_path / "wandb.py").write_text(FAKE_WANDB)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(__import__("sys").modules, "wandb", raising=False)
    import wandb

    out = tmp_path / "out"
    config = Config(output_dir=str(out), seed=7, telemetry=TelemetryConfig(wandb="offline", wandb_project="p"))
    for start in (0, 50, 0):
        (tracker,) = trackers.open_trackers(config, start)
    assert [call["id"] for call in wandb.calls] == [None, "new1", None]
    assert [call["resume"] for call in wandb.calls] == [None, "allow", None]
    assert wandb.calls[0]["mode"] == "offline" and wandb.calls[0]["config"]["seed"] == 7
    assert (out / "wandb_run_id").read_text() == "new3"
    tracker.numbers(7, {"a": 1.0})
    tracker.picture(7, "grid", tmp_path / "x.png")
    tracker.close()
    assert wandb.calls[3] == {"a": 1.0, "step": 7} and wandb.calls[4]["grid"].path.endswith("x.png")
    assert wandb.calls[5] == "finish"
    with pytest.raises(UserError, match="wandb: no API key configured; log in with `wandb login`"):
        trackers.open_trackers(replace(config, telemetry=TelemetryConfig(wandb="online", wandb_project="refused")), 0)


def test_tensorboard_files_are_written(tmp_path):
    pytest.importorskip("tensorboard")
    from PIL import Image

    config = Config(output_dir=str(tmp_path), telemetry=TelemetryConfig(tensorboard=True))
    (tracker,) = trackers.open_trackers(config, 0)
    Image.new("RGB", (4, 4)).save(tmp_path / "x.png")
    tracker.numbers(1, {"a": 1.0})
    tracker.picture(1, "grid", tmp_path / "x.png")
    tracker.close()
    assert list((tmp_path / "tensorboard").glob("events*"))


def test_tensorboard_files_are_begun_anew_where_their_folder_was_deleted(tmp_path):
    pytest.importorskip("tensorboard")
    config = Config(output_dir=str(tmp_path), telemetry=TelemetryConfig(tensorboard=True))
    (tracker,) = trackers.open_trackers(config, 0)
    tracker._writer.flush()
    shutil.rmtree(tmp_path / "tensorboard")
    tracker.numbers(1, {"a": 1.0})
    tracker.close()
    assert list((tmp_path / "tensorboard").glob("events*"))


@pytest.mark.parametrize("precision, share", [("bf16", 1 / 312e12), ("fp32", None)])
def test_the_utilisation_of_a_known_device_is_that_of_bfloat16(precision, share, tmp_path, monkeypatch):
    """Products of float32 have another peak: a share of bfloat16's would be too small."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A100-SXM4-80GB")
    clock = Clock(monkeypatch)
    config = Config(
        output_dir=str(tmp_path), parallel=ParallelConfig(precision=precision),
        train=TrainConfig(steps=1, batch_size=4), telemetry=TelemetryConfig(log_every=1),
    )
    telemetry = Telemetry(config, SINGLE, flops=1.0)
    telemetry.device = torch.device("cpu")
    monkeypatch.setattr(telemetry_module, "peak_memory_gib", lambda device: 0.0)
    telemetry.start(0)
    clock.now += 1.0
    run(telemetry, 0, 1)
    telemetry.close()
    assert lines(tmp_path)[0]["mfu"] == pytest.approx(share)


def test_the_telemetry_of_a_run(tmp_path):
    config = Config(
        output_dir=str(tmp_path / "run"), train=TrainConfig(steps=8, batch_size=4),
        telemetry=TelemetryConfig(log_every=4, peak_tflops=1.0),
    )
    telemetry = Telemetry(config, SINGLE, flops=2e12)
    telemetry.start(0)
    run(telemetry, 0, 8)
    telemetry.close()
    first, _ = lines(tmp_path / "run")
    assert first["mfu"] == pytest.approx(2 / first["seconds_per_step"])
