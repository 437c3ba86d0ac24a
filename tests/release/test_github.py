"""This repository's packages, as far as they do not wait for the day of a release; and the files for GitHub."""

import os
import re
import tomllib
from pathlib import Path
from typing import Any

import yaml

from release import changelogs, rules
from release.packages import Package, packages
from tests.release.repository import ROOT


def test_this_repository_meets_what_does_not_wait_for_the_day() -> None:
    everything = packages(ROOT)
    assert len({package.project["urls"]["Repository"] for package in everything}) == 1
    assert [finding for finding in rules.addresses(ROOT, everything) if not finding.ok and finding.rule == "urls"] == []
    for package in everything:
        assert rules.readme(package).ok, rules.readme(package)
        below = changelogs.entries(package.changelog)
        # Ready as it is, or with what release:prepare does.
        assert below[0].version in (changelogs.UNRELEASED, package.version)
        assert below[0].text or below[1].text


def workflow_files() -> list[Path]:
    return sorted((ROOT / ".github").rglob("*.yml"))


def steps_of(workflow: Path) -> list[dict[str, Any]]:
    return [step for job in yaml.safe_load(workflow.read_text())["jobs"].values() for step in job["steps"]]


def test_github_reads_its_files() -> None:
    names = {path.relative_to(ROOT / ".github").as_posix() for path in workflow_files()}
    assert {f"workflows/{name}.yml" for name in ("ci", "site", "release")} <= names
    assert {f"ISSUE_TEMPLATE/{name}.yml" for name in ("bug", "feature", "model", "config")} <= names
    for path in workflow_files():
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
        if path.parent.name == "workflows":
            # YAML takes `on` for a truth value.
            assert {"name", True, "jobs"} <= set(content), path
            for job in content["jobs"].values():
                assert "timeout-minutes" in job, path
        elif path.name != "config.yml":
            kinds = [field["type"] for field in content["body"]]
            assert set(kinds) <= {"markdown", "input", "textarea", "dropdown", "checkboxes"}
            ids = [field["id"] for field in content["body"] if field["type"] != "markdown"]
            assert len(ids) == len(set(ids))
            assert {"name", "description", "body"} <= set(content)


def test_the_commands_of_the_workflows_are_there() -> None:
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["envs"]
    ran = "\n".join(
        step["run"]
        for path in workflow_files()
        if "workflows" in path.parts
        for step in steps_of(path)
        if "run" in step
    )
    named = re.findall(r"hatch run (?:([\w-]+):)?([\w-]+)", ran)
    assert {("release", "build"), ("docs", "build")} <= set(named)
    for environment, script in named:
        assert script in scripts[environment or "default"]["scripts"], (environment, script)
    assert re.search(r"^ *\.ci/run$", ran, re.M)
    assert os.access(ROOT / ".ci" / "run", os.X_OK)
    (site,) = (
        step["with"]["path"] for step in steps_of(ROOT / ".github/workflows/site.yml") if "path" in step.get("with", {})
    )
    assert f"\nsite_dir: {site}\n" in (ROOT / "mkdocs.yml").read_text(encoding="utf-8")


def test_actions_have_a_version() -> None:
    for path in workflow_files():
        if "workflows" in path.parts:
            for step in steps_of(path):
                assert "uses" not in step or re.fullmatch(r"[\w-]+/[\w-]+@(v\d+|release/v\d+)", step["uses"]), step


def test_the_citation_has_what_is_cited() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert {"cff-version", "message", "title", "authors", "type", "license", "repository-code"} <= set(citation)
    assert citation["license"] == "Apache-2.0"
    assert citation["repository-code"] == Package("jllm-core", ROOT).project["urls"]["Repository"]
