"""The comparison's page: self-contained, safe, and right in what it says."""

import json
import re

import pytest

from accel_gpt2.errors import UserError
from accel_gpt2.report import write_comparison_report
from accel_gpt2.report.comparison import render_comparison
from accel_gpt2.report.comparison_form import read_comparison

from .comparisons import ARMS, HOSTILE, missing_entry, write_comparison
from .pages import Page

FIGURES = {
    "accuracy.png",
    "bits_per_byte.png",
    "log_ratios.png",
    "out_of_distribution.png",
    "reliability.png",
    "risk_coverage.png",
    "tokens_read.png",
    "training_documents.png",
}


@pytest.fixture(scope="module")
def binary(tmp_path_factory):
    """All eleven entries with three seeds; the directory and what its comparison.json holds."""
    directory = tmp_path_factory.mktemp("binary")
    return directory, write_comparison(directory, ["negative", "positive"])


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """Three entries with one seed and hostile names; its content and its page as written."""
    directory = tmp_path_factory.mktemp("small")
    content = write_comparison(
        directory, [HOSTILE, "b & c"], ids=("1a", "3", "5"), num_seeds=1, name="{} " + HOSTILE
    )
    return directory, content, Page(write_comparison_report(directory).read_text("utf-8"))


def page_of(directory, content):
    """The page of a content, without its figures, which take most of the time."""
    (directory / "comparison.json").write_text(json.dumps(content))
    return Page(render_comparison(read_comparison(directory), []))


def section(page, title, following):
    """The visible text between two titles."""
    return page.text.split(f" {title} ", 1)[1].split(f" {following} ", 1)[0]


def pair_of(content, a, b):
    return next(pair for pair in content["pairs"] if (pair["a"], pair["b"]) == (a, b))


def test_the_page_needs_nothing_else_and_runs_nothing(small):
    """Hostile names are shown as text; every source is a data URI; the PNGs lie beside the page."""
    directory, _, page = small
    assert not {"script", "link", "iframe", "object", "embed"} & set(page.tags)
    assert page.text.count(HOSTILE) > 10
    sources = [x for x in page.attributes if x[1] in {"src", "srcset", "href", "action", "data"}]
    assert len(sources) == 2 * len(FIGURES)
    assert all(value.startswith("data:image/png;base64,") for _, _, value in sources)
    assert {path.name for path in directory.glob("*.png")} == FIGURES
    without_pictures = re.sub(r"data:image/png;base64,[A-Za-z0-9+/=]+", "", page.html)
    assert not re.search(r"https?:|//|url\(|@import", without_pictures)


def test_every_picture_says_what_it_shows(small):
    """Each has a caption, and a text with its numbers for those who cannot see it."""
    _, content, page = small
    texts = [value for tag, name, value in page.attributes if (tag, name) == ("img", "alt")]
    assert len(texts) == len(FIGURES) == page.tags.count("figcaption")
    assert all(len(text) > 40 for text in texts)
    accuracy = content["entries"][1]["metrics"]["accuracy"]
    assert f"3  gpt2 per class {HOSTILE}"[:30] in texts[0]
    assert f"{accuracy:.1%}" in texts[0]


def test_verdict_first_and_alarms_below_it(binary):
    """The first paragraph is the verdict; an alarm has what, likely cause and what to do."""
    directory, content = binary
    page = page_of(directory, content)
    before_table = page.text.split(" Results ")[0]
    order = [
        *content["verdict"],
        "Near chance: 7a",
        content["alarms"][0]["what"],
        f"Likely cause: {content['alarms'][0]['cause']}",
        f"What to do: {content['alarms'][0]['next']}",
    ]
    positions = [before_table.index(text) for text in order]
    assert positions == sorted(positions)


def test_every_entry_has_its_numbers(binary):
    """Accuracy with its interval, seeds apart from it, raw and calibrated scores, own bits."""
    directory, content = binary
    text = section(page_of(directory, content), "Results", "What made the difference")
    assert len(content["entries"]) == len(ARMS) == 11
    for entry in content["entries"]:
        metrics, by_seed = entry["metrics"], entry["by_seed"]
        low, high = metrics["accuracy_interval_95"]
        matrix = metrics["bits_per_byte"]
        cells = [
            f"{entry['id']} {entry['name']}",
            f"{metrics['accuracy']:.1%} ({100 * low:.1f}–{100 * high:.1f}%)",
            f"{by_seed['accuracy_mean']:.1%} ± "
            f"{100 * by_seed['accuracy_standard_deviation']:.1f} (3 seeds)",
            f"{metrics['macro_f1']:.3f}",
            f"{metrics['raw']['auroc']:.3f}",
            *(
                f"{metrics['raw'][key]:.3f} → {metrics['calibrated'][key]:.3f}"
                for key in ("nll", "brier", "ece")
            ),
            f"{(matrix[0][0] + matrix[1][1]) / 2:.3f}" if matrix else "–",
        ]
        assert " ".join(cells) in text


