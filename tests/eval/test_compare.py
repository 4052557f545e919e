import json

import pytest

from eval.compare import read_reports, side_by_side
from unimm.errors import UserError


def write(path, **content):
    path.write_text(json.dumps(content))
    return path


def test_numbers_of_several_reports_stand_beside_each_other(tmp_path):
    first = write(tmp_path / "a.json", reconstruction={"psnr": 22.0, "ssim": 0.7}, seconds={"load": 1.0}, seed=0)
    probe = {"codes": {"linear": 0.5, "base_rate": 3.0, "sweep": {"3.0": 0.6}}}
    second = write(tmp_path / "b.json", probe=probe)
    columns = {"one": read_reports([first, second]), "two": read_reports([second])}
    assert columns["one"] == {"reconstruction/psnr": 22.0, "reconstruction/ssim": 0.7, "probe/codes/linear": 0.5}
    assert side_by_side(columns).splitlines() == [
        "|  | one | two |",
        "| --- | --- | --- |",
        "| reconstruction/psnr | 22.0 | - |",
        "| reconstruction/ssim | 0.700 | - |",
        "| probe/codes/linear | 0.500 | 0.500 |",
    ]


def test_what_is_no_report_is_refused(tmp_path):
    with pytest.raises(UserError, match="has none of reconstruction"):
        read_reports([write(tmp_path / "a.json", settings={})])
    with pytest.raises(UserError, match="The report"):
        read_reports([tmp_path / "missing.json"])
    one, other = (write(tmp_path / f"{n}.json", chat={"count": n / 2}) for n in (0, 1))
    with pytest.raises(UserError, match="chat/count is 0.5, a report before it 0"):
        read_reports([one, other])
