"""All eight benchmarks on local data in their real schemas, through lmms-eval.

Scores are held against counts by hand (from the answers alone) and against lmms-eval's own figures: once for answers of
every awkward form, said by a script, once for those of the embedded model. One process, two, batches of one and of
eight, an interrupted run and lmms-eval's own command give the same.
"""

# ruff: noqa: E402
from tests.integrations.needs import require_lmms_eval, run

require_lmms_eval()

import ast
import io
import json
import shutil
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
import yaml
from datasets import Dataset, DatasetDict
from PIL import Image

import unimm
from tests.conftest import ROOT
from tests.integrations import local_data
from unimm.errors import UserError
from unimm.evaluation.runs.html_report import write_report
from unimm.evaluation.runs.records import Record, read_records
from unimm.evaluation.understanding import lmms_model as plugin
from unimm.evaluation.understanding.arguments import HUB_TASKS, UnderstandingPlan
from unimm.evaluation.understanding.command import main
from unimm.evaluation.understanding.lmms_tasks import write_overlays
from unimm.evaluation.understanding.run import evaluate_understanding
from unimm.mllm.answering import Answer

WORDS = ("yes", "No.", "Yes, there is one", "no", "red", "two", "", "not so", "yes", "no", "NO")
LETTERS = ("B", "(C)", "The answer is A", "C. ring", "A.", "b", "D", "ring", "A", "C", "")
SALT = "36"  # with it the answers are right and wrong, readable and not, in every benchmark
Found = dict[str, Any]


@pytest.fixture(scope="module")
def loaded() -> tuple[Any, Any]:
    torch.set_num_threads(1)
    return unimm.load(device="cpu")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with the data in `data`, and the cache of data sets beside it."""
    folder = tmp_path_factory.mktemp("understanding")
    local_data.write(folder / "data")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LMMS_EVAL_DATASETS_CACHE", str(folder / "cache"))
        yield folder


def plan(place: Path, **options: Any) -> UnderstandingPlan:
    return UnderstandingPlan(data=str(place / "data"), **options)


def say(text: str) -> str:
    choices = WORDS if "single word" in text else LETTERS
    return choices[zlib.crc32(f"{SALT}{text}".encode()) % len(choices)]


class Script:
    """In place of the model: an answer that depends on the question alone; stops after `stop` batches."""

    def __init__(self, stop: int | None = None) -> None:
        self.left, self.asked = stop, 0

    def __call__(self, model: Any, processor: Any, conversations: Sequence[Any], **settings: Any) -> list[Answer]:
        if self.left is not None:
            self.left -= 1
            if self.left < 0:
                raise KeyboardInterrupt
        texts = ["/".join(part.get("text", "") for part in turns[-1]["content"]) for turns in conversations]
        self.asked += len(texts)
        return [Answer(say(text), len(text), 1) for text in texts]


def scripted(loaded: Any, asked: UnderstandingPlan, folder: Path, stop: int | None = None) -> tuple[Found, int]:
    script = Script(stop)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plugin, "answer_all", script)
        return evaluate_understanding(*loaded, asked, folder), script.asked


@pytest.fixture(scope="module")
def by_script(loaded: Any, place: Path) -> Found:
    return scripted(loaded, plan(place), place / "script")[0]


@pytest.fixture(scope="module")
def by_model(loaded: Any, place: Path) -> Found:
    return evaluate_understanding(*loaded, plan(place), place / "model")


# ---- counts by hand, from what was answered and from the tables that were written ------------------------------------


def answers(folder: Path, name: str) -> list[tuple[str, dict[str, Any]]]:
    """(answer, row of the table) of each document."""
    rows = local_data.TABLES[name.removesuffix("_ocr")][2]()
    return [(record.raw_scores["answer"], rows[int(record.item)]) for record in read_records(folder / name)]


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def hand_mme(pairs: list[tuple[str, Any]]) -> Found:
    def said(text: str) -> str:
        start = text.lower().replace(".", "").strip()[:4]
        return "yes" if "yes" in start else "no" if "no" in start else "?"

    scores: dict[str, list[float]] = {}
    for (first, row), (second, _) in zip(pairs[::2], pairs[1::2], strict=True):
        right = (said(first) == "yes") + (said(second) == "no")  # the table asks yes, then no
        scores.setdefault(row["category"], []).append(50 * right + 100 * (right == 2))
    total = {kind: mean(each) for kind, each in scores.items()}
    cognition = total.pop("commonsense_reasoning")
    return {"perception": sum(total.values()), "cognition": cognition}


def hand_pope(pairs: list[tuple[str, Any]]) -> Found:
    """lmms-eval's own rule, pooled."""
    said = [(text.strip().lower(), row["answer"]) for text, row in pairs]
    hits, alarms, misses = (said.count(pair) for pair in (("yes", "yes"), ("yes", "no"), ("no", "yes")))
    precision, recall = hits / max(1, hits + alarms), hits / max(1, hits + misses)
    f1 = 2 * precision * recall / (precision + recall) if precision + recall else 0.0
    return {"accuracy": mean([a == b for a, b in said]), "precision": precision, "recall": recall, "f1": f1}


