"""Artifacts: a bundle exists when its manifest does, is what its manifest says, and no date sees the future."""

from __future__ import annotations

import shutil
import tempfile
from contextlib import suppress
from datetime import date, timedelta
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gpl_core.errors import ConflictError, ContractError, MissingInputError
from gpl_core.lakehouse.artifacts import MANIFEST, ArtifactStore, Manifest, artifact_version
from tests.support import DAMAGES

DAY = date(2026, 1, 3)


@pytest.fixture
def store(tmp_path) -> ArtifactStore:
    return ArtifactStore(str(tmp_path / "lake"))


@pytest.fixture
def bundle(tmp_path) -> Path:
    folder = tmp_path / "bundle"
    (folder / "adapter").mkdir(parents=True)
    (folder / "weights.safetensors").write_bytes(bytes(range(256)))
    (folder / "adapter" / "config.json").write_text('{"r": 8}')
    return folder


def publish(store: ArtifactStore, folder: Path, through: date = DAY, fingerprint: str = "0123456789abcdef") -> Manifest:
    return store.publish(
        "tokenizer", folder, trained_through=through, fingerprint=fingerprint, config_hash="c",
        lineage={"encoder_version": "e1"}, metrics={"perplexity": 12.5},
    )  # fmt: skip


def place_of(store: ArtifactStore, manifest: Manifest) -> Path:
    return Path(store.root) / manifest.kind / manifest.version


def test_a_published_bundle_is_found_with_everything_it_said(store, bundle):
    manifest = publish(store, bundle)
    assert manifest.version == "2026-01-03-0123456789" == artifact_version(DAY, "0123456789abcdef")
    assert store.find("tokenizer", manifest.version) == manifest
    folder = store.fetch(manifest)
    assert (folder / "weights.safetensors").read_bytes() == bytes(range(256))
    assert (folder / "adapter" / "config.json").read_text() == '{"r": 8}'
    assert set(manifest.files) == {"weights.safetensors", "adapter/config.json"}
    assert (manifest.lineage, manifest.metrics) == ({"encoder_version": "e1"}, {"perplexity": 12.5})


def test_the_manifest_is_written_after_every_file(store, bundle, monkeypatch):
    """A publish that dies at any file leaves nothing that exists; the next one replaces what is there."""
    put, names = type(store._fs).put_file, []

    def dying(self, source, target, **kwargs):
        names.append(Path(target).name)
        if Path(target).name == "weights.safetensors":
            raise OSError("disk full")
        return put(self, source, target, **kwargs)

    monkeypatch.setattr(type(store._fs), "put_file", dying)
    with pytest.raises(OSError, match="disk full"):
        publish(store, bundle)
    assert names == ["config.json", "weights.safetensors"]
    assert store.manifests("tokenizer") == []
    assert store.in_force_or_none("tokenizer", DAY + timedelta(days=1)) is None
    assert [*(Path(store.root) / "tokenizer").iterdir()] == []
    half = Path(store.root) / "tokenizer" / "2026-01-03-0123456789"
    half.mkdir()
    (half / "left-over.bin").write_text("of a run that an earlier release left killed")
    monkeypatch.undo()
    manifest = publish(store, bundle)
    assert not (half / "left-over.bin").exists()
    assert store.fetch(manifest) == half


def test_the_same_fingerprint_is_the_same_bundle_and_is_left_alone(store, bundle):
    first = publish(store, bundle)
    (bundle / "weights.safetensors").write_text("other bytes of a run that was not deterministic")
    assert publish(store, bundle) == first
    assert (store.fetch(first) / "weights.safetensors").read_bytes() == bytes(range(256))
    assert len(store.manifests("tokenizer")) == 1


@pytest.mark.parametrize("half_made", [False, True])
def test_of_two_runs_that_publish_at_once_one_bundle_stays_whole(store, bundle, monkeypatch, half_made):
    """The other run, whose bytes are not the same, publishes while this one copies; before both one was killed."""
    place = Path(store.root) / "tokenizer" / "2026-01-03-0123456789"
    if half_made:
        (place / "adapter").mkdir(parents=True)
    other = bundle.with_name("other")
    shutil.copytree(bundle, other)
    (other / "weights.safetensors").write_bytes(bytes(99))
    put, published = type(store._fs).put_file, []

    def overtaken(self, source, target, **kwargs):
        if not published:
            published.append(None)
            published[0] = publish(ArtifactStore(str(Path(store.root).parent)), other)
        return put(self, source, target, **kwargs)

    monkeypatch.setattr(type(store._fs), "put_file", overtaken)
    assert publish(store, bundle) == published[0] == store.find("tokenizer", published[0].version)
    assert (place / "weights.safetensors").read_bytes() == bytes(99)
    assert [p.name for p in place.parent.iterdir()] == [place.name]


