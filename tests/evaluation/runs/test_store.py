"""The folder of a run: the same bytes after kills, in two processes and in any order; another run in it is refused."""

import argparse
import json
import os
import signal
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import PartialState
from PIL import Image

from tests.evaluation.ranks import FORK, on_two_ranks
from tests.mllm.tiny import image_tokenizer
from unimm.config.schema import plain
from unimm.errors import UserError
from unimm.evaluation.runs import store as store_module
from unimm.evaluation.runs.arguments import add_run_arguments, parse_run, recorded_arguments
from unimm.evaluation.runs.records import read_manifest, read_records
from unimm.evaluation.runs.store import Key, Manifest, Record, RunStore, content_sha256, sample_seed
from unimm.runs.provenance import model_fingerprint

KEYS: list[Key] = [(f"{item:02}", sample) for item in range(6) for sample in range(4)]
MANIFEST = Manifest(
    "toy",
    content_sha256(["a prompt"]),
    seed=7,
    settings={"sampler": {"scale": 3.0, "sizes": (8, 8)}},
    weights={"m": "1"},
)


@pytest.fixture(autouse=True)
def one_process() -> None:
    PartialState._reset_state()


def summarize(records: list[Record]) -> dict[str, float]:
    return {"score": sum(record.raw_scores["score"] for record in records) / len(records), "count": len(records)}


