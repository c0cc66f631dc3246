"""The asyncio process of a worker: routers' connections, admin HTTP, metrics, drain."""
