"""A study as jobs of a real SLURM: each link once, in its order; failed and stopped ones; a second submission."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from launched import wait_for
from stand_in import ROOT, StandIn, small_study

from megavtp.errors import UserError
from megavtp.study import slurm, submit
from megavtp.study.cells import cells_of, links_of
from megavtp.study.config import StudyConfig, load_study
from megavtp.study.costs import rates_of
from megavtp.study.pages import status_page
from megavtp.study.record import read_record
from megavtp.study.results import rows_of
from megavtp.study.runner import run_link, run_study
from megavtp.study.slurm import jobs_of
from megavtp.study.submit import submit_study

# In place of a link's script: makes a checkpoint or metrics, or fails or stops, as its choice says.
COMMAND = """
import json, os, sys
from pathlib import Path
words = sys.argv[1:]
place = next(word for word in words if word.startswith("output_dir=") or word.endswith(".json"))
print("rank", os.environ["SLURM_PROCID"], "of", os.environ["SLURM_NTASKS"], flush=True)
if "broken/" in place or "stopped/" in place:
    sys.exit("no room" if "broken/" in place else 143)
if place.startswith("output_dir="):
    Path(place.partition("=")[2], "checkpoints", "step-00000100").mkdir(parents=True, exist_ok=True)
else:
    Path(place).write_text(json.dumps({"metrics": {"knn/group_top1": 0.5}}))
"""
NAMES = ("good", "broken", "stopped")


def study_of(folder: Path, **slurm: object) -> StudyConfig:
    """Return a study of three choices with a training and a measure each."""
    (folder / "command.py").write_text(COMMAND)
    given = {
        "options": "--ntasks-per-node=2 --gres=none --cpus-per-task=1", "by_kind": {"evaluate": "--ntasks-per-node=1"},
        "launcher": f"srun --overlap python {folder}/command.py",
    }
    return small_study(
        folder, output_dir=str(folder / "the study"), looks=[100], dit={}, measures={"tokenizer": "--data data"},
        seeds=[0], curves={}, slurm=given | slurm,
        axes={"kind": {name: {"tokenizer": [f"seed={i}"]} for i, name in enumerate(NAMES)}},
    )


def submitted(study: StudyConfig) -> list[str]:
    told: list[str] = []
    submit_study(study, told.append)
    return told


@pytest.mark.slurm
@pytest.mark.timeout(600)
def test_a_study_is_a_chain_of_jobs(cluster, tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_CONF", cluster.environment["SLURM_CONF"])
    monkeypatch.setenv("PYTHONPATH", cluster.environment["PYTHONPATH"])
    monkeypatch.chdir(ROOT)
    study = study_of(tmp_path)
    cells, out = cells_of(study), tmp_path / "the study"
    links = links_of(cells)
    told = submitted(study)
    assert told[:2] == [
        f"1/6 pretrain in {links[0].folder}: submitted as job 1",
        f"2/6 evaluate in {links[1].folder}: submitted as job 2, after 1",
    ]
    assert told[-1] == "6 links: 0 finished, 0 in the queue already, 6 submitted"
    again = submitted(study)
    assert again[-1] == "6 links: 0 finished, 6 in the queue already, 0 submitted" and "as job 6" in again[5]

    def logs() -> str:
        return "\n".join(path.read_text() for path in out.rglob("slurm-*.out"))

    def queue() -> dict[str, str]:
        return {job.number: job.state for job in jobs_of(links).values()}

    # What follows the broken one is cancelled; the stopped one is back in the queue, and what follows waits for it.
    wait_for(lambda: queue() == {"5": "pending", "6": "pending"}, 400, lambda: f"{queue()}\n{logs()}")
    assert [cell["cell"] for cell in rows_of(cells)] == ["good/step-00000100"]
    assert (out / "results.csv").read_text().count("\n") == 2
    assert sorted(links[0].log.read_text().splitlines()[1:]) == ["rank 0 of 2", "rank 1 of 2"]
    states = [(record.state, record.exit) if (record := read_record(link)) else None for link in links]
    assert states == [("finished", 0), ("finished", 0), ("failed", 1), None, ("begun", 143), None]
    assert read_record(links[0]).command.startswith("srun --ntasks=2 --overlap python ")
    assert "stopped with its state saved; back to the queue (restart 1)" in logs()
    assert f"failed: pretrain in {links[2].folder} (exit status 1: no room); its log is {links[2].log}" in logs()
    page = status_page(cells, rates_of(links, study.cost), jobs_of(links))
    assert f"evaluate in {links[5].folder}: pending as job 6" in page
    assert page.endswith("3 cells: 1 finished, 1 failed, 1 pending")
    told = submitted(study)
    assert told[-1] == "6 links: 2 finished, 2 in the queue already, 2 submitted"
    assert f"4/6 evaluate in {links[3].folder}: submitted as job 8, after 7" in told
    cluster.run("scancel", "--user=root")


class Queue:
    """In place of SLURM's programs: jobs that wait, until a test says otherwise."""

    def __init__(self) -> None:
        self.jobs: dict[str, list[str]] = {}  # by number: state and script
        self.asked: list[tuple[str, ...]] = []

    def __call__(self, program: str, *arguments: str) -> str:
        self.asked.append((program, *arguments))
        if program == "sbatch":
            self.jobs[number := str(10 + len(self.asked))] = ["PENDING", arguments[-1]]
            return f"{number};cluster\n"
        if program == "scancel":
            del self.jobs[arguments[0]]
        return "".join(f"{number}|{state}|{script}\n" for number, (state, script) in self.jobs.items())

    def job(self, link) -> str:
        return next(number for number, (_, script) in self.jobs.items() if Path(script).parent == link.folder)


