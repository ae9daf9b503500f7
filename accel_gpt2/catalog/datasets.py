"""Data sets that are known by name; any other hub id, file or directory is read as it is."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

# For data whose classes are topics.
DEFAULT_ZERO_SHOT_TEMPLATE = "This text is about {class_name}:\n"


@dataclass(frozen=True, slots=True, kw_only=True)
class DatasetSpec:
    """Where a data set is, what its fields are called, and what may be done with it.

    `hub_id` is None for a data set that is made on the machine. `class_names` is in label order;
    empty means that the source says it. `token_length_percentiles` are GPT-2 tokens per document
    (50th, 90th, 99th), None where unknown. `test_fraction` is cut from the only split, by content
    hash, where the source has no test split of its own; 0 where it has one. `zero_shot_template`
    prompts an untrained language model; `{class_name}` in it stands for one of
    `zero_shot_class_names`, which say in plain words what the classes are, or for the class's name.
    """

    name: str
    hub_id: str | None
    text_field: str
    label_field: str
    class_names: tuple[str, ...]
    licence: str
    source: str
    test_fraction: float = 0.0
    token_length_percentiles: tuple[int, int, int] | None = None
    recipe_defaults: Mapping[str, object] = field(default_factory=lambda: MappingProxyType({}))
    zero_shot_template: str = DEFAULT_ZERO_SHOT_TEMPLATE
    zero_shot_class_names: tuple[str, ...] = ()


_ROWS = (
    DatasetSpec(
        name="docstrings",
        hub_id=None,
        text_field="text",
        label_field="label",
        class_names=("torch", "transformers", "pandas", "scikit-learn"),
        licence="BSD-3-Clause (torch, pandas, scikit-learn) and Apache-2.0 (transformers)",
        source="the docstrings of the installed libraries, read with ast, never imported",
        test_fraction=0.2,
        token_length_percentiles=(111, 666, 2198),
    ),
    DatasetSpec(
        name="imdb",
        hub_id="stanfordnlp/imdb",
        text_field="text",
        label_field="label",
        class_names=("negative", "positive"),
        licence="research use; cite Maas et al. 2011",
        source="https://ai.stanford.edu/~amaas/data/sentiment/",
        token_length_percentiles=(223, 601, 1156),
        zero_shot_template="This is a {class_name} movie review:\n",
    ),
    DatasetSpec(
        name="ag_news",
        hub_id="fancyzhx/ag_news",
        text_field="text",
        label_field="label",
        class_names=("World", "Sports", "Business", "Sci/Tech"),
        licence="research and other non-commercial use",
        source="http://www.di.unipi.it/~gulli/AG_corpus_of_news_articles.html",
        token_length_percentiles=(50, 90, 121),
        zero_shot_template="This news article is about {class_name}:\n",
        zero_shot_class_names=("world politics", "sports", "business", "science and technology"),
    ),
    DatasetSpec(
        name="sms_spam",
        hub_id="ucirvine/sms_spam",
        text_field="sms",
        label_field="label",
        class_names=("ham", "spam"),
        licence="CC BY 4.0; cite Almeida et al. 2011",
        source="https://archive.ics.uci.edu/dataset/228/sms+spam+collection",
        test_fraction=0.2,
        token_length_percentiles=(19, 47, 76),
        zero_shot_template="This is a {class_name} text message:\n",
        zero_shot_class_names=("personal", "spam"),
    ),
)

DATASETS: Mapping[str, DatasetSpec] = MappingProxyType({row.name: row for row in _ROWS})
