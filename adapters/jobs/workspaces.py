"""Workspaces: one directory per job, ``<root>/<job id>/``, for prompts, markers, samples and checkpoints."""

import os
import time
from pathlib import Path

from sqlalchemy import select

from eda.adapters.database import Database, adapters, jobs
from eda.adapters.errors import InvalidInputError
from eda.adapters.jobs.queue import FINAL_STATES
from eda.adapters.store.files import empty_trash, remove_tree

PROMPTS_FILE = "prompts.jsonl"
DEFAULT_KEEP_SECONDS = 7 * 24 * 3600.0
_ORPHAN_SECONDS = 3600.0


class Workspaces:
    """Directories of jobs. Failed and cancelled jobs keep theirs for ``keep_seconds``, so that they can be retried."""

    def __init__(self, root: Path, *, keep_seconds: float = DEFAULT_KEEP_SECONDS) -> None:
        self.root = Path(root)
        self.root.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._keep_seconds = keep_seconds
        self._trash = self.root / ".trash"

    def directory(self, job_id: str) -> Path:
        """Where ``job_id`` works; not created here. Raises ``InvalidInputError`` for an id that is no plain name."""
        if not job_id or job_id.startswith(".") or os.sep in job_id:
            raise InvalidInputError(f"job id {job_id[:80]!r} is malformed", param="job_id")
        return self.root / job_id

    def remove(self, job_id: str) -> None:
        """Deletes a workspace, if there is one."""
        remove_tree(self.directory(job_id), self._trash)

    def sweep(self, database: Database) -> None:
        """Deletes workspaces that nothing will use again.

        Those are of jobs that succeeded, ended long ago, never were, or whose adapter was deleted.
        """
        with database.read() as connection:
            rows = connection.execute(
                select(jobs.c.id, jobs.c.state, jobs.c.finished_at, jobs.c.adapter_uid)
            ).all()
            uids = set(connection.execute(select(adapters.c.uid)).scalars())
        abandoned = {row.id for row in rows if row.state in FINAL_STATES and row.adapter_uid not in uids}
        ended = {row.id: (row.state, row.finished_at or 0.0) for row in rows if row.state in FINAL_STATES}
        known = {row.id for row in rows}
        now = time.time()
        for path in list(self.root.iterdir()):
            job_id = path.name
            if job_id.startswith("."):
                continue
            state, finished_at = ended.get(job_id, ("", now))
            # A server writes a workspace before it enters the job, so a young one without a row is left alone.
            orphan = job_id not in known and now - path.stat().st_mtime > _ORPHAN_SECONDS
            if (
                orphan
                or job_id in abandoned
                or state == "succeeded"
                or now - finished_at > self._keep_seconds
            ):
                self.remove(job_id)
        empty_trash(self._trash)
