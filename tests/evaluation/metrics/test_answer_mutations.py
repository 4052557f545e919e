"""Every rule that reads an answer, and every figure of features, is held by what was recorded from the tools: change
one line of its source, and a recorded case comes out otherwise."""

import functools
import json
from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from tests.conftest import ROOT
from tests.evaluation.awkward_answers import MME, MMMU, OPTIONS, POPE_SCRIPT
from tests.evaluation.mutations import NOTHING, mutated
from unimm.evaluation.metrics import distributions, frechet, yes_no
from unimm.evaluation.understanding import rules as understanding
from unimm.evaluation.understanding import textvqa

FIXTURES = ROOT / "tests" / "fixtures"
CASES = json.loads((FIXTURES / "answer_parsing_cases.json").read_text())
EXPECTED = json.loads((FIXTURES / "metric_expected.json").read_text())


@functools.cache
def features() -> dict[str, Any]:
    with np.load(FIXTURES / "metric_features.npz") as file:
        return {name: torch.from_numpy(file[name]) for name in file.files}


def yes_or_no(rules: ModuleType) -> bool:
    more = all(rules.mme_reading(text) == read for text, read in MME.items())
    more = more and all(rules.official_reading(text) == read for text, read in POPE_SCRIPT.items())
    return more and all(
        rules.mme_reading(case["text"]) == case["mme_lmms_eval"]
        and rules.strict_reading(case["text"]) == {"yes": "yes", "no": "no"}.get(case["pope_lmms_eval"], "other")
        and rules.official_reading(case["text"]) == case["pope_official"]
        for case in CASES["yes_no"]
    )


def letters(rules: ModuleType) -> bool:
    choices, first = CASES["mmmu_multi_choice"], CASES["seed_first_char"]
    read = {"RANDOM": None}
    more = all(rules.mmmu_choice(text, OPTIONS) == letter for text, letter in MMMU.items())
    return (
        more
        and all(
            rules.mmmu_choice(case["text"], choices["index2ans"]) == read.get(case["pred"], case["pred"])
            for case in choices["cases"]
        )
        and all(rules.first_letter(case["text"]) == case["pred"].upper() for case in first["cases"])
    )


def annotated(rules: ModuleType) -> bool:
    return all(
        rules.soft_accuracy(case["pred"], case["answers"]) == pytest.approx(case["score"]) for case in CASES["textvqa"]
    )


def distances(rules: ModuleType) -> bool:
    pair = [rules.moments_of(features()[name].numpy()) for name in ("real", "fake")]
    flat = rules.moments_of(features()["rank1"].numpy())
    close = functools.partial(pytest.approx, abs=1e-6)
    return (
        rules.frechet_distance(*pair) == close(EXPECTED["fid_torch_fidelity"])
        and rules.frechet_distance(*pair) == close(EXPECTED["fid_adm"])
        and rules.frechet_distance(pair[0], flat) == close(EXPECTED["fid_rank_deficient_symmetric_eig"])
    )


def sets(rules: ModuleType) -> bool:
    real, fake, probabilities = (features()[name] for name in ("real", "fake", "probs"))
    found = rules.manifolds(real, fake)
    return (
        (found.precision, found.recall) == (EXPECTED["precision_adm_k3"], EXPECTED["recall_adm_k3"])
        and rules.squared_mmd(real[:200], fake[:200])
        == pytest.approx(EXPECTED["kid_unbiased_poly3_first200"], abs=1e-9)
        and all(
            rules.adm_inception_score(probabilities, split) == pytest.approx(EXPECTED[f"is_split_{split}"], abs=1e-6)
            for split in (200, 50)
        )
    )


