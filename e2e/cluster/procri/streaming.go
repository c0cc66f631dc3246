package procri

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"sync"

	"k8s.io/cri-streaming/pkg/streaming/remotecommand"
	"k8s.io/klog/v2"
)

// streams is what the streaming server calls for kubectl exec, attach and port-forward. A nil reader or writer is a stream that the
// client did not ask for.
type streams struct {
	runtime *runtimeService
}

// Exec runs a command on the client's streams.
func (s *streams) Exec(
	ctx context.Context, containerID string, command []string, in io.Reader, out, failure io.WriteCloser, tty bool,
	resize <-chan remotecommand.TerminalSize,
) error {
	c, err := s.runtime.container(containerID)
	if err != nil {
		return err
	}
	pipes, err := newStdio(in != nil, tty)
	if err != nil {
		return err
	}
	defer pipes.close()
	process, err := c.spawn(command, pipes)
	if err != nil {
		return err
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	go pipes.follow(ctx, resize)
	if in != nil {
		go pipes.feed(in)
	}
	var copies sync.WaitGroup
	copies.Go(func() { pump(out, pipes.output) })
	if pipes.failure != nil {
		copies.Go(func() { pump(failure, pipes.failure) })
	}
	code, err := process.waitOrKill(ctx)
	pipes.drain(&copies)
	if err != nil {
		return err
	}
	if code != 0 {
		return exitError(code)
	}
	return nil
}

// Attach joins the streams of a container's main process until it ends or the client leaves.
func (s *streams) Attach(
	ctx context.Context, containerID string, in io.Reader, out, failure io.WriteCloser, _ bool,
	resize <-chan remotecommand.TerminalSize,
) error {
	c, err := s.runtime.container(containerID)
	if err != nil {
		return err
	}
	if _, err := c.running(); err != nil {
		return err
	}
	c.mu.Lock()
	pipes, stdout, stderr := c.streams, c.stdout, c.stderr
	c.mu.Unlock()
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	if out != nil {
		defer stdout.watch(out)()
	}
	if failure != nil {
		defer stderr.watch(failure)()
	}
	go pipes.follow(ctx, resize)
	if in != nil && pipes.input != nil {
		go func() {
			if c.config.GetStdinOnce() {
				pipes.feed(in)
			} else {
				copyInput(pipes.input, in)
			}
			// Without output the end of the input is the end of the session.
			if out == nil && failure == nil {
				cancel()
			}
		}()
	}
	select {
	case <-c.ended:
	case <-ctx.Done():
	}
	return nil
}

// PortForward carries one connection to a port of the pod.
func (s *streams) PortForward(_ context.Context, sandboxID string, port int32, stream io.ReadWriteCloser) error {
	pod, err := s.runtime.sandbox(sandboxID)
	if err != nil {
		return err
	}
	if !pod.ready() {
		return fmt.Errorf("sandbox %s has ended", sandboxID)
	}
	connection, err := pod.namespaces.dial(port)
	if err != nil {
		return fmt.Errorf("port %d of pod %s: %w", port, pod.config.GetMetadata().GetName(), err)
	}
	defer func() { _ = connection.Close() }() // both directions have ended
	go func() {
		pump(connection, stream)
		if half, ok := connection.(*net.TCPConn); ok {
			_ = half.CloseWrite() // fails if the other side has gone
		}
	}()
	pump(stream, connection)
	// The pod has sent everything, and no one reads what the client still sends.
	return stream.Close()
}

// feed copies the client's input and closes the process's at its end; a terminal stays open.
func (s *stdio) feed(in io.Reader) {
	copyInput(s.input, in)
	if !s.terminal {
		_ = s.input.Close() // closed already if the process has ended
	}
}

// follow passes the client's window size on.
func (s *stdio) follow(ctx context.Context, resize <-chan remotecommand.TerminalSize) {
	for {
		select {
		case <-ctx.Done():
			return
		case size, open := <-resize:
			if !open {
				return
			}
			if !s.terminal {
				continue
			}
			if err := s.resize(size.Width, size.Height); err != nil {
				klog.V(2).InfoS("Terminal could not be resized", "err", err)
			}
		}
	}
}

// pump copies until one side ends, which is how a session ends. A nil writer drops the data.
func pump(to io.Writer, from io.Reader) {
	if to == nil {
		to = io.Discard
	}
	if _, err := io.Copy(to, from); err != nil && !errors.Is(err, net.ErrClosed) {
		klog.V(4).InfoS("Stream ended", "err", err)
	}
}

// copyInput hides the file's ReadFrom, because splicing works only from a file.
func copyInput(to io.Writer, from io.Reader) {
	pump(struct{ io.Writer }{to}, from)
}