def test_the_best_of_a_column_is_bold(binary):
    """Highest accuracy, lowest calibrated score; never colour alone, never in the seeds' column."""
    directory, content = binary
    html = page_of(directory, content).html
    table = html[html.index("<h2>Results") : html.index("<h2>What made")]
    bold = re.findall(r'<td class="number strong">(.*?)</td>', table, re.S)
    metrics = [entry["metrics"] for entry in content["entries"]]
    assert bold[0].startswith(f"{max(x['accuracy'] for x in metrics):.1%}")
    lowest = min(metrics, key=lambda x: x["calibrated"]["nll"])
    assert f"{lowest['raw']['nll']:.3f} → {lowest['calibrated']['nll']:.3f}" in bold
    assert not any("±" in cell for cell in bold)


def test_costs_are_shown_where_they_are_known(binary):
    """Time, tokens, memory, speed and price of each entry; a dash where one is unknown."""
    directory, content = binary
    text = section(page_of(directory, content), "What it took", "Recall by class")
    assert "5 gpt2 with a head 28 min 30 s 1.97M 20.5k 858 MiB $0.95 162" in text
    assert "3 gpt2 per class 17 min 06 s 1.97M 20.5k 858 MiB – 271" in text
    assert "1a TF-IDF + logistic regression 5 min 42 s – – – – 812" in text
    assert "price_usd_per_hour" not in text


def test_the_questions_are_answered_from_either_side_of_a_pair(binary):
    """A pair that is listed the other way round is turned, its interval with it."""
    directory, content = binary
    text = section(page_of(directory, content), "What made the difference", "Every pair")
    pair = pair_of(content, "7a", "7b")
    low, high = (f"{100 * -bound:+.1f}" for bound in reversed(pair["interval_95"]))
    assert pair["significant"]
    assert pair["accuracy_difference"] < -0.1
    expected = (
        f"7b against 7a 7b is better {-100 * pair['accuracy_difference']:+.1f} {low} to {high}"
    )
    assert expected in text
    content["pairs"].remove(pair)
    assert "7b against 7a" not in page_of(directory, content).text
    content["pairs"].append(pair)


def test_every_pair_stands_in_the_matrix_and_in_the_list(binary):
    """Each pair twice in the matrix with opposite marks, once in the list with both p-values."""
    directory, content = binary
    page = page_of(directory, content)
    matrix = section(page, "Every pair", "Every pair in full")
    significant = sum(pair["significant"] for pair in content["pairs"])
    assert len(content["pairs"]) == 55
    assert 0 < significant < 55
    legend = "▲ the row is better, ▼ the column is better"
    assert legend in matrix
    cells = matrix.replace(legend, "")
    assert cells.count("▲") == cells.count("▼") == significant
    rows = section(page, "Every pair in full", "What it took")
    pair = pair_of(content, "3", "5")
    assert (
        f"3 − 5 {'yes' if pair['significant'] else 'no'} "
        f"{100 * pair['accuracy_difference']:+.1f}".replace("-", "−")
        in rows
    )
    assert f"{pair['only_a']} {pair['only_b']} {pair['p_value']:.2g}" in rows


def test_many_entries_have_the_list_alone(binary):
    """Beyond twelve entries a matrix would not fit, so the list is open."""
    directory, content = binary
    more = {**content, "entries": [*content["entries"]]}
    more["entries"] += [{**content["entries"][0], "id": f"1{letter}"} for letter in "xyz"]
    html = page_of(directory, more).html
    assert "<summary>Every pair" not in html
    assert "Only the first right" in html
    assert "▲" not in html


def test_recipes_stand_whole_and_their_differences_apart(binary):
    """The table lists what differs alone; every recipe is there to be unfolded."""
    directory, content = binary
    page = page_of(directory, content)
    text = section(page, "Where the recipes differ", "To repeat it")
    assert "finetuning full lora full" in text
    assert "global_batch_tokens" not in text
    with_recipes = sum(entry["recipe"] is not None for entry in content["entries"])
    assert page.tags.count("details") == with_recipes + 1  # and the list of pairs
    assert page.text.count("global_batch_tokens") == with_recipes