def hand_exact(pairs: list[tuple[str, Any]]) -> float:
    def plain(text: str) -> str:
        return "".join(char for char in text.lower() if char not in ".,()")

    return mean([plain(text) == plain(row["answer"]) for text, row in pairs])


def hand_textvqa(pairs: list[tuple[str, Any]]) -> float:
    """All answers of the table are words that the answer processor leaves alone, but for number words."""

    def plain(text: str) -> str:
        words = [word for word in text.lower().replace(".", "").replace(",", "").split() if word not in ("a", "the")]
        return " ".join({"two": "2", "one": "1"}.get(word, word) for word in words)

    def score(text: str, row: Any) -> float:
        equal = [plain(each) == plain(text) for each in row["answers"]]
        return mean([min(1.0, (sum(equal) - mine) / 3) for mine in equal])

    return mean([score(text, row) for text, row in pairs])


def letter(text: str) -> str:
    """What MMBench and MMMU read alike from LETTERS; the rest are no letters."""
    read = {"(C)": "C", "The answer is A": "A", "C. ring": "C", "A.": "A", **{letter: letter for letter in "ABCD"}}
    return read.get(text, "?")


def hand_mmbench(pairs: list[tuple[str, Any]]) -> float:
    right: dict[int, bool] = {}
    for text, row in pairs:
        group = row["index"] % local_data.ROTATION
        right[group] = right.get(group, True) and letter(text) == row["answer"]
    return 100 * mean([*right.values()])


def hand_seed(pairs: list[tuple[str, Any]], *kinds: str) -> float:
    return mean([text[:1].lower() == row["answer"].lower() for text, row in pairs if row["data_type"] in kinds])


def hand_mmmu(pairs: list[tuple[str, Any]]) -> float:
    def right(text: str, row: Any) -> bool:
        if row["question_type"] == "open":
            return row["answer"] in text.lower()
        return letter(text) == row["answer"]

    return mean([right(text, row) for text, row in pairs])


def hand_ai2d(pairs: list[tuple[str, Any]]) -> float:
    def right(text: str, row: Any) -> bool:
        chosen = text[0] if text[1:2] == "." else text.strip("()").lower().rstrip(".").upper()
        return chosen == "ABCD"[int(row["answer"])]

    return mean([right(text, row) for text, row in pairs])


