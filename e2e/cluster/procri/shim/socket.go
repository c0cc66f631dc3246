package shim

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"syscall"
)

// MessageLimit bounds one message in bytes; environments and mount lists are far smaller.
const MessageLimit = 4 << 20

// maxDescriptors is the largest number of descriptors with one message.
const maxDescriptors = 3

// errClosed reports that procri has closed its end, or has died.
var errClosed = errors.New("procri has gone")

// receive reads one message with its descriptors. It returns errClosed at the end of the stream.
func receive(buffer []byte) (Message, []int, error) {
	control := make([]byte, syscall.CmsgSpace(maxDescriptors*4))
	var size, controlSize int
	var err error
	for {
		size, controlSize, _, _, err = syscall.Recvmsg(Socket, buffer, control, syscall.MSG_CMSG_CLOEXEC)
		if !errors.Is(err, syscall.EINTR) {
			break
		}
	}
	var message Message
	if err != nil {
		return message, nil, fmt.Errorf("receive: %w", err)
	}
	if size == 0 {
		return message, nil, errClosed
	}
	if err := json.Unmarshal(buffer[:size], &message); err != nil {
		return message, nil, fmt.Errorf("message of %d bytes: %w", size, err)
	}
	descriptors, err := parseDescriptors(control[:controlSize])
	return message, descriptors, err
}

func parseDescriptors(control []byte) ([]int, error) {
	parts, err := syscall.ParseSocketControlMessage(control)
	if err != nil {
		return nil, fmt.Errorf("control message: %w", err)
	}
	var descriptors []int
	for i := range parts {
		if parts[i].Header.Level != syscall.SOL_SOCKET || parts[i].Header.Type != syscall.SCM_RIGHTS {
			continue
		}
		rights, err := syscall.ParseUnixRights(&parts[i])
		if err != nil {
			return nil, fmt.Errorf("descriptors: %w", err)
		}
		descriptors = append(descriptors, rights...)
	}
	return descriptors, nil
}

// send writes one reply. Its credentials name pid, which the kernel translates into procri's PID namespace.
func send(reply Reply, pid int) {
	data, err := json.Marshal(reply)
	if err != nil {
		fatal(err)
	}
	credentials := syscall.UnixCredentials(&syscall.Ucred{Pid: int32(pid), Uid: 0, Gid: 0})
	for {
		err = syscall.Sendmsg(Socket, data, credentials, nil, 0)
		if !errors.Is(err, syscall.EINTR) {
			break
		}
	}
	if errors.Is(err, syscall.ESRCH) {
		// The process has ended and been reaped, so its number no longer means anything.
		send(reply, os.Getpid())
		return
	}
	if err != nil && !errors.Is(err, syscall.EPIPE) {
		fatal(fmt.Errorf("reply: %w", err))
	}
}
