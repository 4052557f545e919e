"""What is written is there whole or not at all: only files are replaced, and a full or closed disk is one sentence."""

import errno
import os
import resource
import signal
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.data.conftest import write_folder
from tests.mllm import tiny
from tests.tokenizer.conftest import tiny_vqrae
from tests.training.tokenizer.test_trainer import trainer
from unimm.cli import main
from unimm.config.loading import save_config
from unimm.data.image_files import save_image_atomically
from unimm.encoding import EncodeConfig, Encoder
from unimm.errors import UserError, run_main
from unimm.evaluation.generation.class_samples import write_npz
from unimm.mllm.export import save_generation
from unimm.runs.provenance import write_atomically
from unimm.runs.report import Report
from unimm.saving import save_whole
from unimm.tokenizer import ImageTokenizerProcessor
from unimm.training.loop.checkpoint import save_checkpoint

NOISE = Image.effect_noise((64, 64), 90).convert("RGB")


@contextmanager
def full_disk(room: int) -> Iterator[None]:
    """Within, no file of this process grows beyond `room` bytes: what a full disk does to the libraries as well."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)


def everything(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*")}


def pipe(path: Path) -> None:
    os.mkfifo(path)


def device(path: Path) -> None:
    try:
        os.mknod(path, stat.S_IFCHR | 0o666, os.makedev(1, 7))  # as /dev/full
    except OSError:
        pytest.skip("making a device is not allowed here")


WRITERS: dict[str, Callable[[Path], Any]] = {
    "text": lambda path: write_atomically(path, "text"),
    "image": lambda path: save_image_atomically(NOISE, path),
    "report": lambda path: Report(str(path)),
    "samples": lambda path: write_npz(path, (1, 2, 2, 3), [np.zeros((1, 2, 2, 3), np.uint8)]),
}


@pytest.mark.parametrize("make", [pipe, device])
@pytest.mark.parametrize("writer", WRITERS)
def test_devices_and_pipes_are_never_replaced(make: Callable[[Path], None], writer: str, tmp_path: Path) -> None:
    place = tmp_path / "place.png"
    make(place)
    before = place.lstat()
    with pytest.raises(UserError, match="a device, a pipe or a socket"):
        WRITERS[writer](place)
    assert (place.lstat().st_ino, place.lstat().st_mode) == (before.st_ino, before.st_mode)
    assert everything(tmp_path) == {"place.png"}


@pytest.mark.parametrize("make", [pipe, device])  # of our own: a test that fails must not cost the machine a device
def test_a_report_over_a_device_is_refused_before_the_work(
    make: Callable[[Path], None], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make(tmp_path / "full")
    assert main(["encoders", "--json", str(tmp_path / "full")]) == 2
    assert not stat.S_ISREG((tmp_path / "full").lstat().st_mode)
    output = capsys.readouterr()
    assert output.out == "" and output.err == (
        f"unimm: error: Cannot write the report {tmp_path}/full: it is a device, a pipe or a socket, and only files "
        "are replaced.\n"
    )


def test_a_link_is_followed_and_stays(tmp_path: Path) -> None:
    (tmp_path / "far").mkdir()
    (tmp_path / "link.png").symlink_to("far/file.png")
    save_image_atomically(NOISE, tmp_path / "link.png")
    write_atomically(tmp_path / "link.png", b"new")
    assert (tmp_path / "link.png").is_symlink() and (tmp_path / "far/file.png").read_bytes() == b"new"


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "bmp", "tiff"])
def test_an_image_on_a_full_disk_is_one_sentence_and_leaves_nothing(suffix: str, tmp_path: Path) -> None:
    with full_disk(100), pytest.raises(UserError, match="^Cannot write the image .*: File too large.$"):
        save_image_atomically(NOISE, tmp_path / f"new/folder/a.{suffix}")
    assert everything(tmp_path) == set()
    path = save_image_atomically(NOISE, tmp_path / f"new/a.{suffix}")
    with Image.open(path) as read:
        assert read.size == NOISE.size


@pytest.mark.parametrize("suffix", ["jp2", "gif", "pdf", "eps"])
def test_formats_are_those_of_a_list(suffix: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"must end in an image format such as \.png, \.jpg"):
        save_image_atomically(NOISE, tmp_path / f"a.{suffix}")


def test_what_is_written_reaches_the_disk_before_it_has_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_room(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", no_room)
    for write in (lambda path: write_atomically(path, "text"), lambda path: save_image_atomically(NOISE, path)):
        with pytest.raises(UserError, match="No space left on device"):
            write(tmp_path / "a.png")
    model, processor = tiny.unified()
    with pytest.raises(UserError, match="No space left on device"):
        save_whole(tmp_path / "model", model, processor)
    assert everything(tmp_path) == set()


def encode(folder: Path) -> None:
    tokenizer = tiny_vqrae()
    source = write_folder(folder / "in", range(3))
    config = EncodeConfig(str(source), features=True)
    processor = ImageTokenizerProcessor.for_tokenizer(tokenizer.config)
    with full_disk(300):
        Encoder(tokenizer, processor, config, folder / "out").run()


def save(folder: Path) -> None:
    model, processor = tiny.unified()
    with full_disk(20_000):
        save_whole(folder / "out", model, processor)


def export(folder: Path) -> None:
    model, processor = tiny.unified()
    with full_disk(130_000):  # the language model fits, the image tokenizer does not
        save_generation(model, processor, folder / "out")


def checkpoint(folder: Path) -> None:
    state = {"weights": tiny.unified()[0].state_dict()}
    with full_disk(20_000):
        save_checkpoint(folder / "out", 3, state, keep=1)


@pytest.mark.parametrize("work", [encode, save, export, checkpoint])
def test_a_full_disk_is_one_sentence_and_leaves_nothing(work: Callable[[Path], None], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^Cannot write the (features|model into|checkpoint) [^\n]*\.$"):
        work(tmp_path)
    assert {name for name in everything(tmp_path) if name.startswith("out/") and (tmp_path / name).is_file()} == set()
    assert not list(tmp_path.rglob(".*"))


def test_the_tokenizer_is_saved_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = trainer(tmp_path, 1)

    def no_room(folder: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(run.processor, "save_pretrained", no_room)
        with pytest.raises(UserError, match="No space left on device"):
            run.save_pretrained()
    assert everything(tmp_path) == set()
    run.save_pretrained()
    assert {"config.json", "model.safetensors", "preprocessor_config.json"} <= everything(tmp_path)


@pytest.mark.parametrize(
    "arguments",
    [
        ["generate", "a red circle", "--output", "closed/a.png"],
        ["reconstruct", "in.png", "--output", "closed/a.png"],
        ["demo", "--output", "closed/demo"],
        ["export", "--understanding", "--output", "closed/model"],
        ["detach", "--output", "closed/model"],
        ["attach", "host", "--image-tokenizer", "tokenizer", "--output", "closed/model"],
        ["encoders", "--json", "closed/r.json"],
    ],
    ids=lambda arguments: arguments[0],
)
def test_a_folder_that_is_closed_to_us_is_said_before_the_work(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "closed").mkdir()
    NOISE.save("in.png")
    may = os.access  # root may write anywhere: the folder is closed by hand
    monkeypatch.setattr(os, "access", lambda path, mode, **_: "closed" not in str(path) and may(path, mode))
    assert main(arguments) == 2
    output = capsys.readouterr()
    assert output.err.count("\n") == 1 and "closed may not be written to" in output.err
    assert everything(tmp_path) == {"closed", "in.png"}


@pytest.mark.parametrize("number", [errno.EROFS, errno.EACCES, errno.ENOSPC])
def test_what_a_recipe_cannot_write_is_one_line(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(self: Path, *_: Any, **__: Any) -> None:
        raise OSError(number, os.strerror(number), str(self))

    monkeypatch.setattr(Path, "mkdir", refuse)

    def recipe() -> None:
        (tmp_path / "out").mkdir(parents=True)

    assert run_main(recipe, name="t2i") == 2
    reason = os.strerror(number)
    assert capsys.readouterr().err == f"t2i: error: Cannot write {tmp_path}/out: {reason}.\n"
    with pytest.raises(UserError, match=reason):
        save_config(EncodeConfig("pictures"), tmp_path / "out")


def test_other_errors_keep_their_traceback() -> None:
    def broken() -> None:
        raise RuntimeError("a defect of ours")

    with pytest.raises(RuntimeError, match="a defect"):
        run_main(broken)
