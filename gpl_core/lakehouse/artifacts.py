"""Published artifacts: versioned bundles of safetensors and JSON, with a manifest written last.

A bundle without a manifest does not exist, and one that differs from its manifest is never used; the previous version
is used instead. Date D uses the newest version with `trained_through` before D, so a backfill never sees the future.
Operators' decisions (`decisions.py`) take a version out of force or put it back; whole bundles are never changed.
"""

import hashlib
import json
import logging
import os
import shutil
import tempfile
import uuid
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, field
from datetime import UTC, date, datetime
from functools import cached_property, lru_cache
from itertools import groupby
from pathlib import Path
from typing import Any, Self

from pydantic import TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from gpl_core.conf.sections import Shadow
from gpl_core.contracts.yaml_problems import problems_of
from gpl_core.errors import ConflictError, ContractError, MissingInputError, UsageError
from gpl_core.lakehouse.decisions import Action, Decision, account, add_decision, decision_count, latest_decisions
from gpl_core.lakehouse.lake import Lake
from gpl_core.lakehouse.scratch import scratch_folder
from gpl_core.lakehouse.storage import filesystem, write_whole

log = logging.getLogger("gpl")

MANIFEST = "manifest.json"
KINDS = ("tokenizer", "interest_model", "calibrator", "preranker")
_TRIES = 3


@dataclass(frozen=True)
class Manifest:
    """What a bundle is and where it comes from."""

    kind: str
    version: str  # `<trained_through>-<hash of the inputs>`: the same inputs give the same version
    trained_through: date  # last date whose events the artifact has seen
    lineage: Mapping[str, str]  # versions of the artifacts it was built on, e.g. `{"encoder_version": …}`
    fingerprint: str
    config_hash: str  # of the configuration that shaped it
    files: Mapping[str, str]  # file name -> sha256
    created_at: str = ""
    metrics: Mapping[str, Any] = field(default_factory=dict)
    saw: str = ""  # what its training saw of the tables is known by (`Step.sees`); "" when that is not comparable
    # What it was made of, to say what has changed since (`graph/origins.py`).
    origin: Mapping[str, Mapping[str, str]] = field(default_factory=dict)

    def to_json(self) -> str:
        """Manifest as JSON text, with a checksum of itself."""
        body = {**asdict(self), "trained_through": self.trained_through.isoformat()}
        return json.dumps({**body, "checksum": _checksum(body)}, indent=2, sort_keys=True)

    @classmethod
    def from_json(cls, text: str | bytes, source: str) -> Self:
        """Parse a manifest (an earlier release gave it no checksum); ContractError names `source` if it is broken."""
        try:
            body = dict(json.loads(text))
            checksum = body.pop("checksum", None)
            problems = "" if checksum in (None, _checksum(body)) else "it differs from its checksum"
            manifest = TypeAdapter(cls).validate_python(body)
        except ValidationError as error:
            problems = "; ".join(problems_of(error, Manifest))
        except (ValueError, TypeError) as error:
            problems = str(error)
        if problems:
            raise ContractError(f"artifact manifest {source} is broken: {problems}; delete the bundle or restore it")
        return manifest


def artifact_version(trained_through: date, fingerprint: str) -> str:
    """The version name of an artifact made from inputs with `fingerprint`."""
    return f"{trained_through.isoformat()}-{fingerprint[:10]}"


