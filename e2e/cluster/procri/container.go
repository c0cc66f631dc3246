package procri

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sync"
	"time"

	"golang.org/x/sys/unix"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
	"k8s.io/klog/v2"

	"github.com/tandem-inference/tandem/e2e/cluster/procri/shim"
)

// The reasons in a container's status, the same as in other runtimes.
const (
	reasonCompleted = "Completed"
	reasonError     = "Error"
	reasonNoStart   = "StartError"
)

// drainTimeout bounds the wait for the end of an output that a process outside the container keeps open.
const drainTimeout = 2 * time.Second

// container is one container, from its creation to its removal.
type container struct {
	id      string
	sandbox *sandbox
	config  *runtimeapi.ContainerConfig
	image   string
	spec    *shim.Spec
	created time.Time
	// record is the file that describes the container to tests and diagnosis.
	record string
	// ended is closed when a started container has ended.
	ended chan struct{}

	// starting is held while the container starts.
	starting sync.Mutex

	mu       sync.Mutex
	state    runtimeapi.ContainerState
	started  time.Time
	finished time.Time
	exitCode int
	reason   string
	message  string
	main     *child
	streams  *stdio
	log      *logFile
	stdout   *output
	stderr   *output
	// stopping is true once nothing may start the container.
	stopping bool
}

// containerRecord is the content of the record file.
type containerRecord struct {
	ID        string `json:"id"`
	PID       int    `json:"pid"`
	Name      string `json:"name"`
	Pod       string `json:"pod"`
	Namespace string `json:"namespace"`
	PodUID    string `json:"podUid"`
	State     string `json:"state"`
	ExitCode  int    `json:"exitCode"`
}

// logPath is the path at which the kubelet looks for the container's log; empty if it does not look.
func (c *container) logPath() string {
	folder := c.sandbox.config.GetLogDirectory()
	if folder == "" || c.config.GetLogPath() == "" {
		return ""
	}
	return filepath.Join(folder, c.config.GetLogPath())
}

// save writes the record; mu must be held.
func (c *container) save() error {
	pod := c.sandbox.config.GetMetadata()
	record := containerRecord{
		ID: c.id, Name: c.config.GetMetadata().GetName(), Pod: pod.GetName(), Namespace: pod.GetNamespace(), PodUID: pod.GetUid(),
		State: c.state.String(), ExitCode: c.exitCode,
	}
	if c.main != nil && c.state == runtimeapi.ContainerState_CONTAINER_RUNNING {
		record.PID = c.main.pid
	}
	data, err := json.Marshal(record)
	if err != nil {
		return err
	}
	return replaceFile(c.record, data)
}

// replaceFile writes a file so that readers see the old content or the new, never a part.
func replaceFile(path string, data []byte) error {
	temporary := path + ".new"
	if err := os.WriteFile(temporary, data, 0o644); err != nil {
		return err
	}
	return os.Rename(temporary, path)
}

// start runs the main process. A container that can't start counts as ended, as in other runtimes.
func (c *container) start() error {
	c.starting.Lock()
	defer c.starting.Unlock()
	c.mu.Lock()
	state, stopping := c.state, c.stopping || !c.sandbox.ready()
	c.mu.Unlock()
	if state != runtimeapi.ContainerState_CONTAINER_CREATED || stopping {
		return fmt.Errorf("container %s can't start: it is %s", c.id, state)
	}
	err := c.launch()
	if err == nil {
		return nil
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.finish(signalExit, reasonNoStart, err.Error())
	return err
}

// launch opens log and streams, starts the shim and hands both over to follow.
func (c *container) launch() (err error) {
	path := c.logPath()
	if path == "" {
		path = os.DevNull
	}
	log, err := openLog(path)
	if err != nil {
		return fmt.Errorf("log: %w", err)
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, log.close())
		}
	}()
	streams, err := newStdio(c.config.GetStdin(), c.config.GetTty())
	if err != nil {
		return err
	}
	ns := *c.sandbox.namespaces
	ownPID, err := c.sandbox.selectPID(c, &ns)
	if err != nil {
		streams.close()
		closeAll(streams.theirs)
		return err
	}
	process, err := startShim(&ns, ownPID)
	if ns.pid != nil {
		err = errors.Join(err, ns.pid.Close())
	}
	if err != nil {
		streams.close()
		closeAll(streams.theirs)
		return err
	}
	main, err := process.run(shim.Message{Kind: shim.Start, Spec: c.spec}, streams.theirs)
	if err != nil {
		streams.close()
		process.kill()
		return err
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.state, c.started = runtimeapi.ContainerState_CONTAINER_RUNNING, time.Now()
	c.main, c.streams, c.log = main, streams, log
	c.stdout, c.stderr = newOutput(stdoutStream, log), newOutput(stderrStream, log)
	if err := c.save(); err != nil {
		klog.ErrorS(err, "Container has no record", "container", c.id)
	}
	go c.follow()
	return nil
}

// follow carries the output until the container ends, and then records how it ended.
func (c *container) follow() {
	var copies sync.WaitGroup
	copies.Go(func() { c.stdout.copy(c.streams.output) })
	if c.streams.failure != nil {
		copies.Go(func() { c.stderr.copy(c.streams.failure) })
	}
	code := c.main.wait()
	<-c.main.shim.ended
	deadline := time.Now().Add(drainTimeout)
	for _, file := range []*os.File{c.streams.output, c.streams.failure} {
		if file != nil {
			_ = file.SetReadDeadline(deadline) // fails only if closed
		}
	}
	copies.Wait()
	c.streams.close()
	if err := c.log.close(); err != nil {
		klog.ErrorS(err, "Container output may be incomplete", "container", c.id)
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	reason := reasonCompleted
	if code != 0 {
		reason = reasonError
	}
	c.finish(code, reason, "")
}

// finish records the end; mu must be held.
func (c *container) finish(code int, reason, message string) {
	c.state, c.finished = runtimeapi.ContainerState_CONTAINER_EXITED, time.Now()
	c.exitCode, c.reason, c.message = code, reason, message
	if err := c.save(); err != nil && !errors.Is(err, os.ErrNotExist) {
		klog.ErrorS(err, "Container record is stale", "container", c.id)
	}
	close(c.ended)
}

// running returns what is needed to talk to a running container.
func (c *container) running() (*child, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.state != runtimeapi.ContainerState_CONTAINER_RUNNING {
		return nil, fmt.Errorf("container %s is not running: it is %s", c.id, c.state)
	}
	return c.main, nil
}

// stop asks the main process to end, waits for the grace period and then kills the whole tree.
func (c *container) stop(grace time.Duration) {
	c.mu.Lock()
	c.stopping = true
	c.mu.Unlock()
	// Wait for a start that is under way, so that there is something to stop.
	c.starting.Lock()
	defer c.starting.Unlock()
	main, err := c.running()
	if err != nil {
		return // it never ran, or has ended
	}
	if grace > 0 {
		main.signal(stopSignal(c.config.GetStopSignal()))
		select {
		case <-c.ended:
			return
		case <-time.After(grace):
		}
	}
	main.shim.kill()
	<-c.ended
}

// stopSignal translates CRI's name for a signal.
func stopSignal(wanted runtimeapi.Signal) unix.Signal {
	name := wanted.String()
	if number := unix.SignalNum(name); number != 0 {
		return number
	}
	return unix.SIGTERM
}

// remove kills the container if it is running, and deletes its files.
func (c *container) remove() error {
	c.stop(0)
	err := os.Remove(c.record)
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	return err
}
