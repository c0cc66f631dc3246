package procri

import (
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

func TestContainerSeesItsPod(t *testing.T) {
	n := startNode(t)
	pod, _ := n.pod(nil)
	answer, err := n.runtime.PodSandboxStatus(n.context(), &runtimeapi.PodSandboxStatusRequest{PodSandboxId: pod})
	check(t, err)
	address := answer.Status.Network.Ip
	got := n.output(pod, `hostname; cat /etc/hostname /etc/resolv.conf; ip -4 -o addr show eth0 | awk '{print $4}';
		ip route | head -1; ping -c1 -W5 10.77.5.1 >/dev/null 2>&1 || true; stat -f -c %T /dev/shm; test $$ -lt 100 && cat /proc/1/comm`, nil)
	equal(t, got, "web-0\nweb-0\nsearch test.svc\nnameserver 10.96.0.10\noptions ndots:5\n"+address+"/28\n"+
		"default via 10.77.5.1 dev eth0 \ntmpfs\nprocri-init\n")
	if resolver, err := os.ReadFile("/etc/resolv.conf"); err == nil && strings.Contains(string(resolver), "test.svc") {
		t.Fatal("the machine's resolv.conf was changed")
	}
}

func TestEnvironmentIsImageAndPodOnly(t *testing.T) {
	n := startNode(t)
	pod, _ := n.pod(nil)
	got := n.output(pod, "", func(c *runtimeapi.ContainerConfig) {
		c.Image.Image, c.Command, c.Args = "tandem.local/echo:2.0", nil, []string{"a", "b"}
		c.Envs = []*runtimeapi.KeyValue{{Key: "WHO", Value: []byte("pod")}}
	})
	equal(t, got, "from pod: a b\n")
	got = n.output(pod, "", func(c *runtimeapi.ContainerConfig) {
		c.Image.Image, c.Command = "tandem.local/echo:2.0", []string{"env"}
	})
	equal(t, got, "HOME=/root\nHOSTNAME=web-0\nOTHER=image\nPATH="+defaultPath+"\nWHO=image\n")
}

func TestMountsReachAnyPath(t *testing.T) {
	n := startNode(t)
	pod, _ := n.pod(nil)
	volume := t.TempDir()
	check(t, os.WriteFile(filepath.Join(volume, "data"), []byte("content\n"), 0o644))
	targets := []string{"/missing-at-the-top/deep", "/etc/tandem-test/config", "/var/run/secrets/tandem-test", "/usr/share/tandem-test"}
	id := n.run(pod, "sleep 100", func(c *runtimeapi.ContainerConfig) {
		for _, target := range targets {
			c.Mounts = append(c.Mounts, &runtimeapi.Mount{HostPath: volume, ContainerPath: target, Readonly: target == targets[0]})
		}
		c.Mounts = append(c.Mounts,
			&runtimeapi.Mount{HostPath: filepath.Join(volume, "data"), ContainerPath: "/dev/termination-log"},
			&runtimeapi.Mount{HostPath: volume, ContainerPath: targets[1] + "/inner"})
		c.WorkingDir = "/also/missing"
	})
	for _, target := range targets {
		equal(t, string(n.exec(id, "cat", target+"/data").Stdout), "content\n")
		if _, err := os.Lstat(target); err == nil {
			t.Fatalf("%s appeared on the machine", target)
		}
	}
	equal(t, n.exec(id, "touch", targets[0]+"/new").ExitCode, 1)
	equal(t, n.exec(id, "touch", targets[1]+"/inner/new").ExitCode, 0)
	equal(t, string(n.exec(id, "pwd").Stdout), "/also/missing\n")
	equal(t, n.exec(id, "sh", "-c", "test -s /etc/passwd && test -c /dev/null && test -e /dev/fd && echo end > /dev/termination-log").ExitCode, 0)
	written, err := os.ReadFile(filepath.Join(volume, "data"))
	check(t, err)
	equal(t, string(written), "end\n")
}

func TestReadonlyRoot(t *testing.T) {
	n := startNode(t)
	pod, _ := n.pod(nil)
	volume := t.TempDir()
	id := n.run(pod, "sleep 100", func(c *runtimeapi.ContainerConfig) {
		c.Linux.SecurityContext.ReadonlyRootfs = true
		c.Mounts = []*runtimeapi.Mount{{HostPath: volume, ContainerPath: "/srv/tandem/volume"}}
	})
	for path, code := range map[string]int32{
		"/new": 1, "/tmp/new": 1, "/srv/tandem/new": 1, "/etc/new": 1, "/srv/tandem/volume/new": 0, "/dev/shm/new": 0, "/dev/null": 0,
	} {
		if got := n.exec(id, "touch", path).ExitCode; got != code {
			t.Errorf("touch %s: %d, want %d", path, got, code)
		}
	}
}

func TestSharedMemoryIsThePods(t *testing.T) {
	n := startNode(t)
	first, _ := n.pod(nil)
	second, _ := n.pod(nil)
	writer := n.run(first, "echo here > /dev/shm/tandem-test; sleep 100", nil)
	reader := n.run(first, "sleep 100", nil)
	stranger := n.run(second, "sleep 100", nil)
	n.eventually("the file", func() bool { return n.exec(writer, "test", "-s", "/dev/shm/tandem-test").ExitCode == 0 })
	equal(t, string(n.exec(reader, "cat", "/dev/shm/tandem-test").Stdout), "here\n")
	equal(t, n.exec(stranger, "test", "-e", "/dev/shm/tandem-test").ExitCode, 1)
}

func TestIdentityAndLimits(t *testing.T) {
	n := startNode(t)
	pod, _ := n.pod(nil)
	script := "id -u; id -g; id -G; ulimit -l; grep -E 'CapBnd|NoNewPrivs' /proc/self/status | awk '{print $2}'; echo out > /dev/stdout"
	got := n.output(pod, script, func(c *runtimeapi.ContainerConfig) {
		security := c.Linux.SecurityContext
		security.RunAsUser, security.RunAsGroup = &runtimeapi.Int64Value{Value: 65532}, &runtimeapi.Int64Value{Value: 65531}
		security.SupplementalGroups, security.NoNewPrivs = []int64{2000}, true
		security.Capabilities = &runtimeapi.Capability{DropCapabilities: []string{"ALL"}}
	})
	equal(t, got, "65532\n65531\n65531 2000\n8192\n0000000000000000\n1\nout\n")
	got = n.output(pod, script, func(c *runtimeapi.ContainerConfig) {
		c.Linux.SecurityContext.Capabilities = &runtimeapi.Capability{
			DropCapabilities: []string{"ALL"}, AddCapabilities: []string{"IPC_LOCK"},
		}
	})
	equal(t, got, "0\n0\n0\n"+highestMemlock(t)+"\n0000000000004000\n0\nout\n")
}

// highestMemlock is the limit that a container with IPC_LOCK gets, as `ulimit -l` prints it.
func highestMemlock(t *testing.T) string {
	t.Helper()
	status, err := os.ReadFile("/proc/self/status")
	check(t, err)
	_, rest, _ := strings.Cut(string(status), "CapEff:\t")
	effective, err := strconv.ParseUint(rest[:16], 16, 64)
	check(t, err)
	var limit unix.Rlimit
	check(t, unix.Getrlimit(unix.RLIMIT_MEMLOCK, &limit))
	if holds(effective, "SYS_RESOURCE") || limit.Max == unix.RLIM_INFINITY {
		return "unlimited"
	}
	return strconv.FormatUint(limit.Max>>10, 10)
}

func TestExitCodesAndReasons(t *testing.T) {
	n := startNode(t)
	pod, _ := n.pod(nil)
	for script, want := range map[string]struct {
		code   int32
		reason string
	}{
		"exit 0":         {0, reasonCompleted},
		"exit 7":         {7, reasonError},
		"kill -9 $$":     {137, reasonError},
		"kill -SEGV $$":  {139, reasonError},
		"sleep 100 & :":  {0, reasonCompleted},
		"echo last; :":   {0, reasonCompleted},
		"exec /bin/true": {0, reasonCompleted},
	} {
		id := n.run(pod, script, nil)
		got := n.finish(id)
		if got.ExitCode != want.code || got.Reason != want.reason || got.FinishedAt < got.StartedAt {
			t.Errorf("%s: %d %s", script, got.ExitCode, got.Reason)
		}
		equal(t, n.record(id).ExitCode, int(want.code))
	}
}

func TestContainerThatCannotStart(t *testing.T) {
	n := startNode(t)
	pod, _ := n.pod(nil)
	id := n.create(pod, "", func(c *runtimeapi.ContainerConfig) { c.Command = []string{"no-such-program"} })
	_, err := n.runtime.StartContainer(n.context(), &runtimeapi.StartContainerRequest{ContainerId: id})
	if err == nil || !strings.Contains(err.Error(), "no-such-program") {
		t.Fatalf("start: %v", err)
	}
	got := n.status(id)
	equal(t, got.State, runtimeapi.ContainerState_CONTAINER_EXITED)
	equal(t, got.Reason, reasonNoStart)
	equal(t, got.ExitCode, signalExit)
}

func TestStopIsGracefulThenFinal(t *testing.T) {
	n := startNode(t)
	pod, _ := n.pod(nil)
	stop := func(id string, grace int64) {
		t.Helper()
		_, err := n.runtime.StopContainer(n.context(), &runtimeapi.StopContainerRequest{ContainerId: id, Timeout: grace})
		check(t, err)
	}
	polite := n.run(pod, "trap 'exit 3' TERM; touch /dev/shm/ready; while :; do sleep 0.05; done", nil)
	n.eventually("the trap", func() bool { return n.exec(polite, "test", "-e", "/dev/shm/ready").ExitCode == 0 })
	stop(polite, 20)
	equal(t, n.status(polite).ExitCode, 3)
	stop(polite, 20)

	deaf := n.run(pod, "trap '' TERM; (setsid sleep 1000 &) ; touch /dev/shm/deaf; while :; do sleep 1; done", nil)
	n.eventually("the trap", func() bool { return n.exec(deaf, "test", "-e", "/dev/shm/deaf").ExitCode == 0 })
	pid := n.record(deaf).PID
	namespace, err := os.Readlink("/proc/" + strconv.Itoa(pid) + "/ns/pid")
	check(t, err)
	stop(deaf, 1)
	equal(t, n.status(deaf).ExitCode, 137)
	n.eventually("end of the whole tree", func() bool { return !anyInNamespace(namespace) })
}

func TestKillFromOutside(t *testing.T) {
	n := startNode(t)
	pod, _ := n.pod(nil)
	id := n.run(pod, "sleep 1000", nil)
	record := n.record(id)
	equal(t, record.Pod+"/"+record.Namespace+"/"+record.PodUID+"/"+record.State, "web/test/u-1/CONTAINER_RUNNING")
	check(t, syscall.Kill(record.PID, syscall.SIGKILL))
	equal(t, n.finish(id).ExitCode, 137)
	equal(t, n.record(id).PID, 0)
}

func TestExecSync(t *testing.T) {
	n := startNode(t)
	pod, _ := n.pod(nil)
	id := n.run(pod, "sleep 1000", func(c *runtimeapi.ContainerConfig) {
		c.Envs = []*runtimeapi.KeyValue{{Key: "A", Value: []byte("b")}}
	})
	answer := n.exec(id, "sh", "-c", "echo $A; echo no >&2; exit 4")
	equal(t, string(answer.Stdout)+string(answer.Stderr), "b\nno\n")
	equal(t, answer.ExitCode, 4)
	begin := time.Now()
	_, err := n.runtime.ExecSync(n.context(), &runtimeapi.ExecSyncRequest{
		ContainerId: id, Cmd: []string{"sh", "-c", "sleep 1000 & wait"}, Timeout: 1,
	})
	equal(t, status.Code(err), codes.DeadlineExceeded)
	if waited := time.Since(begin); waited > patience/2 {
		t.Fatalf("the time-out took %s", waited)
	}
	_, err = n.runtime.ExecSync(n.context(), &runtimeapi.ExecSyncRequest{ContainerId: id, Cmd: []string{"no-such-program"}})
	if err == nil {
		t.Fatal("a missing program ran")
	}
	equal(t, n.exec(id, "sh", "-c", "ls -d /proc/[0-9]* | wc -l").ExitCode, 0)
}

func TestSharedProcessNamespace(t *testing.T) {
	n := startNode(t)
	pod, _ := n.pod(func(c *runtimeapi.PodSandboxConfig) {
		c.Linux.SecurityContext.NamespaceOptions.Pid = runtimeapi.NamespaceMode_POD
	})
	shared := func(c *runtimeapi.ContainerConfig) {
		c.Linux.SecurityContext.NamespaceOptions.Pid = runtimeapi.NamespaceMode_POD
	}
	first := n.run(pod, "exec sleep 4321", shared)
	second := n.run(pod, "(setsid sleep 5432 &); exec sleep 3210", shared)
	n.eventually("sight of the other container", func() bool {
		return n.exec(second, "sh", "-c", "grep -lz 4321 /proc/[0-9]*/cmdline").ExitCode == 0
	})
	_, err := n.runtime.StopContainer(n.context(), &runtimeapi.StopContainerRequest{ContainerId: second})
	check(t, err)
	equal(t, n.status(first).State, runtimeapi.ContainerState_CONTAINER_RUNNING)
	if n.exec(first, "sh", "-c", "grep -lz 543[2] /proc/[0-9]*/cmdline").ExitCode == 0 {
		t.Fatal("a process of the stopped container is left")
	}
}

// anyInNamespace looks for a process in a PID namespace.
func anyInNamespace(namespace string) bool {
	links, err := filepath.Glob("/proc/[0-9]*/ns/pid")
	if err != nil {
		return false
	}
	for _, link := range links {
		if target, err := os.Readlink(link); err == nil && target == namespace {
			return true
		}
	}
	return false
}