@pytest.mark.parametrize("run_name", ["script", "model"])
def test_scores_are_the_counts_by_hand_and_lmms_evals(
    run_name: str, request: pytest.FixtureRequest, place: Path
) -> None:
    found: Found = request.getfixturevalue(f"by_{run_name}")
    ours = {name: result["scores"] for name, result in found.items()}
    theirs = {name: result["lmms_eval"] for name, result in found.items()}
    pairs = {name: answers(place / run_name, name) for name in HUB_TASKS}
    close: Callable[[Any], Any] = pytest.approx
    mme, pope = hand_mme(pairs["mme"]), hand_pope(pairs["pope"])
    for part in ("perception", "cognition"):
        assert mme[part] == close(ours["mme"][part]) == close(theirs["mme"][f"mme_{part}_score"])
    for figure, value in pope.items():
        name = "pope_f1_score" if figure == "f1" else f"pope_{figure}"
        assert value == close(ours["pope"]["lmms_eval"]["pooled"][figure]) == close(theirs["pope"][name])
    hands = {"gqa": hand_exact, "textvqa": hand_textvqa, "textvqa_ocr": hand_textvqa, "ai2d": hand_ai2d}
    for name, hand in hands.items():
        assert hand(pairs[name]) == close(ours[name]["accuracy"]) == close(theirs[name]["exact_match"]), name
    assert hand_mmbench(pairs["mmbench"]) == close(ours["mmbench"]["circular"])
    assert ours["mmbench"]["circular"] == close(theirs["mmbench"]["gpt_eval_score"])
    for kind, kinds in {"image": ("image",), "video": ("video",), "all": ("image", "video")}.items():
        assert hand_seed(pairs["seed"], *kinds) == close(ours["seed"][kind]) == close(theirs["seed"][f"seed_{kind}"])
    mmmu = ours["mmmu"]
    assert hand_mmmu(pairs["mmmu"]) == close(mmmu["accuracy"])
    drawn = theirs["mmmu"]["mmmu_acc"] - mmmu["accuracy"]  # lmms-eval draws where it cannot read
    assert -1e-4 < drawn < mmmu["unparsed"] / len(pairs["mmmu"]) + 1e-4


def test_the_script_says_enough_for_rules_to_differ(by_script: Found, place: Path) -> None:
    """Guards the test above: a table on which every rule gives 0 or 1 would prove little."""
    scores = {name: result["scores"] for name, result in by_script.items()}
    assert scores["pope"]["official"]["pooled"] != scores["pope"]["plain"]["pooled"]
    assert scores["pope"]["lmms_eval"]["pooled"]["unparsed"] > scores["pope"]["plain"]["pooled"]["unparsed"] > 0
    assert {"random", "popular", "adversarial", "mean_f1", "pooled"} == set(scores["pope"]["official"])
    assert [name for name in HUB_TASKS if not 0 < scores[name]["verdict"]["value"] < 1] == []
    assert 0 < scores["mmbench"]["circular"] < 100 and scores["mmbench"]["unparsed"] > 0
    assert 0 < scores["mme"]["perception"] < 600 and 0 < scores["mme"]["cognition"] < 200


def written(text: str) -> str:
    """The letter that LETTERS hold by themselves."""
    return {"(C)": "C", "The answer is A": "A", "C. ring": "C", "A.": "A", "b": "B"}.get(text, text)


def options_of(name: str, row: dict[str, Any]) -> dict[str, str]:
    if name in ("mmmu", "ai2d"):
        texts = ast.literal_eval(row["options"]) if isinstance(row["options"], str) else row["options"]
    else:
        texts = [row[letter if name == "mmbench" else f"choice_{letter.lower()}"] for letter in "ABCD"]
    return dict(zip("ABCDEFGH", map(str, texts), strict=False))


