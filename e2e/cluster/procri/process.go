package procri

import (
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"sync"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/tandem-inference/tandem/e2e/cluster/procri/shim"
)

// errGone reports that a container ended before it could answer.
var errGone = errors.New("the container has ended")

// shimProcess is procri's side of one shim.
type shimProcess struct {
	command *exec.Cmd
	socket  *net.UnixConn
	// ended is closed when the shim, and with it every process of the container, is gone.
	ended chan struct{}

	mu      sync.Mutex
	next    uint32
	waiting map[uint32]chan reply
}

// reply is a shim's reply, with the process number that came with it, in procri's PID namespace.
type reply struct {
	shim.Reply
	pid int
}

// startShim starts a shim in the namespaces, with its own mount namespace and, if ownPID, its own PID namespace.
func startShim(ns *namespaces, ownPID bool) (*shimProcess, error) {
	ends, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("socket pair: %w", err)
	}
	theirs := os.NewFile(uintptr(ends[1]), "shim")
	defer func() { _ = theirs.Close() }() // the shim has its own copy
	socket, err := connection(ends[0])
	if err != nil {
		return nil, err
	}
	s := &shimProcess{socket: socket, ended: make(chan struct{}), next: shim.MainID, waiting: map[uint32]chan reply{}}
	s.command = &exec.Cmd{
		Path: "/proc/self/exe", Args: []string{runtimeName, shim.Name}, Env: []string{}, Dir: "/",
		Stderr: os.Stderr, ExtraFiles: []*os.File{theirs},
		SysProcAttr: &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNS, Setsid: true},
	}
	if ownPID {
		s.command.SysProcAttr.Cloneflags |= syscall.CLONE_NEWPID
	}
	if err := ns.do(s.command.Start); err != nil {
		return nil, errors.Join(fmt.Errorf("start shim: %w", err), socket.Close())
	}
	go s.read()
	return s, nil
}

// connection prepares procri's end of a socket pair: room for large messages, and credentials with each reply.
func connection(descriptor int) (*net.UnixConn, error) {
	file := os.NewFile(uintptr(descriptor), "procri")
	defer func() { _ = file.Close() }() // FileConn makes a copy
	for option, value := range map[int]int{unix.SO_SNDBUFFORCE: 2 * shim.MessageLimit, unix.SO_PASSCRED: 1} {
		if err := unix.SetsockoptInt(descriptor, unix.SOL_SOCKET, option, value); err != nil {
			return nil, fmt.Errorf("socket option %d: %w", option, err)
		}
	}
	generic, err := net.FileConn(file)
	if err != nil {
		return nil, err
	}
	return generic.(*net.UnixConn), nil
}

// read passes replies on until the shim has ended.
func (s *shimProcess) read() {
	data := make([]byte, 64<<10)
	control := make([]byte, unix.CmsgSpace(unix.SizeofUcred))
	for {
		size, controlSize, _, _, err := s.socket.ReadMsgUnix(data, control)
		if err != nil || size == 0 {
			break
		}
		var received reply
		if err := json.Unmarshal(data[:size], &received.Reply); err != nil {
			break // a shim that can't be understood is ended below
		}
		received.pid = sender(control[:controlSize])
		s.mu.Lock()
		if channel, known := s.waiting[received.ID]; known {
			channel <- received
		}
		s.mu.Unlock()
	}
	_ = s.socket.Close() // which ends a shim that has not ended yet
	_ = s.command.Wait() // how the shim itself ended does not matter
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, channel := range s.waiting {
		close(channel)
	}
	s.waiting = nil
	close(s.ended)
}

// sender is the process number in the credentials of a message, 0 if there are none.
func sender(control []byte) int {
	messages, err := unix.ParseSocketControlMessage(control)
	if err != nil {
		return 0
	}
	for i := range messages {
		if credentials, err := unix.ParseUnixCredentials(&messages[i]); err == nil {
			return int(credentials.Pid)
		}
	}
	return 0
}

// send hands one message and its descriptors to the shim.
func (s *shimProcess) send(message shim.Message, files ...*os.File) error {
	data, err := json.Marshal(message)
	if err != nil {
		return err
	}
	if len(data) > shim.MessageLimit {
		return fmt.Errorf("%w: it has %d bytes, and at most %d are allowed", errConfig, len(data), shim.MessageLimit)
	}
	var rights []byte
	if len(files) > 0 {
		descriptors := make([]int, len(files))
		for i, file := range files {
			descriptors[i] = int(file.Fd())
		}
		rights = unix.UnixRights(descriptors...)
	}
	if _, _, err = s.socket.WriteMsgUnix(data, rights, nil); err != nil {
		return fmt.Errorf("%w: %w", errGone, err)
	}
	return nil
}

// child is one process that a shim has started.
type child struct {
	shim *shimProcess
	id   uint32
	// pid is its number in procri's PID namespace.
	pid     int
	replies chan reply
}

// run starts a process: the main one if the message holds a spec. The files are closed.
func (s *shimProcess) run(message shim.Message, files []*os.File) (*child, error) {
	defer closeAll(files)
	c := &child{shim: s, replies: make(chan reply, 2)}
	s.mu.Lock()
	if s.waiting == nil {
		s.mu.Unlock()
		return nil, errGone
	}
	c.id = s.next
	s.next++
	s.waiting[c.id] = c.replies
	s.mu.Unlock()
	message.ID = c.id
	if err := s.send(message, files...); err != nil {
		return nil, err
	}
	received, open := <-c.replies
	if !open {
		return nil, errGone
	}
	if received.Event != shim.Started {
		c.forget()
		return nil, errors.New(received.Error)
	}
	c.pid = received.pid
	return c, nil
}

// wait returns the exit code. A process whose shim ended first was killed.
func (c *child) wait() int {
	defer c.forget()
	received, open := <-c.replies
	if !open {
		return signalExit + int(unix.SIGKILL)
	}
	return received.ExitCode
}

func (c *child) forget() {
	c.shim.mu.Lock()
	defer c.shim.mu.Unlock()
	delete(c.shim.waiting, c.id)
}

// signal sends a signal to the process, or to its group if it is not the main one. A process that has ended needs none.
func (c *child) signal(number unix.Signal) {
	_ = c.shim.send(shim.Message{Kind: shim.Signal, ID: c.id, Signal: int(number)}) // fails when the container has ended
}

// kill ends every process of the container and waits until they are gone.
func (s *shimProcess) kill() {
	_ = s.send(shim.Message{Kind: shim.Kill}) // fails when it has ended
	if s.command.SysProcAttr.Cloneflags&syscall.CLONE_NEWPID != 0 {
		// A stopped shim does not read; in any case process 1 takes the others along.
		_ = s.command.Process.Kill() // fails when it has ended
	}
	<-s.ended
}

// signalExit is what is added to a signal's number to make an exit code.
const signalExit = 128

func closeAll(files []*os.File) {
	for _, file := range files {
		_ = file.Close() // nothing was written through it here
	}
}
