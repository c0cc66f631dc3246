"""The clients of the process: the Kubernetes API, and the HTTP of workers and routers."""
