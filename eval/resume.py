"""Kill real training runs with SIGKILL at random steps and while they write checkpoints, start them again by the same
command, and compare what they end with, bit for bit, with runs that nobody disturbed.

    python eval/resume.py --json runs/resume.json
    python eval/resume.py --only stage2 --kills 5 --accelerate

Both stages of the tokenizer (the second with its GAN), conversations and drawings, in the debug configurations. One
thread: the last bits depend on their number.
"""

import argparse
import shutil
import sys
import tempfile
from pathlib import Path

from unimm.benchmarks.resume import Case, Launcher, debug_cases, finish, run_case
from unimm.errors import UserError, run_main
from unimm.report import Report

ROOT = Path(__file__).resolve().parents[1]


def main(argv: list[str] | None = None) -> int:
    cases = debug_cases()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--only", choices=[case.name for case in cases], help="this one and, undisturbed, what it needs"
    )
    parser.add_argument("--kills", type=int, default=5, help="of each run; every second one while it writes")
    parser.add_argument("--seed", type=int, default=0, help="of the steps at which they come")
    parser.add_argument("--accelerate", action="store_true", help="start the runs by accelerate launch: slower")
    parser.add_argument("--folder", help="keep the runs there; a temporary folder otherwise")
    parser.add_argument("--json", metavar="FILE", help="write the result, - for standard output")
    arguments = parser.parse_args(argv)
    report = Report(arguments.json)
    folder = Path(arguments.folder or tempfile.mkdtemp(prefix="unimm-resume-")).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    launcher = Launcher(ROOT, folder, accelerate=arguments.accelerate)
    report.say(f"{'recipe':<8} {'steps':>5}  {'killed after step':<52} {'checkpoints found':<34} {'equal':<5} seconds")
    log, equal = folder / "vfm.log", True
    try:
        finish(launcher.start(Case("vfm", "vfm", 3), "runs/debug/vfm", log), log)
        for case in cases:
            wanted = arguments.only in (None, case.name)
            trial = run_case(launcher, case, kills=arguments.kills if wanted else 0, seed=arguments.seed)
            killed, found = ", ".join(trial.killed_at), " | ".join(" ".join(map(str, f)) or "-" for f in trial.found)
            verdict = "yes" if trial.equal else "NO"
            report.say(f"{case.name:<8} {case.steps:>5}  {killed:<52} {found:<34} {verdict:<5} {trial.seconds:7.1f}")
            report.add(**{case.name: {"steps": case.steps, "killed_at": trial.killed_at, "equal": trial.equal}})
            equal &= trial.equal
            if not trial.equal:
                report.say(f"  differing: {', '.join(trial.differing[:5])}, {len(trial.differing)} in all")
            if case.name == arguments.only:
                break
    finally:
        if arguments.folder is None:
            shutil.rmtree(folder, ignore_errors=True)
    report.write()
    if not equal:
        raise UserError("A resumed run differs from the undisturbed one.")
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main, name="resume"))
