"""Run by ComfyUI-Manager after installing requirements.txt: checks the prebuilt kernels and says what will run here.

It installs, downloads and changes nothing but one status file, .cache/install_status.json in this folder. The pack
works the same if this never ran. Standard library only; its output is ASCII, and its exit code 0, whatever is found.
"""

import importlib
import importlib.util
import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent
STATUS = ROOT / ".cache" / "install_status.json"


def main(**options):
    """Survey this machine, print what was found, and write it to the status file. options: of survey(), for tests."""
    survey = load_survey()
    found = survey.survey(**options)
    version = pack_version()
    say("version " + version)
    for line in survey.lines(found):
        say(line)
    write_status({"format": 1, "version": version, **found})


def load_survey():
    """cuda/survey.py, by file location: `cuda` is also the name of a package of NVIDIA's, and the embedded Python of
    Windows does not look for modules in the folder of the script it runs."""
    name = "svg2_install_cuda"
    spec = importlib.util.spec_from_file_location(
        name, ROOT / "cuda" / "__init__.py", submodule_search_locations=[str(ROOT / "cuda")]
    )
    sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules[name])
    return importlib.import_module(name + ".survey")


def pack_version():
    found = re.search(r'^version = "([^"]+)"', (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.MULTILINE)
    return found.group(1) if found else "unknown"


def write_status(status):
    try:
        STATUS.parent.mkdir(exist_ok=True)
        STATUS.write_text(json.dumps(status, indent=1) + "\n", encoding="ascii")
    except OSError as error:  # a read-only folder: nothing depends on the file
        say("the status file was not written (" + type(error).__name__ + "); that does no harm")


def say(text):
    print("[SVG2] " + text.encode("ascii", "backslashreplace").decode(), flush=True)


if __name__ == "__main__":
    try:
        main()
    except BaseException as error:  # an information page must not fail an installation
        try:
            say("check skipped: " + type(error).__name__ + ": " + str(error))
        except Exception:
            sys.stdout = None  # a closed pipe would fail again when Python flushes it at exit
