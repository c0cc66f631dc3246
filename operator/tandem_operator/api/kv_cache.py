"""The tiers of the KV cache behind GPU memory."""

from typing import Annotated, ClassVar

from pydantic import Field

from tandem_operator.api.api_object import ApiObject, Rule
from tandem_operator.api.model import ResourceName
from tandem_operator.api.quantity import Quantity
from tandem_operator.api.refusal import refused_unless

_NO_TIERS = "evicted pages are not kept outside GPU memory"


class KvCacheDisk(ApiObject):
    """The disk tier."""

    size: Annotated[Quantity, refused_unless("0", because=_NO_TIERS)] = "0"
    """Space that the tier may use; 0 turns it off."""
    path: Annotated[
        str,
        Field(min_length=1, max_length=512),
        refused_unless("/var/cache/tandem", because=_NO_TIERS),
    ] = "/var/cache/tandem"
    """Where the tier is mounted in the worker's container."""
    claim_name: Annotated[ResourceName | None, refused_unless(because=_NO_TIERS)] = None
    """A PersistentVolumeClaim for the tier; without one it is an emptyDir."""

    rules: ClassVar[tuple[Rule, ...]] = (
        Rule(
            "self.path.startsWith('/') && self.path != '/'",
            "kvCache.disk.path must be an absolute path below /: write it like /var/cache/tandem",
            ".path",
        ),
    )


class KvCache(ApiObject):
    """The tiers of the KV cache behind GPU memory."""

    host_memory: Annotated[Quantity, refused_unless("0", because=_NO_TIERS)] = "0"
    """Host memory for evicted pages, per worker; 0 turns the tier off."""
    disk: KvCacheDisk = KvCacheDisk()
    """The disk tier."""
    share: Annotated[
        bool, refused_unless(False, because="workers don't fetch from each other's caches")
    ] = False
    """Whether workers may fetch each other's cached prefixes."""
