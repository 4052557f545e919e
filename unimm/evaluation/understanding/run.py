"""Run understanding benchmarks through lmms-eval: MME, POPE, GQA, TextVQA, MMBench, SEED, MMMU, AI2D.

Every answer is saved as soon as it is generated, with everything its score needs, so an interrupted run resumes, and
the scores are a function of these records. They are reported beside lmms-eval's own figures, and if papers count
differently, each count is named (POPE by three readings, SEED's images and all, MME's two halves).
"""

import contextlib
import functools
import importlib.metadata
import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from unimm.errors import UserError
from unimm.evaluation.metrics.bootstrap import bootstrap_mean
from unimm.evaluation.runs.records import UNREADABLE, unreadable_names
from unimm.evaluation.runs.store import Manifest, Record, RunStore, content_sha256, processes
from unimm.evaluation.shapes.questions import write_shapes_questions
from unimm.evaluation.understanding.arguments import SHAPES_TASKS, UnderstandingPlan
from unimm.evaluation.understanding.rules import RULES
from unimm.mllm.answering import Answer
from unimm.runs.provenance import model_fingerprint, package_versions


class _Books:
    """The answers of all tasks, one `RunStore` per task; implements `lmms_model.Memory`."""

    def __init__(self, folder: Path, plan: UnderstandingPlan, model: Any, arguments: Mapping[str, Any]) -> None:
        from unimm.evaluation.understanding.lmms_tasks import BENCHMARKS, task_name

        self.folder, self.plan, self.arguments = folder, plan, dict(arguments)
        self.weights, self.dtype = model_fingerprint(model), str(model.dtype).removeprefix("torch.")
        self.device = model.device.type
        self.names = {task_name(name): name for name in plan.tasks}
        self.benchmarks = BENCHMARKS
        self.stores: dict[str, RunStore] = {}
        self.known: dict[tuple[str, int], Answer] = {}

    def begin(self, documents: Mapping[str, Any]) -> None:
        """Open every task's folder, in the same order on all processes (opening is collective)."""
        for task, name in self.names.items():
            split = documents[task][self.benchmarks[name].split]
            store = RunStore.open(self.folder / name, self._manifest(name, split))
            self.stores[task] = store
            for record in store.records():
                said = record.raw_scores
                self.known[task, int(record.item)] = Answer(said["answer"], said["prompt_tokens"], said["new_tokens"])

    def recall(self, task: str, doc_id: int) -> Answer | None:
        return self.known.get((task, doc_id))

    def keep(self, task: str, doc_id: int, document: Mapping[str, Any], prompt: str, answer: Answer) -> None:
        name = self.names[task]
        row = self.benchmarks[name].row(document, answer.text)
        rule = RULES[name]
        verdict, plain, lost = rule.verdict(row), float(rule.plain(row)), float(rule.unparsed(row))
        said = {"answer": row.pop("answer"), "prompt_tokens": answer.prompt_tokens, "new_tokens": answer.new_tokens}
        said |= {"plain": plain, "unparsed": lost}
        reason = f"{UNREADABLE}: {document[UNREADABLE]}" if UNREADABLE in document else ""
        inputs = {"prompt": prompt, **row}
        self.stores[task].append(
            Record(name, f"{doc_id:06d}", inputs=inputs, raw_scores=said, verdict=verdict, reason=reason)
        )
        self.known[task, doc_id] = answer

    def finish(self) -> dict[str, Any]:
        """Return the scores per task, from the records alone."""
        return {
            name: self.stores[task].finish(functools.partial(summary_of, name)) for task, name in self.names.items()
        }

    def close(self) -> None:
        """Release the folders to other processes; recorded answers are kept."""
        for store in self.stores.values():
            store.close()

    def _manifest(self, name: str, split: Any) -> Manifest:
        columns = [column for column in self.benchmarks[name].columns if not column.startswith("image")]
        plan = self.plan
        return Manifest(
            bench=name,
            prompts_sha256=content_sha256(split.select_columns(columns)),
            seed=plan.seed,
            settings={
                "protocol": "lmms-eval",
                "definition": self.benchmarks[name].definition,
                "limit": plan.limit,
                "default_max_new_tokens": plan.default_max_new_tokens,
                "dtype": self.dtype,
                "device": self.device,
            },
            weights={"model": self.weights},
            versions=package_versions() | {"lmms-eval": importlib.metadata.version("lmms-eval")},
            arguments=self.arguments,
        )


