"""The messages that routers and workers exchange; neither torch nor any other Tandem package."""
