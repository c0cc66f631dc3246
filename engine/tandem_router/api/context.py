"""What every endpoint needs."""

from dataclasses import dataclass

from tandem_router.api.keys import ApiKeys
from tandem_router.config import RouterConfig, SloClass
from tandem_router.dispatch.dispatcher import Dispatcher
from tandem_router.errors import InvalidRequest, NotFound
from tandem_router.metrics import RouterMetrics
from tandem_router.text.model import TextModel
from tandem_router.workers.fleet import Fleet


@dataclass(frozen=True)
class RouterContext:
    """The parts of one running router."""

    config: RouterConfig
    text: TextModel
    fleet: Fleet
    dispatcher: Dispatcher
    metrics: RouterMetrics
    keys: ApiKeys

    def check_model(self, name: str | None) -> None:
        """Raise NotFound for a model that isn't served here."""
        if name is not None and name != self.config.model_name:
            raise NotFound(
                f"the model {name!r} does not exist; this router serves {self.config.model_name!r}",
                param="model",
                code="model_not_found",
            )

    def choose_class(self, name: str | None) -> SloClass:
        """The request's SLO class. Raises InvalidRequest for an unknown one."""
        found = self.config.slo_class(name)
        if found is not None:
            return found
        if name is not None:
            known = ", ".join(entry.name for entry in self.config.slo_classes) or "none"
            raise InvalidRequest(
                f"slo_class: {name!r} is unknown; known classes: {known}", param="slo_class"
            )
        return SloClass(name="default")
