from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.errors import IntegrityError, PolicyError, UsageError
from pipeline.plan.manifest import (
    WEIGHTS,
    ManifestDocument,
    check_name,
    decode,
    encode,
    log_prior,
    log_q,
    repeat_factor,
    targets_table,
    weights,
)
from pipeline.plan.policy import apply, parse
from pipeline.schema import TARGETS, FileRef

FILE = FileRef(sha256="ab" * 32, size=100, num_rows=3, blocks=("0123456789abcdef",))
DOCUMENT = ManifestDocument(
    name="sqrt",
    policy=parse("power:alpha=0.5"),
    split="train",
    num_classes=3,
    num_draws=12,
    targets=FILE,
    classes=replace(FILE, blocks=()),
    shards=replace(FILE, num_rows=1),
    samples=replace(FILE, num_rows=40),
)

counts_lists = st.lists(st.integers(0, 10_000), min_size=1, max_size=20).filter(any)
policies = st.sampled_from(["natural", "power", "balanced:max_repeat=10", "undersample:ceiling=mean", "ratio"])


def as_json(**changes: Any) -> bytes:
    return json.dumps(json.loads(encode(DOCUMENT)) | changes).encode()


def vectors(counts: list[int], policy: str = "natural") -> tuple[np.ndarray, np.ndarray]:
    targets = apply(counts, parse(policy))
    return targets.available, targets.target


# -- the file


def test_exact_bytes() -> None:
    reference = """{
  "blocks": "0123456789abcdef",
  "num_rows": 3,
  "sha256": "abababababababababababababababababababababababababababababababab",
  "size": 100
 }"""
    assert encode(replace(DOCUMENT, classes=FILE, shards=FILE, samples=FILE)).decode() == (
        f'{{\n "classes": {reference},\n "epoch_rule": 1,\n "format": "evenshard.manifest",\n "format_version": 1,\n'
        ' "name": "sqrt",\n "num_classes": 3,\n "num_draws": 12,\n "policy": {\n  "alpha": "0.5",\n'
        f'  "policy": "power"\n }},\n "samples": {reference},\n "shards": {reference},\n "split": "train",\n'
        f' "targets": {reference}\n}}\n'
    )


@pytest.mark.parametrize("text", ["natural", "undersample:frozen", 'explicit:{"targets": {"a\\u00e9 \\ud800": 3}}'])
def test_decode_undoes_encode(text: str) -> None:
    document = replace(DOCUMENT, policy=parse(text))
    assert decode(encode(document), "x") == document


@given(
    name=st.from_regex(r"[a-z][a-z0-9._-]{0,20}", fullmatch=True),
    draws=st.integers(1, 2**62),
    size=st.integers(0, 2**40),
)
def test_decode_undoes_encode_whatever_the_numbers(name: str, draws: int, size: int) -> None:
    document = replace(DOCUMENT, name=name, num_draws=draws, shards=replace(FILE, size=size, blocks=()))
    assert decode(encode(document), "x") == document


@pytest.mark.usefixtures("cycles_wait")
@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "not a manifest of evenshard"),
        (b"\xff\xfe", "not a manifest of evenshard"),
        (b"[" * 100_000, "not a manifest of evenshard"),
        (b"[]", "expected a JSON object, found list"),
        (b"{}", "expected format 'evenshard.manifest', found None"),
        (as_json(format="other"), "expected format 'evenshard.manifest', found 'other'"),
        (as_json(format_version=2), "format_version 2 is newer than 1, .* upgrade evenshard"),
        (as_json(format_version=0), "format_version must be an integer from 1, found 0"),
        (as_json(format_version="1"), "format_version must be an integer from 1, found '1'"),
        (as_json(epoch_rule=2), "epoch_rule 2, this version of evenshard draws by rule 1 only"),
        (as_json(extra=1), r"missing keys \[\], unknown keys \['extra'\]"),
        (encode(DOCUMENT).replace(b'"split"', b'"spilt"'), r"missing keys \['split'\], unknown keys \['spilt'\]"),
        (as_json(num_draws="12"), "num_draws must be an integer from 0 to 2\\^63 - 1, found '12'"),
        (as_json(num_draws=-1, name=3), "name must be a string, found 3; num_draws must be an integer"),
        (as_json(num_draws=12.0), "integers and strings only, found 12.0"),
        (as_json(num_draws=float("nan")), "integers and strings only, found NaN"),
        (as_json(num_draws=float("inf")), "integers and strings only, found Infinity"),
        (as_json(num_draws=True), "integers and strings only, found true as 'num_draws'"),
        (as_json(policy=None), "integers and strings only, found null as 'policy'"),
        (as_json(num_draws=0), "at least one class and one draw"),
        (as_json(num_classes=4), "num_classes is 4, but num_rows of the tables is {'targets': 3, 'classes': 3}"),
        (as_json(split="dev"), "split must be one of train, val, test, not 'dev'"),
        (as_json(name="a:b"), "a manifest name is 1 to 100 letters"),
        (as_json(policy={"policy": "power", "alfa": "1"}), "unknown parameter 'alfa'"),
        (as_json(targets=FILE.to_json() | {"sha256": "AB" * 32}), "targets: sha256 must be 64 lower-case hex digits"),
        (
            as_json(shards=FILE.to_json() | {"blocks": "ab"}),
            "shards: blocks must be 16 hex digits for each of 1 blocks",
        ),
        (as_json(samples={"sha256": ""}), "samples: missing keys"),
        (encode(DOCUMENT).replace(b'"name":', b'"split": "val", "name":'), "key 'split' stands twice"),
    ],
)
def test_what_is_not_a_manifest_is_refused_and_names_the_file(data: bytes, message: str) -> None:
    with pytest.raises(IntegrityError, match=rf"^ROOT/manifests/x\.json: .*{message}"):
        decode(data, "ROOT/manifests/x.json")


