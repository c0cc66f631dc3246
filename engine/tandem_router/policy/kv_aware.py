"""The decode worker with the longest cached prefix, as long as loads are comparable."""

import random
from collections.abc import Sequence

from tandem_router.policy.base import Placement, Policy, lacks_room
from tandem_router.workers.link import WorkerLink
from tandem_wire.hashing import prefix_hashes, salt_hash

LOAD_SLACK_SEQUENCES = 4
LOAD_SLACK_RATIO = 1.25


class KvAware(Policy):
    """Among the workers whose load is within a slack of the least, the one with the longest prefix.

    It predicts neither TTFT nor TBT and doesn't fetch a prefix from elsewhere: a worker that holds
    more of the prompt wins unless it has clearly more sequences than the least loaded one. A worker
    that doesn't say how its hashes are salted counts as holding nothing.
    """

    def choose_decode(self, candidates: Sequence[WorkerLink], placement: Placement) -> WorkerLink:
        roomy = [link for link in candidates if not lacks_room(link, placement)] or list(candidates)
        least = min(link.num_load for link in roomy)
        limit = least * LOAD_SLACK_RATIO + LOAD_SLACK_SEQUENCES
        near = [link for link in roomy if link.num_load <= limit]
        chains: dict[tuple[int, int], list[int]] = {}

        def matching(link: WorkerLink) -> int:
            if not len(link.prefixes) or link.welcome is None or not link.welcome.salt_parts:
                return 0
            salt = salt_hash(*link.welcome.salt_parts, placement.cache_salt)
            key = (salt, link.welcome.page_size)
            if key not in chains:
                chains[key] = prefix_hashes(placement.tokens, link.welcome.page_size, salt)
            return link.prefixes.num_matching_blocks(chains[key])

        return max(near, key=lambda link: (matching(link), -link.num_load, random.random()))
