# Copyright 2026 The diffusers-greedy-grow authors.
# SPDX-License-Identifier: Apache-2.0

"""The committed tables are what `--report` writes from the committed records, and the pages' links lead somewhere."""

import importlib
import re
import shlex
from pathlib import Path

import pytest

from benchmarks import lora, tables
from benchmarks.tables import MOST_COLUMNS, RESULTS, ROOT


REPORTS = sorted(RESULTS.rglob("*.md"))
PRESENT_REPORTS = [path for path in REPORTS if not path.is_relative_to(RESULTS / "0.1.0")]
PAGES = [ROOT / "benchmarks" / "README.md", *sorted((ROOT / "benchmarks" / "docs").glob("*.md"))]


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", PRESENT_REPORTS, ids=name)
def test_a_committed_report_is_what_its_command_writes(path, monkeypatch):
    monkeypatch.chdir(ROOT)
    text = path.read_text()
    command = re.match(r"<!-- Written by `python -m benchmarks\.(\w+) (.*)`; do not edit. -->\n", text)
    assert command, "The first line must name the command."
    module = importlib.import_module(f"benchmarks.{command[1]}")
    reports = module.make_reports(module.parse_arguments(shlex.split(command[2])))
    assert {report.resolve(): written for report, written in reports.items()}[path] == text


def test_report_writes_the_file_and_measures_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(lora, "measure", lambda *args: pytest.fail("`--report` measured."))
    record = (RESULTS / "lora.json").read_text()
    (tmp_path / "lora.json").write_text(record)
    lora.main(["--report", "--results_dir", str(tmp_path)])
    written = (tmp_path / "lora.md").read_text()
    assert written.replace(str(tmp_path), "benchmarks/results") == (RESULTS / "lora.md").read_text()
    assert (tmp_path / "lora.json").read_text() == record


def test_wide_tables_are_split_and_lose_nothing():
    row = {name: i for i, name in enumerate("abcdefghij")}
    parts = tables.split_columns([row, {**row, "j": 10}], num_keys=2)
    assert [list(part[0]) for part in parts] == [list("abcdef"), list("abghij")]
    assert [{**parts[0][i], **parts[1][i]} for i in (0, 1)] == [row, {**row, "j": 10}]


def anchors(path: Path) -> set[str]:
    """Return the anchors that GitHub makes of a page's headings."""
    headings = re.findall(r"^#+ (.*)$", path.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("path", [*PAGES, *REPORTS], ids=name)
def test_links_lead_somewhere_and_tables_are_narrow(path):
    text = path.read_text()
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith("http"):
            continue
        file, _, anchor = target.partition("#")
        linked = (path.parent / file).resolve() if file else path
        assert linked.exists(), target
        assert not anchor or anchor in anchors(linked), target
    widths = {line.count("|") - 1 for line in text.splitlines() if re.match(r"\|( --- \|)+$", line)}
    assert max(widths, default=0) <= MOST_COLUMNS


def test_the_index_has_every_page():
    linked = set(re.findall(r"\]\((docs/\w+\.md)\)", PAGES[0].read_text()))
    assert linked == {f"docs/{page.name}" for page in PAGES[1:]}
