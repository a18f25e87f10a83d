"""Submit a study's links to SLURM: those that have not finished and do not stand in the queue."""

from collections.abc import Callable
from pathlib import Path

from megavtp.data.files import write_atomic
from megavtp.errors import UserError
from megavtp.study.cells import links_of
from megavtp.study.config import StudyConfig
from megavtp.study.links import Link
from megavtp.study.record import is_finished, read_record
from megavtp.study.results import write_results
from megavtp.study.runner import opened, tell
from megavtp.study.slurm import Job, cancel, check_slurm, command_line, jobs_of, script_of, script_path, submit
from megavtp.training.output_dir import writing


def submit_study(study: StudyConfig, tell: Callable[[str], None] = tell) -> None:
    """Submit what is left of a study, each link as a job that waits for those it depends on, and say what was done.

    A link whose job waits for one that has failed is submitted again, as SLURM would cancel the job.

    UserError: SLURM is not there or refuses a job, a link was begun or queued with other settings, or another process
    runs the study.
    """
    check_slurm()
    with opened(study) as cells:
        write_results(study, cells)
        links = links_of(cells)
        queue = jobs_of(links)
        _check_queued(links, queue)
        submitted: dict[Path, Job] = {}
        finished = 0
        for number, link in enumerate(links, 1):
            if is_finished(link, read_record(link)):
                finished += 1
                continue
            where, job = f"{number}/{len(links)} {link.kind} in {link.folder}", queue.get(link.folder)
            if job is not None and job.state == "pending" and any(part.folder in submitted for part in link.after):
                cancel(job)
                tell(f"{where}: job {job.number} is cancelled, as the one that it waited for has failed")
            elif job is not None:
                tell(f"{where}: {job}")
                continue
            waits = {**queue, **submitted}
            after = [waits[part.folder] for part in link.after if part.folder in waits]
            submitted[link.folder] = _submit(study, link, after, len(submitted))
            behind = f", after {', '.join(job.number for job in after)}" if after else ""
            tell(f"{where}: submitted as job {submitted[link.folder].number}{behind}")
    before = len(links) - finished - len(submitted)
    tell(f"{len(links)} links: {finished} finished, {before} in the queue already, {len(submitted)} submitted")


def _check_queued(links: list[Link], queue: dict[Path, Job]) -> None:
    for link in links:
        if (job := queue.get(link.folder)) and command_line(link) not in script_path(link).read_text().splitlines():
            raise UserError(
                f"{link.kind} in {link.folder} is {job} with other settings; scancel {job.number}, or set another "
                "output_dir"
            )


def _submit(study: StudyConfig, link: Link, after: list[Job], before: int) -> Job:
    script = script_path(link)
    with writing(script):
        script.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(script, script_of(study, link, after).encode())
    try:
        return submit(script)
    except UserError as error:
        raise UserError(
            f"{error}; change the section slurm of the study and start the same command again (jobs submitted by this "
            f"one: {before})"
        ) from None