@pytest.fixture
def queue(monkeypatch) -> Queue:
    queue = Queue()
    monkeypatch.setattr(slurm, "_ask", queue)
    monkeypatch.setattr(submit, "check_slurm", lambda: None)
    return queue


def test_the_script_has_all_that_a_job_is(queue, tmp_path, monkeypatch):
    (tmp_path / "mine.sbatch").write_text("#!/bin/sh\n#SBATCH --nodes=4\n\nmodule load cuda\n\"$@\"\n")
    monkeypatch.chdir(tmp_path)
    study = study_of(tmp_path, template="mine.sbatch")
    submitted(study)
    pretrain, evaluate = links_of(cells_of(study))[:2]
    arguments = f"tools/study.py run '{study.output_dir}/study.yaml' --link '{evaluate.folder}'"
    assert (evaluate.folder / "job.sbatch").read_text().splitlines() == [
        "#!/bin/sh", "#SBATCH --nodes=4", "", slurm.command_line(evaluate),
        "#SBATCH --ntasks-per-node=2 --gres=none --cpus-per-task=1", "#SBATCH --ntasks-per-node=1",
        f"#SBATCH --job-name=good/step-00000100/evaluate '--output={evaluate.folder}/slurm-%j.out' "
        f"--kill-on-invalid-dep=yes --dependency=afterok:{queue.job(pretrain)}",
        f"MEGAVTP={ROOT}", f"cd {tmp_path} || exit 2", f"set -- {sys.executable} -u {ROOT}/{arguments}", "",
        "module load cuda", '"$@"',
    ]
    assert load_study(Path(study.output_dir) / "study.yaml") == study


def test_what_waits_for_a_failed_job_is_submitted_again(queue, tmp_path):
    study = study_of(tmp_path)
    submitted(study)
    pretrain, evaluate = links_of(cells_of(study))[:2]
    first, second = queue.job(pretrain), queue.job(evaluate)
    queue.jobs[first][0] = "COMPLETING"
    told = submitted(study)
    third = next(number for number, (state, script) in queue.jobs.items() if number > second and "good" in script)
    why = f"job {second} is cancelled, as the one that it waited for has failed"
    assert told[1] == f"2/6 evaluate in {evaluate.folder}: {why}"
    assert told[2] == f"2/6 evaluate in {evaluate.folder}: submitted as job {queue.job(evaluate)}, after {third}"
    assert told[-1] == "6 links: 0 finished, 4 in the queue already, 2 submitted"


def test_a_finished_link_is_not_waited_for(queue, tmp_path):
    study = study_of(tmp_path)
    run_study(study, StandIn("evaluate"), lambda line: None)
    told = submitted(study)
    assert told[-1] == "6 links: 3 finished, 0 in the queue already, 3 submitted" and ", after" not in "".join(told)


