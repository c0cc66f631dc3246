"""The binaries that a cluster runs on, and the Go toolchain that builds them."""
