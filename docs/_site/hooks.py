"""What mkdocs does beside its own: pages that lie outside of docs/, their links, and pictures for light and dark.

On the repository README.md and CONTRIBUTING.md link to docs/, and docs/ to them; here all are pages of one folder.
"""

import re
from pathlib import Path

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[2]
OUTSIDE = {"README.md": "index.md", "CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}
PICTURE = re.compile(
    r'<picture>\s*<source media="\(prefers-color-scheme: dark\)" srcset="(?P<dark>[^"]+)">\s*'
    r'<img alt="(?P<alt>[^"]*)" src="(?P<light>[^"]+)"[^>]*>\s*</picture>'
)


# Pages that the menu has where the file is there.
OPTIONAL = {"changelog.md": ROOT / "CHANGELOG.md", "security.md": ROOT / "docs" / "security.md"}


def on_config(config):
    """Put them into the last part of the menu."""
    (last,) = config["nav"][-1].values()
    last += [page for page, file in OPTIONAL.items() if file.is_file() and page not in last]
    return config


def on_files(files: Files, config) -> Files:
    """Add the pages from outside of docs/ that are there."""
    for name, page in OUTSIDE.items():
        if (ROOT / name).is_file():
            files.append(File.generated(config, page, content=(ROOT / name).read_text(encoding="utf-8")))
    return files


def on_page_markdown(markdown: str, page, **_) -> str:
    """Links as they are in one folder. A <picture> becomes two images, of which the chosen scheme shows one; the
    reader's toggle does not change what <picture> asks for."""
    outside = page.file.src_uri in OUTSIDE.values()
    for name, target in OUTSIDE.items():
        markdown = re.sub(rf"\]\((\.\./)?{re.escape(name)}(?=[)#])", f"]({target}", markdown)
    if outside:
        markdown = re.sub(r"\]\(docs/", "](", markdown)
        markdown = re.sub(r'((?:src|srcset)=")docs/', r"\1", markdown)
    return PICTURE.sub(r"![\g<alt>](\g<light>#only-light)\n![\g<alt>](\g<dark>#only-dark)", markdown)
