"""Write README.md from the home page, nbs/index.ipynb: `python -m tools.readme`. A test compares the two."""

from __future__ import annotations

import json
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LINK = re.compile(r"\]\((?!https?:|#|mailto:)([^)]+)\)")


def source(cell: dict) -> str:
    "A cell's text without its `#|` lines."
    return "\n".join(line for line in "".join(cell["source"]).splitlines() if not line.startswith("#|"))


def as_text(output: dict) -> str:
    "An output's plain text; figures have none worth showing."
    data = output.get("data", {})
    text = "" if "image/png" in data else "".join(output.get("text", data.get("text/plain", [])))
    return text.strip("\n")


def markdown(notebook: dict) -> str:
    "The home page as GitHub shows it: prose, code, and the text that the code printed."
    parts = []
    for cell in notebook["cells"]:
        hidden = "#| hide" in "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(LINK.sub(r"](nbs/\1)", source(cell)))
        elif not hidden:
            parts.append(f"```python\n{source(cell)}\n```")
            parts += [f"```text\n{text}\n```" for text in map(as_text, cell["outputs"]) if text]
    note = "<!-- Made from nbs/index.ipynb by `python -m tools.readme`. Edit the notebook. -->"
    return "\n\n".join([note, *parts]) + "\n"


if __name__ == "__main__":
    (ROOT / "README.md").write_text(markdown(json.loads((ROOT / "nbs/index.ipynb").read_text())))
