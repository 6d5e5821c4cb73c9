"""The command `audit`."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from consumers.cli.options import AsJson, time_option
from consumers.embedded.stack import stack
from consumers.ops.checks import counted
from consumers.terminal import print_audit, print_comparison, print_json

if TYPE_CHECKING:
    from consumers.ops.audit import Audits
    from consumers.ops.content_audit import ContentAudit
    from producers.outbox import Outbox
    from producers.segments import Segment

    Comparisons = Mapping[Literal["content", "against"], Mapping[str, ContentAudit]]


def audit(
    *,
    since: Annotated[
        datetime | None,
        typer.Option(
            parser=time_option,
            metavar="TIME",
            help="Check only events recorded from this time on, such as 2026-11-22T17:00, 7d or yesterday.",
        ),
    ] = None,
    content: Annotated[
        bool, typer.Option("--content", help="Also compare the content of rows with the outbox of this host.")
    ] = False,
    seal_file: Annotated[
        Path | None,
        typer.Option("--seal", metavar="FILE", help="Write the outbox's digests of all settled events to a new file."),
    ] = None,
    against: Annotated[
        Path | None,
        typer.Option("--against", metavar="FILE", help="Compare the content of rows with a file written by --seal."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Check that every event of every source has a row or an outcome; exit status 1 if one is missing or differs.

    Example: trading-history audit --content --since 2026-06-01
    """
    from consumers.ops.audit import audit as account
    from consumers.ops.seal import read_seal, write_seal
    from producers.settings import TransportSettings, ZoneSettings
    from producers.times import localized

    if since is not None:
        since = localized(since, ZoneSettings.from_environment().timezone, "--since")
    seal = None if against is None else read_seal(against)
    with stack(database=True):
        settings = TransportSettings.from_environment()
        redis = None if settings.redis_url is None else settings.redis()
        needs_chains = content or seal_file is not None
        with _outbox(settings.outbox, is_needed=needs_chains) as outbox:
            audits = account(redis, outbox, settings.queue, since=since)
            chains = _chains(outbox) if outbox is not None and needs_chains else {}
        compared = _compared(audits, chains if content else {}, {} if seal is None else seal.chains, since)
    if as_json:
        print_json(_results(audits, compared))
    else:
        print_audit([asdict(one) for one in audits])
        _print_compared(compared, None if seal is None else f"the seal of {seal.made_at:%Y-%m-%d %H:%M:%SZ}")
    if seal_file is not None:
        sealed = f"{counted(write_seal(seal_file, chains), 'event')} sealed in {seal_file}"
        print(f"{sealed}. Keep it where the owner of the database cannot change it.", file=sys.stderr)
    _print_notes(audits)
    differs = any(one.differing for contents in compared.values() for one in contents.values())
    raise typer.Exit(0 if all(one.complete for one in audits) and not differs else 1)


def _compared(
    audits: Audits,
    chains: Mapping[str, Sequence[Segment]],
    sealed: Mapping[str, Sequence[Segment]],
    since: datetime | None,
) -> Comparisons:
    """Compare the content of the database with the chains of the outbox (`content`) and of the seal (`against`)."""
    from consumers.ops.content_audit import audit_content

    first_numbers = {one.source: one.proven_from for one in audits}

    def chosen(known: Mapping[str, Sequence[Segment]]) -> dict[str, Sequence[Segment]]:
        # With --since, the sources that have no event since then are left out.
        return {source: one for source, one in known.items() if since is None or source in first_numbers}

    return {
        "content": audit_content(chosen(chains), first_numbers),
        "against": audit_content(chosen(sealed), first_numbers),
    }


def _outbox(path: Path, *, is_needed: bool) -> Outbox | nullcontext[None]:
    from producers.errors import OutboxError
    from producers.outbox import Outbox

    if path.is_file():
        return Outbox(path)
    if is_needed:
        raise OutboxError(f"there is no outbox at {path}: set HISTORY_OUTBOX. Only --against needs no outbox")
    return nullcontext()


def _chains(outbox: Outbox) -> dict[str, list[Segment]]:
    """Return the segments of each source of the outbox that has settled events."""
    chains = {source.full_name: outbox.digest_chain(source.id) for source in outbox.sources()}
    return {source: segments for source, segments in chains.items() if segments}


def _results(audits: Audits, compared: Comparisons) -> list[dict[str, Any]]:
    """Return the results as dicts. The members `content` and `against` are None if this source was not compared.

    A source that is only in the seal has no other members.
    """
    results: list[dict[str, Any]] = [asdict(one) for one in audits]
    known = {one.source for one in audits}
    results += [{"source": source} for source in compared["against"] if source not in known]
    for result in results:
        for name, contents in compared.items():
            found = contents.get(result["source"])
            result[name] = None if found is None else asdict(found)
    return results


def _print_compared(compared: Comparisons, seal: str | None) -> None:
    for name, contents in compared.items():
        for source, content in contents.items():
            print_comparison(source, asdict(content), "the outbox" if name == "content" else str(seal))


def _print_notes(audits: Audits) -> None:
    if audits.redis_problem is not None:
        print(
            f"note: Redis: {audits.redis_problem}; events that are only in the queue count as missing", file=sys.stderr
        )
    if audits.left_out:
        have = (
            "it has no event since then, and its outbox is"
            if audits.left_out == 1
            else ("they have no event since then, and their outboxes are")
        )
        left_out = f"{counted(audits.left_out, 'source')} left out: {have} not on this host"
        print(f"note: {left_out}; without --since they are checked too", file=sys.stderr)