def test_plain_readings_and_unparsed_answers_are_the_counts_by_hand(by_script: Found, place: Path) -> None:
    scores = {name: result["scores"] for name, result in by_script.items()}
    for name in ("seed", "mmbench", "ai2d", "mmmu"):
        right, lost = list[bool](), 0
        for text, row in answers(place / "script", name):
            if name == "mmmu" and row["question_type"] == "open":
                right.append(text.lower() == row["answer"])
                lost += not text
                continue
            options = options_of(name, row)
            by_text = [letter for letter, option in options.items() if option.lower() == text.lower()]
            read = by_text[0] if len(by_text) == 1 else written(text)
            gold = "ABCD"[int(row["answer"])] if name == "ai2d" else row["answer"]
            right.append(read == gold)
            lost += read not in options
        plain = scores[name]["plain"]
        figure = {"seed": "all", "mmbench": "per_row"}.get(name, "accuracy")
        assert plain[figure] == pytest.approx(mean(right) * (100 if name == "mmbench" else 1)), name
        assert plain["unparsed"] == lost, name
        assert scores[name]["plain_verdict"]["value"] == pytest.approx(mean(right)), name
    said = [text for text, _ in answers(place / "script", "pope")]
    guessed = [text for text in said if text in ("red", "two", "", "NO")]
    assert scores["pope"]["official"]["pooled"]["unparsed"] == scores["pope"]["unparsed"] == len(guessed) > 0
    said = [text for text, _ in answers(place / "script", "mme")]
    assert scores["mme"]["unparsed"] == sum(text in ("red", "two", "", "not so") for text in said) > 0
    for name in ("gqa", "textvqa", "textvqa_ocr"):
        said = [text for text, _ in answers(place / "script", name)]
        assert scores[name]["unparsed"] == scores[name]["plain"]["unparsed"] == said.count("")
    for name in HUB_TASKS:
        records = read_records(place / "script" / name)
        assert sum(record.raw_scores["unparsed"] for record in records) == scores[name]["unparsed"], name


def test_prompts_are_the_benchmarks_own(by_script: Found, place: Path) -> None:
    prompts = {
        name: [record.inputs["prompt"] for record in read_records(place / "script" / name)] for name in HUB_TASKS
    }
    assert prompts["mme"][0].endswith("in image 0?\nAnswer the question using a single word or phrase.")
    assert "Reference OCR token: STOP, No0" in prompts["textvqa_ocr"][0]
    assert "Reference OCR" not in prompts["textvqa"][0] and "nasa" in prompts["textvqa"][0]
    assert prompts["mmbench"][0].startswith("Look at the middle. Which shape")
    assert prompts["gqa"][0].startswith("What color is the circle?\nAnswer")


def test_manifests_name_the_weights_the_data_and_the_versions(by_script: Found, place: Path) -> None:
    manifests = {name: json.loads((place / "script" / name / "manifest.json").read_text()) for name in HUB_TASKS}
    assert len({manifest["prompts_sha256"] for manifest in manifests.values()}) == len(local_data.TABLES)
    for name, manifest in manifests.items():
        assert manifest["bench"] == name and len(manifest["weights"]["model"]) == 64
        assert manifest["versions"]["lmms-eval"] and manifest["settings"]["definition"].endswith(".yaml")


def records_of(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name / "records.jsonl").read_bytes() for name in HUB_TASKS}


def test_batches_do_not_change_an_answer(loaded: Any, by_model: Found, place: Path) -> None:
    evaluate_understanding(*loaded, plan(place, batch_size=1), place / "single")
    assert records_of(place / "single") == records_of(place / "model")


def test_two_processes_give_what_one_gives_through_the_driver(by_model: Found, place: Path) -> None:
    arguments = ("--data", str(place / "data"), "--output", str(place / "ranks"), "--device", "cpu", "--json")
    run(str(ROOT / "eval/lmms.py"), *arguments, str(place / "ranks.json"), cache=place, ranks=2)
    assert records_of(place / "ranks") == records_of(place / "model")
    report = json.loads((place / "ranks.json").read_text())
    assert set(report["understanding"]) == set(HUB_TASKS) and report["model"] == "default"
    for name in HUB_TASKS:
        assert report["understanding"][name]["scores"] == json.loads(json.dumps(by_model[name]["scores"])), name
        if name != "mmmu":  # whose random draws depend on the process
            assert report["understanding"][name]["lmms_eval"] == pytest.approx(by_model[name]["lmms_eval"]), name


