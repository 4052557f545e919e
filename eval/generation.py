"""Compare drawn pictures with real ones: FID, sFID, inception score, KID, precision and recall.

    python eval/generation.py --samples samples.npz --reference VIRTUAL_imagenet256_labeled.npz --inception FILE
    python eval/generation.py --samples DRAWN_DIR --reference REAL_DIR --encoder DINOV2_DIR --json generation.json

A set is a folder, a parquet file or the ADM evaluator's npz (`arr_0`, or statistics for a reference). FID, sFID and the
inception score need FID's Inception weights, whose file you name; every other space has figures of its own.
`accelerate launch` shares the pictures. `--write-npz` and `--write-statistics` keep the samples in ADM's formats.
"""

import argparse
import sys

from unimm.benchmarks.feature_spaces import load_space
from unimm.benchmarks.generation import collect, compare, read_reference, write_pictures_npz, write_statistics
from unimm.benchmarks.pictures import picture_set
from unimm.benchmarks.store import processes
from unimm.errors import UserError, run_main
from unimm.provenance import git_commit
from unimm.report import Report


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", required=True, help="the drawn pictures")
    parser.add_argument("--reference", required=True, help="the real ones, or their statistics")
    parser.add_argument("--inception", metavar="FILE", help="FID's Inception weights")
    parser.add_argument("--encoder", metavar="PATH", help="a vision encoder instead: SigLIP, CLIP, DINOv2, ...")
    parser.add_argument("--num-images", type=int, help="take the first N of each set; all unless given")
    parser.add_argument("--kernel-size", type=int, help="pictures in one subset of KID; 1000, or all of fewer")
    parser.add_argument("--batch-size", type=int, default=50)
    parser.add_argument("--device", help="cpu, cuda, ...; a GPU where there is one")
    parser.add_argument("--write-npz", metavar="FILE", help="write the samples as arr_0")
    parser.add_argument("--write-statistics", metavar="FILE", help="write the samples' mu, sigma (mu_s, sigma_s)")
    parser.add_argument("--json", metavar="FILE", help="write the result, - for standard output")
    arguments = parser.parse_args(argv)
    if (arguments.inception is None) == (arguments.encoder is None):
        raise UserError("Name the network that compares: either --inception FILE or --encoder PATH.")
    report = Report(arguments.json if processes().is_main_process else None)
    with report.timed("load"):
        space = load_space(arguments.inception, arguments.encoder, arguments.device)
        assert space is not None
    with report.timed("features"):
        reference = read_reference(arguments.reference, space, arguments.num_images, arguments.batch_size)
        generated = collect(space, picture_set(arguments.samples, arguments.num_images), arguments.batch_size)
    with report.timed("figures"):
        found = compare(generated, reference, space=space, kernel_size=arguments.kernel_size)
    if not processes().is_main_process:
        return
    if arguments.write_npz is not None:
        write_pictures_npz(arguments.samples, arguments.write_npz, arguments.num_images)
    if arguments.write_statistics is not None:
        write_statistics(arguments.write_statistics, generated, space)
    for name, value in found.items():
        report.say(f"{name:<24} {value}" if not isinstance(value, float) else f"{name:<24} {value:12.5f}")
    report.say(f"{'features':<24} {space.name}, sha256 {space.describe()['sha256']}")
    report.add(generation=found, space=space.describe(), samples=arguments.samples, reference=arguments.reference)
    report.add(commit=git_commit())
    report.write()


if __name__ == "__main__":
    sys.exit(run_main(main, name="generation"))
