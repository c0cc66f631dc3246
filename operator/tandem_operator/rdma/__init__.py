"""How workers get at RDMA devices: choose the wiring, then write it into pods."""

from tandem_operator.rdma.pod import PodWiring, build_wiring
from tandem_operator.rdma.wiring import Wiring, choose_wiring

__all__ = ["PodWiring", "Wiring", "build_wiring", "choose_wiring"]