def test_what_is_unknown_is_left_out(tmp_path):
    """Nulls everywhere, one seed, missing arms with their reasons: the page stands."""
    content = write_comparison(tmp_path, ["ham", "spam"], ids=("1a", "3"), num_seeds=1)
    for entry in content["entries"]:
        entry["metrics"] = {"accuracy": entry["metrics"]["accuracy"], "recall": None, "raw": None}
        for key in ("recipe", "curves", "log_ratios", "out_of_distribution", "by_seed"):
            entry[key] = None
    content["entries"] += [missing_entry("2", "zero_shot"), missing_entry("6", "discriminative")]
    required = {"format_version", "dataset", "class_names", "entries", "pairs"}
    content = {key: value if key in required else None for key, value in content.items()}
    (tmp_path / "comparison.json").write_text(json.dumps(content))
    page = Page(write_comparison_report(tmp_path).read_text("utf-8"))
    assert [path.name for path in tmp_path.glob("*.png")] == ["accuracy.png"]
    assert f"2 arm 2: No weights of {HOSTILE} are here" in page.text
    assert "No arm is done yet." in page.text  # there is no verdict
    for title in ("What it took", "Recall by class", "Environment", "To repeat it", "Alarm"):
        assert title not in page.text


def test_a_comparison_that_has_only_begun(tmp_path):
    """Before the first arm is done there is a page that says so."""
    content = write_comparison(tmp_path, ["ham", "spam"], ids=("1a",), num_seeds=1)
    content.update(entries=[missing_entry("3", "generative")], pairs=[], verdict=[])
    page = page_of(tmp_path, content)
    assert "No arm is done yet." in page.text
    assert "Results" not in page.text


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda x: x.pop("entries"), "entries: Field required"),
        (lambda x: x.update(format_version=2), "format_version: Input should be 1"),
        (lambda x: x["entries"][0].update(status="running"), r"entries.0.status: Input should be"),
        (
            lambda x: x["entries"][0]["metrics"].update(accuracy="0.9"),
            r"entries\.0\.metrics\.accuracy: Input should be a valid number",
        ),
        (
            lambda x: x["entries"][0]["metrics"].update(accuracy=float("nan")),
            r"entries\.0\.metrics\.accuracy: Input should be a finite number",
        ),
        (
            lambda x: x["entries"][0]["metrics"].update(accuracy_interval_95=[0.1]),
            "accuracy_interval_95: List should have at least 2 items",
        ),
        (
            lambda x: x["entries"][1]["metrics"].update(bits_per_byte=[[1.0]]),
            "the bits_per_byte of entry 3 have no row and column for each class",
        ),
        (lambda x: x["entries"][0].update(id="3"), "two entries have one id"),
        (
            lambda x: x["class_counts"].update(test=[1]),
            "class_counts.test has 1 of 2 classes",
        ),
        (
            lambda x: x["entries"][0]["log_ratios"]["edges"].pop(),
            "the log_ratios of entry 1a have no count for each bin",
        ),
    ],
    ids=[
        "missing",
        "version",
        "status",
        "text",
        "not a number",
        "half an interval",
        "not square",
        "twice",
        "class counts",
        "bins",
    ],
)
def test_damage_is_named_and_what_to_type(small, tmp_path, change, problem):
    """A wrong type, a missing field, numbers that do not belong together: one sentence."""
    content = json.loads(json.dumps(small[1]))
    change(content)
    (tmp_path / "comparison.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=rf"damaged \(.*{problem}.*`accel-gpt2 compare` command"):
        write_comparison_report(tmp_path)
    assert list(tmp_path.iterdir()) == [tmp_path / "comparison.json"]


@pytest.mark.parametrize("content", ["", "{", "[]", "[" * 100_000])
def test_what_is_no_json_object_is_damaged(tmp_path, content):
    """An empty or cut file ends in the same sentence."""
    (tmp_path / "comparison.json").write_text(content)
    with pytest.raises(UserError, match=r"comparison\.json is damaged \(the file: "):
        write_comparison_report(tmp_path)


def test_a_directory_without_a_comparison(tmp_path):
    """The sentence says which directory is needed, and nothing is written."""
    with pytest.raises(UserError, match=r"holds no comparison\.json: give the --output-dir"):
        write_comparison_report(tmp_path)
    assert list(tmp_path.iterdir()) == []
