"""Pages whose tables a command writes, between `<!-- name -->` and `<!-- /name -->`; the rest is text."""

import re

Table = list[list[str]]  # the header first


def table(rows: Table, right: int = 1) -> str:
    """Markdown; the columns from `right` on are numbers."""
    header, *body = (f"| {' | '.join(row)} |" for row in rows)
    columns = len(rows[0])
    return "\n".join([header, "|" + "---|" * min(right, columns) + "---:|" * (columns - right), *body])


def tables(text: str) -> list[Table]:
    """The tables of a text, as `table` writes them."""
    found, before = [], ""
    for line in text.splitlines():
        if line.startswith("|"):
            if not before.startswith("|"):
                found.append([])
            if not line.startswith("|---"):
                found[-1].append([cell.strip() for cell in line.strip("|").split("|")])
        before = line
    return found


def _section(name: str) -> re.Pattern:
    return re.compile(rf"(<!-- {re.escape(name)} -->\n)(.*?)(<!-- /{re.escape(name)} -->)", re.DOTALL)


def read(page: str, name: str) -> str:
    """What stands between a section's markers.

    Raises:
        ValueError: a page without them.
    """
    found = _section(name).search(page)
    if not found:
        raise ValueError(f"the page must have <!-- {name} --> and <!-- /{name} --> on lines of their own")
    return found[2].strip("\n")


def write(page: str, sections: dict[str, str]) -> str:
    """The page with each section's text between its markers."""
    for name, text in sections.items():
        read(page, name)
        page = _section(name).sub(lambda found, text=text: f"{found[1]}\n{text}\n\n{found[3]}", page)
    return page
