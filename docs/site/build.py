"""Builds the site into ``site/``: ``make docs``.

The pages are the repository's own Markdown files, which can also be read where they are. Here their links are turned
into links between pages, formulas into MathML, marks of code blocks into notes, and files of the repository that a page
links to (``src/fvae_lora/layer.py#update``) into pages of their own. Then Zensical builds the site, with warnings as
errors, and every link is checked, and that the site asks for nothing from elsewhere.
"""

from __future__ import annotations

import ast
import os
import posixpath
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

PROJECT = Path(__file__).parents[2]
WORK = PROJECT / ".cache" / "site"
SITE = PROJECT / "site"

FENCE = re.compile(
    r"^(?P<indent> *)(?P<fence>```+)(?P<language>[\w-]*)[^\n]*\n(?P<body>.*?)^ *(?P=fence) *$\n?", re.M | re.S
)
FORMULA = re.compile(r"(?P<code>`+[^`]+?`+)|\$(?P<formula>[^$\n]+)\$")
LINK = re.compile(r"(?<=\]\()(?P<target>[^)\s#]*)(?:#(?P<anchor>[^)\s]*))?(?=\))")
MARK = re.compile(r"^<!-- needs: (.+?) -->$", re.M)
LANGUAGES = {
    ".py": "python",
    ".sh": "sh",
    ".yaml": "yaml",
    ".yml": "yaml",
    ".toml": "toml",
    ".json": "json",
    ".txt": "text",
}


class SiteError(Exception):
    """A page that cannot be built, or a site that is not right; one line."""


def pages() -> dict[str, str]:
    """The pages of the site: where each is in the repository, and in the site."""
    found = {f"docs/{path.name}": path.name for path in (PROJECT / "docs").glob("*.md")}
    found |= {f"docs/guides/{path.name}": f"guides/{path.name}" for path in (PROJECT / "docs/guides").glob("*.md")}
    for path in (PROJECT / "studies").rglob("*.md"):
        where = path.relative_to(PROJECT).as_posix()
        found[where] = where.replace("README.md", "index.md")
    return found | {
        "benchmarks/README.md": "benchmarks/index.md",
        "benchmarks/NOTES.md": "benchmarks/notes.md",
        "benchmarks/lab/README.md": "benchmarks/lab.md",
        "examples/README.md": "examples/index.md",
        "CHANGELOG.md": "changelog.md",
        "CONTRIBUTING.md": "contributing.md",
    }


class Assembly:
    """The pages as Zensical reads them, in a folder of its own."""

    def __init__(self, docs: Path, formula: Callable[..., str]) -> None:
        self.formula = formula
        self.docs = docs
        self.pages = pages()

    def write(self) -> None:
        """Write every page, and what it links to."""
        for source, target in self.pages.items():
            self._write(target, self.page(source, (PROJECT / source).read_text(encoding="utf-8")))
        (self.docs / "style.css").write_bytes((PROJECT / "docs/site/style.css").read_bytes())

    def _write(self, target: str, text: str) -> None:
        (self.docs / target).parent.mkdir(parents=True, exist_ok=True)
        (self.docs / target).write_text(text, encoding="utf-8")

    def page(self, source: str, text: str) -> str:
        """A page's text as it stands in the site."""
        parts, end = [], 0
        for fence in FENCE.finditer(text):
            parts.append(self._prose(source, text[end : fence.start()]))
            is_formula = fence["language"] == "math"
            parts.append(
                f"\n<div>{self.formula(fence['body'].strip(), display='block')}</div>\n" if is_formula else fence[0]
            )
            end = fence.end()
        return "".join([*parts, self._prose(source, text[end:])])

    def _prose(self, source: str, text: str) -> str:
        text = MARK.sub(r'<p class="needs">Needs \1.</p>\n', text)
        # Markdown takes a line that begins with <math> for a block of HTML, hence the span.
        text = FORMULA.sub(lambda found: found["code"] or f"<span>{self.formula(found['formula'])}</span>", text)
        text = re.sub(r"!\[([^\]]*)\]\((\S+\.svg)\)", lambda found: self._figure(source, found[2], found[1]), text)
        return LINK.sub(lambda found: self._link(source, found["target"], found["anchor"] or ""), text)

    def _figure(self, source: str, target: str, caption: str) -> str:
        """A drawing inside the page, where it takes the page's colours."""
        drawing = (PROJECT / source).parent / target
        svg = re.sub(r">\s+<", "><", drawing.read_text(encoding="utf-8").partition("?>\n")[2].strip())
        return f"<figure>{svg}<figcaption>{caption}</figcaption></figure>"

    def _link(self, source: str, target: str, anchor: str) -> str:
        if not target or urlsplit(target).scheme:
            return f"{target}#{anchor}" if anchor else target
        wanted = posixpath.normpath(posixpath.join(posixpath.dirname(source), target))
        page = self.pages.get(wanted) or self.pages.get(f"{wanted}/README.md") or self._file(source, wanted)
        if wanted.endswith(".py") and anchor:
            anchor = f"__codelineno-0-{definition(PROJECT / wanted, anchor).lineno}"
        back = posixpath.relpath(page, posixpath.dirname(self.pages[source]) or ".")
        return f"{back}#{anchor}" if anchor else back

    def _file(self, source: str, wanted: str) -> str:
        """A file of the repository, as a page where it is text."""
        file = PROJECT / wanted
        if wanted.startswith("..") or not file.is_file():
            raise SiteError(f"{source}: links to {wanted}, which the repository does not have")
        if file.suffix not in LANGUAGES and file.suffix:
            target = wanted.removeprefix("docs/")
            (self.docs / target).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, self.docs / target)
            return target
        title = f"---\ntitle: {wanted}\nsearch:\n  exclude: true\nhide:\n  - toc\n---\n\n# `{wanted}`\n\n"
        code = file.read_text(encoding="utf-8")
        target = f"source/{wanted.removeprefix('.')}.md"  # Zensical leaves out what begins with a dot
        self._write(target, f'{title}````{LANGUAGES.get(file.suffix, "text")} linenums="1"\n{code}````\n')
        return target


