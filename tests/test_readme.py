"""README's settings table is generated from the dataclass: `python tests/test_readme.py` writes it anew."""

import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import train_gpt  # noqa: E402

README = ROOT / "README.md"
BEGIN, END = "<!-- settings: begin -->\n", "<!-- settings: end -->"


def text(value: object) -> str:
    return str(int(value)) if isinstance(value, bool) else f"{value}"


def row(name: str, field) -> str:
    meta = field.metadata
    choices = tuple(train_gpt.HEADS) if name == "HEAD_TYPE" else meta["choices"]
    allowed = ", ".join(choices)
    if field.type == "bool":
        allowed = "0, 1"
    elif meta["low"] is not None:
        allowed = f"{meta['low']} .. {meta['high']}"
    changed = [
        f"{preset} {text(values[field.name])}"
        for preset, values in train_gpt.PRESETS.items()
        if field.name in values
    ]
    default = f"`{text(field.default)}`" if field.default != "" else "empty"
    return f"| `{name}` | {default} | {'; '.join(changed)} | {allowed} | {meta['doc']} |"


def table() -> str:
    rows = [row(name, field).replace("|", "|") for name, field in train_gpt.FIELDS.items()]
    return (
        "\n".join(
            [
                "| variable | default (study) | other presets | allowed | meaning |",
                "|---|---|---|---|---|",
                *rows,
            ]
        )
        + "\n"
    )


def test_settings_table_is_current():
    found = re.search(
        re.escape(BEGIN) + "(.*?)" + re.escape(END), README.read_text(encoding="utf-8"), re.S
    )
    assert found, "README.md has lost the markers of its settings table"
    assert found.group(1) == table(), (
        "README's settings table is stale: run python tests/test_readme.py"
    )


def test_top_level_holds_only_what_the_design_names():
    allowed = {
        "train_gpt.py",
        "README.md",
        "submission.json",
        "train.log",
        "requirements.txt",
        "tests",
        "runs",
        "data",
    }
    assert {p.name for p in ROOT.iterdir() if not p.name.startswith((".", "__"))} <= allowed


def test_submission_says_which_data_machine_and_head():
    result = json.loads((ROOT / "submission.json").read_text())
    for key in (
        "author",
        "github_id",
        "name",
        "blurb",
        "date",
        "track",
        "seed",
        "val_loss",
        "val_bpb",
        "pre_quant_val_loss",
        "pre_quant_val_bpb",
        "step_stop",
        "wallclock_seconds",
        "eval_time_seconds",
        "bytes_total",
        "bytes_code",
        "bytes_model_int8_zlib",
        "hardware",
        "pytorch_version",
        "head",
        "settings",
    ):
        assert key in result, key
    assert (
        result["bytes_total"]
        == result["bytes_code"] + result["bytes_model_int8_zlib"]
        <= 16_000_000
    )


def test_submission_and_log_are_of_one_run():
    result = json.loads((ROOT / "submission.json").read_text())
    log = (ROOT / "train.log").read_text()
    assert f"val_loss:{result['val_loss']:.8f} val_bpb:{result['val_bpb']:.8f}" in log
    assert f"source_sha256:{result['source_sha256']}" in log
    assert f"Total submission size int8+zlib: {result['bytes_total']} bytes" in log


if __name__ == "__main__":
    old = README.read_text(encoding="utf-8")
    README.write_text(
        re.sub(
            re.escape(BEGIN) + ".*?" + re.escape(END),
            lambda _: BEGIN + table() + END,
            old,
            flags=re.S,
        ),
        encoding="utf-8",
    )
