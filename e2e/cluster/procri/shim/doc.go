// Package shim is the first process of every container that procri runs.
//
// The package runs the shim from its own init function if the program was started as `… procri-init`. The reason is that the binary
// contains all of Kubernetes, whose package initialisers cost a tenth of a second and tens of megabytes. Go initialises a package as
// soon as its imports are initialised, in the order of their paths, so a package that imports little is initialised early; and the
// shim never returns from its initialiser. So nothing but the standard library may be imported here.
//
// The shim is started inside the namespaces of the container. It reads one start message from the socket at descriptor Socket, builds
// the container's root, starts the main process, and from then on starts further processes (exec), passes signals on and reaps
// whatever ends. It ends with the main process, or as soon as procri's end of the socket closes. Because it is process 1 of its PID
// namespace, the kernel then kills everything in the container.
package shim
