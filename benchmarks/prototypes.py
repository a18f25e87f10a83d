"""Compare the prototype loss with the plain one, which holds all logits: time, memory and agreement.

    python benchmarks/prototypes.py
    python benchmarks/prototypes.py --threads 1 --chunk 128 1024 --rounds 7

The plain one is what DINOv2 computes (arXiv 2304.07193): the logits of all rows, Sinkhorn-Knopp on the teacher's matrix
of exponentials, a log-softmax of the student's logits, and automatic differentiation. Both do the work of one
self-distillation step on given features, forward and backward, in float32: the targets, all three terms, the gradients
of features and prototypes. They take turns in one process; memory is the most that torch has allocated at one time.
"""

import argparse
import os
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run from a clone without an install

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # torch's profiler, which counts memory, would tell of itself

import torch
from torch import Tensor

from benchmarks.side_by_side import alternate, difference, peak_bytes, ratios
from megavtp.config.schema import SelfDistillationConfig
from megavtp.objectives.centering import sinkhorn_bias
from megavtp.objectives.self_distillation import StudentOutput, TeacherBias, TeacherOutput, self_distillation_loss

TEMPERATURE, ITERATIONS = 0.07, 3
Result = tuple[Tensor, ...]  # the loss, and its gradients by the student's features and prototypes


def main() -> None:
    options = parse()
    if options.threads:
        torch.set_num_threads(options.threads)
    student, teacher = unit_inputs(
        options.images, options.patches, options.prototypes, torch.device("cpu"), torch.float32
    )
    weights = torch.rand(options.patches, generator=torch.Generator().manual_seed(1))
    ways = {"plain": lambda: plain(student, teacher, weights)}
    for chunk in options.chunk:
        ways[f"MegaVTP, chunk {chunk}"] = lambda chunk=chunk: ours(student, teacher, weights, chunk)
    device, wanted = torch.device("cpu"), plain(student, teacher, weights)
    gib = {name: peak_bytes(way, device) / 2**30 for name, way in ways.items()}
    errors = {name: difference(way(), wanted) for name, way in ways.items()}
    print(table(options, alternate(ways, options.rounds, device, time.process_time), gib, errors))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=16, help="each with 2 global and 8 local crops (default: 16)")
    parser.add_argument("--patches", type=int, default=540, help="masked patches (default: 540)")
    parser.add_argument("--prototypes", type=int, default=65536, help="default: 65536")
    parser.add_argument("--chunk", type=int, nargs="+", default=[128, 1024], help="rows whose logits exist at one time")
    parser.add_argument("--threads", type=int, help="of torch (default: all cores)")
    parser.add_argument("--rounds", type=int, default=5, help="in which each way runs once (default: 5)")
    return parser.parse_args()


def unit_inputs(
    images: int, patches: int, prototypes: int, device: torch.device, dtype: torch.dtype
) -> tuple[StudentOutput, TeacherOutput]:
    """Draw features and prototypes of length 1 with 256 channels, as the DINO head gives; of each image two global and
    eight local crops."""
    draw = torch.Generator().manual_seed(0)

    def unit(rows: int) -> Tensor:
        return torch.nn.functional.normalize(torch.randn(rows, 256, generator=draw), dim=-1).to(device)

    m, p, K = images, patches, prototypes
    student = [unit(2 * m).to(dtype), unit(8 * m).to(dtype), unit(p).to(dtype), unit(K)]
    return (
        StudentOutput(*(x.requires_grad_() for x in student), unit(2 * m)),
        TeacherOutput(unit(2 * m).to(dtype), unit(p).to(dtype), unit(K)),
    )


def ours(student: StudentOutput, teacher: TeacherOutput, weights: Tensor, chunk: int) -> Result:
    settings = SelfDistillationConfig(chunk=chunk)
    bias = TeacherBias(*(
        sinkhorn_bias([rows], teacher.W, TEMPERATURE, iterations=ITERATIONS, rows_at_once=chunk)
        for rows in (teacher.cls, teacher.patches)
    ))
    terms = self_distillation_loss(
        student, teacher, bias, weights, settings, teacher_temperature=TEMPERATURE,
        images_total_local=len(student.global_cls) // 2,
    )
    loss = torch.stack(list(terms.values())).sum()  # dino_weight and ibot_weight are 1
    return loss.detach(), *torch.autograd.grad(loss, student[:4])


def plain(student: StudentOutput, teacher: TeacherOutput, weights: Tensor) -> Result:
    with torch.no_grad():
        wanted = [rows @ teacher.W.T for rows in (teacher.cls, teacher.patches)]
    features = torch.cat([student.global_cls, student.local_cls, student.patches])
    total = plain_loss((features @ student.W.T).split([len(x) for x in student[:3]]), wanted, weights)
    return total.detach(), *torch.autograd.grad(total, student[:4])


def plain_loss(logits: Sequence[Tensor], wanted: Sequence[Tensor], weights: Tensor) -> Tensor:
    """Compute the DINO and iBOT losses.

    Args:
        logits: the student's, of global crops, local crops and masked patches.
        wanted: the teacher's, of global crops and masked patches; they are overwritten.
    """
    images, total = len(logits[0]) // 2, logits[0].new_zeros(())
    temperature, pairs = SelfDistillationConfig().student_temperature, 2 + 2 * (len(logits[1]) // images)
    with torch.no_grad():
        balanced_views, patches = (balanced(x.div_(TEMPERATURE)) for x in wanted)
    views = balanced_views.chunk(2)
    for index, crop in enumerate((*logits[0].chunk(2), *logits[1].split(images))):
        log_p = (crop / temperature).log_softmax(-1)
        for other, view in enumerate(views):
            if index != other:
                total = total - (view * log_p).sum(-1).mean() / pairs
    log_p = (logits[2] / temperature).log_softmax(-1)
    return total - ((patches * log_p).sum(-1) * weights).sum() / (2 * images)


def balanced(logits: Tensor) -> Tensor:
    q = logits.exp_()
    for _ in range(ITERATIONS):
        q /= q.sum(0, keepdim=True)
        q /= q.sum(1, keepdim=True)
    return q


def table(
    options: argparse.Namespace, seconds: dict[str, list[float]], gib: dict[str, float], errors: dict[str, float]
) -> str:
    lines = [
        f"{options.images * 10 + options.patches} rows, {options.prototypes} prototypes, torch {torch.__version__}, "
        f"{torch.get_num_threads()} threads, processor time, medians of {options.rounds} rounds with the ratio's "
        "quartiles:",
        "",
        "| way | seconds | time to plain | GiB | memory to plain | largest difference |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for name, times in seconds.items():
        low, ratio, high = ratios(times, seconds["plain"])
        lines.append(
            f"| {name} | {statistics.median(times):.2f} | {ratio:.2f} ({low:.2f} to {high:.2f}) | "
            f"{gib[name]:.2f} | {gib[name] / gib['plain']:.2f} | {errors[name]:.0e} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
