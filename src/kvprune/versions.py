"""What a figure was made with."""

import platform
from importlib.metadata import PackageNotFoundError, version


def versions() -> dict[str, str]:
    """Of what took part; kvprune's is "source" where it runs from a folder without being installed."""
    found = {name: version(name) for name in ("torch", "transformers", "safetensors")}
    try:
        own = version("kvprune")
    except PackageNotFoundError:
        own = "source"
    return {"kvprune": own, **found, "python": platform.python_version()}
