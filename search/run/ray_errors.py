"""Errors of ``ray.init``, in one line with what to do."""

import os
import traceback

from ray.exceptions import AuthenticationError

from bdense.errors import InputError

TOKEN = "RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN_PATH (a file) or RAY_AUTH_TOKEN"


def cannot_use(error: Exception) -> InputError:
    """The error for the user, made from what ``ray.init`` raised."""
    address = os.environ.get("RAY_ADDRESS")
    where = address or "this machine"
    said = " ".join(str(error).split())
    if _is_refused(error):
        return InputError(
            f"Ray at {where} asks for a token, and the one here is missing or wrong; set {TOKEN}, "
            "to the same as on its head"
        )
    advice = "check RAY_ADDRESS, or unset it" if address else "see Ray's own logs"
    if "version mismatch" in said.lower():
        advice = "install the cluster's versions of Ray and Python here"
    return InputError(f"Ray cannot be used at {where}: {said}; {advice}")


def _is_refused(error: Exception) -> bool:
    """Whether the token was refused; Ray names that only in a cause of its error."""
    if isinstance(error, AuthenticationError):
        return True
    text = "".join(traceback.format_exception(error))
    return "AuthenticationError" in text or "InvalidAuthToken" in text
