// Package shim is the first process of every container that procri runs.
//
// The package runs the shim from its own init function, when the program was started as `… procri-init`: the binary that procri is linked
// into holds all of Kubernetes, whose own package initialisers cost a tenth of a second and tens of megabytes. Go initialises packages
// as soon as their imports are, in the order of their paths, so a package that imports little is initialised early; and the
// shim never returns from its initialiser. For that reason nothing but the standard library may be imported here.
//
// The shim is started inside the namespaces of the container. It reads one start message from the socket at descriptor Socket, builds
// the container's root, starts the main process, and from then on starts further processes (exec), passes signals on and reaps
// whatever ends. It ends with the main process, and at once when procri's end of the socket closes; as it is process 1 of its PID
// namespace the kernel then kills everything in the container.
package shim
