"""Work on a claimed row under its lease; an error becomes a named state."""

import logging
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from bdense.errors import BdenseError, NonFiniteError, StoppedError, is_out_of_memory
from search.errors import (
    DiskFullError,
    LeaseLostError,
    SpecChangedError,
    StorageError,
    UnpreparedError,
)
from search.log import log_context
from search.redaction import redact
from search.storage.ledger import Claim, FailureReason, LeaseRenewal, Ledger
from search.study.folders import row_folder
from search.study.notes import attach_pictures, errors_logged
from search.study.plot import draw_losses
from search.study.results import TrialResult
from search.study.retention import drop_checkpoints
from search.study.trial_log import TrialLog
from search.worker.disk import disk_error
from search.worker.result import package_versions

_log = logging.getLogger(__name__)


def work_on_row(
    ledger: Ledger,
    claim: Claim,
    work: Callable[[LeaseRenewal, Path, TrialLog], TrialResult],
    *,
    fingerprint: str,
    asked: float,
) -> None:
    """Work on a claimed row; store its result or failure, or give it back.

    Args:
        ledger: The row's ledger.
        claim: The row.
        work: Makes the result, given the held lease, the row's folder and its log.
        fingerprint: The study's.
        asked: ``time.perf_counter()`` when the claim was asked for.

    Raises:
        LeaseLostError: Another worker took it over; nothing was stored.
        StorageError: The database stayed away; the trial is taken over once it is back.
        StoppedError: The study or launch was asked to stop; the trial was given back.
        UnpreparedError: This machine cannot work on it; the trial was given back.
        SpecChangedError: What is measured was edited meanwhile; the trial was given back.
    """
    study = ledger.name
    folder = row_folder(study, claim.number)
    log = TrialLog(folder)

    def fail(reason: FailureReason, detail: str) -> None:
        attrs: dict[str, Any] = {"fingerprint": fingerprint, "versions": package_versions()}
        ledger.fail(claim, reason, detail, attrs)
        log("failed", level=logging.WARNING, reason=reason, error=redact(detail))
        drop_checkpoints(folder)

    with log_context(study=study, trial=claim.number, attempt=claim.attempt):
        before = {"from_attempt": claim.attempt - 1} if claim.adopted else {}
        log("adopted" if before else "claimed", params=dict(claim.params), **before)
        try:
            with ledger.holding(claim) as holding:
                result = work(holding, folder, log)
            service = {"service_seconds": _service_seconds(asked, result)}
            result = replace(result, timings={**result.timings, **service})
            # Before the end: a finished trial accepts no pictures.
            with ledger.holding(claim):
                with errors_logged(f"loss curve of trial {claim.number}"):
                    draw_losses(folder)
                attach_pictures(ledger, claim, folder, result)
            attrs = result.attrs() | {"tries": claim.tries}
            if result.value is None:
                ledger.prune(claim, attrs)
                log("pruned", reason=result.reason)
            else:
                ledger.complete(claim, result.value, attrs)
                named: dict[str, Any] = {"value" if result.score else "fid": result.value}
                log("complete", **named)
        except StoppedError:
            ledger.release(claim, interrupted=True)
            log("released", why="stopped")
            raise
        except (LeaseLostError, StorageError) as error:
            # Not the trial's fault; its result is in its folder for the next worker.
            log("lost", level=logging.WARNING, error=str(error))
            raise
        except (UnpreparedError, SpecChangedError) as error:
            ledger.release(claim, interrupted=True)
            log("released", level=logging.WARNING, why=redact(str(error)))
            raise
        except NonFiniteError as error:
            fail("diverged", str(error))
        except BdenseError as error:
            fail("error", str(error))
        except Exception as error:
            if is_out_of_memory(error):
                # It would fail the same way anywhere, and the memory is free again.
                what = "\n".join(str(error).splitlines()[:1])
                fail("out of memory", f"{what}; use a smaller batch or give trials more memory")
                return
            if (refusal := disk_error(error)) is not None:
                # Not the trial's fault; every row here would meet the same.
                ledger.release(claim, interrupted=True)
                why = "disk full" if isinstance(refusal, DiskFullError) else "no access"
                log("released", level=logging.WARNING, why=why)
                raise refusal from error
            _log.exception("trial %d, attempt %d", claim.number, claim.attempt)
            if claim.tries < ledger.max_attempts:
                ledger.release(claim)
                why = redact(f"{type(error).__name__}: {error}")
                log("released", level=logging.WARNING, why=why)
            else:
                fail("error", f"{type(error).__name__}: {error}")
        finally:
            log.open()  # in case it ended before the folder was taken


def _service_seconds(asked: float, result: TrialResult) -> float:
    """Seconds from asking for the trial to storing its result, without those of bdense."""
    inside = sum(s for name, s in result.timings.items() if name != "service_seconds")
    # A result that was taken over was computed before this worker asked.
    return round(max(time.perf_counter() - asked - inside, 0.0), 3)
