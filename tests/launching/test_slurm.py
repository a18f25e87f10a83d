"""The sbatch template on a real SLURM: trains, is stopped, goes back to the queue, resumes. And srun by itself."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import faulty
import pytest
from launched import ROOT, events, steps_done, wait_for

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(600)]
TEMPLATE = ROOT / "launchers" / "slurm" / "pretrain.sbatch"


def test_a_job_is_requeued_and_resumes(cluster, recipe, tmp_path):
    output, log = tmp_path / "run", tmp_path / "log"
    sizes = ["--nodes=1", "--ntasks-per-node=2", "--gres=none", "--cpus-per-task=1", "--time=30"]
    settings = [f"output_dir={output}", "train.steps=5000", "train.checkpoint_every=0"]
    options = ["--parsable", f"--chdir={ROOT}", f"--output={log}", *sizes]
    job = cluster.run("sbatch", *options, str(TEMPLATE), recipe, *settings).strip()

    def tell() -> str:
        return log.read_text() if log.exists() else "no output"

    wait_for(lambda: max(steps_done(output), default=0) >= 3, 120, tell)
    cluster.run("scancel", "--signal=TERM", job)  # what --signal=TERM@300 does before the time limit
    wait_for(lambda: cluster.state(job) == "PENDING", 60, tell)
    (stopped,), (saved,) = events(output, "stopped_by_signal"), events(output, "checkpoint")
    assert stopped["step"] == saved["step"] == max(steps_done(output))
    assert "stopped with its state saved; back to the queue (restart 1)" in log.read_text()
    time.sleep(3)  # a node refuses a job that it was told to end in the same second
    cluster.run("scontrol", "update", f"JobId={job}", "StartTime=now")  # SLURM by itself waits two minutes
    wait_for(lambda: max(steps_done(output)) > saved["step"], 120, tell)
    assert events(output, "resumed")[-1]["step"] == saved["step"]
    cluster.run("scancel", job)  # sends the same signal, but ends the job for good
    wait_for(lambda: cluster.state(job) == "CANCELLED", 60, tell)
    wait_for(lambda: len(events(output, "checkpoint")) == 2, 60, tell)
    assert cluster.run("squeue", "--noheader").strip() == ""
    assert sorted(steps_done(output)) == list(range(1, max(steps_done(output)) + 1))
    assert log.read_text().count("back to the queue") == 1


def test_srun_ends_when_a_rank_is_killed(cluster):
    said = cluster.run(
        "srun", "--ntasks=2", "--job-name=faulty", sys.executable, str(Path(faulty.__file__)), "is killed", "1", "5",
        check=False, OMP_NUM_THREADS="1",
    )
    assert "[rank 0] ended because other ranks did: rank 1 (" in said, said
    assert "last seen in step 3, pass reconstruction" in said


def test_doctor_under_srun(cluster):
    said = cluster.run("srun", "--ntasks=2", sys.executable, str(ROOT / "launchers" / "doctor.py"), "--megabytes=1")
    assert "started by srun, ranks: 2, machines: 1, meeting at " in said and said.endswith("all is well\n"), said


def test_the_template_without_a_recipe_or_in_another_folder(tmp_path):
    def run(*arguments: str) -> subprocess.CompletedProcess:
        return subprocess.run(
            ["bash", str(TEMPLATE), *arguments], capture_output=True, text=True, cwd=tmp_path,
            env={"PATH": "/usr/bin:/bin", "SLURM_SUBMIT_DIR": str(tmp_path)},
        )

    assert run().returncode == 2 and "error: no recipe; usage: sbatch" in run().stderr
    assert "submit from the clone's folder" in run("recipe.yaml").stderr
