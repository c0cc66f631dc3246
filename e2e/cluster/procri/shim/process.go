package shim

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"
)

// attributesOf translates a process for syscall.ForkExec: its attributes and its standard descriptors.
func attributesOf(process *Process, descriptors []int) (*syscall.SysProcAttr, []uintptr, error) {
	wanted := maxDescriptors
	if process.Terminal {
		wanted = 1
	}
	if len(descriptors) != wanted {
		return nil, nil, fmt.Errorf("%d descriptors instead of %d", len(descriptors), wanted)
	}
	attributes := &syscall.SysProcAttr{
		Setsid:      true,
		Credential:  &syscall.Credential{Uid: process.User, Gid: process.Group, Groups: process.Groups},
		AmbientCaps: process.Ambient,
	}
	if os.Getpid() != 1 {
		// There is no PID namespace of the shim's own to take the process along if the shim is killed.
		attributes.Pdeathsig = syscall.SIGKILL
	}
	files := make([]uintptr, 0, maxDescriptors)
	for i := range maxDescriptors {
		descriptor := descriptors[min(i, wanted-1)]
		files = append(files, uintptr(descriptor))
	}
	if process.Terminal {
		attributes.Setctty = true
		attributes.Ctty = 0
	}
	return attributes, files, own(process, descriptors)
}

// own gives pipes and terminals to the process's user, who could not reopen them as /dev/stdout otherwise.
func own(process *Process, descriptors []int) error {
	for _, descriptor := range descriptors {
		var stat syscall.Stat_t
		if err := syscall.Fstat(descriptor, &stat); err != nil {
			return fmt.Errorf("standard descriptor: %w", err)
		}
		if kind := stat.Mode & syscall.S_IFMT; kind == syscall.S_IFCHR && !process.Terminal {
			continue // /dev/null is everybody's
		}
		if err := syscall.Fchown(descriptor, int(process.User), int(stat.Gid)); err != nil {
			return fmt.Errorf("standard descriptor: %w", err)
		}
	}
	return nil
}

// lookPath finds the program in the container, as the container's PATH says.
func lookPath(process *Process) (string, error) {
	if len(process.Args) == 0 {
		return "", fmt.Errorf("the command is empty")
	}
	program := process.Args[0]
	if strings.Contains(program, "/") {
		return program, nil
	}
	for _, variable := range process.Env {
		list, found := strings.CutPrefix(variable, "PATH=")
		if !found {
			continue
		}
		for _, directory := range filepath.SplitList(list) {
			path := filepath.Join(directory, program)
			info, err := os.Stat(path)
			if err == nil && info.Mode().IsRegular() && info.Mode()&0o111 != 0 {
				return path, nil
			}
		}
	}
	return "", fmt.Errorf("exec: %q: executable file not found in $PATH", program)
}
