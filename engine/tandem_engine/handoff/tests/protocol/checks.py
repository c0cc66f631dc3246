"""What must hold after every step, when the workers are at rest, and at the end."""

from tandem_engine.handoff.decode.side import _Fetch
from tandem_engine.handoff.tests.protocol.fabric import Arrival
from tandem_engine.handoff.tests.protocol.router import ProtocolViolation, require
from tandem_engine.handoff.tests.protocol.worker import Worker
from tandem_engine.scheduler.request import Kind


def check_ledger(worker: Worker) -> None:
    """Free and held blocks are all blocks, each in one state."""
    worker.core.ledger.check()
    counts = worker.core.ledger.counts()
    total = counts["free"] + counts["cached"] + counts["owned"] + counts["leased"]
    require(
        counts["leaked"] == 0 and total == worker.core.ledger.num_blocks,
        f"{worker.boot_id}: the ledger doesn't add up: {counts}",
    )


def check_loop(worker: Worker) -> None:
    """No callback and no task ended by an exception that no one took."""
    require(not worker.loop.errors, f"{worker.boot_id}: {worker.loop.errors}")


def _owner(worker: Worker, arrival: Arrival) -> _Fetch | None:
    """The fetch whose attempt the write belongs to, as D has it now."""
    landing = arrival.landing or arrival.inbound.landing(arrival.write.epoch)
    for fetch in worker.service._decode._fetches.values():
        if fetch.attempt is not None and fetch.attempt.landing is landing is not None:
            return fetch
    return None


def check_target(worker: Worker, arrival: Arrival) -> None:
    """D's pages that a write can still change belong to the attempt that it was made for."""
    inbound, write = arrival.inbound, arrival.write
    what = f"{worker.boot_id}: a write of epoch {write.epoch} to its blocks {write.target_blocks}"
    fetch = _owner(worker, arrival)
    if fetch is None:
        raise ProtocolViolation(f"{what}, which is over")
    require(
        inbound.serials.get(write.epoch) == arrival.serial,
        f"{what} is of an earlier attempt of the same number",
    )
    request, transfers = fetch.request, worker.core.scheduler.transfers
    require(set(write.target_blocks) <= set(request.blocks), f"{what} is outside its request")
    open_one = transfers._fetching.get(request.rid) or transfers._abandoned.get(request.rid)
    require(
        open_one is not None
        and open_one.holding is not None
        and open_one.holding.leased
        and set(request.blocks) <= set(open_one.blocks),
        f"{what}, which the core has given to others",
    )


def check_sources(worker: Worker) -> None:
    """P's pages that a lane still reads are pinned for the prompt that it pushes."""
    for lane in worker.seat.lanes:
        if lane.job is None:
            continue
        write, outbound = lane.job.write, lane.outbound
        if not outbound.arrival(write).touches_cache:
            continue
        key = f"{outbound.link.session}/{write.epoch}"
        request = worker.core.scheduler.requests.find(Kind.REMOTE, key)
        require(
            request is not None
            and request.holding is not None
            and request.holding.leased
            and set(write.source_blocks) <= set(request.blocks),
            f"{worker.boot_id}: a write reads blocks {write.source_blocks}, which are not pinned",
        )


def check_at_rest(worker: Worker) -> None:
    """Nothing can move but time: every lease has an owner that this worker is connected to."""
    service = worker.service
    sessions = service._prefill._sessions
    for request in worker.core.scheduler.requests:
        if request.kind is Kind.REMOTE:
            session, _, epoch = request.key.rpartition("/")
            require(
                session in sessions and int(epoch) in sessions[session].pushes,
                f"{worker.boot_id}: the lease {request.key} has outlived its owner",
            )
    num_open = len(service._decode._fetches)
    num_open += sum(len(session.pushes) for session in sessions.values())
    require(
        service.num_leases() == num_open,
        f"{worker.boot_id}: {service.num_leases()} leases, but {num_open} fetches and pushes",
    )


def check_nothing_left(worker: Worker) -> None:
    """Every request has ended: no block, lease or epoch is left."""
    left = {what: count for what, count in worker.leases().items() if count}
    require(not left, f"{worker.boot_id}: left over: {left}")
    lanes = [lane for lane in worker.seat.lanes if lane.job is not None]
    require(not lanes, f"{worker.boot_id}: {len(lanes)} writes are under way")
