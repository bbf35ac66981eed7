"""Make the pages of the site that are not files of docs/: the README, notebooks, the reference.

A hook of mkdocs. Links from a page to a file of the repository outside docs/ lead to a copy of it.
"""

from __future__ import annotations

import json
import re
from pathlib import Path, PurePosixPath
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parent.parent
PAGES = {
    "index.md": "README.md",
    "contributing.md": "CONTRIBUTING.md",
    "changelog.md": "CHANGELOG.md",
}
"""Page of the site -> file of the repository."""
REFERENCE = {
    "Functions": ["launch.api.forget", "launch.api.train", "launch.api.evaluate"],
    "What they take and return": ["launch.inputs.Options", "launch.inputs.Result"],
    "Models": [
        "launch.api.load_model",
        "engine.models.classifier.Classifier",
        "loaders.preset.Preset",
    ],
    "Methods": [
        "engine.method.Method",
        "engine.method.Phase",
        "engine.method.Run",
        "engine.recipe.Recipe",
    ],
    "Metrics": ["eval.metrics.registry.metric", "eval.metrics.registry.Facts"],
    "Exceptions": ["errors"],
}
"""Title -> names below letheon whose docstrings are shown."""
LINK = re.compile(r"(\]\()([^)#\s]+)")


def on_files(files: Files, config: Any) -> Files:
    """Add the pages made of other files, and copies of the files that pages link to."""
    for name, source in PAGES.items():
        text = (ROOT / source).read_text(encoding="utf-8")
        files.append(File.generated(config, name, content=rewrite(text, "", PurePosixPath())))
    for path in sorted((ROOT / "docs" / "notebooks").glob("*.ipynb")):
        page = f"notebooks/{path.stem}.md"
        files.append(File.generated(config, page, content=notebook_page(path)))
    files.append(File.generated(config, "reference.md", content=reference_page()))
    for source in sorted(linked_files()):
        copy = f"files/{source}.txt"
        files.append(File.generated(config, copy, abs_src_path=str(ROOT / source)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Rewrite the links of a page of docs/ that leave it."""
    if page.file.generated_by:
        return markdown
    place = PurePosixPath(page.file.src_uri).parent
    return rewrite(markdown, "docs" / place, place)


def linked_files() -> set[str]:
    """Find the files of the repository outside docs/ that a page links to."""
    found = set()
    for page in [*(ROOT / "docs").rglob("*.md"), *(ROOT / name for name in PAGES.values())]:
        for _, target in LINK.findall(page.read_text(encoding="utf-8")):
            place = (page.parent / target).resolve()
            if place.is_file() and place.is_relative_to(ROOT):
                found.add(place.relative_to(ROOT).as_posix())
    return {name for name in found - {*PAGES.values()} if not name.startswith("docs/")}


def rewrite(text: str, folder: str | PurePosixPath, place: PurePosixPath) -> str:
    """Rewrite the relative links of a page.

    Args:
        text: the page, in Markdown.
        folder: where it lies in the repository.
        place: where it lies in the site.
    """
    pages = {source: page for page, source in PAGES.items()}

    def lead(match: re.Match[str]) -> str:
        file = (ROOT / folder / match[2]).resolve()
        if "://" in match[2] or not file.is_relative_to(ROOT) or not file.exists():
            return match[0]  # mkdocs names what is not there
        name = file.relative_to(ROOT).as_posix()
        inside = re.sub(r"\.ipynb$", ".md", name.removeprefix("docs/"))
        goal = inside if name.startswith("docs/") else pages.get(name, f"files/{name}.txt")
        return f"{match[1]}{'../' * len(place.parts)}{goal}"

    return LINK.sub(lead, text)


def notebook_page(path: Path) -> str:
    """Write a notebook as a page."""
    parts = []
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        text = "".join(cell["source"])
        parts.append(text if cell["cell_type"] == "markdown" else f"```python\n{text}\n```")
    return "\n\n".join(parts) + "\n"


def reference_page() -> str:
    """Write the directives of mkdocstrings for the public names."""
    lines = ["# Python reference", "", "Made from the docstrings.", ""]
    for title, names in REFERENCE.items():
        lines += [f"## {title}", ""]
        for name in names:
            lines += [f"::: letheon.{name}", "    options:", "      heading_level: 3", ""]
    return "\n".join(lines)
