package procri

import (
	"testing"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

func TestParseStat(t *testing.T) {
	line := "7 (a ) b) S 3 7 7 0 -1 4194560 11 0 5 0 100 50 0 0 20 0 1 0 100 1000 25 18446744073709551615"
	parent, used, ok := parseStat([]byte(line))
	if !ok {
		t.Fatal("not understood")
	}
	equal(t, parent, 3)
	equal(t, used.minorFaults, 11)
	equal(t, used.majorFaults, 5)
	equal(t, used.cpuNanoseconds, 150*clockTick)
	equal(t, used.residentBytes/4096, 25)
	if _, _, ok := parseStat([]byte("7 (short) S 1")); ok {
		t.Fatal("half a line was understood")
	}
}

func TestStatsCountTheWholeTree(t *testing.T) {
	n := startNode(t)
	pod, _ := n.pod(nil)
	// The child of the shell holds the memory.
	id := n.run(pod, "python3 -c 'x = bytearray(b\"1\" * (64 << 20)); open(\"/dev/shm/full\", \"w\"); import time; time.sleep(1000)' & wait", nil)
	n.eventually("the memory", func() bool { return n.exec(id, "test", "-e", "/dev/shm/full").ExitCode == 0 })
	one, err := n.runtime.ContainerStats(n.context(), &runtimeapi.ContainerStatsRequest{ContainerId: id})
	check(t, err)
	if used := one.Stats.Memory.WorkingSetBytes.Value; used < 64<<20 || used > 256<<20 {
		t.Fatalf("working set of %d bytes", used)
	}
	if one.Stats.Cpu.UsageCoreNanoSeconds.Value == 0 {
		t.Fatal("no CPU time")
	}
	all, err := n.runtime.ListContainerStats(n.context(), &runtimeapi.ListContainerStatsRequest{})
	check(t, err)
	equal(t, len(all.Stats), 1)
	pods, err := n.runtime.ListPodSandboxStats(n.context(), &runtimeapi.ListPodSandboxStatsRequest{})
	check(t, err)
	equal(t, len(pods.Stats), 1)
	if count := pods.Stats[0].Linux.Process.ProcessCount.Value; count != 2 {
		t.Fatalf("%d processes", count)
	}
}
