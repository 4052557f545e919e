"""Real sizes: the weights of the tokenizers and of the class-conditional GPT, and Qwen3-0.6B with one of them, run.

    python eval/bench_real_size.py --json real_size.json
    python eval/bench_real_size.py --only table

The table is built on the meta device; the run has random weights in memory (about 10 GiB at its peak, a few minutes on
two cores) and prints the seconds and the peak of resident memory after each step.
"""

import argparse
import sys
import warnings

from transformers.utils import logging

from unimm.benchmarks.real_size import gpt_table, parameter_table, run_real_size
from unimm.errors import UserError, run_main
from unimm.provenance import git_commit
from unimm.report import Report
from unimm.tokenizer.published import PUBLISHED

PARTS = ("encoder", "sampler", "quantizer", "decoder", "all")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=("table", "run"))
    parser.add_argument("--encoder", default="internvit-300m-448", help="of the run; `unimm encoders` lists them")
    parser.add_argument("--json", metavar="FILE", help="write the result, - for standard output")
    arguments = parser.parse_args(argv)
    if arguments.encoder not in PUBLISHED:
        raise UserError(f"There is no encoder {arguments.encoder}; known are {', '.join(PUBLISHED)}.")
    report = Report(arguments.json)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    warnings.filterwarnings("ignore")
    if arguments.only != "run":
        rows = parameter_table()
        report.add(table=rows)
        report.say(f"{'VQRAE on':<24} {'tokens':>6} {' '.join(f'{part:>9}' for part in PARTS)}   millions")
        for row in rows:
            millions = [f"{row[part] / 1e6:9.1f}" for part in PARTS]
            report.say(f"{row['name']:<24} {row['tokens']:>6} {' '.join(millions)}")
        sizes = gpt_table()
        report.add(gpt=sizes)
        for row in sizes:
            report.say(f"GPT {row['name']:<20} {row['all'] / 1e6:9.1f}   LlamaGen: {row['published']}")
    if arguments.only != "table":
        result = run_real_size(arguments.encoder)
        report.add(run=result)
        report.say(f"{result['host']} + VQRAE on {result['encoder']}: {result['weights'] / 1e6:.1f} million weights")
        for name, seconds in result["seconds"].items():
            report.say(f"{name:<36} {seconds:>7.2f} s   peak {result['peak_gib'][name]:.2f} GiB")
        report.say(
            f"on disk {result['gib_on_disk']} GiB, the same token after the reload: {result['same_after_reload']}"
        )
    report.add(commit=git_commit())
    report.write()


if __name__ == "__main__":
    sys.exit(run_main(main, name="bench_real_size"))