def summary_of(name: str, records: Sequence[Record]) -> dict[str, Any]:
    """Return the summary of a task.

    It holds the scores; the intervals of the mean verdict by the benchmark's own reading (`verdict`) and by the plain
    one (`plain_verdict`); the number of `unparsed` answers (not readable without guessing) and of all `answers`; their
    mean length in tokens; and the documents whose image was `unreadable`, which have an empty answer.
    """
    rows = [{**record.raw_scores, "item": record.item, **record.inputs} for record in records]
    rule = RULES[name]
    clusters = [rule.cluster(row) for row in rows]
    intervals = {
        key: bootstrap_mean([float(worth(row)) for row in rows], clusters)._asdict()
        for key, worth in (("verdict", rule.verdict), ("plain_verdict", rule.plain))
    }
    length, lost = sum(row["new_tokens"] for row in rows) / len(rows), sum(rule.unparsed(row) for row in rows)
    counted = {"answers": len(rows), "mean_new_tokens": length, "unreadable": unreadable_names(records)}
    return {"unparsed": lost, **rule.scores(rows), **intervals, **counted}


def evaluate_understanding(
    model: Any, processor: Any, plan: UnderstandingPlan, folder: str | Path, arguments: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Run all tasks of the plan; an unfinished run in `folder` is resumed.

    Args:
        folder: receives one run folder per task, the task files, and the files that the tasks write themselves.
        arguments: command-line arguments, for the manifest.

    Returns:
        task -> {"scores": ours, from the records; "lmms_eval": its own figures, empty but on the main process}.

    Raises:
        UserError: lmms-eval is not installed, data is missing, or the folder holds a run that differs.
    """
    require_lmms_eval()
    from unimm.evaluation.understanding.lmms_model import ChatModel
    from unimm.evaluation.understanding.lmms_tasks import run_tasks, task_name

    folder = Path(folder)
    overlays = _prepare(plan, folder)
    with contextlib.closing(_Books(folder, plan, model, arguments or {})) as books:
        subject = ChatModel(
            model,
            processor,
            batch_size=plan.batch_size,
            default_max_new_tokens=plan.default_max_new_tokens,
            memory=books,
        )
        theirs = run_tasks(subject, [task_name(name) for name in plan.tasks], overlays, folder, plan.limit)
        ours = books.finish()
    return {name: {"scores": ours[name], "lmms_eval": theirs.get(task_name(name), {})} for name in plan.tasks}


def require_lmms_eval() -> None:
    """Raise UserError if lmms-eval is not installed."""
    if importlib.util.find_spec("lmms_eval") is None:
        raise UserError("These benchmarks are asked by lmms-eval, which is not installed: pip install 'unimm[lmms]'.")


def _prepare(plan: UnderstandingPlan, folder: Path) -> Path:
    """Write the task files, and the questions of the shapes tasks if any are planned, on the main process."""
    from unimm.evaluation.understanding.lmms_tasks import write_overlays

    overlays, state = folder / "tasks", processes()
    if state.is_main_process:
        made = [name for name in plan.tasks if name in SHAPES_TASKS]
        if made:
            write_shapes_questions(folder / "data", plan.questions, plan.seed)
            write_overlays(made, overlays, data=folder / "data")
        named = [name for name in plan.tasks if name not in SHAPES_TASKS]
        write_overlays(named, overlays, data=plan.data, hub_owner=plan.hub_owner)
    state.wait_for_everyone()
    return overlays
