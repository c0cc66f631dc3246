// Package dradriver is a DRA driver for tests: it offers the devices that a file lists, and gives a pod that claims some their names in
// an environment variable. Everything around it is the real thing: the kubelet calls it, the scheduler allocates from its slices.
package dradriver
