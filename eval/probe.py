"""Linear and k-NN probing of an image tokenizer's features, before and after quantization.

    python eval/probe.py --model runs/cifar10/stage2 --source '$UNIMM_DATA/data/cifar10/train.parquet' \\
        --test-source '$UNIMM_DATA/data/cifar10/test.parquet' --json probe.json
    python eval/probe.py --model runs/cifar10/stage2 ... --random

The linear probe follows MAE's protocol on frozen mean-pooled features (unimm/evaluation/probe/run.py). `--random`
probes the same architecture with random weights, as a lower bound.
"""

import argparse
import dataclasses
import sys

from unimm.errors import one_line, run_main
from unimm.evaluation.probe.run import KINDS, ProbePlan, probe_tokenizer, random_twin
from unimm.evaluation.runs.evaluated_model import load_evaluated_model
from unimm.runs.provenance import git_commit, hardware, package_versions
from unimm.runs.report import Report


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="an image tokenizer or a unified model; the default comes with the library")
    parser.add_argument("--random", action="store_true", help="random weights in the model's architecture")
    parser.add_argument("--source", required=True, help="training images: a labelled parquet file, or shapes")
    parser.add_argument("--test-source", required=True)
    parser.add_argument("--num-train", type=int, help="the first N images; all unless given")
    parser.add_argument("--num-test", type=int)
    parser.add_argument("--level", type=int, help="hidden state of the encoder; the tokenizer's own unless given")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--epochs", type=int, default=90)
    parser.add_argument("--warmup-epochs", type=int, default=10)
    parser.add_argument("--batch-size", type=int, default=1024)
    parser.add_argument("--base-rates", type=float, nargs="+", default=[0.1, 0.3, 1.0, 3.0])
    parser.add_argument("--neighbours", type=int, default=20)
    parser.add_argument("--no-flip", action="store_true", help="leave the mirror images out")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", metavar="FILE", help="write the result, - for standard output")
    arguments = vars(parser.parse_args(argv))
    report = Report(arguments.pop("json"))
    path, random, no_flip = (arguments.pop(name) for name in ("model", "random", "no_flip"))
    plan = ProbePlan(flip=not no_flip, **arguments)
    with report.timed("load"):
        evaluated = load_evaluated_model(path)
    tokenizer = random_twin(evaluated.tokenizer, plan.seed) if random else evaluated.tokenizer
    unreadable: list[str] = []
    with report.timed("probe"):
        scores = probe_tokenizer(
            tokenizer, evaluated.image_processor, plan, bad=lambda name, error: unreadable.append(one_line(error))
        )
    for reason in unreadable:
        report.say(f"left out: {reason}")
    report.say(f"{'':<10} {'linear':>8} {'knn':>8} {'rate':>6}")
    for kind, found in scores.items():
        report.say(f"{kind:<10} {found['linear']:8.4f} {found['knn']:8.4f} {found['base_rate']:6g}")
    report.add(probe=scores, random=random, unreadable=unreadable, plan=dataclasses.asdict(plan), commit=git_commit())
    report.add(versions=package_versions(), hardware=hardware(), **evaluated.runs_on)
    report.write()


if __name__ == "__main__":
    sys.exit(run_main(main, name="probe"))
