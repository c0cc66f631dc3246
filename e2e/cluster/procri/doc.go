// Package procri is a container runtime for the kubelet whose containers are plain processes of this machine.
//
// It serves the runtime and image services of CRI v1 on a unix socket, so everything above it (probes, volumes, projected tokens, the
// downward API, preStop, restart back-off, logs, exec and port-forward) is the kubelet's own. Instead of images there is a small table
// that maps a name to an entry point, an environment and files of the machine. A container sees those files, the machine's system (/usr,
// /etc and the like), both read-only, and empty folders where the machine has homes, caches and everything else (shim/root.go).
//
//   - A pod sandbox is a network, a UTS and an IPC namespace, held by descriptors (namespaces.go). It has one end of a veth pair, whose
//     other end is in the node's bridge (network.go), an address from the pod subnet (addresses.go), a resolv.conf and a /dev/shm
//     (sandbox.go).
//   - A container is a process tree in a PID and a mount namespace below a small first process, package shim, which is this same
//     program started again. procri talks to it over a socket pair (process.go): start, exec, signal, and one event for the end of
//     each process. When procri dies, for whatever reason, the socket closes, the shim ends, and the kernel ends the rest.
//   - CRI's configuration of a container becomes a shim.Spec in spec.go; the output of its processes goes through output.go to the log
//     file that the kubelet reads (log.go); streams to kubectl are in streaming.go.
//
// Everything procri writes lies below its root folder: containers/<id>.json describes each container for tests and diagnosis,
// sandboxes/<id> holds the files of a pod, and addresses/ the addresses in use. The namespaces need no clean-up, because they end with
// the processes; a new procri removes the files and mounts that a killed one has left behind.
package procri
