"""What the benchmark scripts share: run inside `.venv` with the host, and keep generated tables in documents."""

import csv
import importlib.util
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
RESULTS = Path(__file__).parent / "results"
PICTURES = ROOT / "web" / "docs" / "img"  # shipped, and where README and pages find them


def start() -> None:
    """Set up, make the host importable, the pack as `svg2_pack`, and tests/models' modules by their names."""
    sys.path.insert(0, str(ROOT / "scripts"))
    import environment
    import host

    host.activate(environment.ensure(), cpu=True)
    sys.path.insert(0, str(ROOT / "tests" / "models"))
    load_pack()


def load_pack() -> None:
    """The pack as `svg2_pack`; its core needs no host."""
    if "svg2_pack" not in sys.modules:
        spec = importlib.util.spec_from_file_location("svg2_pack", ROOT / "__init__.py", submodule_search_locations=[str(ROOT)])
        sys.modules["svg2_pack"] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules["svg2_pack"])


def need_torch() -> None:
    """Where there is no torch, start over in the checkout's own environment, made if need be."""
    if importlib.util.find_spec("torch") is None:
        sys.path.insert(0, str(ROOT / "scripts"))
        import environment

        environment.ensure()


def read_rows(path: Path) -> list[dict]:
    """The records of a CSV file; none where there is no file."""
    if not path.exists():
        return []
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def write_rows(path: Path, rows: list[dict]) -> None:
    """Records as a whole CSV file, with the fields of the last one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[-1].keys())
        writer.writeheader()
        writer.writerows(rows)


def replace_rows(path: Path, rows: list[dict], key: tuple[str, ...]) -> None:
    """Put records into a CSV file in place of those that are the same in all of `key`."""
    new = {tuple(str(row[k]) for k in key) for row in rows}
    write_rows(path, [row for row in read_rows(path) if tuple(row[k] for k in key) not in new] + rows)


def append_rows(path: Path, rows: list[dict], fields: tuple[str, ...]) -> None:
    """Append records to a CSV file; a new one begins with the names of the fields."""
    new = not path.exists()
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fields)
        if new:
            writer.writeheader()
        writer.writerows(rows)


def processor() -> str:
    """The CPU's name."""
    sys.path.insert(0, str(ROOT / "scripts"))
    import environment

    return environment.processor()


def write_table(document: Path, name: str, table: str) -> None:
    """Replace the text between `<!-- name -->` and `<!-- /name -->` in a Markdown document."""
    begin, end = f"<!-- {name} -->", f"<!-- /{name} -->"
    text = document.read_text(encoding="utf-8")
    head, rest = text.split(begin)
    _, tail = rest.split(end)
    document.write_text(f"{head}{begin}\n{table.strip()}\n{end}{tail}", encoding="utf-8")


def markdown(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
