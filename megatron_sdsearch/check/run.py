"""Run all parts of a check; no part depends on another's outcome."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from megatron_sdsearch.check.contents import check_contents
from megatron_sdsearch.check.findings import Finding, Report, Severity, errors, warning
from megatron_sdsearch.check.run_under_test import ClusterOptions, RunUnderTest, find_cluster
from megatron_sdsearch.check.servers import check_servers
from megatron_sdsearch.check.sizes import check_sizes
from megatron_sdsearch.check.storage import check_storage
from megatron_sdsearch.config import examine_tree, read_tree, setting_warnings
from megatron_sdsearch.errors import ConfigError, SDSearchError, as_config_error
from megatron_sdsearch.training.preflight import attempt, read_files, start_problems

# To add a part, add its function here.
PARTS: Sequence[Callable[[RunUnderTest], Iterable[Finding]]] = (
    check_contents,
    check_sizes,
    check_storage,
    check_servers,
)
_SECTIONS = {"parallel": "layout", "--nproc-per-node": "layout", "run_dir": "storage", "checkpoint": "storage"}


def run_checks(
    path: Path, overrides: Sequence[str] = (), *, options: ClusterOptions | None = None, is_online: bool = False
) -> Report:
    """Check a configuration, the files that it names, and the machine.

    Args:
        path: the YAML file.
        overrides: ``key=value``, as for ``train``.
        options: known numbers of the cluster it is meant for.
        is_online: also send requests to servers.

    Returns:
        All findings; only YAML that cannot be read ends the check early.
    """
    problems: list[ConfigError] = []
    tree = attempt(lambda: read_tree(path, overrides), "CONFIG", problems)
    config = None
    if not problems:
        config, problems = examine_tree(tree)
    findings = [replace(finding, section="configuration") for finding in errors(problems)]
    if config is None:
        return Report(findings=findings)
    cluster = find_cluster(config, options or ClusterOptions())
    files = read_files(config)
    run = RunUnderTest(config=config, cluster=cluster, files=files, is_online=is_online)
    refused = [*start_problems(config, cluster), *files.problems]
    found = [*errors({str(problem): problem for problem in refused}.values())]  # both report config.json
    fields = {problem.field for problem in refused}
    # Training would not notice what follows.
    waste = [warning(problem.field, problem.problem, problem.fix) for problem in setting_warnings(config)]
    for part in PARTS:
        try:
            waste += part(run)
        except SDSearchError as error:  # a part reads files that may change or break while it does
            waste += errors([as_config_error(error, "CONFIG")])
    found += [finding for finding in waste if finding.severity is not Severity.WARNING or finding.field not in fields]
    # Findings about a default that replaced a refused value mean nothing.
    defaults = {problem.field for problem in problems}
    findings += [replace(f, section=_section_of(f.field)) for f in found if f.field not in defaults]
    sections = list(dict.fromkeys(finding.section for finding in findings))
    findings.sort(key=lambda finding: (sections.index(finding.section), list(Severity).index(finding.severity)))
    return Report(findings=findings, cluster=cluster.description)


def _section_of(field: str) -> str:
    if field.startswith(("rollout.sglang", "SDSEARCH_SGLANG")):
        return "sglang"
    top = field.partition(".")[0]
    return _SECTIONS.get(top, top)