def definition(file: Path, name: str) -> ast.stmt:
    """Where a function or class is defined.

    Args:
        file: The Python file.
        name: The function's name; a method's follows its class's and a dot.

    Raises:
        SiteError: There is none.
    """
    found: ast.AST = ast.parse(file.read_text(encoding="utf-8"))
    for part in name.split("."):
        inside = (node for node in ast.iter_child_nodes(found) if isinstance(node, ast.stmt))
        if not (named := [node for node in inside if getattr(node, "name", None) == part]):
            raise SiteError(f"{file.relative_to(PROJECT)}: has no {name}")
        found = named[0]
    assert isinstance(found, ast.stmt)
    return found


class _Links(HTMLParser):
    """What a page links to, what a browser fetches for it, and the places in it that can be linked to."""

    def __init__(self) -> None:
        super().__init__()
        self.links: list[str] = []
        self.fetched: list[str] = []
        self.anchors: set[str] = {""}

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Collect a tag's links."""
        given = dict(attrs)
        self.anchors |= {given[key] or "" for key in ("id", "name") if given.get(key)}
        if tag == "a" and given.get("href"):
            self.links.append(given["href"] or "")
        is_hint = tag == "link" and given.get("rel") in ("canonical", "prev", "next", "alternate")
        if tag in ("script", "img", "link", "source", "iframe") and not is_hint:
            self.fetched += [given[key] or "" for key in ("src", "href") if given.get(key)]


def problems(site: Path) -> list[str]:
    """Links of a built site that lead nowhere, and what it would fetch from elsewhere.

    Args:
        site: The folder of the site.

    Returns:
        A line for each.
    """
    parsed = {}
    for file in sorted(site.rglob("*.html")):
        parsed[file] = _Links()
        parsed[file].feed(file.read_text(encoding="utf-8"))
    found = []
    for file, page in parsed.items():
        where = file.relative_to(site)
        for target in page.fetched:
            if urlsplit(target).scheme not in ("", "data") or target.startswith("//"):
                found.append(f"{where}: fetches {target}")
        for target in [*page.links, *page.fetched]:
            if file.name == "404.html" or urlsplit(target).scheme or target.startswith("//"):
                continue
            path, anchor = unquote(urlsplit(target).path), unquote(urlsplit(target).fragment)
            there = (file.parent / path).resolve() if path else file
            there = there / "index.html" if there.is_dir() else there
            if not there.is_file():
                found.append(f"{where}: {target}: no such page or file")
            elif there in parsed and anchor not in parsed[there].anchors:
                found.append(f"{where}: {target}: no such place in that page")
    for file in sorted(site.rglob("*.css")):
        for target in re.findall(r"url\([\"']?((?:https?:)?//[^)\"']+)", file.read_text(encoding="utf-8")):
            found.append(f"{file.relative_to(site)}: fetches {target}")
    return found


def main() -> int:
    """Build the site and check it; one line for each problem."""
    from latex2mathml.converter import convert

    shutil.rmtree(WORK, ignore_errors=True)
    (WORK / "docs").mkdir(parents=True)
    try:
        Assembly(WORK / "docs", convert).write()
    except SiteError as error:
        print(f"docs: {error}", file=sys.stderr)
        return 1
    shutil.copyfile(PROJECT / "docs/site/zensical.toml", WORK / "zensical.toml")
    (WORK / "src").symlink_to(PROJECT / "src")
    zensical = Path(sys.executable).with_name("zensical")
    built = subprocess.run([zensical, "build", "--strict", "--clean"], cwd=WORK, env=os.environ, check=False)
    if built.returncode:
        return built.returncode
    found = problems(WORK / "site")
    for line in found:
        print(f"docs: {line}", file=sys.stderr)
    if not found:
        shutil.rmtree(SITE, ignore_errors=True)
        shutil.move(WORK / "site", SITE)
        print(f"The site is in {SITE.relative_to(PROJECT)}/: open {SITE.relative_to(PROJECT)}/index.html")
    return bool(found)


if __name__ == "__main__":
    sys.exit(main())
