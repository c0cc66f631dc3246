"""A cluster's nodes: their addresses, their namespaces, the network between them."""
