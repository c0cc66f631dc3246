package procri

import (
	"fmt"
	"slices"
	"strings"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// capabilityNames lists the kernel's capabilities by number.
var capabilityNames = []string{
	"CHOWN", "DAC_OVERRIDE", "DAC_READ_SEARCH", "FOWNER", "FSETID", "KILL", "SETGID", "SETUID", "SETPCAP", "LINUX_IMMUTABLE",
	"NET_BIND_SERVICE", "NET_BROADCAST", "NET_ADMIN", "NET_RAW", "IPC_LOCK", "IPC_OWNER", "SYS_MODULE", "SYS_RAWIO",
	"SYS_CHROOT", "SYS_PTRACE", "SYS_PACCT", "SYS_ADMIN", "SYS_BOOT", "SYS_NICE", "SYS_RESOURCE", "SYS_TIME",
	"SYS_TTY_CONFIG", "MKNOD", "LEASE", "AUDIT_WRITE", "AUDIT_CONTROL", "SETFCAP", "MAC_OVERRIDE", "MAC_ADMIN", "SYSLOG",
	"WAKE_ALARM", "BLOCK_SUSPEND", "AUDIT_READ", "PERFMON", "BPF", "CHECKPOINT_RESTORE",
}

// defaultCapabilities are those that a container has by default, as in every common runtime.
var defaultCapabilities = []string{
	"CHOWN", "DAC_OVERRIDE", "FSETID", "FOWNER", "MKNOD", "NET_RAW", "SETGID", "SETUID", "SETFCAP", "SETPCAP",
	"NET_BIND_SERVICE", "SYS_CHROOT", "KILL", "AUDIT_WRITE",
}

// ipcLock is the capability to lock any amount of memory.
const ipcLock = "IPC_LOCK"

// everyCapability is the mask that drops none.
const everyCapability = ^uint64(0)

// capabilityNumber accepts a name with or without `CAP_`, in upper or lower case.
func capabilityNumber(name string) (int, error) {
	plain := strings.TrimPrefix(strings.ToUpper(name), "CAP_")
	number := slices.Index(capabilityNames, plain)
	if number < 0 {
		return 0, fmt.Errorf("unknown capability %q", name)
	}
	return number, nil
}

// boundingSet is the mask of the capabilities that a container's processes can have.
func boundingSet(wanted *runtimeapi.Capability, privileged bool) (uint64, error) {
	if privileged {
		return everyCapability, nil
	}
	var mask uint64
	set := func(names []string, held bool) error {
		for _, name := range names {
			if strings.EqualFold(name, "ALL") {
				mask = 0
				if held {
					mask = everyCapability
				}
				continue
			}
			number, err := capabilityNumber(name)
			if err != nil {
				return err
			}
			if held {
				mask |= 1 << number
			} else {
				mask &^= 1 << number
			}
		}
		return nil
	}
	if err := set(defaultCapabilities, true); err != nil {
		return 0, err
	}
	// ALL first on either side, so that `drop ALL, add X` and `add ALL, drop X` mean what they say.
	add, drop := wanted.GetAddCapabilities(), wanted.GetDropCapabilities()
	isAll := func(name string) bool { return strings.EqualFold(name, "ALL") }
	order := []struct {
		names []string
		held  bool
	}{{drop, false}, {add, true}}
	if slices.ContainsFunc(add, isAll) {
		slices.Reverse(order)
	}
	for _, step := range order {
		if err := set(step.names, step.held); err != nil {
			return 0, err
		}
	}
	return mask, nil
}

// holds reports whether a mask has a capability.
func holds(mask uint64, name string) bool {
	number, err := capabilityNumber(name)
	return err == nil && mask&(1<<number) != 0
}
