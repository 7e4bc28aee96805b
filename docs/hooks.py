"""What mkdocs does not do by itself; see mkdocs.yml.

- Pages and files that lie outside docs/ are in the site, without a copy: PAGES, and the cells of examples/walkthrough.py.
- Links lead where they lead in the repository: docs/x.md is x.md of the site, every other page keeps its path.
- Doctests in docstrings are shown as Python.
- A built page that would ask for anything outside the site is refused.
"""

import re
from pathlib import Path
from posixpath import dirname, join, normpath, relpath

import griffe
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File

ROOT = Path(__file__).parent.parent
FIGURE = re.compile(r'savefig\(FOLDER / "([^"]+)"\)')
PAGES = (
    "README.md",
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "benchmarks/README.md",
    "benchmarks/RESULTS.md",
    *sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("benchmarks/results/*.png")),
    "examples/own_loop.py",
)
WALKTHROUGH = "examples/walkthrough.py", "walkthrough.md"
LINK = re.compile(r"(\]\()([^)#:\s]+)(?=[)#])")
CELL = re.compile(r"^# %%(.*)\n", re.MULTILINE)
OUTSIDE = re.compile(
    r"<(?:link|script|img|iframe|source)\b[^>]*?\b(?:href|src)=[\"']?(?:https?:)?//[^\s>]*|@import[^;]*//[^;]*"
)


def on_files(files, config):
    for path in PAGES:
        files.append(File.generated(config, path, abs_src_path=str(ROOT / path)))
    script, page = WALKTHROUGH
    files.append(File.generated(config, page, content=cells((ROOT / script).read_text())))
    return files


def on_page_markdown(markdown, page, config, files):
    here = page.file.src_uri
    inside = here not in PAGES  # pages of docs/, which is the site's root
    folder = join("docs", dirname(here)) if inside else dirname(here)

    def moved(link):
        target = normpath(join(folder, link[2])).removeprefix("docs/").replace(*WALKTHROUGH)
        return link[1] + relpath(target, dirname(here) or ".")

    return LINK.sub(moved, markdown)


def cells(source: str) -> str:
    """A script in cells as Markdown: `# %% [markdown]` is text, `# %%` code, with the figures that it saves."""
    _, *found = CELL.split(source)
    page = ""
    for kind, cell in zip(found[::2], found[1::2], strict=True):
        if kind.strip() == "[markdown]":
            page += re.sub(r"^# ?", "", cell, flags=re.MULTILINE) + "\n"
        else:
            page += f"```python\n{cell.strip()}\n```\n\n"
            page += "".join(f"![{Path(figure).stem}](walkthrough/{figure})\n\n" for figure in FIGURE.findall(cell))
    return page


def on_post_build(config):
    for page in Path(config.site_dir).rglob("*.html"):
        if found := OUTSIDE.search(page.read_text()):
            raise PluginError(f"{page} would ask for something outside the site: {found[0]}")


class Doctests(griffe.Extension):
    """Puts doctests, which are no Markdown, into fences."""

    def on_object(self, *, obj, **_):
        if obj.docstring:
            fence = r"\1```pycon\n\g<0>\n\1```"
            obj.docstring.value = re.sub(r"(?m)^( *)>>> .*(?:\n(?!\s*$).*)*", fence, obj.docstring.value)