RULES: dict[str, tuple[ModuleType, Callable[[ModuleType], bool]]] = {
    "yes or no": (yes_no, yes_or_no),
    "letters": (understanding, letters),
    "annotated": (textvqa, annotated),
    "distances": (frechet, distances),
    "sets": (distributions, sets),
}
MUTATIONS = {
    ("yes or no", "MME looks at four characters"): ("text[:4]", "text"),
    ("yes or no", "MME prefers yes"): (
        'word for word in ("yes", "no") if word in text',
        'word for word in ("no",) if word in text',
    ),
    ("yes or no", "MME leaves full stops out"): ('.strip().replace(".", "")\n    if len', ".strip()\n    if len"),
    ("yes or no", "MME takes one letter"): ('{"y": "yes", "n": "no"}', "{}"),
    ("yes or no", "lmms-eval's POPE wants the whole answer"): (
        'text if text in ("yes", "no") else',
        "text[:3].strip('.') if text else",
    ),
    ("yes or no", "lmms-eval's POPE ignores case"): (
        "answer.lower().strip()\n    return text",
        "answer.strip()\n    return text",
    ),
    ("yes or no", "the first sentence"): ('answer.partition(".")[0]', "answer"),
    ("yes or no", "commas"): ('.replace(",", "").split(" ")', '.split(" ")'),
    ("yes or no", "single blanks"): ('.replace(",", "").split(" ")', '.replace(",", "").split()'),
    ("yes or no", "NO is a yes"): ('{"No", "not", "no"} &', '{"NO", "No", "not", "no"} &'),
    ("yes or no", "not is a no"): ('{"No", "not", "no"} &', '{"No", "no"} &'),
    ("letters", "punctuation at the ends"): ('for mark in (",", ".", "!", "?", ";", ":", "\'"):', "for mark in ():"),
    ("letters", "brackets first"): (
        '(("(", ")", "(", ")"), ("", " ", " ", " ")',
        '(("", " ", " ", " "), ("(", ")", "(", ")")',
    ),
    ("letters", "the last one named"): ("max(found, key", "min(found, key"),
    ("letters", "any word that ends in the letter"): ('("", " ", " ", " ")', '(" ", " ", " ", " ")'),
    ("letters", "a letter and a full stop"): (', ("", ".", " ", " "))', ")"),
    ("letters", "options by text in long answers only"): ("len(text.split()) <= 5", "len(text.split()) <= 0"),
    ("letters", "options by text"): ("if option.lower() in lowered]", "if False]"),
    ("letters", "SEED's first character"): ("answer.strip()[:1]", "answer.strip().strip('(')[:1]"),
    ("annotated", "three agree"): ("AGREEING = 3", "AGREEING = 2"),
    ("annotated", "the other nine"): ("(agreeing - (other == found))", "agreeing"),
    ("annotated", "articles"): ("if word not in ARTICLES", "if word"),
    ("annotated", "number words"): ("[_NUMBERS.get(word, word) for", "[word for"),
    ("annotated", "full stops"): ('_PERIOD.sub("", text)', "text"),
    ("distances", "over N - 1"): ("self.scatter / (self.count - 1)", "self.scatter / self.count"),
    ("distances", "the means"): ("np.square(x.mean - y.mean).sum()", "np.abs(x.mean - y.mean).sum()"),
    ("distances", "twice the cross term"): ("apart - 2 * cross", "apart - cross"),
    ("distances", "rounding below zero"): ("np.sqrt(np.maximum(product, 0))", "np.sqrt(product)"),
    ("sets", "the third neighbour"): (
        "ADM_NEIGHBOURS, PRDC_NEIGHBOURS = 3, 5",
        "ADM_NEIGHBOURS, PRDC_NEIGHBOURS = 4, 5",
    ),
    ("sets", "itself is no neighbour"): ("radii.append(nearest[:, k])", "radii.append(nearest[:, k - 1])"),
    ("sets", "balls of the real"): ("(distances <= real_radii[0])", "(distances <= generated_radii[:, None])"),
    ("sets", "balls of the generated"): (
        "(_squared_distances(rows, generated) <= generated_radii)",
        "(_squared_distances(rows, generated) <= real_radii[0][:1])",
    ),
    ("sets", "a cubic kernel"): ("/ a.shape[1] + 1) ** 3", "/ a.shape[1] + 1) ** 2"),
    ("sets", "the kernel's offset"): ("/ a.shape[1] + 1) ** 3", "/ a.shape[1]) ** 3"),
    ("sets", "without the diagonal"): ("k.sum() - k.diagonal().sum()", "k.sum()"),
    ("sets", "each block's own mean"): ("p.mean(dim=0, keepdim=True)", "p.mean()"),
    ("sets", "the exponential"): (".mean().exp())", ".mean())"),
}


@pytest.mark.parametrize("name", RULES)
def test_the_rules_as_they_are(name: str) -> None:
    module, agrees = RULES[name]
    assert agrees(module) and agrees(mutated(module, *NOTHING))


@pytest.mark.parametrize("name", MUTATIONS, ids=": ".join)
def test_a_changed_rule_is_found(name: tuple[str, str]) -> None:
    module, agrees = RULES[name[0]]
    assert not agrees(mutated(module, *MUTATIONS[name]))
