"""What is wrong with a run, found from what it wrote: findings, each with its evidence and what changes it.

`diagnose` reads `training_config.yaml`, `metrics.jsonl`, `final_loss.json`, `loss_bounds.json`, the scheduler and
`samples.png`. A file that is missing (a run that is still going, or one of an earlier version) leaves out the findings
that need it. Reading them is in `evidence.py`, the findings themselves are in `symptoms.py`.
"""

from pathlib import Path

from .evidence import read_evidence
from .symptoms import SYMPTOMS, Finding


def diagnose(run: str | Path) -> list[Finding]:
    """What is wrong with a run.

    Args:
        run: its output folder.

    Returns:
        The findings; empty if nothing was found.

    Raises:
        FileNotFoundError: the folder is not that of a run.
        ValueError: its `training_config.yaml` is no configuration.
    """
    evidence = read_evidence(Path(run))
    findings: list[Finding] = []
    for symptom in SYMPTOMS:
        # Of the causes of a bad loss only the first is named: the others follow from it.
        if symptom.explained_by & {finding.name for finding in findings}:
            continue
        found = symptom.look(evidence)
        if found is not None:
            findings.append(Finding(symptom.name, *found))
    return findings


def in_words(findings: list[Finding]) -> list[str]:
    """The findings as lines of text."""
    if not findings:
        return ["Diagnosis: nothing found."]
    return ["Diagnosis:", *(f"  {finding.name}: {finding.evidence}; {finding.remedy}" for finding in findings)]
