"""Generate class-conditional samples in the npz format of the ADM evaluator.

    python eval/c2i_samples.py --model runs/cifar10/c2i --num-images 50000 --output samples.npz
    python eval/c2i_samples.py --model runs/c2i/l --config configs/c2i/protocols/vfmtok.yaml --output samples.npz

`arr_0` is uint8 [N, H, W, 3]; image k has class k modulo the number of classes and depends on (seed, k) only. The file
is written atomically.
"""

import argparse
import dataclasses
import sys

from unimm.class_conditional.drawing import load_drawer
from unimm.config.loading import load_config
from unimm.errors import run_main
from unimm.evaluation.generation.class_samples import SamplesPlan, SamplesProtocol, write_samples
from unimm.runs.provenance import git_commit
from unimm.runs.report import Report
from unimm.sampling import add_sampling_arguments, sampling_options


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a folder that recipes/c2i.py saved")
    parser.add_argument("--output", required=True, metavar="FILE", help="the npz")
    parser.add_argument("--config", metavar="FILE", help="a paper's protocol; flags replace its settings")
    parser.add_argument("--num-images", type=int, help="50000 unless given")
    parser.add_argument("--batch-size", type=int)
    parser.add_argument("--image-size", type=int, help="pixels a side in the file; as drawn unless given")
    add_sampling_arguments(parser.add_argument_group("sampling", "how ids are chosen; by default from all, unguided"))
    parser.add_argument("--seed", type=int)
    parser.add_argument("--device", help="cpu, cuda, ...; a GPU where there is one")
    parser.add_argument("--json", metavar="FILE", help="write what was done, - for standard output")
    arguments = parser.parse_args(argv)
    report = Report(arguments.json)
    protocol = SamplesProtocol() if arguments.config is None else load_config(SamplesProtocol, arguments.config)
    sampling = dataclasses.replace(protocol.sampling, **sampling_options(arguments))
    given = {each.name: getattr(arguments, each.name) for each in dataclasses.fields(SamplesPlan)}
    plan = dataclasses.replace(protocol.plan, **{name: value for name, value in given.items() if value is not None})
    with report.timed("load"):
        drawer = load_drawer(arguments.model, arguments.device)
    with report.timed("per_image", share=plan.num_images):
        shape = write_samples(drawer, arguments.output, plan, sampling)
    report.say(f"{arguments.output}: {shape[0]} images of {shape[1]} x {shape[2]}")
    report.add(
        shape=list(shape), plan=dataclasses.asdict(plan), sampling=dataclasses.asdict(sampling), commit=git_commit()
    )
    report.write()


if __name__ == "__main__":
    sys.exit(run_main(main, name="c2i_samples"))
