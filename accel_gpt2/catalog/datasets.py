"""Data sets that are known by name; any other hub id, file or directory is read as it is."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

# Tokens of a document, without BOS and EOS, and how many documents have about so many.
TokenLengths = tuple[tuple[int, int], ...]

# For data whose classes are topics.
DEFAULT_ZERO_SHOT_TEMPLATE = "This text is about {class_name}:\n"


@dataclass(frozen=True, slots=True, kw_only=True)
class DatasetSpec:
    """Where a data set is, what its fields are called, and what may be done with it.

    `hub_id` is None for a data set that is made on the machine. `class_names` is in label order;
    empty means that the source says it. `test_fraction` is cut from the only split, by content
    hash, where the source has no test split of its own; 0 where it has one. `zero_shot_template`
    prompts an untrained language model; `{class_name}` in it stands for one of
    `zero_shot_class_names`, which say in plain words what the classes are, or for the class's name.

    What plans count with: `train_documents` and `test_documents` of each class in label order, as
    they are left when duplicates are removed; `token_lengths` of the training documents in GPT-2's
    vocabulary, in bins a tenth wide; `trained_vocabularies`, (size, tokens for each GPT-2 token)
    of a BPE that was trained on the text. `statistics_source` says what was counted.
    """

    name: str
    hub_id: str | None
    text_field: str
    label_field: str
    class_names: tuple[str, ...]
    licence: str
    source: str
    train_documents: tuple[int, ...]
    test_documents: tuple[int, ...]
    token_lengths: TokenLengths
    trained_vocabularies: tuple[tuple[int, float], ...]
    statistics_source: str
    test_fraction: float = 0.0
    recipe_defaults: Mapping[str, object] = field(default_factory=lambda: MappingProxyType({}))
    zero_shot_template: str = DEFAULT_ZERO_SHOT_TEMPLATE
    zero_shot_class_names: tuple[str, ...] = ()


def _lengths(text: str) -> TokenLengths:
    """Pairs of `tokens:documents`, as `benchmarks/token_lengths.py` prints them."""
    pairs = (pair.split(":") for pair in text.split())
    return tuple((int(tokens), int(documents)) for tokens, documents in pairs)


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
        train_documents=(2034, 1952, 1997, 2012),
        test_documents=(466, 548, 503, 488),
        token_lengths=_lengths(
            "8:1 9:3 10:14 12:97 14:197 15:208 17:199 20:184 22:243 25:205 28:174 31:177 35:178 "
            "38:185 43:176 48:194 53:194 59:198 66:219 73:185 81:213 89:216 99:214 109:240 "
            "120:211 133:217 146:225 161:222 178:236 196:200 217:176 238:168 263:157 290:178 "
            "318:179 352:151 388:145 428:134 471:133 519:111 571:119 626:104 689:93 763:84 834:69 "
            "922:70 1006:72 1111:67 1224:70 1354:44 1482:45 1637:49 1788:24 1978:35 2171:22 "
            "2409:16 2627:16 2864:10 3167:5 3543:8 3926:8 4265:3 4679:2 5119:2 7406:1"
        ),
        trained_vocabularies=((4096, 0.905), (8192, 0.829), (16384, 0.789)),
        statistics_source="counted 2026-11-23 in torch 2.13, transformers 5.23, pandas 3.1",
    ),
    DatasetSpec(
        name="imdb",
        hub_id="stanfordnlp/imdb",
        text_field="text",
        label_field="label",
        class_names=("negative", "positive"),
        licence="research use; cite Maas et al. 2011",
        source="https://ai.stanford.edu/~amaas/data/sentiment/",
        train_documents=(12337, 12444),
        test_documents=(12500, 12500),
        token_lengths=_lengths(
            "12:2 16:3 20:2 22:4 26:1 28:6 31:6 34:14 38:21 43:39 48:88 54:169 59:181 66:267 "
            "73:276 81:297 89:316 99:338 109:364 121:418 134:795 147:1767 161:2122 178:1945 "
            "197:1719 217:1603 239:1411 263:1298 290:1154 320:1079 352:990 389:899 427:848 "
            "471:724 518:620 569:571 627:514 691:436 760:342 837:282 919:255 1011:190 1116:166 "
            "1223:137 1334:68 1450:17 1613:7 1805:3 2037:2 2143:3 2350:1 3097:1"
        ),
        trained_vocabularies=((4096, 1.213), (8192, 1.101), (16384, 1.025)),
        statistics_source="counted 2026-11-23 on all documents",
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
        train_documents=(30000, 30000, 30000, 30000),
        test_documents=(1900, 1900, 1900, 1900),
        token_lengths=_lengths(
            "16:2 18:8 20:34 22:205 25:402 28:529 31:734 35:1363 39:2032 43:3240 48:3610 53:4058 "
            "59:2911 66:2061 73:895 80:514 89:274 99:181 109:209 119:202 131:56 145:16 162:26 "
            "178:58 194:13 217:4 235:7 258:4 290:2 318:2"
        ),
        trained_vocabularies=((4096, 1.326), (8192, 1.148), (16384, 1.026)),
        statistics_source="lengths counted 2026-11-23 in 23,652 of the 120,000 documents",
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
        train_documents=(3628, 522),
        test_documents=(890, 131),
        token_lengths=_lengths(
            "2:7 3:14 4:22 5:79 6:150 7:187 8:211 9:222 10:213 11:383 13:288 15:261 17:216 19:189 "
            "22:225 25:183 28:152 31:153 35:194 38:204 43:204 48:163 53:112 59:47 65:22 73:12 "
            "80:11 89:9 99:6 106:2 117:2 133:3 196:2 216:1 257:1"
        ),
        trained_vocabularies=((4096, 1.074), (8192, 0.964), (16384, 0.878)),
        statistics_source="counted 2026-11-23 on all documents",
        zero_shot_template="This is a {class_name} text message:\n",
        zero_shot_class_names=("personal", "spam"),
    ),
)

DATASETS: Mapping[str, DatasetSpec] = MappingProxyType({row.name: row for row in _ROWS})


def find_dataset(name: str) -> DatasetSpec | None:
    """The row of a data set, by its own name or its hub id.

    >>> find_dataset("stanfordnlp/imdb").name
    'imdb'
    """
    return DATASETS.get(name) or next((row for row in _ROWS if row.hub_id == name), None)