def test_a_run_is_repeated_from_the_manifest_of_one_of_its_tasks(
    by_script: Found, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plugin, "answer_all", Script())
    asked = ["--tasks", "ai2d,textvqa", "--data", str(place / "data"), "--limit", "3", "--device", "cpu"]
    main([*asked, "--output", str(place / "first")])
    main(["--from", str(place / "first" / "ai2d" / "manifest.json"), "--output", str(place / "again")])
    for name in ("ai2d", "textvqa"):
        kept = read_records(place / "first" / name)
        assert kept == read_records(place / "again" / name) == read_records(place / "script" / name)[:3]
    write_report(place / "first" / "textvqa", place / "page.html")
    assert "what does nasa write on sign 0?" in (place / "page.html").read_text().lower()


def first_answer(sample: dict[str, Any]) -> str:
    """lmms-eval leaves the answer out of a line where its filter changed nothing."""
    said = sample.get("resps", sample["filtered_resps"])
    return said[0] if isinstance(said, list) else said


def test_lmms_evals_own_command_gives_the_same(by_model: Found, place: Path) -> None:
    tasks = ("mme", "ai2d")
    named = ",".join(f"unimm_{name}" for name in tasks)
    given = ("--model", "unimm", "--model_args", "device=cpu", "--tasks", named, "--batch_size", "8")
    where = ("--include_path", str(place / "model" / "tasks"), "--output_path", str(place / "command"))
    run("-m", "lmms_eval", *given, *where, "--log_samples", cache=place)
    (results,) = (place / "command").rglob("*_results.json")
    figures = json.loads(results.read_text())["results"]
    for name in tasks:
        found = {key.partition(",")[0]: value for key, value in figures[f"unimm_{name}"].items()}
        for figure, value in by_model[name]["lmms_eval"].items():
            assert found[figure] == pytest.approx(value), (name, figure)
        (samples,) = (place / "command").rglob(f"*_samples_unimm_{name}.jsonl")
        said = {row["doc_id"]: first_answer(row) for row in map(json.loads, samples.read_text().splitlines())}
        recorded = {int(record.item): record.raw_scores["answer"] for record in read_records(place / "model" / name)}
        assert said == recorded


def test_an_interrupted_run_goes_on_where_it_stood(loaded: Any, by_script: Found, place: Path) -> None:
    total = sum(len(read_records(place / "script" / name)) for name in HUB_TASKS)
    with pytest.raises(KeyboardInterrupt):
        scripted(loaded, plan(place), place / "broken", stop=4)
    found, asked = scripted(loaded, plan(place), place / "broken")
    assert 0 < asked < total
    assert records_of(place / "broken") == records_of(place / "script")
    assert {name: found[name]["scores"] for name in found} == {name: by_script[name]["scores"] for name in found}
    _, again = scripted(loaded, plan(place), place / "broken")
    assert again == 0