def measure(folder: Path, keys: Sequence[Key] = KEYS, stop: Callable[[RunStore, Record], None] | None = None) -> int:
    """A run of the toy benchmark: an image and a score, both functions of the sample's seed. Gives what it did."""
    with RunStore.open(folder, MANIFEST) as store:
        todo = store.split(keys)
        for item, sample in todo:
            seed = sample_seed(MANIFEST.seed, "toy", item, sample)
            path = store.image_path(item, sample)
            path.parent.mkdir(exist_ok=True)
            Image.new("RGB", (4, 4), (seed % 256, seed // 256 % 256, 0)).save(path)
            record = Record("toy", item, sample, seed, {"prompt": "ä\u2028"}, str(path), {"score": seed / 2**63 / 3})
            if stop is not None:
                stop(store, record)
            store.append(record, seconds=0.5)
        store.finish(summarize)
    return len(todo)


def result(folder: Path) -> dict[str, bytes]:
    """Everything that has to be equal."""
    paths = [
        path for path in folder.rglob("*") if path.is_file() and path.name[0] != "." and "timings" not in path.name
    ]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


@pytest.fixture(scope="module")
def preserve_rng_state(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    PartialState._reset_state()
    assert measure(folder) == len(KEYS)
    found = result(folder)
    assert {"manifest.json", "records.jsonl", "summary.json"} < set(found) and len(found) == 3 + len(KEYS)
    assert len((folder / "timings.jsonl").read_text().splitlines()) == len(KEYS)
    return found


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def run_and_wait(target: Callable[..., Any], *arguments: Any) -> int | None:
    process = FORK.Process(target=target, args=arguments)
    process.start()
    process.join(60)
    return process.exitcode


# ---- kills -------------------------------------------------------------------------------------------------------


def in_the_middle_of_a_line(store: RunStore, record: Record) -> None:
    if record.key == KEYS[9]:
        line = store_module.to_line(record)
        with (store.folder / "parts/rank-0.jsonl").open("a") as file:
            file.write(line[: len(line) // 2])
        with (store.folder / "timings.jsonl").open("a") as file:
            file.write('{"item')
        die()


def before_the_first_record(store: RunStore, record: Record) -> None:
    (store.folder / f".{store_module.SUMMARY}.1.tmp").write_text("half")
    die()


def before_the_last_record(store: RunStore, record: Record) -> None:
    if record.key == KEYS[-1]:
        (store.folder / "images/.x.1.tmp.png").write_text("half")
        die()


@pytest.mark.parametrize(
    ("stop", "left"), [(in_the_middle_of_a_line, 15), (before_the_first_record, 24), (before_the_last_record, 1)]
)
def test_a_killed_run_goes_on_at_the_missing_samples(
    stop: Any, left: int, tmp_path: Path, preserve_rng_state: dict[str, bytes]
) -> None:
    folder = tmp_path / "run"
    assert run_and_wait(measure, folder, KEYS, stop) == -signal.SIGKILL
    assert not (folder / "summary.json").exists()
    assert measure(folder) == left
    assert result(folder) == preserve_rng_state
    assert not list(folder.rglob(".*.tmp*"))
    timings = [json.loads(line) for line in (folder / "timings.jsonl").read_text().splitlines()]
    assert [(row["item"], row["sample"]) for row in timings] == KEYS


def test_a_run_killed_while_it_finishes(
    tmp_path: Path, preserve_rng_state: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """records.jsonl is there, summary.json is not, and the parts still hold every record a second time."""
    write = store_module.write_atomically
    with monkeypatch.context() as patch:
        patch.setattr(
            store_module,
            "write_atomically",
            lambda path, text: die() if path.name == "summary.json" else write(path, text),
        )
        assert run_and_wait(measure, tmp_path / "run") == -signal.SIGKILL
    assert (tmp_path / "run/records.jsonl").exists() and (tmp_path / "run/parts/rank-0.jsonl").exists()
    assert measure(tmp_path / "run") == 0
    assert result(tmp_path / "run") == preserve_rng_state
    assert measure(tmp_path / "run") == 0  # and a finished run is finished again
    assert result(tmp_path / "run") == preserve_rng_state


def test_blocks_come_whole_until_nothing_of_them_is_missing(tmp_path: Path) -> None:
    keys: list[Key] = [("a", sample) for sample in range(5)]
    with RunStore.open(tmp_path, MANIFEST) as store:
        assert store.split_blocks(keys, 2) == [keys[:2], keys[2:4], keys[4:]]
        for key in (keys[0], keys[2], keys[3]):
            store.append(Record("toy", *key))
    with RunStore.open(tmp_path, MANIFEST) as store:
        assert store.split_blocks(keys, 2) == [keys[:2], keys[4:]]
        with pytest.raises(UserError, match="2 of 5 samples .* have no record: a #1, a #4"):
            store.finish(len)  # type: ignore[arg-type]


def test_order_does_not_matter(tmp_path: Path, preserve_rng_state: dict[str, bytes]) -> None:
    measure(tmp_path, KEYS[::-1])
    assert result(tmp_path) == preserve_rng_state
    assert [record.key for record in read_records(tmp_path)] == KEYS


# ---- two processes -----------------------------------------------------------------------------------------------


def measure_a_share(folder: Path) -> None:
    assert 0 < measure(folder, KEYS, lambda store, record: None) < len(KEYS)


def be_refused(folder: Path) -> None:
    with pytest.raises(UserError, match=r"differs in seed \(7, now 8\)"):
        RunStore.open(folder, replace(MANIFEST, seed=8))


def test_two_processes_write_the_files_of_one(tmp_path: Path, preserve_rng_state: dict[str, bytes]) -> None:
    on_two_ranks(measure_a_share, tmp_path / "run")
    assert result(tmp_path / "run") == preserve_rng_state


def test_two_processes_go_on_with_what_one_began(tmp_path: Path, preserve_rng_state: dict[str, bytes]) -> None:
    run_and_wait(measure, tmp_path / "run", KEYS, in_the_middle_of_a_line)
    on_two_ranks(measure_a_share, tmp_path / "run")
    assert result(tmp_path / "run") == preserve_rng_state


def test_two_processes_are_refused_together(tmp_path: Path) -> None:
    measure(tmp_path / "run")
    on_two_ranks(be_refused, tmp_path / "run")


def test_batches_stay_together(tmp_path: Path) -> None:
    """A batch with a missing key is done as a whole, by one process."""
    with RunStore.open(tmp_path, MANIFEST) as store:
        for item, sample in (KEYS[0], KEYS[5], *KEYS[8:12]):
            store.append(Record("toy", item, sample))
        assert store.split(KEYS[:20], together=4) == [*KEYS[1:5], *KEYS[6:8], *KEYS[12:20]]
        assert store.split(KEYS[20:], together=4) == KEYS[20:]


# ---- one writer --------------------------------------------------------------------------------------------------


def test_a_second_writer_is_refused_and_a_dead_one_is_not_waited_for(tmp_path: Path) -> None:
    def hold(started: Any) -> None:
        with RunStore.open(tmp_path, MANIFEST):
            started.set()
            signal.pause()

    started = FORK.Event()
    holder = FORK.Process(target=hold, args=(started,))
    holder.start()
    assert started.wait(30)
    with pytest.raises(UserError, match=f"Process {holder.pid} on .* is writing into .*: wait for it"):
        RunStore.open(tmp_path, MANIFEST)
    holder.kill()
    holder.join(30)
    with (
        RunStore.open(tmp_path, MANIFEST),
        pytest.raises(UserError, match=f"Process {os.getpid()} on .* is writing into"),
    ):
        RunStore.open(tmp_path, MANIFEST)
    RunStore.open(tmp_path, MANIFEST).close()


# ---- what does not belong in the folder --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("other", "named"),
    [
        (
            replace(MANIFEST, settings={"sampler": {"scale": 5.0, "sizes": (8, 8)}}),
            "settings.sampler.scale (3.0, now 5.0)",
        ),
        (replace(MANIFEST, weights={"m": "2"}), 'weights.m ("1", now "2")'),
        (replace(MANIFEST, weights={"m": "1", "scorer": "3"}), 'weights.scorer (null, now "3")'),
        (replace(MANIFEST, commit="another", seed=8), "seed (7, now 8), commit ("),
        (replace(MANIFEST, bench="other"), 'bench ("toy", now "other")'),
        (replace(MANIFEST, prompts_sha256=content_sha256(["another"])), "prompts_sha256 ("),
        (replace(MANIFEST, versions={**MANIFEST.versions, "torch": "1.0"}), "versions.torch ("),
        (replace(MANIFEST, hardware={**MANIFEST.hardware, "gpu": "V100"}), "hardware.gpu ("),
    ],
)
def test_another_run_is_refused_by_what_differs(other: Manifest, named: str, tmp_path: Path) -> None:
    RunStore.open(tmp_path, MANIFEST).close()
    with pytest.raises(UserError) as refusal:
        RunStore.open(tmp_path, other)
    assert named in str(refusal.value) and "start in a new folder" in str(refusal.value)
    RunStore.open(tmp_path, MANIFEST).close()  # the refusal holds no lock
    RunStore.open(tmp_path, replace(MANIFEST, arguments={"batch_size": 3})).close()  # decides no result


def test_a_folder_of_other_things_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match="holds other files and no run"):
        RunStore.open(tmp_path, MANIFEST)
    with pytest.raises(UserError, match="Cannot write into .*thesis.tex"):
        RunStore.open(tmp_path / "thesis.tex", MANIFEST)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_damage_in_the_middle_is_not_a_torn_line(tmp_path: Path) -> None:
    measure(tmp_path)
    lines = (tmp_path / "records.jsonl").read_bytes().split(b"\n")
    for damage, message in [
        (b'{"bench', "no record"),
        (b"[1]", "no record"),
        (b'{"bench": "toy", "x": 1}', "Unknown key x"),
    ]:
        (tmp_path / "records.jsonl").write_bytes(b"\n".join([lines[0], damage, *lines[2:]]))
        with pytest.raises(UserError, match=f"[Ll]ine 2 of .*{message}|{message} in line 2"):
            RunStore.open(tmp_path, MANIFEST)


def test_missing_foreign_and_doubled_keys_are_named(tmp_path: Path) -> None:
    store = RunStore.open(tmp_path, MANIFEST)
    for item, sample in store.split(KEYS)[:20]:
        store.append(Record("toy", item, sample, raw_scores={"score": 1}))
    with pytest.raises(UserError, match=r"4 of 24 samples of .* have no record: 05 #0, 05 #1, 05 #2, 05 #3\."):
        store.finish(summarize)
    assert not (tmp_path / "records.jsonl").exists()
    with RunStore.open(tmp_path, MANIFEST) as store:
        assert store.split(KEYS[:3]) == []
        with pytest.raises(UserError, match=r"17 records that nobody asked for: 00 #3, .* and 7 more"):
            store.finish(summarize)
    with RunStore.open(tmp_path, MANIFEST) as store, pytest.raises(ValueError, match="come twice: a #1$"):
        store.split([("a", 1), ("b", 1), ("a", 1)])
    (tmp_path / "parts/rank-1.jsonl").write_text(store_module.to_line(Record("toy", "00", 0, raw_scores={"score": 2})))
    with pytest.raises(UserError, match=r"two different records of \('00', 0\)"):
        RunStore.open(tmp_path, MANIFEST)


def test_append_takes_missing_samples_of_its_benchmark_and_finite_scores(tmp_path: Path) -> None:
    with RunStore.open(tmp_path, MANIFEST) as store:
        store.append(Record("toy", "a"))
        for wrong in (Record("toy", "a"), Record("other", "b")):
            with pytest.raises(ValueError, match="is not missing in this run of toy"):
                store.append(wrong)
        with pytest.raises(ValueError, match=r"toy \('b', 0\): psnr is inf, and a record holds finite"):
            store.append(Record("toy", "b", raw_scores={"psnr": float("inf")}))
        assert [record.key for record in store.records()] == [("a", 0)]
        assert store.done == {("a", 0)}


# ---- names, seeds, manifests -------------------------------------------------------------------------------------


def test_seeds_are_those_of_the_specification() -> None:
    from hashlib import blake2b

    expected = int.from_bytes(blake2b(b'[7, "geneval", "00012", 3]', digest_size=8).digest()) % 2**64 // 2
    assert sample_seed(7, "geneval", "00012", 3) == expected < 2**63
    seeds = {
        sample_seed(run, bench, str(i), k) for run in (0, 1) for bench in "ab" for i in range(20) for k in range(4)
    }
    assert len(seeds) == 2 * 2 * 20 * 4


def test_images_of_different_items_never_share_a_file(tmp_path: Path) -> None:
    with RunStore.open(tmp_path, MANIFEST) as store:
        items = ["a/b", "a b", "A b", "../..", "", "写真", "x" * 300, "CON", "."]
        paths = {store.image_path(item, sample) for item in items for sample in (0, 1)}
        assert len({str(path).lower() for path in paths}) == 2 * len(items)
        assert all(path.parent == tmp_path / "images" and len(path.name) < 100 for path in paths)


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser()
    made.add_argument("--source", required=True)
    made.add_argument("--scale", type=float, default=1.0)
    made.add_argument("--tags", nargs="*", default=["a"])
    made.add_argument("--json")
    add_run_arguments(made)
    return made


def test_a_run_is_repeated_from_its_manifest(tmp_path: Path) -> None:
    first = parse_run(parser(), ["--source", "x", "--scale", "3", "--output", "o", "--json", "-"], bench="toy")
    recorded = recorded_arguments(first)
    assert recorded == {"source": "x", "scale": 3.0, "tags": ["a"]}
    RunStore.open(tmp_path, replace(MANIFEST, arguments=recorded)).close()
    for source in (tmp_path, tmp_path / "manifest.json"):
        again = parse_run(parser(), ["--from", str(source), "--output", "p"], bench="toy")
        assert (recorded_arguments(again), again.output, again.json) == (recorded, "p", None)
    changed = parse_run(parser(), [f"--from={tmp_path}", "--scale", "5"], bench="toy")
    assert recorded_arguments(changed) == recorded | {"scale": 5.0}
    assert read_manifest(tmp_path) == replace(
        MANIFEST, arguments=recorded, settings={"sampler": {"scale": 3.0, "sizes": [8, 8]}}
    )


def test_what_cannot_be_repeated_is_said(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="There is no .*manifest.json: name the folder"):
        parse_run(parser(), ["--from", str(tmp_path)], bench="toy")
    RunStore.open(tmp_path, replace(MANIFEST, arguments={"sauce": "x"})).close()
    with pytest.raises(UserError, match="of a run of toy, this command measures other"):
        parse_run(parser(), ["--from", str(tmp_path)], bench="other")
    with pytest.raises(UserError, match="does not know: sauce"):
        parse_run(parser(), ["--from", str(tmp_path)], bench="toy")
    for content, message in [("{", "cannot be read as JSON"), ("[]", "is no manifest"), ("{}", "bench is missing")]:
        (tmp_path / "manifest.json").write_text(content)
        with pytest.raises(UserError, match=message):
            parse_run(parser(), ["--from", str(tmp_path)], bench="toy")
    with pytest.raises(UserError, match="holds no run, or one that is not finished"):
        read_records(tmp_path)


def test_a_fingerprint_stands_for_weights_and_settings(tmp_path: Path) -> None:
    model = image_tokenizer()
    found = model_fingerprint(model)
    model.save_pretrained(tmp_path)
    assert model_fingerprint(type(model).from_pretrained(tmp_path)) == found
    model.config.image_mean = [0.1, 0.1, 0.1]
    assert model_fingerprint(model) != found
    changed = type(model).from_pretrained(tmp_path)
    next(changed.decoder.parameters()).data.view(-1)[0] += 1e-3
    assert model_fingerprint(changed) != found
    assert changed.fingerprint == model.fingerprint  # the tokenizer's own stands for its ids alone


def test_a_manifest_names_the_machine_and_an_old_one_does_not_name_this_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Verdicts of one network differ between GPU models: both stand in the manifest, and on the page of a run."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "NVIDIA V100")
    made = Manifest("toy", "0" * 64, 0)
    assert made.hardware["gpu"] == "NVIDIA V100"
    assert made.hardware["cpu"] and made.hardware["cpu_capability"] == torch.backends.cpu.get_cpu_capability()
    assert {"torch", "transformers", "python"} <= made.versions.keys()
    tree = plain(made)
    for name in ("hardware", "versions", "commit"):
        del tree[name]
    (tmp_path / "manifest.json").write_text(json.dumps(tree))
    old = read_manifest(tmp_path)
    assert (old.hardware, old.versions, old.commit) == ({}, {}, None)
    assert any(key.startswith("hardware.gpu (null") for key in old.differences(made))
