// Command tandem-cluster is a whole Kubernetes control plane and node in one file. It links the official etcd, Kubernetes and Helm
// modules and runs the one named by its first argument, or by the link that started it. The only part written here is procri, the
// container runtime that runs containers as plain processes of this machine.
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

// name is the name of the binary when no link chooses a component.
const name = "tandem-cluster"

// usageExit is the exit status of a call that names no component.
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
