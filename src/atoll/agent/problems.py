"""Errors of the package as HTTP carries them: RFC 9457 problems."""

import logging

from litestar import MediaType, Request, Response
from litestar.exceptions import HTTPException, NotFoundException, ValidationException

from atoll import errors
from atoll.errors import AtollError
from atoll.model.task import Problem

PROBLEM_TYPE = "application/problem+json"
_log = logging.getLogger("atoll.agent")

_STATUS = {
    errors.InvalidInput: 400,
    errors.Unauthorized: 401,
    errors.Forbidden: 403,
    errors.NotFound: 404,
    errors.AlreadyExists: 409,
    errors.WrongState: 409,
    errors.Busy: 409,
    errors.Changed: 412,
    errors.TooMany: 429,
    errors.OperationStuck: 409,
    errors.Cancelled: 409,
    errors.TimedOut: 409,
    errors.Unsupported: 422,
    errors.ImageRefused: 422,
    # Something that the request depends on refused: the guest, QEMU, a mirror, a program.
    errors.EngineFailed: 424,
    errors.GuestFailed: 424,
    errors.ProcessFailed: 424,
    errors.DownloadFailed: 424,
    errors.BuildFailed: 424,
    errors.NetworkFailed: 424,
    errors.StorageFailed: 507,
}


def problem_of(error: BaseException) -> Problem:
    """Any exception as the client should read it."""
    told = error if isinstance(error, AtollError) else _unforeseen(error)
    kind = next(kind for kind in type(told).__mro__ if issubclass(kind, AtollError))
    status = next((_STATUS[each] for each in kind.__mro__ if each in _STATUS), 500)
    return Problem(
        type=f"urn:atoll:{told.code}",
        title=(kind.__doc__ or told.code).split("\n")[0].rstrip("."),
        status=status,
        detail=told.text,
        code=told.code,
        what=told.what,
        why=told.why,
        next_step=told.next_step,
    )


def _unforeseen(error: BaseException) -> AtollError:
    if isinstance(error, OSError):
        return errors.from_os_error(error, "do that")
    return AtollError("Atoll failed", f"{type(error).__name__}: {error}", "See the agent's log; report it.")


def respond(problem: Problem) -> Response[Problem]:
    headers = {401: {"WWW-Authenticate": 'Bearer realm="atoll"'}, 429: {"Retry-After": "1"}}.get(problem.status)
    return Response(problem, status_code=problem.status, media_type=PROBLEM_TYPE, headers=headers)


def on_atoll_error(request: Request, error: AtollError) -> Response[Problem]:  # type: ignore[type-arg]
    return respond(problem_of(error))


def on_http_exception(request: Request, error: HTTPException) -> Response[Problem]:  # type: ignore[type-arg]
    """What Litestar refuses by itself: a path, a verb, an argument of a wrong type."""
    codes = {
        401: "unauthorized",
        403: "forbidden",
        404: "not-found",
        405: "no-such-method",
        408: "timed-out",
        413: "too-large",
    }
    code = codes.get(error.status_code, "invalid-input" if error.status_code < 500 else "error")
    what = error.detail
    if isinstance(error, ValidationException):
        reasons = error.extra if isinstance(error.extra, list) else []
        told = "; ".join(f"{each.get('key', '')}: {each.get('message', '')}" for each in reasons)
        what = f"the request can't be used: {told}" if told else error.detail
    elif isinstance(error, NotFoundException):
        what = f"there is no {request.url.path}"
    return respond(
        Problem(
            type=f"urn:atoll:{code}",
            title=error.detail.split("\n")[0],
            status=error.status_code,
            detail=what,
            code=code,
            what=what,
        )
    )


def on_anything(request: Request, error: Exception) -> Response[Problem]:  # type: ignore[type-arg]
    _log.error("%s %s failed", request.method, request.url.path, exc_info=error)
    return respond(problem_of(error))


def on_recursion_error(request: Request, error: RecursionError) -> Response[Problem]:  # type: ignore[type-arg]
    """A body of a hundred thousand brackets; what else recurses without an end is the agent's own failure."""
    if "deserializing" not in str(error):
        return on_anything(request, error)
    return on_atoll_error(request, errors.InvalidInput("the request can't be used", "its body is nested too deeply"))


__all__ = [
    "MediaType",
    "on_anything",
    "on_atoll_error",
    "on_http_exception",
    "on_recursion_error",
    "problem_of",
    "respond",
]
