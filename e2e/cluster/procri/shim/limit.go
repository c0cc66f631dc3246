package shim

import (
	"errors"
	"fmt"
	"os"
	"strconv"
	"syscall"
	"unsafe"
)

// Numbers of the kernel's interface that package syscall does not name; they are the same on every architecture.
const (
	rlimitMemlock      = 8
	prSetName          = 15
	prCapbsetRead      = 23
	prCapbsetDrop      = 24
	prSetChildSubreap  = 36
	prSetNoNewPrivs    = 38
	lastCapability     = 63
	containerUmask     = 0o022
	ownScoreAdjustment = "/proc/self/oom_score_adj"
)

// limit applies the limits that every process of the container inherits from the calling thread.
func limit(spec *Spec) error {
	if spec.OOMScoreAdj != nil {
		value := strconv.FormatInt(*spec.OOMScoreAdj, 10)
		err := os.WriteFile(ownScoreAdjustment, []byte(value), 0)
		// A restricted root can't give a process a lower score than its own; the process runs all the same.
		if err != nil && !errors.Is(err, syscall.EACCES) && !errors.Is(err, syscall.EPERM) {
			return fmt.Errorf("OOM score: %w", err)
		}
	}
	if err := limitMemlock(spec.Memlock); err != nil {
		return fmt.Errorf("limit of locked memory: %w", err)
	}
	for capability := range uintptr(lastCapability) {
		if spec.Bounding&(1<<capability) != 0 {
			continue
		}
		// EINVAL: the kernel has no capability of that number.
		if held, err := prctl(prCapbsetRead, capability); err != nil || held == 0 {
			continue
		}
		if _, err := prctl(prCapbsetDrop, capability); err != nil {
			return fmt.Errorf("drop capability %d: %w", capability, err)
		}
	}
	if spec.NoNewPrivileges {
		if _, err := prctl(prSetNoNewPrivs, 1); err != nil {
			return fmt.Errorf("no_new_privs: %w", err)
		}
	}
	return nil
}

// limitMemlock sets the limit of locked memory, or the hard limit if root may not raise that.
func limitMemlock(wanted uint64) error {
	err := syscall.Setrlimit(rlimitMemlock, &syscall.Rlimit{Cur: wanted, Max: wanted})
	if !errors.Is(err, syscall.EPERM) {
		return err
	}
	var held syscall.Rlimit
	if err := syscall.Getrlimit(rlimitMemlock, &held); err != nil {
		return err
	}
	return syscall.Setrlimit(rlimitMemlock, &syscall.Rlimit{Cur: held.Max, Max: held.Max})
}

// rename gives the shim its own name; the kernel calls it `exe`, after the link that started it.
func rename() error {
	name, err := syscall.BytePtrFromString(Name)
	if err != nil {
		return err
	}
	_, _, errno := syscall.RawSyscall6(syscall.SYS_PRCTL, prSetName, uintptr(unsafe.Pointer(name)), 0, 0, 0, 0)
	if errno != 0 {
		return fmt.Errorf("rename: %w", errno)
	}
	return nil
}

func prctl(option, argument uintptr) (uintptr, error) {
	result, _, errno := syscall.RawSyscall6(syscall.SYS_PRCTL, option, argument, 0, 0, 0, 0)
	if errno != 0 {
		return 0, errno
	}
	return result, nil
}
