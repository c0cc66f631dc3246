package procri

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// patience bounds every wait of a test; nothing takes nearly as long, even on a busy machine.
const patience = 2 * time.Minute

const shellImage = "tandem.local/shell:1"

// node is a procri in a process of its own, with a client.
type node struct {
	t       *testing.T
	root    string
	logs    string
	process *exec.Cmd
	stderr  bytes.Buffer
	runtime runtimeapi.RuntimeServiceClient
	images  runtimeapi.ImageServiceClient
}

func startNode(t *testing.T) *node {
	t.Helper()
	n := &node{t: t, root: t.TempDir(), logs: t.TempDir()}
	n.writeImages(`{"images": [
		{"name": "tandem.local/shell:1", "entrypoint": []},
		{"name": "tandem.local/echo:*", "entrypoint": ["/bin/sh", "-c", "echo from $WHO: $0 $*"],
		 "env": {"WHO": "image", "OTHER": "image"}, "workingDir": "/usr"}
	]}`)
	n.start()
	t.Cleanup(n.stop)
	return n
}

func (n *node) writeImages(table string) {
	n.t.Helper()
	check(n.t, os.WriteFile(filepath.Join(n.logs, "images.json"), []byte(table), 0o644))
}

func (n *node) start() {
	n.t.Helper()
	socket := filepath.Join(n.root, "cri.sock")
	n.process = exec.Command("/proc/self/exe", serverArgument, "--socket", socket, "--root", n.root, "--bridge", testBridge,
		"--images", filepath.Join(n.logs, "images.json"), "--pod-cidr", testSubnet, "--dns", "10.96.0.10")
	n.process.Stderr = &n.stderr
	n.process.Env = append(os.Environ(), "SECRET_OF_PROCRI=1")
	check(n.t, n.process.Start())
	n.eventually("the socket", func() bool { return exists(socket) })
	connection, err := grpc.NewClient("unix://"+socket, grpc.WithTransportCredentials(insecure.NewCredentials()))
	check(n.t, err)
	n.runtime, n.images = runtimeapi.NewRuntimeServiceClient(connection), runtimeapi.NewImageServiceClient(connection)
	n.eventually("procri answers", func() bool {
		status, err := n.runtime.Status(n.context(), &runtimeapi.StatusRequest{})
		return err == nil && status.Status.Conditions[1].Status
	})
}

func (n *node) stop() {
	if n.process.ProcessState == nil {
		check(n.t, n.process.Process.Signal(os.Interrupt))
		check(n.t, n.process.Wait())
	}
	if n.t.Failed() {
		n.t.Logf("procri:\n%s", n.stderr.String())
	}
}

func (n *node) context() context.Context {
	ctx, cancel := context.WithTimeout(n.t.Context(), patience)
	n.t.Cleanup(cancel)
	return ctx
}

func (n *node) eventually(what string, condition func() bool) {
	n.t.Helper()
	for deadline := time.Now().Add(patience); !condition(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(deadline) {
			n.t.Fatalf("never came: %s\n%s", what, n.stderr.String())
		}
	}
}

// pod starts a sandbox.
func (n *node) pod(change func(*runtimeapi.PodSandboxConfig)) (string, *runtimeapi.PodSandboxConfig) {
	n.t.Helper()
	config := &runtimeapi.PodSandboxConfig{
		Metadata:     &runtimeapi.PodSandboxMetadata{Name: "web", Namespace: "test", Uid: "u-1"},
		Hostname:     "web-0",
		LogDirectory: n.logs,
		DnsConfig:    &runtimeapi.DNSConfig{Servers: []string{"10.96.0.10"}, Searches: []string{"test.svc"}, Options: []string{"ndots:5"}},
		Labels:       map[string]string{"app": "web"},
		Linux: &runtimeapi.LinuxPodSandboxConfig{SecurityContext: &runtimeapi.LinuxSandboxSecurityContext{
			NamespaceOptions: &runtimeapi.NamespaceOption{Pid: runtimeapi.NamespaceMode_CONTAINER},
		}},
	}
	if change != nil {
		change(config)
	}
	answer, err := n.runtime.RunPodSandbox(n.context(), &runtimeapi.RunPodSandboxRequest{Config: config})
	check(n.t, err)
	return answer.PodSandboxId, config
}

