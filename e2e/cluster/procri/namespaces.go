package procri

import (
	"errors"
	"fmt"
	"os"
	"runtime"

	"golang.org/x/sys/unix"
)

// namespaces are the namespaces that the containers of a pod share. They exist as long as these descriptors or processes in them do.
// A nil file stands for the namespace that procri itself is in, the node's.
type namespaces struct {
	network *os.File
	ipc     *os.File
	uts     *os.File
	// pid is the namespace that containers join instead of having their own.
	pid *os.File
}

// newNamespaces creates the namespaces that flags (CLONE_NEW…) name.
func newNamespaces(flags int, hostname string) (*namespaces, error) {
	n := &namespaces{}
	err := onOwnThread(func() error {
		if err := unix.Unshare(flags); err != nil {
			return fmt.Errorf("new namespaces: %w", err)
		}
		if flags&unix.CLONE_NEWUTS != 0 {
			if err := unix.Sethostname([]byte(hostname)); err != nil {
				return fmt.Errorf("host name %q: %w", hostname, err)
			}
		}
		for _, kind := range []struct {
			flag int
			name string
			file **os.File
		}{{unix.CLONE_NEWNET, "net", &n.network}, {unix.CLONE_NEWIPC, "ipc", &n.ipc}, {unix.CLONE_NEWUTS, "uts", &n.uts}} {
			if flags&kind.flag == 0 {
				continue
			}
			file, err := os.Open("/proc/thread-self/ns/" + kind.name)
			if err != nil {
				return err
			}
			*kind.file = file
		}
		return nil
	})
	if err != nil {
		return nil, errors.Join(err, n.close())
	}
	return n, nil
}

// do runs a function on a thread in the namespaces; processes that the function starts are in them too.
func (n *namespaces) do(f func() error) error {
	return onOwnThread(func() error {
		for _, file := range []*os.File{n.network, n.ipc, n.uts, n.pid} {
			if file == nil {
				continue
			}
			if err := unix.Setns(int(file.Fd()), 0); err != nil {
				return fmt.Errorf("enter namespace: %w", err)
			}
		}
		return f()
	})
}

func (n *namespaces) close() error {
	var failures []error
	for _, file := range []**os.File{&n.network, &n.ipc, &n.uts, &n.pid} {
		if *file != nil {
			failures = append(failures, (*file).Close())
			*file = nil
		}
	}
	return errors.Join(failures...)
}

// onOwnThread runs a function on a thread that ends with it. The function may change the state of its thread: because the goroutine ends
// while locked to it, Go discards the thread. (The main thread can't be discarded, so Command keeps it for itself.)
func onOwnThread(f func() error) error {
	result := make(chan error, 1)
	go func() {
		runtime.LockOSThread()
		result <- f()
	}()
	return <-result
}
