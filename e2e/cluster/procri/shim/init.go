package shim

import (
	"errors"
	"fmt"
	"os"
	"runtime/debug"
	"syscall"
)

// setupExit is the exit status of a shim that failed.
const setupExit = 128

// collectFrom is how much memory in bytes the shim may use before it collects garbage.
const collectFrom = 24 << 20

func init() {
	if len(os.Args) == 2 && os.Args[1] == Name {
		serve()
	}
}

// serve is the shim's main loop. It runs on the main thread, which Go locks to the main goroutine while packages are initialised:
// the bounding set and no_new_privs belong to a thread, and processes inherit those of the thread that starts them.
func serve() {
	syscall.CloseOnExec(Socket)
	// A collection would read every global of the program into memory just to find the shim's few objects.
	debug.SetGCPercent(-1)
	debug.SetMemoryLimit(collectFrom)
	if err := rename(); err != nil {
		fatal(err)
	}
	buffer := make([]byte, MessageLimit)
	tree := newTree()
	for {
		message, descriptors, err := receive(buffer)
		if errors.Is(err, errClosed) {
			tree.end(setupExit + int(syscall.SIGKILL))
		}
		if err != nil {
			fatal(err)
		}
		switch message.Kind {
		case Start:
			err = start(tree, message, descriptors)
			// The start message is by far the largest.
			buffer = make([]byte, MessageLimit/16)
		case Exec:
			err = tree.spawn(message.ID, message.Process, descriptors)
		case Signal:
			tree.signal(message.ID, syscall.Signal(message.Signal))
		case Kill:
			tree.end(setupExit + int(syscall.SIGKILL))
		default:
			err = fmt.Errorf("unknown message kind %q", message.Kind)
		}
		if err != nil {
			send(Reply{Event: Failed, ID: message.ID, Error: err.Error()}, os.Getpid())
			if message.Kind == Start {
				tree.end(setupExit)
			}
		}
	}
}

// start builds the container around the shim and starts the main process.
func start(tree *tree, message Message, descriptors []int) error {
	spec := message.Spec
	// Whatever the umask of whoever started procri: the root's own folders are for every user.
	syscall.Umask(containerUmask)
	if err := buildRoot(spec); err != nil {
		return err
	}
	if err := limit(spec); err != nil {
		return err
	}
	return tree.spawn(MainID, &spec.Process, descriptors)
}

// fatal ends a shim that can't even talk to procri; its standard error is procri's.
func fatal(err error) {
	fmt.Fprintf(os.Stderr, "%s: %v\n", Name, err)
	os.Exit(setupExit)
}
