"""Write a report: one HTML file that holds everything, and its tables as Markdown. Start at `write_report`."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import resources
from pathlib import Path

from lightning_pfl.comparison.record import Record
from lightning_pfl.comparison.report.findings import Findings
from lightning_pfl.comparison.report.sections import Section, Table, sections_of

__all__ = ["as_html", "as_markdown", "write_report"]


def write_report(records: Sequence[Record], folder: Path) -> tuple[Path, Path]:
    """Write ``report.html`` and ``report.md``.

    Args:
        records: of one comparison.
        folder: where to.

    Returns:
        Their paths.

    Raises:
        ValueError: records that do not belong together.
        ModuleNotFoundError: matplotlib or jinja2 is not installed.
    """
    findings = Findings.of(records)
    sections = sections_of(findings)
    folder.mkdir(parents=True, exist_ok=True)
    page, tables = folder / "report.html", folder / "report.md"
    title, lead = str(findings.about.get("title", "Comparison")), _lead(records, findings)
    page.write_text(as_html(title, lead, sections), encoding="utf8")
    tables.write_text(as_markdown(title, lead, sections), encoding="utf8")
    return page, tables


def as_html(title: str, lead: str, sections: Sequence[Section]) -> str:
    """The page; it needs nothing else."""
    try:
        from jinja2 import Environment
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("A report's page needs jinja2: pip install 'lightning-pfl[benchmark]'.") from error
    source = (resources.files("lightning_pfl.comparison.report") / "page.html.jinja").read_text(encoding="utf8")
    template = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string(source)
    return template.render(title=title, lead=lead, sections=sections)


def as_markdown(title: str, lead: str, sections: Sequence[Section]) -> str:
    """Words and tables, without the pictures, whose numbers are in the tables."""
    parts = [f"# {title}", lead]
    for section in sections:
        parts += [f"## {section.title}", *section.words]
        for table in section.tables:
            parts += [f"### {table.title}"] if table.title else []
            parts.append(_markdown(table))
    return "\n\n".join(parts) + "\n"


def _markdown(table: Table) -> str:
    lines = [table.columns, ["---"] + ["---:"] * (len(table.columns) - 1)]
    lines += [
        [f"**{cell.text}**" if cell.mark and cell.text else cell.text.replace("|", "\\|") for cell in row.cells]
        for row in table.rows
    ]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _lead(records: Sequence[Record], findings: Findings) -> str:
    about = findings.about
    models = ", ".join(dict.fromkeys(findings.models))
    return (
        f"{len(records)} runs of {len(findings.rows)} methods: {len(findings.clients)} clients on {models}, "
        f"{about.get('scenario')}, {about.get('rounds')} rounds of {about.get('steps')} steps, asked on the "
        f"{about.get('side')} side."
    )
