"""Draw the contact sheets of docs/guides/suite.md and fill in its tables: `python docs/assets/make_suite.py`.

Only pictures under licences that allow it are shown, and each sheet's sources are listed under it.
"""

from __future__ import annotations

import re
from pathlib import Path

from lightning_pfl.benchmark.suite.catalogue import find_tasks
from lightning_pfl.benchmark.suite.graph import relatives
from lightning_pfl.benchmark.suite.library import PACKAGE_OF, load_library
from lightning_pfl.benchmark.suite.recipes import SMOKE, Sizes, build_task
from lightning_pfl.benchmark.suite.sheets import Row, clean_examples, contact_sheet

HERE = Path(__file__).parent
PAGE = HERE.parent / "guides" / "suite.md"
GROUPS = {"A": "Compare", "B": "Concepts and phrases", "K": "Questions about pictures", "U": "Never trained on"}


def main() -> None:
    library = load_library()
    page = PAGE.read_text(encoding="utf8")
    for group in GROUPS:
        rows, shown = [], {}
        lines = ["| task | client, time | asks | answers | strong relatives | in the place of |", "| --- " * 6 + "|"]
        for spec in find_tasks([group]):
            task = build_task(spec, library, Sizes(120, SMOKE.val, SMOKE.test))
            examples, pictures = clean_examples(task, library, 2)
            rows.append(Row(f"{spec.name}: {spec.asks}", examples or task.train[:0]))
            shown |= dict.fromkeys(PACKAGE_OF[picture.domain] for picture in pictures)
            place = "-" if spec.client is None else f"{spec.client}, {spec.time}"
            words = ", ".join(spec.goals[:6]) + (", ..." if len(spec.goals) > 6 else "")
            answers = f"{words} (open)" if spec.open_ended else words
            related = " ".join(relatives(spec.id))
            lines.append(f"| {spec.name} | {place} | {spec.asks} | {answers} | {related} | {spec.analogue} |")
        sheet = contact_sheet(rows, pixels=72)
        sheet.save(HERE / f"suite_{group}.png", optimize=True)
        credit = "; ".join(
            f"{package.name} {package.version} ({package.licence})" for package in sorted(shown, key=lambda p: p.name)
        )
        text = (
            "\n".join(lines) + f"\n\n![Samples of group {group}](../assets/suite_{group}.png)\n\nPictures: {credit}.\n"
        )
        page = re.sub(
            rf"(<!-- {group} -->\n).*?(<!-- end {group} -->)",
            lambda found, text=text: found[1] + text + found[2],
            page,
            flags=re.S,
        )
        print(group, (HERE / f"suite_{group}.png").stat().st_size)
    PAGE.write_text(page, encoding="utf8")


if __name__ == "__main__":
    main()
