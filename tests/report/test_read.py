"""Reading run directories, whole and damaged."""

import json
import math

import numpy as np
import pyarrow.parquet
import pytest

from accel_gpt2.errors import UserError
from accel_gpt2.report.read import read_run


def append(directory, text):
    with (directory / "log.jsonl").open("a") as file:
        file.write(text)


def step_row(step, loss, class_index=0, event="step"):
    return json.dumps(
        {
            "event": event,
            "class_index": class_index,
            "class_name": "World",
            "step": step,
            "loss": loss,
            "validation_bits_per_token": loss,
            "best": True,
        }
    )


def test_losses_become_bits_per_token(trained_run):
    """Every logged step is there, in bits, in order, beside its validation points."""
    logged = [json.loads(line) for line in (trained_run / "log.jsonl").read_text().splitlines()]
    curves = read_run(trained_run).curves
    assert [curve.class_name for curve in curves] == ["World", "Sports", "Business"]
    for curve in curves:
        own = [row for row in logged if row.get("class_index") == curve.class_index]
        losses = [row["loss"] * math.log2(math.e) for row in own if row["event"] == "step"]
        assert len(losses) == 12
        assert [point.bits for point in curve.training] == pytest.approx(losses)
        assert [point.step for point in curve.validation] == [40, 80, 120]
        assert curve.num_steps == 120
        assert curve.num_tokens == 4096 * 120


def test_the_best_checkpoint_is_the_last_that_was_flagged(trained_run):
    """The star stands at the lowest validation point, which is not the last one here."""
    for curve in read_run(trained_run).curves:
        lowest = min(curve.validation, key=lambda point: point.bits)
        assert curve.best == lowest
        assert curve.best.step < 120


def test_after_a_resume_the_last_row_of_a_step_wins(trained_run):
    """A repeated row replaces its forerunner, in its place, and no other class's."""
    before = read_run(trained_run).curves
    append(trained_run, step_row(50, 9.0) + "\n" + step_row(40, 1.5, event="evaluate") + "\n")
    after = read_run(trained_run).curves
    assert [p.step for p in after[0].training] == [p.step for p in before[0].training]
    assert after[0].training[4].bits == pytest.approx(9.0 * math.log2(math.e))
    assert after[0].validation[0].bits == 1.5
    assert after[1:] == before[1:]


def test_a_half_written_last_line_is_no_damage(trained_run):
    """A run that is writing at this moment reads without a notice."""
    before = read_run(trained_run)
    append(trained_run, step_row(130, 3.0)[:40])
    after = read_run(trained_run)
    assert after.curves == before.curves
    assert after.notices == ()


def test_a_broken_line_inside_the_log_is_reported(trained_run):
    """A line that a dying machine left half-written costs that line and is said."""
    append(
        trained_run, step_row(130, 3.0)[:40] + step_row(140, 3.0) + "\n" + step_row(150, 3.0) + "\n"
    )
    run = read_run(trained_run)
    assert run.curves[0].num_steps == 150
    assert len(run.notices) == 1
    assert run.notices[0].startswith("1 of ")


@pytest.mark.parametrize(
    "row", ['{"event": "limit"}', "[1, 2]", '{"event": "step", "class_index": null, "step": 3}', ""]
)
def test_other_rows_are_left_alone(trained_run, row):
    """Events that are no curve's change nothing and are no damage."""
    before = read_run(trained_run)
    append(trained_run, row + "\n" + row + "\n")
    assert read_run(trained_run) == before


def test_a_gap_in_the_loss_is_not_a_number(trained_run):
    """A null loss stays a gap; it is not drawn as zero."""
    append(trained_run, step_row(130, None) + "\n")
    assert math.isnan(read_run(trained_run).curves[0].training[-1].bits)


@pytest.mark.parametrize(
    ("key", "unit"), [("validation_bits_per_document", "document"), ("loss_of_its_own", None)]
)
def test_validation_says_what_losses_are_per(trained_run, key, unit):
    """Bits per document are read as such; a curve whose unit nothing says is left out."""
    path = trained_run / "log.jsonl"
    path.write_text(path.read_text().replace('"validation_bits_per_token"', f'"{key}"'))
    curves = read_run(trained_run).curves
    assert [curve.unit for curve in curves] == ([unit] * 3 if unit else [])
    assert all(not math.isnan(point.bits) for curve in curves for point in curve.validation)


def test_before_the_first_validation_the_recipe_says_it(trained_run):
    """The training losses of a classification head are per document, all others per token."""
    path = trained_run / "log.jsonl"
    rows = path.read_text().splitlines(keepends=True)
    path.write_text("".join(row for row in rows if '"evaluate"' not in row))
    assert {curve.unit for curve in read_run(trained_run).curves} == {"token"}
    recipe = trained_run / "recipe.yaml"
    recipe.write_text(
        recipe.read_text().replace("objective: generative", "objective: classification")
    )
    assert {curve.unit for curve in read_run(trained_run).curves} == {"document"}


def test_the_surest_mistakes(evaluated_run):
    """They are the ten wrong documents with the largest margin, by a plain sort of them all."""
    table = pyarrow.parquet.read_table(evaluated_run / "evaluation" / "scores.parquet").to_pylist()
    wrong = [row for row in table if row["label"] != row["prediction"]]
    assert len(wrong) > 10

    def margin(row):
        return row[f"log_likelihood_{row['prediction']}"] - row[f"log_likelihood_{row['label']}"]

    expected = sorted(wrong, key=margin, reverse=True)[:10]
    mistakes = read_run(evaluated_run).mistakes
    assert [mistake.document for mistake in mistakes] == [row["document"] for row in expected]
    np.testing.assert_allclose([m.margin_nats for m in mistakes], [margin(r) for r in expected])


@pytest.mark.parametrize("name", ["recipe.yaml", "plan.json", "environment.json"])
@pytest.mark.parametrize("content", ["{", "[1, 2]", ": :\n- {"])
def test_damaged_facts_are_left_out_and_named(trained_run, name, content):
    """A file that only informs does not stop the report, and its absence is said."""
    (trained_run / name).write_text(content)
    assert read_run(trained_run).notices == (f"{name} could not be read and is left out.",)


def test_damaged_scores_are_left_out_and_named(evaluated_run):
    """A truncated scores.parquet costs the table of mistakes only."""
    path = evaluated_run / "evaluation" / "scores.parquet"
    path.write_bytes(path.read_bytes()[:1000])
    run = read_run(evaluated_run)
    assert run.mistakes == ()
    assert run.notices == ("evaluation/scores.parquet could not be read and is left out.",)


@pytest.mark.parametrize("content", ["", '{"accuracy": 0.9', '{"accuracy": 0.9}', "[]", "3"])
def test_damaged_metrics_say_what_to_type(evaluated_run, content):
    """Without whole metrics there is no verdict, so the sentence names the command."""
    (evaluated_run / "evaluation" / "metrics.json").write_text(content)
    with pytest.raises(UserError, match=r"metrics\.json is damaged .* `accel-gpt2 evaluate "):
        read_run(evaluated_run)


def test_a_directory_that_is_no_run(tmp_path):
    """An ordinary directory, and one that does not exist, end in a sentence."""
    with pytest.raises(UserError, match=r"is not a run directory, it holds neither recipe\.yaml"):
        read_run(tmp_path)
    with pytest.raises(UserError, match=r"nowhere is not a directory: give the --output-dir"):
        read_run(tmp_path / "nowhere")
