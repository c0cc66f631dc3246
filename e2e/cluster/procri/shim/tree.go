package shim

import (
	"errors"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
)

// tree holds the processes of one container that the shim has started.
type tree struct {
	mu sync.Mutex
	// pids maps process numbers in messages to those in the shim's PID namespace.
	pids map[uint32]int
}

// newTree starts the reaper.
func newTree() *tree {
	t := &tree{pids: map[uint32]int{}}
	// Orphans come to the shim even if it is not process 1.
	if _, err := prctl(prSetChildSubreap, 1); err != nil {
		fatal(fmt.Errorf("subreaper: %w", err))
	}
	signals := make(chan os.Signal, 64)
	signal.Notify(signals, syscall.SIGCHLD, syscall.SIGTERM, syscall.SIGINT, syscall.SIGHUP, syscall.SIGQUIT)
	go func() {
		for received := range signals {
			if received == syscall.SIGCHLD {
				t.reap()
			} else {
				t.signal(MainID, received.(syscall.Signal))
			}
		}
	}()
	return t
}

// spawn starts a process on the calling thread and reports it to procri. The descriptors are closed in any case.
func (t *tree) spawn(id uint32, process *Process, descriptors []int) error {
	defer func() {
		for _, descriptor := range descriptors {
			_ = syscall.Close(descriptor) // nothing was written through it here
		}
	}()
	attributes, files, err := attributesOf(process, descriptors)
	if err != nil {
		return err
	}
	path, err := lookPath(process)
	if err != nil {
		return err
	}
	// Held until the process is registered, so that the reaper can't see it before.
	t.mu.Lock()
	defer t.mu.Unlock()
	if id != MainID && t.pids[MainID] == 0 {
		return errors.New("the container's main process has ended")
	}
	pid, err := syscall.ForkExec(path, process.Args, &syscall.ProcAttr{
		Dir: process.Dir, Env: process.Env, Files: files, Sys: attributes,
	})
	if err != nil {
		return fmt.Errorf("start %s in %s: %w", path, process.Dir, err)
	}
	t.pids[id] = pid
	send(Reply{Event: Started, ID: id}, pid)
	return nil
}

// reap collects every process that has ended, and ends the shim when the main one has.
func (t *tree) reap() {
	t.mu.Lock()
	defer t.mu.Unlock()
	for {
		var status syscall.WaitStatus
		pid, err := syscall.Wait4(-1, &status, syscall.WNOHANG, nil)
		if errors.Is(err, syscall.EINTR) {
			continue
		}
		if err != nil || pid <= 0 {
			return
		}
		for id, known := range t.pids {
			if known != pid {
				continue
			}
			delete(t.pids, id)
			send(Reply{Event: Exited, ID: id, ExitCode: exitCode(status)}, os.Getpid())
			if id == MainID {
				t.end(exitCode(status))
			}
			break
		}
	}
}

// signal passes a signal on; a process that has ended needs none.
func (t *tree) signal(id uint32, number syscall.Signal) {
	t.mu.Lock()
	defer t.mu.Unlock()
	pid, known := t.pids[id]
	if !known {
		return
	}
	if id != MainID {
		pid = -pid
	}
	// ESRCH: it ended just now and is about to be reaped.
	if err := syscall.Kill(pid, number); err != nil && !errors.Is(err, syscall.ESRCH) {
		fmt.Fprintf(os.Stderr, "%s: signal %d: %v\n", Name, number, err)
	}
}

// end kills every process below the shim and exits. If the shim is process 1, the kernel does the killing.
func (t *tree) end(code int) {
	if os.Getpid() == 1 {
		os.Exit(code)
	}
	for {
		children := childrenOf(os.Getpid())
		if len(children) == 0 {
			os.Exit(code)
		}
		for _, pid := range children {
			_ = syscall.Kill(pid, syscall.SIGKILL) // ESRCH: it is ending already
		}
		for range children {
			// Orphans of the killed processes come here and are found in the next round.
			if _, err := syscall.Wait4(-1, nil, 0, nil); err != nil && !errors.Is(err, syscall.EINTR) {
				break
			}
		}
	}
}

// childrenOf reads the children of a process from /proc.
func childrenOf(parent int) []int {
	stats, err := filepath.Glob("/proc/[0-9]*/stat")
	if err != nil {
		fatal(err)
	}
	var children []int
	for _, path := range stats {
		data, err := os.ReadFile(path)
		if err != nil {
			continue // it has ended since
		}
		// The name before the last parenthesis may contain anything.
		fields := strings.Fields(string(data[strings.LastIndexByte(string(data), ')')+1:]))
		if len(fields) < 2 || fields[1] != strconv.Itoa(parent) {
			continue
		}
		if pid, err := strconv.Atoi(filepath.Base(filepath.Dir(path))); err == nil {
			children = append(children, pid)
		}
	}
	return children
}

// exitCode returns the status that a shell would report.
func exitCode(status syscall.WaitStatus) int {
	if status.Signaled() {
		return 128 + int(status.Signal())
	}
	return status.ExitStatus()
}
