"""The page of architectures is what the descriptors say."""

from pathlib import Path

from kvprune.pages.architectures import page


def test_the_page_is_up_to_date():
    assert (Path(__file__).parents[2] / "docs" / "architectures.md").read_text() == page()
