"""Run the fast suite on the newest versions that pyproject.toml admits, and say what they broke.

    make latest                                  # both environments; exit code 1 when something is broken
    make latest ARGS="-k packing"                # with these arguments for pytest beside its own

Each environment is built anew and takes no constraint but torch's own build. What fails here and passes in `.ci/run` is
broken by one of the packages that are listed: exclude that version in pyproject.toml, or mend the code and let
`make constraints ARGS=--upgrade` write the new set.
"""

import json
import os
import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / ".venv-latest"
PINNED = ROOT / "constraints-cpu.txt"
FAST = ["-m", "not slow", "-n", "2", "--dist", "loadscope"]
NO_TESTS = 5  # pytest's code when nothing was selected, as `-k` may in one of the two
UV = [sys.executable, "-m", "uv", "--quiet"]


@dataclass
class Environment:
    """One set of extras and its tests, with what came out."""

    name: str
    extras: str
    tests: list[str]
    newer: dict[str, tuple[str, str]] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    passed: int = 0

    @property
    def python(self) -> str:
        return str(FOLDER / self.name / "bin" / "python")

    def install(self) -> None:
        """Build it anew; the build of torch is the pinned one, because a newer one may not be on offer for the CPU."""
        torch = FOLDER / "torch.txt"
        FOLDER.mkdir(exist_ok=True)
        torch.write_text(
            "".join(f"{name}=={version}\n" for name, version in pins().items() if name.startswith("torch"))
        )
        subprocess.run([*UV, "venv", "--clear", str(FOLDER / self.name), "--python", sys.executable], check=True)
        command = [*UV, "pip", "install", "--python", self.python, "-e", f".{self.extras}", "-c", str(torch)]
        subprocess.run(command, check=True, cwd=ROOT)
        listed = subprocess.run(
            [*UV, "pip", "list", "--python", self.python, "--format", "json"],
            check=True,
            capture_output=True,
            text=True,
        )
        installed = {normal(entry["name"]): entry["version"].partition("+")[0] for entry in json.loads(listed.stdout)}
        tested = pins()
        self.newer = {
            name: (tested.get(name, "none"), version)
            for name, version in sorted(installed.items())
            if name != "unimm" and tested.get(name) != version
        }

    def test(self, extra: list[str]) -> None:
        """Run its tests; a failure and an error of collection are problems, and so is a run that did not end."""
        record = FOLDER / f"{self.name}.xml"
        record.unlink(missing_ok=True)
        command = [self.python, "-m", "pytest", f"--junitxml={record}", *self.tests, *extra]
        code = subprocess.run(command, cwd=ROOT, check=False).returncode
        cases = list(ElementTree.parse(record).iter("testcase")) if record.is_file() else []
        for case in cases:
            if case.find("failure") is not None or case.find("error") is not None:
                self.problems.append(f"{case.get('classname')}::{case.get('name')}")
        self.passed = sum(len(case) == 0 for case in cases)
        if code and not self.problems and not (code == NO_TESTS and extra):
            self.problems.append(f"pytest ended with exit code {code}")

    def summary(self) -> str:
        counts = f"{self.passed} passed, {len(self.problems)} broken"
        lines = [f"{self.name}: {counts}, {len(self.newer)} packages in other versions than the tested ones"]
        lines += [f"  {name} {tested} -> {found}" for name, (tested, found) in self.newer.items()]
        return "\n".join(lines + [f"  BROKEN {problem}" for problem in self.problems])


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def pins() -> dict[str, str]:
    lines = (line for line in PINNED.read_text(encoding="utf-8").splitlines() if "==" in line)
    return {normal(name): version for name, _, version in (line.partition("==") for line in lines)}


def main() -> int:
    os.environ.setdefault("UV_FIND_LINKS", os.environ.get("PIP_FIND_LINKS", ""))
    environments = [
        Environment("default", "[train,eval,gguf,dev]", FAST),
        Environment("lmms", "[lmms,fidelity,dev]", ["tests/integrations"]),
    ]
    for environment in environments:
        try:
            environment.install()
        except subprocess.CalledProcessError:
            environment.problems.append("it does not install")
        else:
            environment.test(sys.argv[1:])
    print("\n" + "\n".join(environment.summary() for environment in environments))
    broken = sum(len(environment.problems) for environment in environments)
    print(f"latest: {f'{broken} broken' if broken else 'nothing is broken'}")
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
