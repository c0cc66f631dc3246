"""Which rails the NICs of all workers of a service get, when rails don't reach each other."""

from collections import defaultdict

from tandem_operator.facts.observed import DeviceView

Rail = str | int | bool


def choose_rails(
    devices: tuple[DeviceView, ...], attribute: str, wanted: int, seed: int
) -> tuple[Rail, ...]:
    """As many rails as a worker has NICs, of those that most nodes are on; fewer if there are.

    The choice stays the same while the same nodes are on the same rails. `seed` is where it starts,
    so that services spread over the rails.
    """
    nodes: dict[Rail, set[str]] = defaultdict(set)
    for device in devices:
        if (rail := device.attributes.get(attribute)) is not None:
            nodes[rail].add(device.node)
    most = max(map(len, nodes.values()), default=0)
    full = sorted((rail for rail in nodes if len(nodes[rail]) == most), key=_order)
    rest = sorted((rail for rail in nodes if len(nodes[rail]) < most), key=_order)
    start = seed % len(full) if full else 0
    rotated = [*full[start:], *full[:start], *rest]
    return tuple(sorted(rotated[:wanted], key=_order))


def _order(rail: Rail) -> tuple[int, str]:
    text = str(rail)
    return len(text), text
