"""Choose a layout: what a recipe needs on a number of GPUs, and the fastest ways to lay it out that fit.

    python tools/plan.py --config configs/pretrain/vtp_g.yaml --gpus 256 --memory 80
    python tools/plan.py --config configs/pretrain/vtp_l.yaml --gpus 8 --device a100 --top 3 train.batch_size=4096
    python tools/plan.py --config configs/pretrain/vtp_g.yaml --gpus 1024 --rehearse 37 parallel.tp=4 parallel.pp=8

The last plays two steps as rank 37 in the recipe's own layout, of a VTP, its decoder's second stage or a DiT, and sets
the plan beside them.
Nothing is trained and no GPU is needed. Memory and traffic are counted on the real model without its data; times are
bounds from the device's data sheet.
"""

import argparse
import os
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run from a clone without an install

from megavtp.cli import run  # noqa: E402
from megavtp.options import Options, place, real, whole  # noqa: E402

os.environ["DS_ACCELERATOR"] = "cpu"  # DeepSpeed would take a GPU of this machine for that of the rehearsal


def parse() -> argparse.Namespace:
    parser = Options(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=place, help="YAML recipe (default: the demo's)")
    parser.add_argument("--gpus", type=whole(1, 1_000_000), required=True, help="how many, over all nodes")
    parser.add_argument("--device", default="h100", help="a100, h100, h200, ... (default: h100)")
    parser.add_argument("--memory", type=real(0, 100_000, above=True), help="GiB of one (default: the device's)")
    parser.add_argument("--gpus-per-node", type=whole(1, 1024), default=8, help="(default: 8)")
    parser.add_argument(
        "--margin", type=real(0, 1, below=True), default=0.1,
        help="part of the memory left to the context, the communication library and gaps (default: 0.1)",
    )
    parser.add_argument("--top", type=whole(1, 1000), default=5, help="layouts to print (default: 5)")
    parser.add_argument(
        "--rehearse", type=whole(0, 999_999), metavar="RANK", help="play the recipe's own layout on one rank"
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings over the recipe's")
    return parser.parse_args()


def rehearse(options: argparse.Namespace, path: Path, is_dit: bool) -> int:
    from megavtp.config.load import load_config
    from megavtp.config.schema import Config
    from megavtp.decoder.rehearsal import rehearse_decoder
    from megavtp.decoder.validate import asks_for_second_stage
    from megavtp.dit.config import DiTConfig
    from megavtp.dit.rehearsal import rehearse_dit
    from megavtp.errors import UserError
    from megavtp.pretraining.rehearsal import rehearse_pretraining

    if options.rehearse >= options.gpus:
        raise UserError(f"--rehearse {options.rehearse}: the ranks of {options.gpus} GPUs are 0 to {options.gpus - 1}")
    if is_dit:
        found = rehearse_dit(load_config(path, DiTConfig, options.overrides), options.gpus, options.rehearse)
    else:
        recipe = load_config(path, Config, options.overrides)
        play = rehearse_decoder if asks_for_second_stage(recipe) else rehearse_pretraining
        found = play(recipe, options.gpus, options.rehearse)
    print(found.page())
    if found.agrees():
        return 0
    print("the plan is not what was played")
    return 1


def main() -> int:
    options = parse()
    from megavtp.config.load import load_config, read_yaml
    from megavtp.config.schema import DEMO_CONFIG, Config

    path = options.config or DEMO_CONFIG
    is_dit = "flow_matching" in read_yaml(path)
    if options.rehearse is not None:
        return rehearse(options, path, is_dit)
    from megavtp.config.run import ParallelConfig
    from megavtp.config.share import share
    from megavtp.config.validate import validate, with_vocabulary
    from megavtp.decoder.validate import asks_for_second_stage, validate_decoder
    from megavtp.errors import UserError
    from megavtp.planning import report
    from megavtp.planning.devices import find_device
    from megavtp.planning.plan import GIB, Planner
    from megavtp.planning.search import search
    from megavtp.planning.summary import parameter_counts
    from megavtp.pretraining.rehearsal import CLIP_VOCABULARY
    from megavtp.training.optimizer import parameter_groups

    device = find_device(options.device)
    memory = device.memory if options.memory is None else options.memory
    if is_dit:
        raise UserError(f"{path}: layouts are sought for tokenizers, and this is a DiT; --rehearse RANK plays its own")
    recipe = load_config(path, Config, options.overrides)
    # Of the recipe's layout only precision, kernels and compilation count: the rest is what is sought.
    given = recipe.parallel
    alone = ParallelConfig(
        compile=given.compile, precision=given.precision, attention=given.attention, timeout=given.timeout
    )
    second_stage = asks_for_second_stage(recipe)
    config = (validate_decoder if second_stage else validate)(replace(recipe, parallel=alone), None)
    if not second_stage and set(share(config, 1).passes) == {"reconstruction"} and config.model.init_from is not None:
        print("encoder     planned as trained; of a run of launchers/train_decoder.py this is an upper bound")
    if config.model.text.vocab_size is None:
        config = with_vocabulary(config, CLIP_VOCABULARY)
        print(f"vocabulary  taken as CLIP's {CLIP_VOCABULARY:,}; set model.text.vocab_size for your tokenizer's")
    groups = partial(parameter_groups, config=config.train.optimizer)
    planner = Planner(config, groups, device, options.gpus_per_node)
    budget = memory * (1 - options.margin) * GIB
    print("\n".join(report.model_lines(config, parameter_counts(config))))
    print(f"device      {device.name}, {memory:g} GiB of which {budget / GIB:.1f} for the run, {options.gpus} of them, "
          f"{options.gpus_per_node} in a node\n")
    print("looking at layouts ...", file=sys.stderr, flush=True)
    found = search(planner, config, options.gpus, budget, options.top)
    if not found.fitting:
        print(report.nothing_fits(found, memory, budget))
        if found.closest is not None:
            print("\n" + report.table([found.closest]) + "\n\n" + report.details(found.closest))
        return 1
    print(f"{found.count} layouts fit; the fastest {len(found.fitting)}:\n\n{report.table(found.fitting)}\n")
    print("the first of them\n\n" + report.details(found.fitting[0]) + "\n")
    print("# to paste into the recipe\n" + report.yaml_lines(found.fitting[0]))
    return 0


if __name__ == "__main__":
    run(main)
