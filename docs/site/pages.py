"""Give mkdocs the pages where they lie, README.md and docs/ included, so that links are the same here and in the repository."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files

ROOT = Path(__file__).parents[2]
SHOWN = ("*.md", "LICENSE", "docs/*.md", "docs/guides/*.md", "docs/*.png", "docs/*.svg", "notebooks/*.ipynb")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add all pages and pictures of the repository; mkdocs itself takes only what lies below ``docs_dir``."""
    from mkdocs.structure.files import File

    for pattern in SHOWN:
        for path in sorted(ROOT.glob(pattern)):
            name = path.relative_to(ROOT).as_posix()
            files.append(File(name, str(ROOT), config.site_dir, config.use_directory_urls))
    return files
