package procri

import (
	"bytes"
	"context"
	"errors"
	"os"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/tandem-inference/tandem/e2e/cluster/procri/shim"
)

// execOutputLimit bounds, in bytes, what ExecSync returns of each stream; anything more is read and dropped.
const execOutputLimit = 16 << 20

// spawn starts one more process in a running container.
func (c *container) spawn(command []string, streams *stdio) (*child, error) {
	main, err := c.running()
	if err != nil {
		closeAll(streams.theirs)
		return nil, err
	}
	process := c.spec.Process
	process.Args, process.Terminal = command, streams.terminal
	return main.shim.run(shim.Message{Kind: shim.Exec, Process: &process}, streams.theirs)
}

// execSync runs a command to its end, or kills its process group when the context is done.
func (c *container) execSync(ctx context.Context, command []string) (stdout, stderr []byte, code int, err error) {
	streams, err := newStdio(false, false)
	if err != nil {
		return nil, nil, 0, err
	}
	defer streams.close()
	process, err := c.spawn(command, streams)
	if err != nil {
		return nil, nil, 0, err
	}
	var copies sync.WaitGroup
	var output, failure limitedBuffer
	copies.Go(func() { output.readFrom(streams.output) })
	copies.Go(func() { failure.readFrom(streams.failure) })
	code, err = process.waitOrKill(ctx)
	streams.drain(&copies)
	return output.Bytes(), failure.Bytes(), code, err
}

// waitOrKill returns the exit code, and the context's error if the context ended the process.
func (c *child) waitOrKill(ctx context.Context) (int, error) {
	exited := make(chan int, 1)
	go func() { exited <- c.wait() }()
	select {
	case code := <-exited:
		return code, nil
	case <-ctx.Done():
		c.signal(unix.SIGKILL)
		return <-exited, ctx.Err()
	}
}

// drain waits for the end of what a process wrote, but not for long if the process's children keep it open.
func (s *stdio) drain(copies *sync.WaitGroup) {
	deadline := time.Now().Add(drainTimeout)
	for _, file := range []*os.File{s.output, s.failure} {
		if file != nil {
			_ = file.SetReadDeadline(deadline) // fails only if closed
		}
	}
	copies.Wait()
}

// limitedBuffer keeps the beginning of a stream.
type limitedBuffer struct{ bytes.Buffer }

func (b *limitedBuffer) readFrom(file *os.File) {
	chunk := make([]byte, 32<<10)
	for {
		count, err := file.Read(chunk)
		b.Write(chunk[:min(count, execOutputLimit-b.Len())])
		if err != nil {
			return // the stream has ended, or the deadline has passed
		}
	}
}

// exitError is a k8s.io/utils/exec.ExitError, with which streaming reports an exit status other than 0.
type exitError int

var errExit = errors.New("command ended with an error")

func (e exitError) Error() string   { return errExit.Error() }
func (e exitError) String() string  { return e.Error() }
func (e exitError) Exited() bool    { return true }
func (e exitError) ExitStatus() int { return int(e) }