def test_a_file_that_differs_or_lacks_is_refused_by_name(store, bundle):
    manifest = publish(store, bundle)
    weights = place_of(store, manifest) / "weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\0")
    with pytest.raises(ContractError, match=r"tokenizer 2026-01-03-0123456789: file weights\.safetensors"):
        store.fetch(manifest)
    weights.unlink()
    with pytest.raises(ContractError, match="missing or differs"):
        store.fetch(manifest)


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"kind": "tokenizer"}', '{"trained_through": "soon"}', "not json"])
def test_a_manifest_that_cannot_be_read_is_named_and_hides_no_other(store, bundle, text, caplog):
    old, new = (publish(store, bundle, date(2026, 1, d), f"{d:020d}") for d in (1, 5))
    (place_of(store, new) / MANIFEST).write_text(text)
    assert used(store, 9) == [old.version]
    assert f"tokenizer/{new.version}/{MANIFEST} is broken" in caplog.text
    with pytest.raises(MissingInputError, match=rf"no version {new.version}; existing: .*{new.version} \(damaged\)"):
        store.decide("tokenizer", new.version, "promote")


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", [MANIFEST, "weights.safetensors", "adapter/config.json"])
def test_a_bundle_that_is_not_whole_is_never_used_until_it_is_made_again(store, bundle, name, damage, caplog):
    old, new = (publish(store, bundle, date(2026, 1, d), f"{d:020d}") for d in (1, 5))
    DAMAGES[damage](place_of(store, new) / name)
    assert used(store, 5, 6, 9) == [old.version] * 3
    fresh = ArtifactStore(str(Path(store.root).parent))
    assert fresh.find("tokenizer", new.version) is None
    if (name, damage) != (MANIFEST, "missing"):  # that is a bundle which was never finished
        assert list(fresh.damaged) == [f"tokenizer/{new.version}"]
        assert new.version in caplog.text
    shutil.rmtree(place_of(store, old))
    with pytest.raises(MissingInputError, match="Run the step that trains it"):
        fresh.in_force("tokenizer", date(2026, 1, 9))
    again = publish(fresh, bundle, date(2026, 1, 5), f"{5:020d}")
    assert used(store, 9) == [again.version]
    assert fresh.fetch(again) == place_of(store, new)
    assert not fresh.damaged


