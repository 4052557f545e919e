"""The command line on a tiny model: what it reports, and that every mistake is one line and exit code 2."""

import io
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from safetensors.torch import load_file, save_file

from tests.mllm import tiny
from unimm.cli import build_parser, main

PROMPT = "a photo of a red circle"


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A unified model of random weights, saved with its processor."""
    folder = tmp_path_factory.mktemp("model")
    for part in tiny.unified(context=2048):
        part.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An image tokenizer alone."""
    folder = tmp_path_factory.mktemp("tokenizer")
    model, processor = tiny.unified()
    model.image_tokenizer.save_pretrained(folder)
    processor.image_processor.save_pretrained(folder)
    return folder


@pytest.fixture
def desk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working folder with one image, `in.png`."""
    monkeypatch.chdir(tmp_path)
    tiny.image().save("in.png")
    return tmp_path


def files(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def report(text: str) -> dict[str, Any]:
    content = json.loads(text)
    assert all(isinstance(value, float) and value >= 0 for value in content["seconds"].values())
    return content


def test_generate_numbers_its_images(model_folder: Path, desk: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["generate", PROMPT, "--model", str(model_folder), "--output", "out/a.png", "--num-images", "2"]
    assert main([*command, "--seed", "3", "--guidance-scale", "2", "--temperature", "0.9", "--json", "r.json"]) == 0
    assert capsys.readouterr().out.splitlines() == ["out/a-1.png", "out/a-2.png"]
    assert files(desk) == {"in.png", "out/a-1.png", "out/a-2.png", "r.json"}
    content = report(Path("r.json").read_text())
    assert set(content["seconds"]) == {"load", "per_image"}
    assert (content["prompt"], content["seed"], content["guidance_scale"], content["temperature"]) == (
        PROMPT,
        3,
        2.0,
        0.9,
    )
    assert content["images"] == ["out/a-1.png", "out/a-2.png"]
    assert Image.open("out/a-1.png").size == (16, 16)


def test_generate_shows_the_image_in_a_terminal(
    model_folder: Path, desk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    for name, value in {"TERM": "xterm", "NO_COLOR": "", "COLUMNS": "80", "LINES": "24"}.items():
        monkeypatch.setenv(name, value)
    for name in ("TMUX", "KITTY_WINDOW_ID", "TERM_PROGRAM", "LC_TERMINAL"):
        monkeypatch.delenv(name, raising=False)
    command = ["generate", PROMPT, "--model", str(model_folder), "--output", "a.png", "--seed", "3"]
    for more, stream, previews in (([], Terminal(), 4), (["--no-preview"], Terminal(), 0), ([], io.StringIO(), 0)):
        monkeypatch.setattr("sys.stderr", stream)
        assert main([*command, *more]) == 0
        assert stream.getvalue().count("\x1b[16F") == previews
        assert stream.getvalue().count("▀") == previews * 16 * 32


def test_generate_replaces_what_was_named_and_nothing_else(model_folder: Path, desk: Path) -> None:
    mine = ("picture.png", "picture-2.png", "named.png", "named-1.png")
    for name in mine:
        Path(name).write_text("mine")
    command = ["generate", PROMPT, "--model", str(model_folder), "--json", "r.json"]

    def drawn(*options: str) -> list[str]:
        assert main([*command, *options]) == 0
        return report(Path("r.json").read_text())["images"]

    assert drawn() == ["picture-1.png"] and drawn() == ["picture-3.png"]
    assert drawn("--num-images", "2") == ["picture-4.png", "picture-5.png"]
    assert drawn("--output", "named.png", "--num-images", "2") == ["named-2.png", "named-3.png"]
    assert {Path(name).read_text() for name in mine} == {"mine"}
    assert drawn("--output", "named.png") == ["named.png"] and Image.open("named.png").size == (16, 16)


def test_reconstruct_replaces_nothing_that_was_not_named(
    model_folder: Path, desk: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["reconstruct", "in.png", "--model", str(model_folder)]
    for expected in ("reconstruction.png", "reconstruction-1.png"):
        assert main(command) == 0
        assert capsys.readouterr().out.startswith(f"{expected} ")
        assert Image.open(expected).size == (16, 16)
        Path(expected).write_text("mine")
    assert Path("reconstruction.png").read_text() == "mine"


def test_names_of_files_that_are_no_utf8(
    model_folder: Path, desk: Path, capsysbinary: pytest.CaptureFixture[bytes]
) -> None:
    name = os.fsdecode(b"caf\xe9.png")
    tiny.image().save(name)
    assert main(["reconstruct", name, "--output", f"out-{name}", "--model", str(model_folder), "--json", "r.json"]) == 0
    assert capsysbinary.readouterr().out.startswith(b"out-caf\\udce9.png  (16 ids")
    content = report(Path("r.json").read_text(encoding="utf-8"))
    assert (content["image"], content["output"]) == (name, f"out-{name}") and Path(f"out-{name}").is_file()
    assert main(["chat", "what?", "--image", name, "--model", str(model_folder), "--json", "-"]) == 0
    assert report(capsysbinary.readouterr().out.decode("utf-8"))["images"] == [name]
    assert main(["reconstruct", f"absent-{name}", "--model", str(model_folder)]) == 2
    assert b"absent-caf\\udce9.png: there is no such file" in capsysbinary.readouterr().err


def test_tokens_guessed_ahead_give_the_same_file(model_folder: Path, desk: Path) -> None:
    command = ["generate", PROMPT, "--model", str(model_folder), "--seed", "3", "--output"]
    for name, ahead in (("one.png", []), ("four.png", ["4"]), ("auto.png", ["auto"])):
        assert main([*command, name, *(["--parallel-tokens", *ahead] if ahead else [])]) == 0
    assert (desk / "one.png").read_bytes() == (desk / "four.png").read_bytes() == (desk / "auto.png").read_bytes()


def test_generate_repeats_itself_by_the_reported_seed(
    model_folder: Path, desk: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["generate", PROMPT, "--model", str(model_folder)]
    assert main([*command, "--output", "a.png", "--json", "-"]) == 0
    seed = report(capsys.readouterr().out)["seed"]
    assert main([*command, "--output", "b.png", "--seed", str(seed)]) == 0
    assert Path("a.png").read_bytes() == Path("b.png").read_bytes()


def test_chat_answers_once(model_folder: Path, desk: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["chat", "what is there?", "--image", "in.png", "--model", str(model_folder)]
    assert main([*command, "--json", "-"]) == 0
    printed = capsys.readouterr()
    content = report(printed.out)
    assert set(content["seconds"]) == {"load", "answer"}
    assert content["images"] == ["in.png"] and isinstance(content["answer"], str)
    assert content["answer"] in printed.err  # a person still reads it, standard output being one JSON object


def test_chat_converses(
    model_folder: Path, desk: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("talk.txt").write_text("/image in.png\nwhat is there?\n/image absent.png\n/draw a red circle\n/quit\nnot read")
    with open("talk.txt") as lines:
        monkeypatch.setattr("sys.stdin", lines)
        assert main(["chat", "--model", str(model_folder)]) == 0
    printed = capsys.readouterr()
    assert printed.out.endswith("picture-1.png\n")
    assert "there is no such file" in printed.err and printed.err.count("\n") == 1
    assert files(desk) == {"in.png", "talk.txt", "picture-1.png"}


@pytest.mark.parametrize("kind", ["model_folder", "tokenizer_folder"])
def test_reconstruct(kind: str, request: pytest.FixtureRequest, desk: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = request.getfixturevalue(kind)
    assert main(["reconstruct", "in.png", "--model", str(folder), "--output", "o.png", "--json", "r.json"]) == 0
    content = report(Path("r.json").read_text())
    assert set(content["seconds"]) == {"load", "per_image"} and content["ids"] == 16
    assert capsys.readouterr().out.startswith("o.png")
    assert Image.open("o.png").size == (16, 16)


def test_demo_makes_one_page_and_prints_its_path_last(
    model_folder: Path, desk: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["demo", "--model", str(model_folder), "--output", "page", "--json", "r.json"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "page/index.html"
    assert files(desk) == {"in.png", "page/index.html", "r.json"}
    content = report(Path("r.json").read_text())
    assert {"load", "reconstruct", "answer", "per_image"} == set(content["seconds"])
    page = Path("page/index.html").read_text()
    assert page.count("<img ") == page.count('src="data:image/png;base64,') >= 16
    assert "http" not in page and "$" not in page


MISTAKES = {
    "no command": ([], "required: COMMAND"),
    "unknown command": (["paint"], "invalid choice: 'paint'"),
    "no prompt": (["generate"], "required: PROMPT"),
    "empty prompt": (["generate", " "], "prompt is empty"),
    "long prompt": (["generate", "word " * 10_000], "shorter prompt"),
    "empty question": (["chat", ""], "question is empty"),
    "long question": (["chat", "word " * 10_000], "model reads 2048"),
    "no images": (["generate", "x", "--num-images", "0"], "'0' is not a number of images"),
    "wrong seed": (["generate", "x", "--seed", "-1"], "'-1' is not a whole number"),
    "wrong scale": (["generate", "x", "--guidance-scale", "much"], "'much' is not a number"),
    "no tokens ahead": (["generate", "x", "--parallel-tokens", "-1"], "'-1' is not a whole number from 0"),
    "wrong temperature": (["generate", "x", "--temperature", "nan"], "'nan' is not a number"),
    "greedy images": (["generate", "x", "--temperature", "0", "--num-images", "2"], "would be equal"),
    "output no image": (["generate", "x", "--output", "a.txt"], "a.txt: its name must end in"),
    "output under a file": (["generate", "x", "--output", "in.png/a.png"], "in.png is a file"),
    "report a folder": (["generate", "x", "--json", "."], "Cannot write the report"),
    "image absent": (["chat", "x", "--image", "absent.png"], "absent.png: there is no such file"),
    "image is text": (["reconstruct", "text.png"], "text.png: it is not an image"),
    "image truncated": (["reconstruct", "cut.png"], "cut.png: the file is cut off"),
    "page over a file": (["demo", "--output", "in.png"], "in.png is a file"),
    "json of a conversation": (["chat", "--json", "-"], "give a PROMPT"),
    "model absent": (["generate", "x", "--model", "absent"], "absent"),
    "model is an image": (["reconstruct", "in.png", "--model", "in.png"], "in.png"),
    "model is damaged": (["reconstruct", "in.png", "--model", "damaged"], "damaged"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_one_line_and_write_nothing(
    mistake: str, model_folder: Path, desk: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    Path("text.png").write_text("no image")
    Path("cut.png").write_bytes(Path("in.png").read_bytes()[:50])
    Path("damaged").mkdir()
    Path("damaged/config.json").write_text("{")
    before = files(desk)
    arguments, message = MISTAKES[mistake]
    if arguments and arguments[0] != "paint" and "--model" not in arguments:
        arguments = [*arguments, "--model", str(model_folder)]
    assert main(arguments) == 2
    printed = capfd.readouterr()
    assert printed.err.count("\n") == 1 and printed.err.startswith("unimm: error: ") and message in printed.err
    assert printed.out == ""
    assert files(desk) == before


def test_a_tokenizer_that_lacks_weights_is_refused(
    tokenizer_folder: Path, tmp_path: Path, desk: Path, capsys: pytest.CaptureFixture[str]
) -> None:

    broken = tmp_path / "broken"
    broken.mkdir()
    for path in tokenizer_folder.iterdir():
        (broken / path.name).write_bytes(path.read_bytes())
    weights = load_file(broken / "model.safetensors")
    del weights[sorted(weights)[0]]
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    assert main(["reconstruct", "in.png", "--model", str(broken), "--output", "o.png"]) == 2
    assert "weights; missing 1 (" in capsys.readouterr().err
    assert not Path("o.png").exists()


def test_encoders_lists_what_each_gives(desk: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["encoders", "--json", "r.json"]) == 0
    table = capsys.readouterr().out
    content = report(Path("r.json").read_text())["encoders"]
    assert all(name in table and encoder["hub_id"] in table for name, encoder in content.items())
    assert content["internvit-300m-448"]["width"] == 1024


@pytest.fixture(scope="module")
def language_model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llm")
    tiny.language_model().save_pretrained(folder)
    tiny.text_tokenizer().save_pretrained(folder)
    return folder


def test_attach_writes_a_model_that_loads(
    language_model_folder: Path, tokenizer_folder: Path, desk: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["attach", str(language_model_folder), "--image-tokenizer", str(tokenizer_folder), "--output", "out"]
    assert main([*command, "--row-init", "codebook", "--json", "r.json"]) == 0
    content = report(Path("r.json").read_text())
    assert content["model_type"] == "unimm_llava" and content["untrained"] == ["projector", "image rows"]
    assert "New and untrained: projector, image rows" in capsys.readouterr().out
    assert main(["generate", PROMPT, "--model", "out", "--output", "a.png", "--seed", "1"]) == 0
    assert Image.open("a.png").size == (16, 16)


def test_attach_overwrites_nothing_and_names_the_hosts(
    language_model_folder: Path, tokenizer_folder: Path, desk: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer = ["--image-tokenizer", str(tokenizer_folder)]
    assert main(["attach", str(language_model_folder), *tokenizer, "--output", "."]) == 2
    assert "is not an empty folder" in capsys.readouterr().err
    Path("clip").mkdir()
    Path("clip/config.json").write_text('{"model_type": "clip"}')
    assert main(["attach", "clip", *tokenizer, "--output", "out"]) == 2
    assert "is a clip model; supported are llava, internvl" in capsys.readouterr().err
    assert not Path("out").exists()


def test_ways_out_and_doctor(model_folder: Path, desk: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = ["--model", str(model_folder)]
    assert main(["detach", *model, "--output", "host"]) == 0
    assert main(["export", *model, "--understanding", "--output", "reads"]) == 0
    assert main(["export", *model, "--generation", "--output", "writes"]) == 0
    types = [
        json.loads(Path(f"{folder}/config.json").read_text())["model_type"] for folder in ("host", "reads", "writes")
    ]
    assert types == ["qwen3", "llava", "qwen3"]
    assert Path("writes/image_tokenizer/model.safetensors").is_file()
    capsys.readouterr()
    assert main(["doctor", *model, "--json", "r.json"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 15
    assert report(Path("r.json").read_text())["ok"] is True


def test_doctor_fails_with_code_1(
    model_folder: Path, desk: Path, tmp_path_factory: pytest.TempPathFactory, capsys: pytest.CaptureFixture[str]
) -> None:
    broken_tower = tmp_path_factory.mktemp("sick") / "model"
    shutil.copytree(model_folder, broken_tower)
    file = broken_tower / "processor_config.json"
    settings = json.loads(file.read_text())
    settings["image_processor"]["image_mean"] = [0.1, 0.1, 0.1]
    file.write_text(json.dumps(settings))
    assert main(["doctor", "--model", str(broken_tower)]) == 1
    capsys.readouterr()
    assert main(["doctor", str(broken_tower)]) == 1
    failed = [line for line in capsys.readouterr().out.splitlines() if "FAIL" in line]
    assert len(failed) == 2 and "normalization" in failed[0] and "agreement" in failed[1]
    shutil.copy(model_folder / "processor_config.json", file)
    file = broken_tower / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"image_grid": [9, 9]}))
    assert main(["doctor", str(broken_tower)]) == 1
    assert "image_grid of config.json is [9, 9]" in capsys.readouterr().out
    assert main(["chat", "Is there a ring?", "--model", str(broken_tower)]) == 2
    assert "image_grid of config.json is [9, 9]" in capsys.readouterr().err


def test_help_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    for command in ("demo", "chat", "generate", "reconstruct"):
        with pytest.raises(SystemExit) as stop:
            build_parser().parse_args([command, "--help"])
        assert stop.value.code == 0
        assert {"--model", "--json"} <= set(capsys.readouterr().out.replace("]", " ").replace("[", " ").split())


def test_an_interrupt_is_quiet(monkeypatch: pytest.MonkeyPatch, desk: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("unimm.commands.generate.load_model", interrupt)
    assert main(["generate", "x"]) == 130
    assert capsys.readouterr().err == ""
