"""A hook of mkdocs: pages that stand outside docs/, and links that are right on GitHub and here."""

import json
import posixpath
import re
from pathlib import Path

from mkdocs.structure.files import File

ROOT = Path(__file__).parents[1]
#: Shown under their own paths; of other files only what these pages show.
PAGES = ("README.md", "bench/REPORT.md", "bench/README.md", "configs/README.md", "CHANGELOG.md")
EXAMPLES = sorted(ROOT.glob("examples/*.py")) + sorted(ROOT.glob("examples/*.ipynb"))
_LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)#\s]*)(#[^)\s]*)?\)")


def _repository_path(page):
    """Where a page of the site stands in the repository."""
    return page if page in PAGES or page.startswith("examples/") else f"docs/{page}"


def _site_path(path):
    """Where a file of the repository stands in the site; None if it does not."""
    if path.startswith("docs/"):
        return path.removeprefix("docs/")
    if ROOT / path in EXAMPLES:
        return posixpath.splitext(path)[0] + ".md"
    return path if path in PAGES or path.endswith(".png") else None


def _fenced(text, language=""):
    return f"```{language}\n{text.rstrip()}\n```\n"


def _example_page(file):
    """A script, or a notebook with what its cells print, as a page."""
    if file.suffix == ".py":
        title = file.stem.replace("_", " ").capitalize()
        return f"# {title}\n{_fenced(file.read_text(encoding='utf-8'), 'python')}"
    parts = []
    for cell in json.loads(file.read_text(encoding="utf-8"))["cells"]:
        text = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(text)
            continue
        command = text.startswith("%%bash")
        code = text.partition("\n")[2] if command else text
        parts.append(_fenced(code, "bash" if command else "python"))
        printed = "".join("".join(out.get("text", ())) for out in cell["outputs"])
        parts += [_fenced(printed, "text")] if printed else []
    return "\n\n".join(parts)


def on_files(files, config):
    """Add the pages and the pictures that they and the others show."""
    wanted = set(PAGES)
    for page in (*PAGES, *(f"docs/{file.src_uri}" for file in files if file.src_uri[-3:] == ".md")):
        for _, _, target, _ in _LINK.findall((ROOT / page).read_text(encoding="utf-8")):
            path = posixpath.normpath(posixpath.join(posixpath.dirname(page), target))
            if target.endswith(".png") and not path.startswith("docs/"):
                wanted.add(path)
    for path in sorted(wanted):
        files.append(File.generated(config, path, abs_src_path=str(ROOT / path)))
    for file in EXAMPLES:
        page = _site_path(f"examples/{file.name}")
        files.append(File.generated(config, page, content=_example_page(file)))
    return files


def on_page_markdown(markdown, page, config, files):
    """Turn links into the repository into links within the site, or into text."""
    here = page.file.src_uri

    def link(match):
        mark, text, target, anchor = match.groups(default="")
        if not target or "://" in target:
            return match[0]
        start = posixpath.dirname(_repository_path(here))
        found = _site_path(posixpath.normpath(posixpath.join(start, target)))
        if found is None:
            return text
        return f"{mark}[{text}]({posixpath.relpath(found, posixpath.dirname(here))}{anchor})"

    return _LINK.sub(link, markdown)
