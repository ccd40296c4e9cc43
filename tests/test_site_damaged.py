"""Sites that are not there or not whole: one clear error, whatever of them is read."""

import json
from pathlib import Path
from typing import Any

import pytest

from fastsae.dashboard import site
from fastsae.dashboard.facts import Facts
from fastsae.errors import FastSAEError


def test_a_folder_without_a_report_or_with_a_damaged_one(report: Path, tmp_path: Path):
    with pytest.raises(FastSAEError, match="no report in"):
        site.read_overview(tmp_path)
    (tmp_path / "data").mkdir()
    whole = (report / "data" / "overview.js").read_text("utf-8")
    (tmp_path / "data" / "overview.js").write_text(whole[: len(whole) // 2], "utf-8")
    with pytest.raises(FastSAEError, match="damaged"):
        site.read_overview(tmp_path)
    (tmp_path / "data" / "overview.js").write_text('fastsae.put("overview",{"about":{"format":"else"}});\n', "utf-8")
    with pytest.raises(FastSAEError, match="fastsae-site"):
        site.read_overview(tmp_path)


def damaged(folder: Path, name: str, value: Any) -> None:
    (folder / "data" / f"{name}.js").write_text(f'fastsae.put("{name}",{json.dumps(value)});\n', "utf-8")


def test_files_that_do_not_fit_together(facts: Facts, tmp_path: Path):
    site.write_site(tmp_path, facts, show_progress=False)
    overview = site._read(tmp_path, "overview")
    for damage in ({"d_sae": "many"}, {"about": None}, {"about": []}, {"proxies": None}):
        damaged(tmp_path, "overview", overview | damage)
        for read in (site.read_overview, site.read_rows, lambda folder: site.read_card(folder, 3)):
            with pytest.raises(FastSAEError, match="damaged|expected a fastsae-site"):
                read(tmp_path)
    damaged(tmp_path, "overview", overview)
    rows = site._read(tmp_path, "rows-0")
    for damage in ({}, {"feature": []}, {**rows, "density": rows["density"][1:]}, [1], None):
        damaged(tmp_path, "rows-0", damage)
        with pytest.raises(FastSAEError, match="do not fit together"):
            site.read_rows(tmp_path)
    cards = site._read(tmp_path, "cards-0")
    for damage in ({}, {**cards, "cards": cards["cards"][:2]}, {**cards, "cards": cards["cards"][1:]}, None, 3):
        damaged(tmp_path, "cards-0", damage)
        with pytest.raises(FastSAEError, match="do not fit together"):
            site.read_card(tmp_path, 3)
    (tmp_path / "data" / "cards-0.js").write_bytes(b'fastsae.put("cards-0",\xff);\n')
    with pytest.raises(FastSAEError, match="damaged"):
        site.read_card(tmp_path, 3)
    (tmp_path / "data" / "cards-0.js").unlink()
    (tmp_path / "data" / "cards-0.js").mkdir()
    with pytest.raises(FastSAEError, match="cannot be read"):
        site.read_card(tmp_path, 3)
