"""Measure an image tokenizer on real pictures.

    python eval/reconstruction.py --model runs/cifar10/stage2 --source '$UNIMM_DATA/data/cifar10/test.parquet' \\
        --kmeans-source '$UNIMM_DATA/data/cifar10/train.parquet' --reference runs/cifar10/stage1 --json
        reconstruction.json

Prints PSNR, SSIM, codebook use and perplexity beside two baselines: every patch painted in its mean colour, and in the
nearest of 1024 k-means centres of raw patches. `--reference` names a tokenizer that still has the original encoder: the
features are compared with its. The sets of originals and reconstructions are compared too, in the features of FID's
Inception (`--inception FILE`: rFID), of any vision encoder (`--fd-encoder PATH`), or, unless one is named, of the
tokenizer's own encoder, which flatters it.
"""

import argparse
import dataclasses
import sys
from typing import Any

from unimm.benchmarks.feature_spaces import TokenizerSpace, load_space
from unimm.benchmarks.generation import PairedSets
from unimm.benchmarks.pictures import PROTOCOLS
from unimm.benchmarks.reconstruction import ReconstructionPlan, evaluate_pictures
from unimm.benchmarks.subject import load_subject
from unimm.errors import run_main
from unimm.evaluation.distributions import PRDC_NEIGHBOURS
from unimm.perceptual_networks import load_lpips
from unimm.provenance import git_commit
from unimm.report import Report
from unimm.weights import file_sha256


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="an image tokenizer or a unified model; the default comes with the library")
    parser.add_argument("--source", required=True, help="a parquet file or a folder of pictures")
    parser.add_argument("--kmeans-source", help="pictures that the k-means baseline learns from")
    parser.add_argument("--reference", help="a tokenizer with the original encoder")
    parser.add_argument("--inception", metavar="FILE", help="FID's Inception weights")
    parser.add_argument("--fd-encoder", metavar="PATH", help="a vision encoder: SigLIP, CLIP, DINOv2, ...")
    parser.add_argument("--lpips-trunk", metavar="FILE", help="torchvision's vgg16 weights: LPIPS is measured too")
    parser.add_argument("--lpips-heads", metavar="FILE", help="LPIPS v0.1 for VGG; those of an installed lpips")
    parser.add_argument("--num-images", type=int, default=1000, help="0: all, in the order of their names")
    parser.add_argument("--protocol", default="adm", help=f"how pictures are cut: {', '.join(PROTOCOLS)}")
    parser.add_argument("--score-size", type=int, help="pixels a side at which pictures are compared; as drawn")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", metavar="FILE", help="write the result, - for standard output")
    arguments = parser.parse_args(argv)
    report = Report(arguments.json)
    with report.timed("load"):
        subject = load_subject(arguments.model)
        reference = load_subject(arguments.reference).tokenizer if arguments.reference else None
        lpips = load_lpips(arguments.lpips_trunk, arguments.lpips_heads) if arguments.lpips_trunk else None
        named = load_space(arguments.inception, arguments.fd_encoder)
    space = named or TokenizerSpace(reference or subject.tokenizer, original=reference is not None)
    sets = PairedSets(space)
    plan = ReconstructionPlan(
        arguments.source,
        arguments.num_images or None,
        arguments.kmeans_source,
        seed=arguments.seed,
        protocol=arguments.protocol,
        score_size=arguments.score_size,
    )
    with report.timed("reconstruction"):
        found = evaluate_pictures(
            subject.tokenizer,
            subject.image_processor,
            plan,
            reference,
            on_batch=lambda batch: sets.add(batch.originals, batch.drawn),
            lpips=lpips,
        )
    distances: dict[str, Any] | None = None
    if named is not None or len(found.rows) > PRDC_NEIGHBOURS:
        distances = sets.figures()
    else:
        report.say(f"{len(found.rows)} pictures are no distribution: the sets are not compared.")
    for name, value in found.scores.items():
        error = f" ± {found.errors[name]:.4f}" if name in found.errors else ""
        report.say(f"{name:<22} {value:10.4f}{error}")
    for name, value in (distances or {}).items():
        report.say(f"{name:<22} {value:10.4f}")
    report.say(f"{space.name}: sha256 {space.describe()['sha256']}")
    if lpips is not None:
        trunk = file_sha256(arguments.lpips_trunk)
        report.say(f"lpips_vgg: sha256 of the trunk {trunk}")
        report.add(lpips={"network": "vgg16", "trunk_sha256": trunk})
    report.add(
        distances=distances,
        space=space.describe(),
        reconstruction=found.scores,
        standard_errors=found.errors,
        source=plan.source,
        num_images=len(found.rows),
        protocol=dataclasses.asdict(plan.rules) | {"score_size": plan.score_size},
        seed=plan.seed,
        commit=git_commit(),
    )
    report.write()


if __name__ == "__main__":
    sys.exit(run_main(main, name="reconstruction"))
