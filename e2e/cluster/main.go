// Command tandem-cluster is a whole Kubernetes node and control plane in one file. It links the official etcd, Kubernetes and Helm
// modules and runs the one that its first argument names, or that the name of the link it was started by names. The only part written
// here is procri, the container runtime that runs containers as plain processes of this machine.
package main

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"

	_ "k8s.io/component-base/logs/json/register"
	_ "k8s.io/component-base/metrics/prometheus/clientgo"
	_ "k8s.io/component-base/metrics/prometheus/version"
)

// name is what the binary is called when no link chooses a component.
const name = "tandem-cluster"

// usageExit is the exit status for a call that names no component.
const usageExit = 2

func main() {
	args := os.Args
	if _, known := components[filepath.Base(args[0])]; !known {
		args = args[1:]
	}
	if len(args) == 0 {
		usage()
	}
	component, known := components[filepath.Base(args[0])]
	if !known {
		usage()
	}
	// Every component reads os.Args itself, as it does in its own binary.
	os.Args = args
	os.Exit(component())
}

// usage lists the components and ends the process.
func usage() {
	names := make([]string, 0, len(components))
	for component := range components {
		names = append(names, component)
	}
	slices.Sort(names)
	fmt.Fprintf(os.Stderr, "usage: %s {%s} [arguments]\n", name, strings.Join(names, "|"))
	os.Exit(usageExit)
}