def test_any_single_bit_of_a_manifest_that_matters_is_noticed(store, bundle):
    manifest = publish(store, bundle)
    text = manifest.to_json().encode()
    for place in range(0, 8 * len(text), 7):
        changed = bytearray(text)
        changed[place // 8] ^= 1 << place % 8
        with suppress(ContractError):
            assert Manifest.from_json(bytes(changed), "here") == manifest, f"bit {place} of {text.decode()}"


def test_a_killed_publish_leaves_no_part_of_a_manifest(store, bundle, monkeypatch):
    monkeypatch.setattr("os.replace", lambda *names: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        publish(store, bundle)
    assert store.manifests("tokenizer") == []
    assert store.find("tokenizer", "2026-01-03-0123456789") is None


@pytest.mark.parametrize("name", ["{}/", "/{}", "./{}", "../tokenizer/{}", "", "{}/manifest.json", "*"])
def test_only_the_name_of_a_version_that_exists_names_it(store, bundle, name):
    version = publish(store, bundle).version
    for action in ("promote", "rollback"):
        with pytest.raises(MissingInputError, match="no version"):
            store.decide("tokenizer", name.format(version), action)
    assert not store.lake.exists("artifact_decisions")


def test_a_date_uses_the_newest_published_version_from_before_it(store, bundle):
    """published through the 1st, the 5th and the 9th"""
    versions = {d: publish(store, bundle, date(2026, 1, d), f"{d:020d}").version for d in (5, 1, 9)}
    used = {
        d: m.version if (m := store.in_force_or_none("tokenizer", date(2026, 1, d))) else None for d in range(1, 13)
    }
    assert used[1] is None, "trained through the 1st: the 1st itself must not use it"
    assert {used[d] for d in (2, 3, 4, 5)} == {versions[1]}
    assert {used[d] for d in (6, 7, 8, 9)} == {versions[5]}
    assert {used[d] for d in (10, 11, 12)} == {versions[9]}


def test_none_in_force_names_what_there_is(store, bundle):
    with pytest.raises(MissingInputError, match=r"artifact tokenizer: .*2026-01-03; existing: none"):
        store.in_force("tokenizer", DAY)
    version = publish(store, bundle, DAY).version
    with pytest.raises(MissingInputError, match=rf"existing: {version} \(through 2026-01-03\)"):
        store.in_force("tokenizer", DAY)


def test_of_two_versions_through_the_same_date_the_later_made_counts(store, bundle):
    publish(store, bundle, DAY, "f" * 20)
    later = publish(store, bundle, DAY, "a" * 20)
    assert store.in_force("tokenizer", DAY + timedelta(days=1)).version == later.version


def test_kinds_do_not_mix(store, bundle):
    publish(store, bundle)
    assert store.manifests("calibrator") == []
    assert store.find("calibrator", "2026-01-03-0123456789") is None


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(through=st.lists(st.integers(0, 6), max_size=4), asked=st.integers(0, 8))
def test_the_version_in_force_is_what_a_scan_of_the_dates_says(tmp_path, bundle, through, asked):
    store = ArtifactStore(tempfile.mkdtemp(dir=tmp_path))
    for i, day in enumerate(through):
        publish(store, bundle, DAY + timedelta(days=day), f"{i:010d}")
    usable = [d for d in through if d < asked]
    found = store.in_force_or_none("tokenizer", DAY + timedelta(days=asked))
    assert (found.trained_through if found else None) == (DAY + timedelta(days=max(usable)) if usable else None)


@settings(deadline=None)
@given(st.dictionaries(st.text(), st.text()), st.dictionaries(st.text(), st.floats(allow_nan=False)))
def test_manifests_survive_their_json(lineage, metrics):
    manifest = Manifest("k", "v", DAY, lineage, "f", "c", {"a": "b"}, "now", metrics)
    assert Manifest.from_json(manifest.to_json(), "here") == manifest


# ---- operators' decisions --------------------------------------------------------------------------------------


def used(store: ArtifactStore, *days: int) -> list[str | None]:
    """Versions that a fresh reader finds in force for these days of January."""
    fresh = ArtifactStore(str(Path(store.root).parent))
    return [m.version if (m := fresh.in_force_or_none("tokenizer", date(2026, 1, d))) else None for d in days]


def test_a_version_that_is_rolled_back_is_kept_passed_by_and_can_be_promoted_again(store, bundle):
    old, new = (publish(store, bundle, date(2026, 1, d), f"{d:020d}").version for d in (1, 5))
    assert used(store, 2, 5, 6, 9) == [old, old, new, new]
    assert store.decide("tokenizer", new, "rollback", reason="codes collapsed")
    assert used(store, 2, 5, 6, 9) == [old, old, old, old]
    assert store.find("tokenizer", new) is not None, "nothing is deleted"
    assert store.decide("tokenizer", new, "promote")
    assert used(store, 2, 5, 6, 9) == [old, old, new, new]
    rows = store.lake.open("artifact_decisions").read().to_pylist()
    assert sorted((r["number"], r["action"], r["version"], r["reason"]) for r in rows) == [
        (1, "rollback", new, "codes collapsed"), (2, "promote", new, ""),
    ]  # fmt: skip


def test_dates_before_a_rollbacks_own_date_go_on_using_the_version(store, bundle):
    old, new = (publish(store, bundle, date(2026, 1, d), f"{d:020d}").version for d in (1, 5))
    store.decide("tokenizer", new, "rollback", from_date=date(2026, 1, 8))
    assert used(store, 6, 7, 8, 9) == [new, new, old, old]


def test_the_same_decision_twice_is_one(store, bundle):
    version = publish(store, bundle).version
    assert not store.decide("tokenizer", version, "promote"), "it is in force as it is"
    assert not store.lake.exists("artifact_decisions")
    assert store.decide("tokenizer", version, "rollback")
    assert not store.decide("tokenizer", version, "rollback")
    assert store.decide("tokenizer", version, "rollback", from_date=DAY), "another date is another decision"
    assert store.lake.open("artifact_decisions").read().num_rows == 2


def test_of_versions_through_one_date_the_promoted_one_counts_until_a_later_one_is_made(store, bundle):
    first, forced = (publish(store, bundle, DAY, c * 20).version for c in "ab")
    assert used(store, 9) == [forced]
    store.decide("tokenizer", first, "promote")
    assert used(store, 9) == [first]
    later = publish(store, bundle, DAY, "c" * 20).version
    assert used(store, 9) == [later]


def test_an_unknown_version_is_refused_with_those_that_exist_and_how_they_stand(store, bundle):
    version = publish(store, bundle).version
    store.decide("tokenizer", version, "rollback", from_date=date(2026, 1, 9))
    with pytest.raises(
        MissingInputError,
        match=rf"no version v9; existing: {version} \(through 2026-01-03, rolled back from 2026-01-09",
    ):
        store.decide("tokenizer", "v9", "promote")


def test_of_two_decisions_at_once_one_is_told(store, bundle, monkeypatch):
    """The other one is made after this one has looked and before it commits."""
    one, two = (publish(store, bundle, DAY, c * 20).version for c in "ab")
    manifests = store.manifests

    def slow(kind: str) -> list[Manifest]:
        ArtifactStore(str(Path(store.root).parent)).decide(kind, two, "rollback")
        return manifests(kind)

    monkeypatch.setattr(store, "manifests", slow)
    with pytest.raises(ConflictError, match="in the meantime"):
        store.decide("tokenizer", one, "promote")
    assert used(store, 9) == [one], "only the rollback of the other was recorded"
    assert store.lake.open("artifact_decisions").read().num_rows == 1
