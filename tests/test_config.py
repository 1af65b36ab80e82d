"""The build file: every mistake is an error that names the file, the key and the way out."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pipeline.config import BuildConfig, load_config, make_config
from pipeline.errors import ConfigError, NotFoundError


def write(folder: Path, text: str) -> Path:
    path = folder / "build.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def refusal(folder: Path, text: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(write(folder, text))
    assert "build.yaml" in str(caught.value)
    return str(caught.value)


def test_defaults_are_those_of_the_design() -> None:
    config = make_config(source="photos", root="out")
    assert (config.label_from, config.split_from, config.check) == ("parent", None, "decode")
    assert (config.shard_samples, config.shard_bytes, config.seed) == (2000, 128 << 20, 0)
    limits = config.inspection.limits
    assert (limits.max_pixels, limits.max_bytes, limits.max_cpu_s) == (50_000_000, 64 << 20, 20)


def test_flags_override_the_file(tmp_path: Path) -> None:
    values = load_config(write(tmp_path, "source: a\nroot: b\nseed: 3\nsplit_from: none\n"))
    config = make_config(values, seed=4, source=None)
    assert (config.source, config.seed, config.split_from) == ("a", 4, "none")


def test_manifests_and_allow_of_flags_add_to_the_file(tmp_path: Path) -> None:
    values = load_config(write(tmp_path, "manifests: {a: natural, b: balanced}\nallow: [shrink]\n"))
    config = make_config(values, source="a", root="b", manifests={"b": "natural"}, allow=("rejects",))
    assert config.manifests == {"a": "natural", "b": "natural"}
    assert config.allow == ("rejects", "shrink")


def test_paths_may_be_path_objects(tmp_path: Path) -> None:
    assert make_config(source=tmp_path, root=tmp_path / "root").source == str(tmp_path)


def test_an_unknown_key_names_the_file_the_key_and_the_nearest_key(tmp_path: Path) -> None:
    message = refusal(tmp_path, "sorce: photos\n")
    assert "'sorce' (did you mean 'source'?)" in message
    assert "shard_samples" in message


def test_all_unknown_keys_are_named_at_once(tmp_path: Path) -> None:
    message = refusal(tmp_path, "sead: 1\nlabel-from: top\n")
    assert "'seed'" in message
    assert "'label_from'" in message


def test_an_unknown_flag_is_refused() -> None:
    with pytest.raises(ConfigError, match="did you mean 'workers'"):
        make_config(source="a", root="b", worker=2)


def test_a_doubled_key_names_its_line(tmp_path: Path) -> None:
    assert "line 3: key 'seed' stands here twice" in refusal(tmp_path, "seed: 1\nroot: b\nseed: 2\n")


def test_a_doubled_key_within_a_manifest_is_refused_too(tmp_path: Path) -> None:
    assert "line 4" in refusal(tmp_path, "manifests:\n  a:\n    alpha: 1\n    alpha: 2\n")


@pytest.mark.parametrize(
    ("line", "part"),
    [
        ("seed: -1", "seed = -1"),
        ("seed: yes", "seed = True"),
        ("shard_samples: 0", "shard_samples = 0"),
        ("check: fast", "'decode' or 'header'"),
        ("label_column: 7", "label_column = 7"),
        ("max_rejects: 1.5", "a rate from 0.0 to 1.0"),
        ("max_pixels: 999999999", "less than or equal to 178956970"),
        ("allow: [everything]", "'everything' is no guardrail"),
        ("manifests: {a b: natural}", "'a b' is no manifest name"),
    ],
)
def test_a_value_out_of_range_says_which(tmp_path: Path, line: str, part: str) -> None:
    assert part in refusal(tmp_path, line)


def test_python_objects_are_not_built(tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    assert "not plain YAML" in refusal(tmp_path, f"source: !!python/object/apply:os.mkdir ['{canary}']\n")
    assert not canary.exists()


def test_aliases_are_refused(tmp_path: Path) -> None:
    bomb = "a: &a [x]\n" + "".join(f"{b}: &{b} [*{a},*{a}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True))
    assert "line 2: aliases" in refusal(tmp_path, bomb)


@pytest.mark.parametrize("text", ["- a\n", "just words\n", "1: a\n", "a: [\n", "\x00"])
def test_what_is_no_build_file_is_refused(tmp_path: Path, text: str) -> None:
    refusal(tmp_path, text)


def test_a_huge_file_is_refused_before_parsing(tmp_path: Path) -> None:
    assert "is it a build file" in refusal(tmp_path, "#" * (1 << 20) + "\n")


def test_a_missing_file_is_not_found(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match=r"nothing\.yaml"):
        load_config(tmp_path / "nothing.yaml")


def test_a_missing_file_of_class_names_is_not_found(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="a file of them, one on each line; this one cannot be read: No such file"):
        load_config(write(tmp_path, "classes: /nowhere/names.txt"))


def test_an_empty_file_changes_nothing(tmp_path: Path) -> None:
    assert load_config(write(tmp_path, "")) == {}


@pytest.mark.parametrize("name", ["source", "root"])
def test_what_must_be_given_is_asked_for(name: str) -> None:
    with pytest.raises(ConfigError, match=f"{name} is missing"):
        make_config({"source": "a", "root": "b", name: None})


@pytest.mark.parametrize(
    ("given", "meant"), [("3", 3), (3, 3), ("1%", 0.01), ("0.5%", 0.005), ("0.25", 0.25), (0.25, 0.25)]
)
def test_the_budget_of_rejects_is_a_count_or_a_rate(given: object, meant: float) -> None:
    budget = make_config(source="a", root="b", max_rejects=given).max_rejects
    assert budget == meant
    assert type(budget) is type(meant)


@pytest.mark.parametrize(("given", "meant"), [("4 MiB", 4 << 20), ("1kb", 1000), (7, 7)])
def test_bytes_have_units(given: object, meant: int) -> None:
    assert make_config(source="a", root="b", shard_bytes=given).shard_bytes == meant


def test_meaning_holds_what_decides_bytes_and_nothing_else() -> None:
    one = make_config(source="a", root="b", workers=1, address="x", images="i", max_rejects=3, allow=("shrink",))
    two = make_config(source="c", root="d")
    assert one.meaning() == two.meaning()
    assert set(one.meaning()) == {
        *(
            "label_from",
            "split_from",
            "path_column",
            "source_kind",
            "image_column",
            "label_column",
            "split_column",
            "group_column",
            "check",
        ),
        *("shard_samples", "shard_bytes", "seed", "manifests", "max_pixels", "max_image_bytes", "max_decode_s"),
    }


def test_meaning_is_json_without_floats() -> None:
    config = make_config(source="a", root="b", manifests={"z": {"policy": "power", "alpha": 0.5}, "a": "balanced"})

    def refuse(text: str) -> float:
        raise AssertionError(text)

    assert json.loads(json.dumps(config.meaning()), parse_float=refuse)["manifests"]["z"]["alpha"] == "0.5"
    assert list(config.meaning()["manifests"]) == ["a", "z"]


def test_a_config_cannot_change() -> None:
    config = BuildConfig(source="a", root="b")
    with pytest.raises(ValueError, match="frozen"):
        config.seed = 1  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("classes: []", "at least one class name"),
        ("classes: [a, b, a]", r"'a' is the name of \[0, 2\]"),
        ("classes: [a, ' b']", "name 1, ' b'"),
        ("classes: [a, '']", "name 1, ''"),
        ('classes: ["a\\nb"]', "one line"),
        ("classes: [1, 2]", "classes"),
        ("classes: 3", "classes"),
    ],
)
def test_class_names_that_are_none(tmp_path: Path, text: str, told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        load_config(write(tmp_path, text))


def test_class_names_come_from_a_list_or_a_file(tmp_path: Path) -> None:
    (tmp_path / "names.txt").write_bytes("\ufeffa\r\nb c\r\n\u00e9\r\n\r\n".encode())
    flags = {"source": "a", "root": "b"}
    one = make_config(load_config(write(tmp_path, f"classes: {tmp_path}/names.txt")), **flags)
    two = make_config(load_config(write(tmp_path, "classes: [a, b c, \u00e9]")), **flags)
    assert one.classes == two.classes == ("a", "b c", "\u00e9")
    assert one.meaning() == two.meaning()
    assert len(one.meaning()["classes"]) == 64
    assert make_config(classes=["a"], **flags).meaning() != one.meaning()
    assert "classes" not in make_config(**flags).meaning()
    (tmp_path / "names.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="UTF-8"):
        make_config(classes=str(tmp_path / "names.txt"), **flags)
    (tmp_path / "names.txt").write_bytes(b"a\n" * (1 << 20))
    with pytest.raises(ConfigError, match="is no list of class names"):
        make_config(classes=str(tmp_path / "names.txt"), **flags)