def test_an_image_that_cannot_be_read_is_an_empty_answer_and_named(loaded: Any, place: Path, tmp_path: Path) -> None:
    """The run goes on to its end; the black image and the one of one color are asked about like all others."""
    shutil.copytree(place / "data" / "POPE", tmp_path / "data" / "POPE")
    (path,) = (tmp_path / "data" / "POPE").rglob("*.parquet")
    table = Dataset.from_parquet(str(path)).cast_column("image", datasets.Image(decode=False)).to_list()
    table[2]["image"]["bytes"] = table[2]["image"]["bytes"][:60]
    table[4]["image"]["bytes"] = b"<html>not found</html>"
    for row, color in ((5, "black"), (6, "green")):
        content = io.BytesIO()
        Image.new("RGB", (64, 64), color).save(content, "PNG")
        table[row]["image"]["bytes"] = content.getvalue()
    Dataset.from_list(table).cast_column("image", datasets.Image()).to_parquet(path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LMMS_EVAL_DATASETS_CACHE", str(tmp_path / "cache"))
        asked = UnderstandingPlan(tasks=("pope",), data=str(tmp_path / "data"), batch_size=3)
        found, _ = scripted(loaded, asked, tmp_path / "out")
    scores, records = found["pope"]["scores"], read_records(tmp_path / "out" / "pope")
    assert scores["unreadable"] == ["000002", "000004"]
    assert [record.item for record in records if record.is_unreadable] == scores["unreadable"]
    for record in records:
        lost = record.is_unreadable
        whole = next(each for each in read_records(place / "script" / "pope") if each.item == record.item)
        assert record.raw_scores["answer"] == ("" if lost else whole.raw_scores["answer"])
        assert (record.inputs["expected"], record.inputs["image"]) == (whole.inputs["expected"], whole.inputs["image"])
        assert not lost or record.raw_scores["unparsed"] == 1.0
    assert scores["plain"]["pooled"]["unparsed"] >= 2


def test_another_run_in_the_same_folder_is_refused(loaded: Any, by_script: Found, place: Path) -> None:
    shutil.copytree(place / "script", place / "other")
    with pytest.raises(UserError, match="settings.default_max_new_tokens"):
        evaluate_understanding(*loaded, plan(place, default_max_new_tokens=5), place / "other")


def test_questions_about_the_image_world(loaded: Any, place: Path) -> None:
    asked = UnderstandingPlan(tasks=("shapes_mme", "shapes_pope"), questions=12)
    found = evaluate_understanding(*loaded, asked, place / "shapes")
    pope, mme = (found[name]["scores"] for name in ("shapes_pope", "shapes_mme"))
    records: list[Record] = read_records(place / "shapes" / "shapes_pope")
    right = mean([record.raw_scores["answer"] == record.inputs["expected"] for record in records])
    assert pope["plain"]["pooled"]["accuracy"] == right == pytest.approx(mme["categories"]["existence"]["acc"] / 100)
    assert pope["verdict"]["clusters"] == 6 and pope["plain"]["pooled"]["unparsed"] == 0
    assert right >= 0.5  # the default answers 96 of 100 of them


def test_a_folder_of_save_to_disk_is_read_too(loaded: Any, by_script: Found, place: Path, tmp_path: Path) -> None:
    table = Dataset.from_list(local_data.ai2d())
    DatasetDict({"test": table}).save_to_disk(tmp_path / "data" / "AI2D")
    asked = UnderstandingPlan(tasks=("ai2d",), data=str(tmp_path / "data"))
    scripted(loaded, asked, tmp_path / "out")
    assert read_records(tmp_path / "out" / "ai2d") == read_records(place / "script" / "ai2d")


def test_tasks_of_the_hub_keep_everything_but_their_name_and_owner(place: Path, tmp_path: Path) -> None:
    names = write_overlays(("gqa", "textvqa_ocr"), tmp_path, hub_owner="lmms-lab")
    gqa, ocr = (yaml.safe_load((tmp_path / f"{name}.yaml").read_text()) for name in names)
    assert names == ["unimm_gqa", "unimm_textvqa_ocr"] and Path(gqa.pop("include")).is_file()
    assert gqa == {"task": "unimm_gqa", "dataset_path": "lmms-lab/GQA"}
    assert ocr["lmms_eval_specific_kwargs"]["default"]["ocr"] is True
    (local,) = write_overlays(("gqa",), tmp_path, data=place / "data")
    task = yaml.safe_load((tmp_path / f"{local}.yaml").read_text())
    assert task["process_docs"] is None and task["dataset_path"] == "parquet"  # no images from the hub


def test_data_that_is_not_there_is_said(loaded: Any, place: Path, tmp_path: Path) -> None:
    def ask(*tasks: str) -> None:
        evaluate_understanding(*loaded, UnderstandingPlan(tasks=tasks, data=str(tmp_path)), tmp_path / "out")

    with pytest.raises(UserError, match="There is no folder MME in .*lmms-lab-encoder/MME"):
        ask("mme")
    (tmp_path / "MME").mkdir()
    with pytest.raises(UserError, match="MME holds no test-.*parquet"):
        ask("mme")
    shutil.copytree(place / "data" / "POPE", tmp_path / "textvqa")
    (tmp_path / "textvqa" / "data" / "test-00000-of-00001.parquet").rename(tmp_path / "textvqa" / "validation.parquet")
    with pytest.raises(UserError, match="has no column ocr_tokens, answers; it has id, question_id"):
        ask("textvqa")
