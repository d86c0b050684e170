"""MODE=table: its figures, its order, its words about runs that it cannot compare, and its picture."""

import json
import shutil
import sys

import numpy as np
import pytest
from conftest import cpu_world, from_env
from scipy import stats

import train_gpt
from train_gpt import Hyperparameters, UserError


@pytest.mark.filterwarnings("ignore:Precision loss")  # one sample is constant
def test_welch_equals_scipy():
    rng = np.random.default_rng(0)
    pairs = [
        ([1.0, 1.0], [1.0, 1.1]),
        ([1.3, 1.3001], [1.0, 1.1]),
    ]  # nearly one degree of freedom
    for sizes in (2, 2), (3, 3), (3, 8), (6, 2), (40, 50):
        pairs.append([rng.normal(mean, 0.01, n) for mean, n in zip((1.2, 1.21), sizes)])
    for a, b in pairs:
        t, p, half = train_gpt.welch(a, b)
        want = stats.ttest_ind(a, b, equal_var=False)
        interval = want.confidence_interval(0.95)
        assert t == pytest.approx(want.statistic, rel=1e-9, abs=1e-9)
        assert p == pytest.approx(want.pvalue, rel=1e-3, abs=1e-5)
        assert half == pytest.approx((interval.high - interval.low) / 2, rel=1e-3)


# ---- runs, as folders ----


def put_run(root, name, head="tied", seed=1, bpb=1.5, chosen=(), losses=True, **changes):
    """A finished run; `changes` are of its result or of its settings."""
    folder = root / "runs" / name
    folder.mkdir(parents=True)
    own = dict(Hyperparameters().as_dict(), head_type=head, seed=seed, run_id=name)
    result = dict(
        val_bpb=bpb,
        val_loss=2.5,
        head=head,
        seed=seed,
        step_stop=100,
        wallclock_seconds=20.0,
        bytes_total=15_900_000,
        source_sha256="a" * 64,
        data_sha256="d" * 64,
        hardware="1 x CPU",
        pytorch_version="2.13.0",
        chosen=["SEED", "RUN_ID", "HEAD_TYPE", *chosen],
    )
    result |= {key: value for key, value in changes.items() if key in result}
    own |= {key: value for key, value in changes.items() if key not in result}
    (folder / "submission.json").write_text(json.dumps(dict(result, settings=own)))

    lines = [dict(kind="val", step=8, val_loss=0.9, train_seconds=16)]
    for i in range(9) if losses else ():
        lines.append(dict(kind="train", step=i, train_loss=7 - i, train_seconds=2 * i))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.fixture
def table(tmp_path, monkeypatch, capsys):
    """Prints the table of this folder's runs; returns its rows as lists of cells, and all text."""

    def call(picture=False, **environ):
        with monkeypatch.context() as patch:
            patch.chdir(tmp_path)
            if not picture:
                patch.setattr(train_gpt, "draw", lambda rows, folder: "left out")
            s = from_env(dict(MODE="table", **environ))
            assert train_gpt.run_table(s, cpu_world(), None) == 0
        text = capsys.readouterr().out
        lines = [line for line in text.splitlines() if line.startswith("| ")]
        cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
        assert {len(row) for row in cells} == {8}
        return cells[1:], text

    return call


def test_seeds_are_grouped_and_tested_against_tied(tmp_path, table):
    for seed, tied, mos in (42, 1.500, 1.490), (1337, 1.502, 1.493), (2024, 1.501, 1.491):
        put_run(tmp_path, f"tied-{seed}", seed=seed, bpb=tied)
        sizes = dict(bytes_total=15_000_000 + seed, wallclock_seconds=seed, step_stop=seed)
        put_run(tmp_path, f"mos-{seed}", "mos", seed, mos, ["HEAD_K"], head_k=4, **sizes)
    want = stats.ttest_ind([1.490, 1.493, 1.491], [1.500, 1.502, 1.501], equal_var=False)
    test = f"-0.00967 (t {want.statistic:.2f}, p {want.pvalue:.2g})"
    seeds, bpb = "[1337, 2024, 42]", "1.49133 +- 0.00153"
    (tied, mos), _ = table()
    assert tied == [
        "tied",
        "HEAD_K=2",
        seeds,
        "1.50100 +- 0.00100",
        "-",
        "15900000",
        "200.0",
        "100",
    ]
    assert mos == ["mos", "HEAD_K=4", seeds, bpb, test, "15002024", "1000.0", "1134"]


