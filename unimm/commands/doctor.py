"""`unimm doctor`: checks of a model."""

import argparse

from unimm.commands.options import add_json, add_model, add_positional_model
from unimm.commands.shared import quiet_libraries
from unimm.runs.report import Report

FAILED_EXIT_CODE = 1


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    add_model(parser)
    add_json(parser)
    add_positional_model(parser)


def run(arguments: argparse.Namespace, report: Report) -> int:
    """Check a model: vision tower, matching parts, one answer, one generated image; exit code 1 if a check fails."""
    from dataclasses import asdict

    from unimm.evaluation.understanding.lmms_plugin import lmms_finding
    from unimm.mllm.doctor import examine
    from unimm.mllm.loading import load_unchecked

    findings = []
    quiet_libraries()
    with report.timed("load"):
        model, processor = load_unchecked(arguments.model)
    report.add(model=arguments.model or "default")
    with report.timed("examine"):
        for finding in examine(model, processor):
            report.say(finding.line())
            findings.append(asdict(finding))
        plugin = lmms_finding(len(findings) + 1)
        if plugin is not None:  # lmms-eval is installed
            report.say(plugin.line())
            findings.append(asdict(plugin))
    sound = all(finding["ok"] for finding in findings)
    report.add(findings=findings, ok=sound)
    return 0 if sound else FAILED_EXIT_CODE