def test_a_job_with_other_settings_is_told(queue, tmp_path):
    study = study_of(tmp_path)
    submitted(study)
    link = links_of(cells_of(study))[1]
    other = load_study(tmp_path / "study.yaml", ["measures.tokenizer=--data other"])
    number = queue.job(link)
    with pytest.raises(UserError, match=f"is pending as job {number} with other settings; scancel {number}, or set"):
        submit_study(other, lambda line: None)


def test_a_refusal_is_one_line_that_says_what_was_submitted(queue, tmp_path, monkeypatch):
    study = study_of(tmp_path)

    def refuse(command: list[str], **options: object) -> subprocess.CompletedProcess:
        if command[0] == "sbatch" and "evaluate" not in command[-1]:
            return subprocess.CompletedProcess(command, 0, "7\n", "")
        said = "sbatch: error: invalid partition specified: gpu\nsbatch: error: Batch job submission failed: Invalid\n"
        return subprocess.CompletedProcess(command, int(command[0] == "sbatch"), "", said)

    monkeypatch.undo()
    monkeypatch.setattr(submit, "check_slurm", lambda: None)
    monkeypatch.setattr(slurm.subprocess, "run", refuse)
    with pytest.raises(UserError) as error:
        submitted(study)
    assert str(error.value).endswith(
        "evaluate/job.sbatch': invalid partition specified: gpu; Batch job submission failed: Invalid; change the "
        "section slurm of the study and start the same command again (jobs submitted by this one: 1)"
    )


def test_where_slurm_is_not(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="--launch slurm: there is no sbatch here; start it on a machine that submits"):
        submitted(study_of(tmp_path))
    assert not (tmp_path / "the study").exists()
    with pytest.raises(UserError, match="squeue cannot be run .*; is SLURM installed, and does it answer"):
        slurm._ask("squeue")


@pytest.mark.parametrize("given, said", [
    ({"template": "nowhere.sbatch"}, "slurm.template = nowhere.sbatch: cannot be read .*; name a batch script"),
    ({"options": "--comment='x"}, "slurm.options = --comment='x: is no command line"),
    ({"by_kind": {"train": "--nodes=2"}}, "slurm.by_kind.train: no link is of this kind; use pretrain, decoder,"),
    ({"by_kind": {"dit": "--comment='x"}}, "slurm.by_kind.dit = --comment='x: is no command line"),
    ({"launcher": " "}, "slurm.launcher: name what starts the processes, such as srun python -u"),
])
def test_a_wrong_section_is_told(given, said, queue, tmp_path):
    with pytest.raises(UserError, match=said):
        submitted(study_of(tmp_path, **given))
    assert not queue.jobs


def test_one_link_by_itself(tmp_path, monkeypatch):
    study, stand_in = study_of(tmp_path), StandIn()
    pretrain, evaluate = links_of(cells_of(study))[:2]
    with pytest.raises(UserError, match="--link x: no link of the study has this folder"):
        run_link(study, Path("x"), stand_in)
    with pytest.raises(UserError, match=f"{evaluate.folder} needs pretrain in {pretrain.folder}, which is not fin"):
        run_link(study, evaluate.folder, stand_in)
    assert not stand_in.ran
    monkeypatch.setenv("SLURM_TASKS_PER_NODE", "8(x2)")
    assert [run_link(study, pretrain.folder, stand_in) for _ in range(2)] == [0, 0] and stand_in.ran == [pretrain]
    assert read_record(pretrain).command.startswith("srun --ntasks=16 --overlap python ")
    assert run_link(study, evaluate.folder, lambda command, link, lock: 143) == 1  # a measure does not go on
    assert read_record(evaluate).state == "failed"


def test_a_job_writes_the_results_of_the_study_as_it_was_submitted_last(queue, tmp_path):
    def start(command, link, lock):
        for path in link.outputs:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text('{"metrics": {"knn/group_top1": 0.5}}')
        return 0

    def rows():
        return len(json.loads((tmp_path / "the study" / "results.json").read_text())["rows"])

    study, kept = study_of(tmp_path), tmp_path / "the study" / "study.yaml"
    submitted(study)
    *links, last = links_of(cells_of(study))
    assert [run_link(study, link.folder, start) for link in links] == [0] * len(links) and rows() == 2
    larger = replace(study, looks=(100, 200))
    submitted(larger)
    assert run_link(study, last.folder, start) == 0 and rows() == 3  # its job had read the study before
    assert load_study(kept) == larger
