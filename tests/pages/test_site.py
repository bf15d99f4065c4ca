"""What the site says of the code is what the code has. `make docs` builds it, with broken links as errors."""

import re
from pathlib import Path

import kvprune
from kvprune.pages import commands

DOCS = Path(__file__).parents[2] / "docs"


def test_every_public_name_is_on_the_page_of_the_api():
    shown = re.findall(r"^::: (\S+)$", (DOCS / "api.md").read_text(), re.M)
    homes = {
        f"{kvprune._HOMES[name]}.{name}" if name in kvprune._HOMES else f"kvprune.{name}" for name in kvprune.__all__
    }
    assert sorted(shown) == sorted(homes)


def test_the_page_of_commands_is_what_the_commands_are():
    assert (DOCS / "commands.md").read_text() == commands.page()
    assert {"## kvprune prune", "### kvprune study depth"} <= set(commands.page().splitlines())