// create makes a container that runs a shell script.
func (n *node) create(pod, script string, change func(*runtimeapi.ContainerConfig)) string {
	n.t.Helper()
	config := &runtimeapi.ContainerConfig{
		Metadata: &runtimeapi.ContainerMetadata{Name: "main"},
		Image:    &runtimeapi.ImageSpec{Image: shellImage},
		Command:  []string{"/bin/sh", "-c", script},
		LogPath:  fmt.Sprintf("main-%d.log", time.Now().UnixNano()),
		Linux: &runtimeapi.LinuxContainerConfig{SecurityContext: &runtimeapi.LinuxContainerSecurityContext{
			NamespaceOptions: &runtimeapi.NamespaceOption{Pid: runtimeapi.NamespaceMode_CONTAINER},
		}},
	}
	if change != nil {
		change(config)
	}
	answer, err := n.runtime.CreateContainer(n.context(), &runtimeapi.CreateContainerRequest{PodSandboxId: pod, Config: config})
	check(n.t, err)
	return answer.ContainerId
}

func (n *node) run(pod, script string, change func(*runtimeapi.ContainerConfig)) string {
	n.t.Helper()
	id := n.create(pod, script, change)
	_, err := n.runtime.StartContainer(n.context(), &runtimeapi.StartContainerRequest{ContainerId: id})
	check(n.t, err)
	return id
}

func (n *node) status(id string) *runtimeapi.ContainerStatus {
	n.t.Helper()
	answer, err := n.runtime.ContainerStatus(n.context(), &runtimeapi.ContainerStatusRequest{ContainerId: id})
	check(n.t, err)
	return answer.Status
}

// finish waits for a container's end.
func (n *node) finish(id string) *runtimeapi.ContainerStatus {
	n.t.Helper()
	n.eventually("end of the container", func() bool {
		return n.status(id).State == runtimeapi.ContainerState_CONTAINER_EXITED
	})
	return n.status(id)
}

// output waits for a container's end and returns what it printed, without the log's framing.
func (n *node) output(pod, script string, change func(*runtimeapi.ContainerConfig)) string {
	n.t.Helper()
	status := n.finish(n.run(pod, script, change))
	data, err := os.ReadFile(status.LogPath)
	check(n.t, err)
	var text strings.Builder
	for line := range strings.Lines(string(data)) {
		fields := strings.SplitN(line, " ", 4)
		if len(fields) < 4 {
			n.t.Fatalf("bad log line %q", line)
		}
		if fields[2] == "P" {
			text.WriteString(strings.TrimSuffix(fields[3], "\n"))
		} else {
			text.WriteString(fields[3])
		}
	}
	return text.String()
}

func (n *node) exec(id string, command ...string) *runtimeapi.ExecSyncResponse {
	n.t.Helper()
	answer, err := n.runtime.ExecSync(n.context(), &runtimeapi.ExecSyncRequest{ContainerId: id, Cmd: command})
	check(n.t, err)
	return answer
}

func (n *node) record(id string) containerRecord {
	n.t.Helper()
	data, err := os.ReadFile(filepath.Join(n.root, recordFolder, id+".json"))
	check(n.t, err)
	var record containerRecord
	check(n.t, json.Unmarshal(data, &record))
	return record
}

func exists(path string) bool {
	_, err := os.Lstat(path)
	return err == nil
}

func alive(pid int) bool {
	data, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	return err == nil && !strings.Contains(string(data), ") Z ")
}

func check(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func equal[T comparable](t *testing.T, got, want T) {
	t.Helper()
	if got != want {
		t.Fatalf("got %v, want %v", got, want)
	}
}