class ArtifactStore:
    """Bundles under `<root>/artifacts/<kind>/<version>/`, listed once per store, as are the decisions about them.

    A shadow run reads some kinds from the store of another lakehouse, and publishes none of them.
    """

    def __init__(self, root: str, lake: Lake | None = None, shadow: Shadow | None = None):
        self.root = f"{root.rstrip('/')}/artifacts"
        self.lake = lake or Lake(root)
        self._fs, self._base = filesystem(self.root)
        shadow = shadow or Shadow()
        self._pinned = dict(shadow.artifacts)
        self._theirs = ArtifactStore(shadow.of) if shadow.of else self
        self._listed: dict[str, list[str]] = {}  # kind -> versions, newest first, as they were when first asked for
        # `<kind>/<version>` -> what is wrong with a bundle, of those that have been looked at.
        self.damaged: dict[str, str] = self._theirs.damaged if shadow.of else {}

    def manifests(self, kind: str) -> list[Manifest]:
        """Every bundle of `kind` with a manifest that can be read, oldest first (by trained_through, then creation)."""
        found = [m for version in self._versions(kind) if (m := self._read(kind, version))]
        return sorted(found, key=lambda m: (m.trained_through, m.created_at, m.version))

    def _versions(self, kind: str) -> list[str]:
        """Names of the bundles of `kind`, those of killed runs too."""
        if kind in self._pinned:
            return [v for v in self._theirs._versions(kind) if self._pinned[kind] in ("", v)]
        folder = f"{self._base}/{kind}"
        places = self._fs.ls(folder, detail=False) if self._fs.exists(folder) else []
        return [path.rstrip("/").rsplit("/", 1)[1] for path in places]

    def find(self, kind: str, version: str) -> Manifest | None:
        """The manifest of one version, None when it does not exist or its bundle is damaged."""
        manifest = self._read(kind, version)
        return manifest if manifest and self._is_whole(manifest) else None

    def _read(self, kind: str, version: str) -> Manifest | None:
        if kind in self._pinned:
            return self._theirs._read(kind, version)
        path = f"{self._base}/{kind}/{version}/{MANIFEST}"
        if not self._fs.exists(path):
            return None
        try:
            manifest = Manifest.from_json(self._fs.cat_file(path), path)
        except ContractError as error:
            self._report(kind, version, str(error))
            return None
        return manifest if (manifest.kind, manifest.version) == (kind, version) else None  # "VERSION/" is no version

    def _is_whole(self, manifest: Manifest) -> bool:
        try:
            self.fetch(manifest)
        except ContractError as error:
            self._report(manifest.kind, manifest.version, str(error))
            return False
        return True

    def _report(self, kind: str, version: str, problem: str) -> None:
        self.damaged[f"{kind}/{version}"] = problem
        _say(problem)

    def in_force(self, kind: str, run_date: date) -> Manifest:
        """The newest version in force that was trained on nothing at or after `run_date`, else MissingInputError."""
        manifest = self.in_force_or_none(kind, run_date)
        if manifest is None:
            raise MissingInputError(
                f"artifact {kind}: no published version was trained through a date before {run_date}; "
                f"existing: {self.known(kind)}. Run the step that trains it for {run_date}"
            )
        return manifest

    def in_force_or_none(self, kind: str, run_date: date) -> Manifest | None:
        """Like `in_force`, None instead of an error."""
        if self._pinned.get(kind) == "":
            return self._theirs.in_force_or_none(kind, run_date)
        # Names begin with `trained_through`: of years of versions the newest are read, as far back as needed.
        if kind not in self._listed:
            self._listed[kind] = sorted(self._versions(kind), reverse=True)
        earlier = (v for v in self._listed[kind] if v[:10] < run_date.isoformat())
        for _, versions in groupby(earlier, key=lambda version: version[:10]):
            usable = [m for v in versions if (m := self._read(kind, v)) and self._usable(m, run_date)]
            for manifest in sorted(usable, key=self._rank, reverse=True):
                if self._is_whole(manifest):
                    return manifest
        return None

    def rolled_back(self, kind: str, version: str, run_date: date) -> bool:
        """Whether an operator has decided that `run_date` does without `version`."""
        decision = self._decisions.get((kind, version))
        return decision is not None and not decision.allows(run_date)

    def _usable(self, manifest: Manifest, run_date: date) -> bool:
        return manifest.kind in self._pinned or not self.rolled_back(manifest.kind, manifest.version, run_date)

    def _rank(self, manifest: Manifest) -> tuple[date, str, str]:
        # Of two versions through one date, the one that was made or promoted last.
        decision = self._decision(manifest)
        promoted = decision.decided_at.isoformat() if decision and decision.action == "promote" else ""
        return manifest.trained_through, max(manifest.created_at, promoted), manifest.version

    def known(self, kind: str) -> str:
        """The versions there are and how each stands, for messages."""
        read = {m.version: self._standing(m) for m in self.manifests(kind)}
        damaged = {v: "damaged" for k, v in (place.split("/", 1) for place in self.damaged) if k == kind}
        return ", ".join(f"{version} ({standing})" for version, standing in {**read, **damaged}.items()) or "none"

    def _standing(self, manifest: Manifest) -> str:
        decision, rolled_back = self._decision(manifest), ""
        if decision is not None and decision.action == "rollback":
            rolled_back = ", rolled back" + (f" from {decision.from_date} on" if decision.from_date else "")
        return f"through {manifest.trained_through}{rolled_back}"

    def _decision(self, manifest: Manifest) -> Decision | None:
        return self._decisions.get((manifest.kind, manifest.version))

    @cached_property
    def _decisions(self) -> dict[tuple[str, str], Decision]:
        return latest_decisions(self.lake)

    def decide(
        self, kind: str, version: str, action: Action, *, from_date: date | None = None, reason: str = ""
    ) -> bool:
        """Take `version` out of force (for run dates from `from_date` on) or put it back; False if it is so already.

        MissingInputError without such a version; ConflictError when another decision was made at the same time.
        """
        manifest = self.find(kind, version)
        if manifest is None:
            raise MissingInputError(f"artifact {kind}: no version {version}; existing: {self.known(kind)}")
        self._refuse_pinned(kind)
        count = decision_count(self.lake, kind)
        self.__dict__.pop("_decisions", None)  # others may have decided since
        before = self._decision(manifest)
        if action == "promote":
            peers = [m for m in self.manifests(kind) if m.trained_through == manifest.trained_through]
            stands = max((m for m in peers if self._usable(m, date.max)), key=self._rank, default=None) == manifest
        else:
            stands = before is not None and (before.action, before.from_date) == (action, from_date)
        if not stands:
            add_decision(self.lake, kind, version, action, from_date=from_date, reason=reason, count=count)
            self.__dict__.pop("_decisions", None)
        return not stands

    def publish(
        self, kind: str, folder: Path, *, trained_through: date, fingerprint: str, version: str = "", **facts: Any
    ) -> Manifest:
        """Copy the files of `folder` into the store and write the manifest last, with the `facts` among its fields.

        `version` is made of `trained_through` and `fingerprint` unless given: a forced run makes the same again
        under another name. Publishing the same version again replaces an unfinished or damaged bundle and leaves a
        whole one alone, that of another run which publishes at the same time too; it is promoted when other settings
        have made another one for its date in between. ConflictError when other runs kept replacing the bundle.
        """
        self._refuse_pinned(kind)
        version = version or artifact_version(trained_through, fingerprint)
        paths = (p for p in sorted(folder.rglob("*")) if p.is_file() and p != folder / MANIFEST)
        manifest = Manifest(
            kind=kind, version=version, trained_through=trained_through, fingerprint=fingerprint,
            files={p.relative_to(folder).as_posix(): _digest(p) for p in paths},
            created_at=datetime.now(UTC).isoformat(), **facts,
        )  # fmt: skip
        for attempt in range(_TRIES):
            if (whole := self.find(kind, version)) is not None:
                self.damaged.pop(f"{kind}/{version}", None)
                rivals = [v for v in self._versions(kind) if v[:10] == version[:10] and v != version]
                decision = self._decision(whole)
                if rivals and not attempt and (decision is None or decision.action == "promote"):
                    self.decide(kind, version, "promote", reason="made again")  # it was made before them
                return whole
            self._put(folder, manifest)
        raise ConflictError(
            f"artifact {kind} {version}: {_TRIES} times it was not whole after it was written: others write it too; "
            "run the step again"
        )

    def _put(self, folder: Path, manifest: Manifest) -> None:
        """Write a bundle: on a disk aside and renamed, unless another one is there by then; else file by file."""
        self._listed.pop(manifest.kind, None)
        target = f"{manifest.kind}/{manifest.version}"
        on_disk = "file" in self._fs.protocol
        place = f"{target}.{uuid.uuid4().hex[:8]}.part" if on_disk else target
        if on_disk:  # left behind by a killed run, or damaged
            shutil.rmtree(f"{self._base}/{target}", ignore_errors=True)
        try:
            for name in manifest.files:
                self._fs.makedirs(f"{self._base}/{place}/{name}".rsplit("/", 1)[0], exist_ok=True)
                self._fs.put_file(str(folder / name), f"{self._base}/{place}/{name}")
            write_whole(f"{self.root}/{place}/{MANIFEST}", manifest.to_json().encode())
            if on_disk:
                with suppress(OSError):  # another run was faster: `publish` looks again
                    os.rename(f"{self._base}/{place}", f"{self._base}/{target}")
        finally:
            if on_disk:
                shutil.rmtree(f"{self._base}/{place}", ignore_errors=True)

    def fetch(self, manifest: Manifest) -> Path:
        """A local folder with the bundle's files; ContractError when one is missing or differs from the manifest."""
        if manifest.kind in self._pinned:
            return self._theirs.fetch(manifest)
        source = f"{self._base}/{manifest.kind}/{manifest.version}"
        if "file" in self._fs.protocol:
            local = Path(source)
            differing = _differing(local, manifest)
        else:
            place = hashlib.sha256(f"{source}:{manifest.to_json()}".encode()).hexdigest()[:16]
            local = Path(tempfile.gettempdir()) / f"gpl-artifacts-{account()}" / place
            if local.is_dir() and _differing(local, manifest):  # a copy may be damaged too
                shutil.rmtree(local, ignore_errors=True)
            if not local.is_dir():
                self._copy(source, manifest, local)
            if differing := _differing(local, manifest):
                shutil.rmtree(local, ignore_errors=True)  # the next try copies again
        if differing:
            raise ContractError(
                f"artifact {manifest.kind} {manifest.version}: file {differing} is missing or differs from the "
                f"manifest in {source}; restore the bundle or delete it and run its step again"
            )
        return local

    def _refuse_pinned(self, kind: str) -> None:
        if kind in self._pinned:
            raise UsageError(f"artifact {kind}: this shadow run only reads it from {self._theirs.root}")

    def _copy(self, source: str, manifest: Manifest, local: Path) -> None:
        """Copy a bundle to a folder beside `local` and rename it: ranks may race, and a killed copy is no bundle."""
        local.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        with scratch_folder(parent=local.parent) as aside:
            for name in manifest.files:
                (aside / name).parent.mkdir(parents=True, exist_ok=True)
                with suppress(FileNotFoundError):  # `fetch` reports it
                    self._fs.get_file(f"{source}/{name}", str(aside / name))
            try:
                aside.rename(local)
            except OSError:
                if not local.is_dir():  # if it is one, another rank was faster
                    raise


@lru_cache(maxsize=1024)
def _say(problem: str) -> None:
    """Warn of a damaged bundle, once per process."""
    log.warning("%s; until then it is not used", problem)


def _differing(folder: Path, manifest: Manifest) -> str:
    """The first file in `folder` that is not as `manifest` says; "" when all are."""
    return next((n for n, digest in manifest.files.items() if _digest(folder / n) != digest), "")


def _digest(path: Path) -> str:
    """sha256 of a file; "" without one."""
    try:
        found = path.stat()
        return _sha256(path, found.st_size, found.st_mtime_ns, found.st_ino)
    except OSError:
        return ""


@lru_cache(maxsize=4096)
def _sha256(path: Path, *identity: int) -> str:
    """Read once per process while size, time of change and inode (`identity`) stay."""
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def _checksum(body: Mapping[str, Any]) -> str:
    """Of a manifest's JSON, whatever its layout."""
    canonical = json.dumps(json.loads(json.dumps(body)), sort_keys=True)
    return hashlib.sha256(canonical.encode()).hexdigest()