def test_tied_stands_first_and_the_others_by_their_mean_bpb(tmp_path, table):
    means = dict(wide=1.2, mos=1.4, tied=1.45, delta=1.5, simplex=2.0)
    for head, bpb in means.items():
        put_run(tmp_path, head, head, bpb=bpb)
    put_run(tmp_path, "mos-2", "mos", seed=2, bpb=1.7)  # now 1.55 in the mean
    put_run(tmp_path, "tied-small", bpb=1.9, chosen=["NUM_LAYERS"], num_layers=5)
    rows, _ = table()
    assert [row[0] for row in rows] == ["tied", "tied", "wide", "delta", "mos", "simplex"]
    assert [row[3][:4] for row in rows[:2]] == ["1.45", "1.90"]


def test_a_head_is_compared_with_the_tied_run_whose_settings_are_most_like_its_own(tmp_path, table):
    for layers, tied, mos in (5, 1.9, 1.8), (11, 1.5, 1.6):
        put_run(tmp_path, f"tied-{layers}", bpb=tied, chosen=["NUM_LAYERS"], num_layers=layers)
        put_run(tmp_path, f"mos-{layers}", "mos", bpb=mos, num_layers=layers)
    rows, _ = table()
    assert [row[1] for row in rows] == [f"NUM_LAYERS={n}" for n in (11, 5, 11, 5)]
    assert [row[4] for row in rows] == ["-", "-", "+0.10000", "-0.10000"]
    for name in ("tied-5", "tied-11"):
        shutil.rmtree(tmp_path / "runs" / name)
    assert [row[4] for row in table()[0]] == ["-", "-"]  # nothing to compare with


def test_only_what_a_user_chose_and_what_differs_stands_under_the_differences(tmp_path, table):
    put_run(tmp_path, "a", chosen=["NUM_LAYERS", "TRAIN_LOG_EVERY", "USE_EMA"], train_log_every=5)
    changes = dict(head_lr=0.01, use_ema=False, matrix_lr=0.1)
    put_run(tmp_path, "b", "untied", chosen=["MATRIX_LR"], **changes)
    rows, _ = table()
    assert rows[0][1] == "MATRIX_LR=0.025 USE_EMA=1"
    assert rows[1][1] == "MATRIX_LR=0.1 USE_EMA=0"


def test_runs_that_differ_in_seed_name_or_logging_alone_are_one_configuration(tmp_path, table):
    put_run(tmp_path, "a", seed=1)
    put_run(tmp_path, "b", seed=2, train_log_every=7, mode="train", author="x")
    put_run(tmp_path, "c", seed=3, logit_softcap=20.0)
    rows, _ = table()
    assert [row[2] for row in rows] == ["[1, 2]", "[3]"]


def test_one_seed_or_equal_figures_get_no_p_value(tmp_path, table):
    for seed in (1, 2):
        put_run(tmp_path, f"tied-{seed}", seed=seed)
        put_run(tmp_path, f"mos-{seed}", "mos", seed, bpb=1.75)
    put_run(tmp_path, "simplex", "simplex", bpb=2.0)
    (_, mos, simplex), _ = table()
    assert (mos[4], simplex[4]) == ("+0.25000", "+0.50000")


# ---- what cannot be compared, or read ----


def test_differences_of_source_data_machine_and_torch_are_said(tmp_path, table):
    put_run(tmp_path, "a")
    others = dict(source_sha256="b" * 64, data_sha256="e" * 64, hardware="8 x H100")
    put_run(tmp_path, "b", seed=2, **others)
    _, text = table()
    for name in others:
        assert f"the runs differ in {name}: " in text
    assert "1 x CPU, 8 x H100" in text and "differ in pytorch_version" not in text


