"""One line of results.jsonl: `python record.py ROW RUN_FOLDER [SPECTRUM]`, the run's submission.json with only the settings
that differ from the defaults, and what MODE=eval EVAL_SPECTRUM=1 prints of its artifact."""

import json
import sys
from dataclasses import asdict
from pathlib import Path

sys.path.insert(0, ".")  # the source that made the run
import train_gpt  # noqa: E402

row, folder, spectrum = sys.argv[1], Path(sys.argv[2]), sys.argv[3:]
result = json.loads((folder / "submission.json").read_text())
defaults = asdict(train_gpt.Hyperparameters())
settings = {name: value for name, value in result["settings"].items() if defaults[name] != value}
for name in ("author", "github_id", "track", "blurb", "name"):
    result.pop(name)
if spectrum:
    result["spectrum"] = json.loads(spectrum[0])

print(json.dumps({"row": row, **result, "settings": settings}))
