package procri

import (
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/vishvananda/netlink"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// links counts the pods' links at the bridge.
func links(t *testing.T) int {
	t.Helper()
	found, err := netlink.LinkList()
	check(t, err)
	count := 0
	for _, link := range found {
		if strings.HasPrefix(link.Attrs().Name, "veth") {
			count++
		}
	}
	return count
}

func mountsBelow(t *testing.T, root string) int {
	t.Helper()
	data, err := os.ReadFile("/proc/self/mountinfo")
	check(t, err)
	return strings.Count(string(data), " "+root+"/")
}

// busy starts a pod whose container has a tree of processes, and returns its main process.
func busy(n *node, options *runtimeapi.NamespaceOption) int {
	n.t.Helper()
	pod, _ := n.pod(func(c *runtimeapi.PodSandboxConfig) { c.Linux.SecurityContext.NamespaceOptions = options })
	id := n.run(pod, "(setsid sleep 1000 &); trap '' TERM; while :; do sleep 1; done", func(c *runtimeapi.ContainerConfig) {
		c.Linux.SecurityContext.NamespaceOptions = options
	})
	n.eventually("the tree", func() bool { return n.exec(id, "sh", "-c", "grep -lz 100[0] /proc/[0-9]*/cmdline").ExitCode == 0 })
	return n.record(id).PID
}

func TestNothingOutlivesProcri(t *testing.T) {
	for name, signal := range map[string]syscall.Signal{"killed": syscall.SIGKILL, "terminated": syscall.SIGTERM} {
		t.Run(name, func(t *testing.T) {
			n := startNode(t)
			pid := busy(n, &runtimeapi.NamespaceOption{Pid: runtimeapi.NamespaceMode_CONTAINER})
			other := busy(n, &runtimeapi.NamespaceOption{Pid: runtimeapi.NamespaceMode_NODE})
			namespace, err := os.Readlink(filepath.Join("/proc", itoa(pid), "ns/pid"))
			check(t, err)
			group, err := syscall.Getpgid(other)
			check(t, err)
			check(t, n.process.Process.Signal(signal))
			if err := n.process.Wait(); (err == nil) != (signal == syscall.SIGTERM) {
				t.Fatalf("procri ended with %v", err)
			}
			n.eventually("end of the container", func() bool { return !anyInNamespace(namespace) })
			n.eventually("end of the container without a PID namespace", func() bool {
				return !alive(other) && syscall.Kill(-group, 0) != nil
			})
			n.eventually("end of the links", func() bool { return links(t) == 0 })

			n.start()
			equal(t, mountsBelow(t, n.root), 0)
			left, err := filepath.Glob(filepath.Join(n.root, "*", "*"))
			check(t, err)
			for _, path := range left {
				if filepath.Base(path) != lastFile {
					t.Errorf("left over: %s", path)
				}
			}
			pods, err := n.runtime.ListPodSandbox(n.context(), &runtimeapi.ListPodSandboxRequest{})
			check(t, err)
			equal(t, len(pods.Items), 0)
			busy(n, &runtimeapi.NamespaceOption{Pid: runtimeapi.NamespaceMode_CONTAINER})
		})
	}
}

func TestSandboxRemovalLeavesNothing(t *testing.T) {
	n := startNode(t)
	before := links(t)
	pod, _ := n.pod(nil)
	id := n.run(pod, "sleep 1000", nil)
	equal(t, links(t), before+1)
	for range 2 {
		_, err := n.runtime.StopPodSandbox(n.context(), &runtimeapi.StopPodSandboxRequest{PodSandboxId: pod})
		check(t, err)
	}
	equal(t, n.status(id).ExitCode, 137)
	list, err := n.runtime.ListPodSandbox(n.context(), &runtimeapi.ListPodSandboxRequest{
		Filter: &runtimeapi.PodSandboxFilter{State: &runtimeapi.PodSandboxStateValue{State: runtimeapi.PodSandboxState_SANDBOX_NOTREADY}},
	})
	check(t, err)
	equal(t, len(list.Items), 1)
	for range 2 {
		_, err = n.runtime.RemovePodSandbox(n.context(), &runtimeapi.RemovePodSandboxRequest{PodSandboxId: pod})
		check(t, err)
	}
	equal(t, links(t), before)
	equal(t, mountsBelow(t, n.root), 0)
	if _, err := n.runtime.ContainerStatus(n.context(), &runtimeapi.ContainerStatusRequest{ContainerId: id}); err == nil {
		t.Fatal("the container is still known")
	}
}

func TestHostNetworkPodUsesTheNodes(t *testing.T) {
	n := startNode(t)
	options := &runtimeapi.NamespaceOption{Network: runtimeapi.NamespaceMode_NODE, Pid: runtimeapi.NamespaceMode_CONTAINER}
	pod, _ := n.pod(func(c *runtimeapi.PodSandboxConfig) {
		c.Linux.SecurityContext.NamespaceOptions, c.Hostname = options, ""
	})
	got := n.output(pod, "ip -o link show "+testBridge+" | wc -l", func(c *runtimeapi.ContainerConfig) {
		c.Linux.SecurityContext.NamespaceOptions = options
	})
	equal(t, strings.TrimSpace(got), "1")
	answer, err := n.runtime.PodSandboxStatus(n.context(), &runtimeapi.PodSandboxStatusRequest{PodSandboxId: pod})
	check(t, err)
	equal(t, answer.Status.Network.Ip, "")
}

func TestSandboxesThatAreRefused(t *testing.T) {
	n := startNode(t)
	user := &runtimeapi.UserNamespace{Mode: runtimeapi.NamespaceMode_POD}
	for name, request := range map[string]*runtimeapi.RunPodSandboxRequest{
		"no metadata": {Config: &runtimeapi.PodSandboxConfig{}},
		"handler":     {Config: refusedConfig(), RuntimeHandler: "gvisor"},
		"host port":   {Config: refusedConfig(&runtimeapi.PortMapping{ContainerPort: 80, HostPort: 80})},
		"user namespace": {Config: &runtimeapi.PodSandboxConfig{
			Metadata: refusedConfig().Metadata, Linux: &runtimeapi.LinuxPodSandboxConfig{
				SecurityContext: &runtimeapi.LinuxSandboxSecurityContext{NamespaceOptions: &runtimeapi.NamespaceOption{UsernsOptions: user}},
			},
		}},
	} {
		if _, err := n.runtime.RunPodSandbox(n.context(), request); status.Code(err) != codes.InvalidArgument {
			t.Errorf("%s: %v", name, err)
		}
	}
	equal(t, links(t), 0)
}

func refusedConfig(ports ...*runtimeapi.PortMapping) *runtimeapi.PodSandboxConfig {
	return &runtimeapi.PodSandboxConfig{Metadata: &runtimeapi.PodSandboxMetadata{Name: "refused"}, PortMappings: ports}
}

func TestPodsReachEachOther(t *testing.T) {
	n := startNode(t)
	server, _ := n.pod(nil)
	answer, err := n.runtime.PodSandboxStatus(n.context(), &runtimeapi.PodSandboxStatusRequest{PodSandboxId: server})
	check(t, err)
	serverID := n.run(server, "exec python3 -c \"$PROGRAM\"", listenerEnv)
	client, _ := n.pod(nil)
	clientID := n.run(client, "sleep 1000", nil)
	n.eventually("an answer", func() bool {
		return n.exec(clientID, "bash", "-c", "exec 3<>/dev/tcp/"+answer.Status.Network.Ip+"/80 && echo ping >&3 && grep -q pong <&3").ExitCode == 0
	})
	equal(t, n.status(serverID).State, runtimeapi.ContainerState_CONTAINER_RUNNING)
}

// listenerEnv gives a container a small server at port 80, as a user without privileges.
func listenerEnv(c *runtimeapi.ContainerConfig) {
	c.Linux.SecurityContext.RunAsUser = &runtimeapi.Int64Value{Value: 65532}
	c.Envs = append(c.Envs, &runtimeapi.KeyValue{Key: "PROGRAM", Value: []byte(`
import socket
server = socket.create_server(("0.0.0.0", 80))
while True:
    connection, _ = server.accept()
    data = connection.recv(100)
    connection.sendall(data.replace(b"ping", b"pong"))
    connection.close()
`)})
}