def outcome(data: bytes) -> str:
    try:
        return type(decode(data, "x")).__name__
    except IntegrityError as error:
        return str(error)[:3]


@given(position=st.integers(0, len(encode(DOCUMENT)) - 1), byte=st.integers(0, 255))
def test_a_damaged_byte_gives_a_document_or_an_integrity_error(position: int, byte: int) -> None:
    data = bytearray(encode(DOCUMENT))
    data[position] = byte
    assert outcome(bytes(data)) in ("ManifestDocument", "x: ")


@pytest.mark.parametrize("name", ["natural", "v2.1-sqrt_x", "größe"])
def test_names(name: str) -> None:
    assert check_name(name) == name


@pytest.mark.parametrize("name", ["", ".hidden", "a b", "natural:20", "a/b", "a\n", "x" * 101])
def test_names_that_a_command_could_not_hold(name: str) -> None:
    with pytest.raises(UsageError, match="a manifest name is 1 to 100 letters"):
        check_name(name)


def test_targets_table() -> None:
    table = targets_table(apply([5, 0, 2], parse("undersample:ceiling=3,frozen")))
    assert table.schema == TARGETS
    assert table.to_pydict() == {"available": [5, 0, 2], "pool": [3, 0, 2], "target": [3, 0, 2]}


# -- priors


def test_log_prior_and_log_q() -> None:
    available, target = vectors([6, 2, 0], "balanced:per_class=10")
    assert np.allclose(log_prior(available)[:2], np.log([0.75, 0.25]))
    assert np.allclose(log_q(target)[:2], np.log([0.5, 0.5]))


def test_empty_classes_have_a_log_prior_of_minus_infinity() -> None:
    assert log_prior(np.array([3, 0])).tolist() == [0.0, -np.inf]


def test_masked_logits_never_predict_an_empty_class() -> None:
    shifted = np.array([1.0, 99.0]) + log_prior(np.array([3, 0]))
    assert np.exp(shifted - shifted.max()).tolist() == [1.0, 0.0]


@given(counts=counts_lists, policy=policies)
def test_priors_sum_to_one(counts: list[int], policy: str) -> None:
    available, target = vectors(counts, policy)
    assert np.exp(log_prior(available)).sum() == pytest.approx(1)
    assert np.exp(log_q(target)).sum() == pytest.approx(1)


def test_no_prior_of_nothing() -> None:
    with pytest.raises(PolicyError, match="no prior: all 2 classes are empty"):
        log_q(np.array([0, 0]))


def test_repeat_factor() -> None:
    assert repeat_factor(np.array([4, 0, 2]), np.array([2, 0, 20])).tolist() == [0.5, 0, 10]


# -- weights


@given(counts=counts_lists, policy=policies, kind=st.sampled_from(WEIGHTS))
def test_weights_have_mean_one_over_the_draws(counts: list[int], policy: str, kind: str) -> None:
    available, target = vectors(counts, policy)
    found = weights(kind, available, target)
    assert float((found * target).sum() / target.sum()) == pytest.approx(1)
    assert np.all((found > 0) == ((target if kind == "residual" else available) > 0))


def test_balanced_weights_of_natural_draws_are_those_of_scikit_learn() -> None:
    counts = np.array([60, 30, 10])
    assert weights("balanced", counts, counts) == pytest.approx(100 / (3 * counts))


@given(counts=counts_lists, policy=policies)
def test_residual_weights_balance_the_draws(counts: list[int], policy: str) -> None:
    _, target = vectors(counts, policy)
    mass = (weights("residual", *vectors(counts, policy)) * target)[target > 0]
    assert mass == pytest.approx(np.full(len(mass), mass[0]))


def test_residual_weights_of_balanced_draws_are_one() -> None:
    assert weights("residual", *vectors([50, 3, 1], "balanced:per_class=8")) == pytest.approx([1, 1, 1])


def test_square_root_weights() -> None:
    found = weights("square_root", *vectors([100, 25, 4]))
    assert found[1:] / found[0] == pytest.approx([2, 5])


def test_effective_number_weights_follow_cui() -> None:
    found = weights("effective_number", *vectors([1000, 10, 1]), beta=0.99)
    assert found / found[2] == pytest.approx([0.01 / (1 - 0.99**n) for n in (1000, 10, 1)])


def test_effective_number_weights_at_beta_zero_are_equal() -> None:
    assert weights("effective_number", *vectors([1000, 10, 1]), beta=0.0) == pytest.approx([1, 1, 1])


@pytest.mark.parametrize("kind", WEIGHTS)
def test_one_class_weighs_one(kind: str) -> None:
    assert weights(kind, *vectors([5])) == pytest.approx([1])


def test_unknown_weights_are_refused() -> None:
    with pytest.raises(UsageError, match="unknown class weights 'sqrt'; expected one of balanced, effective_number"):
        weights("sqrt", *vectors([1]))


def test_bad_beta_is_refused() -> None:
    with pytest.raises(UsageError, match="beta must be from 0 to below 1, not 1"):
        weights("effective_number", *vectors([1]), beta=1)


def test_weights_of_nothing_are_refused() -> None:
    with pytest.raises(PolicyError, match="none of the 2 classes is drawn"):
        weights("balanced", np.array([3, 3]), np.array([0, 0]))