def test_unfinished_and_damaged_runs_are_named_and_do_not_stop_the_table(tmp_path, table):
    put_run(tmp_path, "good")
    genuine = json.loads((tmp_path / "runs/good/submission.json").read_text())
    texts = dict(cut='{"val_bpb": 1.', list="[1, 2]", old='{"val_bpb": 1.4}', empty="")
    strange = dict(seed=[1], val_bpb=float("nan"), step_stop=10**400, wallclock_seconds="x")
    strange |= dict(bytes_total=None, settings=3, val_loss=1e308)
    texts |= {name: json.dumps({**genuine, name: value}) for name, value in strange.items()}
    for name, text in texts.items():
        (tmp_path / "runs" / name).mkdir()
        (tmp_path / "runs" / name / "submission.json").write_text(text)
    (tmp_path / "runs/busy").mkdir()
    rows, out = table()
    assert [row[0] for row in rows] == ["tied"] and "runs/busy: not finished" in out
    for name in texts:
        assert f"runs/{name}: not finished, or damaged (" in out
    (tmp_path / "runs/picture.png").touch()  # no folder, so no run
    assert "picture.png" not in table()[1]


def test_choices_and_settings_of_another_kind_do_not_stop_the_table(tmp_path, table):
    put_run(tmp_path, "good")
    put_run(tmp_path, "mos", "mos")
    result = json.loads((tmp_path / "runs/mos/submission.json").read_text())
    damages = dict(number=dict(chosen=5), mixed=dict(chosen=["A", 3]), null=dict(chosen=None))
    damages["list"] = dict(settings={**result["settings"], "ve_layers": [1, 2]})
    for name, damage in damages.items():
        (tmp_path / "runs" / name).mkdir()
        path = tmp_path / "runs" / name / "submission.json"
        path.write_text(json.dumps({**result, **damage}))
        rows, _ = table()
        assert [row[0] for row in rows][:2] == ["tied", "mos"]
        path.unlink()


def test_where_no_run_can_be_read_it_says_why(tmp_path, table):
    with pytest.raises(UserError, match=r"^RUNS=nothing/\*: must match a finished run$"):
        table(RUNS="nothing/*")
    (tmp_path / "runs/a").mkdir(parents=True)
    (tmp_path / "runs/a/submission.json").write_text("[")
    (tmp_path / "runs/b").mkdir()
    with pytest.raises(UserError) as error:
        table()
    message = str(error.value)
    assert message.startswith("RUNS=runs/*: must match a finished run; runs/a: ")
    assert "runs/b: not finished" in message


FORGED = "x|y\n| tied | 9 |\x1b[31m\u202e"


def test_a_stranger_s_strings_cannot_forge_cells_lines_or_colours(tmp_path, table):
    put_run(tmp_path, "a", hardware=FORGED)
    put_run(tmp_path, "b", head=FORGED, chosen=["INIT_TYPE"], init_type=FORGED)
    (tmp_path / "runs" / "c\n| d").mkdir()
    rows, text = table()
    assert rows[1][0].startswith("x?y?? tied ? 9 ?") and "INIT_TYPE=x?y?" in rows[1][1]
    assert "hardware: 1 x CPU, x?y?" in text and "runs/c?? d: not finished" in text
    assert len(rows) == 2 and all(c.isprintable() or c == "\n" for c in text)


def test_the_names_of_a_stranger_s_settings_cannot_forge_them_either(tmp_path, table):
    put_run(tmp_path, "a")
    put_run(tmp_path, "b", "mos", chosen=[FORGED.upper()], **{FORGED.lower(): 1})
    rows, text = table()
    assert len(rows) == 2 and all(c.isprintable() or c == "\n" for c in text)


# ---- the picture ----


@pytest.fixture
def figure(monkeypatch):
    """A list that gets matplotlib's figures as they are saved."""
    kind, figures = pytest.importorskip("matplotlib.figure").Figure, []
    save = kind.savefig
    monkeypatch.setattr(kind, "savefig", lambda f, *a, **k: (figures.append(f), save(f, *a, **k)))
    return figures


