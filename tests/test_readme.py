"""README's settings tables are generated from the source: `python tests/test_readme.py` writes them anew."""

import json
import re

from conftest import ROOT, SCRIPT, from_env

import train_gpt

README = ROOT / "README.md"
BEGIN, END = "<!-- settings: begin -->\n", "<!-- settings: end -->"
BETWEEN = re.compile(re.escape(BEGIN) + "(.*?)" + re.escape(END), re.S)
COLUMNS = ("variable", "default (study)", "other presets", "allowed", "meaning")


def line(*cells):
    return f"| {' | '.join(cells)} |"


def allowed(name, field):
    """The values that a setting may have, in words; nothing for free text."""
    words = field.metadata["allowed"]
    if name == "HEAD_TYPE":
        words = ", ".join(train_gpt.HEADS)
    if words.endswith(" to 1e12"):
        return f"from {words.split()[0]}"
    return f"empty{words}" if words.startswith(", ") else words


def row(name):
    field = train_gpt.FIELDS[name]
    default = train_gpt.as_text(field.default)
    changes = [f"{preset} {v[name]}" for preset, v in train_gpt.PRESETS.items() if name in v]
    shown = f"`{default}`" if default else "empty"
    doc = field.metadata["doc"]
    return line(f"`{name}`", shown, "; ".join(changes), allowed(name, field), doc)


def groups():
    """The titles inside the class Hyperparameters, each with the variables below it."""
    body = re.search(r"\nclass Hyperparameters:\n(.*?)\n    def ", SCRIPT.read_text(), re.S)[1]
    found = {}
    for title, name in re.findall(r"^    (?:# ([A-Z].*)|(\w+): \w+ = \w*setting\()", body, re.M):
        if title:
            names = found[title] = []
        else:
            names.append(name.upper())
    return found


def settings_section():
    """A sub-heading and a table for each group."""
    parts = []
    for title, names in groups().items():
        head = [f"### {title}", "", line(*COLUMNS), "|---|---|---|---|---|"]
        parts.append("\n".join([*head, *map(row, names), ""]))
    return "\n".join(parts)


def test_every_setting_stands_in_one_titled_group_in_the_order_of_the_source():
    titles = list(groups())
    assert titles[:4] == ["Mode", "Data", "Model shape", "Output head"] and len(titles) == 8
    assert [name for names in groups().values() for name in names] == list(train_gpt.FIELDS)


def test_the_settings_tables_are_current():
    found = BETWEEN.search(README.read_text(encoding="utf-8"))
    assert found, "README.md has lost the markers of its settings tables"
    assert found[1] == settings_section(), "stale: run python tests/test_readme.py"
    assert all(row.count("|") == 6 for row in found[1].splitlines() if row.startswith("|"))


def test_every_command_of_readme_is_one_that_the_program_accepts():
    text = BETWEEN.sub("", README.read_text(encoding="utf-8"))
    text = text.replace("try next: the same with HEAD_TYPE=mos, then ", "")  # the demo's own words
    commands = [line for line in text.splitlines() if re.search(r"=\S+ .*train_gpt\.py", line)]
    assert len(commands) >= 5
    for command in commands:
        before = command.split("train_gpt.py")[0]
        for name, value in dict(head="mos", seed="42", size="8192").items():
            before = before.replace(f"${name}", value).replace(f"${{{name}}}", value)
        from_env(dict(re.findall(r"\b([A-Z][A-Z0-9_]*)='?([^\s']+)", before)))


def test_every_variable_that_readme_names_in_code_is_one_of_the_program_s():
    text = BETWEEN.sub("", README.read_text(encoding="utf-8"))
    known = {*train_gpt.FIELDS, *train_gpt.ALIASES, *train_gpt.PUBLISHED}
    named = set(re.findall(r"`([A-Z][A-Z0-9]*_[A-Z0-9_]*)`", text))
    given = re.findall(r"`([A-Z][A-Z0-9_]*)=([^`]*)`", text)
    assert named and given and named | {name for name, _ in given} <= known
    for name, value in given:
        if name == "HEAD_TYPE":
            assert value in {*train_gpt.HEADS, *train_gpt.HEAD_WORDS}
        elif name in train_gpt.FIELDS:
            train_gpt.parse(name, value, name)


def test_the_top_level_holds_only_what_the_design_names():
    project = {"train_gpt.py", "README.md", "submission.json", "train.log", "requirements.txt"}
    folders = {"tests", "runs", "data"}
    shown = {path.name for path in ROOT.iterdir() if not path.name.startswith((".", "__"))}
    assert project < shown <= project | folders


def test_the_submission_is_whole_within_the_limit_and_of_the_same_run_as_the_log():
    result = json.loads((ROOT / "submission.json").read_text())
    promised = """author github_id name blurb date track seed val_loss val_bpb pre_quant_val_loss
        pre_quant_val_bpb step_stop wallclock_seconds eval_time_seconds bytes_total bytes_code
        bytes_model_int8_zlib hardware pytorch_version head settings"""
    assert set(promised.split()) <= result.keys()
    total = result["bytes_code"] + result["bytes_model_int8_zlib"]
    assert result["bytes_total"] == total <= 16_000_000

    log = (ROOT / "train.log").read_text()
    assert f"val_loss:{result['val_loss']:.8f} val_bpb:{result['val_bpb']:.8f}" in log
    assert f"source_sha256:{result['source_sha256']}" in log
    assert f"Total submission size int8+zlib: {total} bytes" in log


OTHERS = {0.75, 2.93, 1.0980, 99.99}  # PR 908's and PR 1435's own figures; a threshold


def test_every_figure_of_readme_stands_in_a_log_or_in_a_table():
    """Rounded as README has it: in train.log, submission.json, measured.log, H100.md, or in a table of RESULTS.md."""
    number = re.compile(r"(?<![\w.])\d[\d,]*\.\d+(?![\w.])|(?<![\w.])\d{1,3}(?:,\d{3})+(?![\w.])")
    submission = json.loads((ROOT / "submission.json").read_text())
    texts = [json.dumps({name: value for name, value in submission.items() if name != "study"})]
    for path in ("train.log", ".study/measured.log", ".study/H100.md"):
        texts.append((ROOT / path).read_text(encoding="utf-8"))
    results = (ROOT / ".study/RESULTS.md").read_text(encoding="utf-8").splitlines()
    texts += [text for text in results if text.startswith("|")]
    found = re.findall(r"\d[\d,]*\.?\d*", "\n".join(texts))
    known = {float(text.replace(",", "")) for text in found} | OTHERS

    readme, missing = README.read_text(encoding="utf-8"), []
    for name in ("answer", "demo", "results"):
        section = readme.split(f"<!-- {name}: begin -->")[1].split(f"<!-- {name}: end -->")[0]
        for text in number.findall(section):
            value, decimals = float(text.replace(",", "")), len(text.partition(".")[2])
            half = 0.5 * 10**-decimals + 1e-9  # a 5 may have been rounded up there, down here
            if not any(abs(one - value) <= half for one in known):
                missing.append(text)
    assert not missing


if __name__ == "__main__":
    old = README.read_text(encoding="utf-8")
    new = BETWEEN.sub(lambda _: BEGIN + settings_section() + END, old)
    README.write_text(new, encoding="utf-8")
