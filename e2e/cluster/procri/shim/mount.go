package shim

import (
	"fmt"
	"syscall"
	"unsafe"
)

func mount(source, target, kind string, flags uintptr, options string) error {
	if err := syscall.Mount(source, target, kind, flags, options); err != nil {
		return fmt.Errorf("mount %q at %s: %w", source, target, err)
	}
	return nil
}

// Numbers of mount_setattr (Linux 5.12), the same on every architecture.
const (
	sysMountSetattr = 442
	atFdcwd         = -100
	atEmptyPath     = 0x1000
	atRecursive     = 0x8000
	mountAttrRdonly = 1
)

// mountAttributes is the kernel's struct mount_attr.
type mountAttributes struct {
	set, clear, propagation, userns uint64
}

// readonly makes a mount read-only, and if all is true everything mounted below it too. Other flags stay as they are.
func readonly(path string, all bool) error {
	if all {
		return readonlyAt(atFdcwd, path, atRecursive)
	}
	return readonlyAt(atFdcwd, path, 0)
}

// readonlyAt is readonly for a path below an open folder, or with atEmptyPath for the open folder itself.
func readonlyAt(directory int, path string, flags uintptr) error {
	name, err := syscall.BytePtrFromString(path)
	if err != nil {
		return err
	}
	attributes := mountAttributes{set: mountAttrRdonly}
	_, _, errno := syscall.Syscall6(sysMountSetattr, uintptr(directory), uintptr(unsafe.Pointer(name)), flags,
		uintptr(unsafe.Pointer(&attributes)), unsafe.Sizeof(attributes), 0)
	if errno != 0 {
		return fmt.Errorf("make %s read-only: %w", path, errno)
	}
	return nil
}
