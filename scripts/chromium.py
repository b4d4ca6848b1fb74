"""Find the browser for what needs the editor: pictures and tests."""

import os
import shutil


def find() -> str | None:
    """The system's Chromium or Chrome; $SVG2_CHROMIUM names another. None: there is none."""
    names = (os.environ.get("SVG2_CHROMIUM"), "chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
    return next((path for name in names if name and (path := shutil.which(name))), None)