def test_the_picture_shows_losses_and_gains_over_tied_with_their_intervals(tmp_path, table, figure):
    for seed, tied, mos in (1, 1.50, 1.49), (2, 1.52, 1.48):
        put_run(tmp_path, f"tied-{seed}", seed=seed, bpb=tied)
        put_run(tmp_path, f"mos-{seed}", "mos", seed, mos)
    put_run(tmp_path, "wide", "wide", bpb=1.6)
    _, text = table(picture=True)
    assert "picture: runs/learning_curves.png" in text
    assert (tmp_path / "runs/learning_curves.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"

    # a colour a head; a line and a dot a seed; the first 5% of the time left out
    curves, gains = figure[0].axes
    assert [label.get_text().split()[1] for label in curves.get_legend().texts] == [
        "tied",
        "mos",
        "wide",
    ]
    lines = [line for line in curves.lines if line.get_marker() == "None"]
    dots = [line for line in curves.lines if line.get_marker() == "."]
    assert [line.get_color() for line in lines] == ["C0", "C0", "C1", "C1", "C2"]
    assert all(list(line.get_xdata()) == [2 * i for i in range(1, 9)] for line in lines)
    assert all(list(line.get_ydata()) == [7 - i for i in range(1, 9)] for line in lines)
    assert [dot.get_color() for dot in dots] == ["C0", "C1", "C2"]
    assert {dot.get_linestyle() for dot in dots} == {"None"}
    for seeds, dot in zip((2, 2, 1), dots):
        assert dot.get_xydata().tolist() == [[20.0, 2.5]] * seeds

    # the means' differences, and their 95% intervals by scipy
    want = stats.ttest_ind([1.49, 1.48], [1.50, 1.52], equal_var=False).confidence_interval(0.95)
    mos, wide = gains.containers
    assert (mos[0].get_xdata()[0], wide[0].get_xdata()[0]) == pytest.approx((-0.025, 0.09))
    (segment,) = mos[2][0].get_segments()
    assert segment[:, 0] == pytest.approx([want.low, want.high], rel=1e-3)
    names = [label.get_text() for label in gains.get_yticklabels()]
    places = [container[0].get_ydata(orig=False)[0] for container in (mos, wide)]
    assert names == ["1 mos", "2 wide"] and places == list(gains.get_yticks())


def test_a_run_without_training_lines_does_not_hinder_the_picture(tmp_path, table, figure):
    put_run(tmp_path, "a")
    put_run(tmp_path, "b", "mos", losses=False)  # of ITERATIONS=0, or of TRAIN_LOG_EVERY=0
    _, text = table(picture=True)
    assert "picture: runs/learning_curves.png" in text and "no picture" not in text


def test_a_stranger_s_strings_are_not_read_as_mathematics(tmp_path, table, figure):
    put_run(tmp_path, "a$x_{$")
    put_run(tmp_path, "b", head="$x_{$", chosen=["INIT_TYPE"], init_type="$y^{$")
    _, text = table(picture=True)
    assert "picture: runs/learning_curves.png" in text and "no picture" not in text


def test_what_hinders_the_picture_does_not_hinder_the_table(tmp_path, table, monkeypatch):
    put_run(tmp_path, "a")
    (tmp_path / "runs/learning_curves.png").mkdir()
    for missing in (), ("matplotlib", "matplotlib.figure"):
        for name in missing:
            monkeypatch.setitem(sys.modules, name, None)
        rows, text = table(picture=True)
        assert len(rows) == 1 and "no picture: " in text
    monkeypatch.undo()
    (tmp_path / "runs/learning_curves.png").rmdir()
    with open(tmp_path / "runs/a/metrics.jsonl", "a") as metrics:
        metrics.write('{"kind": "tr')  # torn by a kill: the other runs' curves are drawn
    rows, text = table(picture=True)
    assert len(rows) == 1 and "picture: runs/learning_curves.png" in text


def test_a_real_run_is_a_row(tmp_path, finished, table):
    shutil.copytree(finished / "runs" / "done", tmp_path / "runs" / "done")
    result = json.loads((finished / "runs/done/submission.json").read_text())
    (row,), _ = table(picture=True)
    assert row[:3] == ["mos", "", f"[{result['seed']}]"]
    assert row[3:6] == [f"{result['val_bpb']:.5f}", "-", str(result["bytes_total"])]
