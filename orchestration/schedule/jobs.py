"""Where rounds run: jobs of a Ray cluster, whose ids are taken once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

from cpfean.errors import ServiceError, message_of


class Jobs(Protocol):
    """Where rounds run."""

    def submit(self, job: str, command: str) -> bool:
        """Starts a job; False if there was one of that id before."""

    def running(self, prefix: str) -> Sequence[str]:
        """The jobs that have not ended and whose id starts so."""


class RayJobs:
    """A Ray cluster, reached through its dashboard.

    Args:
        address: http://host:port; on the head 127.0.0.1:8265.

    Raises:
        ServiceError: nobody answers, at any call.
    """

    def __init__(self, address: str) -> None:
        self._address = address

    def submit(self, job: str, command: str) -> bool:
        with self._client() as client:
            try:
                client.submit_job(entrypoint=command, submission_id=job)
            except RuntimeError as error:
                if "already exists" in str(error):
                    return False
                raise
        return True

    def running(self, prefix: str) -> Sequence[str]:
        with self._client() as client:
            return [
                job.submission_id
                for job in client.list_jobs()
                if (job.submission_id or "").startswith(prefix) and not job.status.is_terminal()
            ]

    @contextmanager
    def _client(self) -> Iterator[Any]:
        from ray.job_submission import JobSubmissionClient

        try:
            yield JobSubmissionClient(self._address)
        # Ray raises its own kinds, requests' and plain ones, at any call.
        except Exception as error:
            raise ServiceError(
                f"no Ray cluster takes jobs at {self._address} ({message_of(error)}); start one, "
                "or name its dashboard with --jobs."
            ) from None
