package procri

import (
	"bytes"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// clockTick is the unit of CPU times in /proc: 100 per second on every Linux.
const clockTick = uint64(time.Second / 100)

// Positions in /proc/<pid>/stat, counted from the field after the name.
const (
	statParent      = 1
	statMinorFaults = 7
	statMajorFaults = 9
	statUserTime    = 11
	statWaitedTimes = 15
	statResident    = 21
)

// usage is what the processes of a container use.
type usage struct {
	cpuNanoseconds uint64
	residentBytes  uint64
	minorFaults    uint64
	majorFaults    uint64
	processes      uint64
}

func (u *usage) add(other usage) {
	u.cpuNanoseconds += other.cpuNanoseconds
	u.residentBytes += other.residentBytes
	u.minorFaults += other.minorFaults
	u.majorFaults += other.majorFaults
	u.processes += other.processes
}

// processTable is a snapshot of /proc.
type processTable struct {
	children map[int][]int
	usage    map[int]usage
}

// readProcesses reads every process that procri can see. One that ends meanwhile is left out.
func readProcesses() (processTable, error) {
	table := processTable{children: map[int][]int{}, usage: map[int]usage{}}
	paths, err := filepath.Glob("/proc/[0-9]*/stat")
	if err != nil {
		return table, err
	}
	for _, path := range paths {
		data, err := os.ReadFile(path)
		if err != nil {
			continue
		}
		pid, err := strconv.Atoi(filepath.Base(filepath.Dir(path)))
		if err != nil {
			continue
		}
		parent, used, ok := parseStat(data)
		if ok {
			table.children[parent] = append(table.children[parent], pid)
			table.usage[pid] = used
		}
	}
	return table, nil
}

func parseStat(data []byte) (parent int, used usage, ok bool) {
	// The name before the last parenthesis may contain anything.
	fields := strings.Fields(string(data[bytes.LastIndexByte(data, ')')+1:]))
	if len(fields) <= statResident {
		return 0, usage{}, false
	}
	number := func(position int) uint64 {
		value, err := strconv.ParseUint(fields[position], 10, 64)
		ok = ok && err == nil
		return value
	}
	ok = true
	used = usage{
		residentBytes: number(statResident) * uint64(os.Getpagesize()),
		minorFaults:   number(statMinorFaults),
		majorFaults:   number(statMajorFaults),
		processes:     1,
	}
	// User and system time, and the times of children that were waited for.
	for position := statUserTime; position < statWaitedTimes; position++ {
		used.cpuNanoseconds += number(position) * clockTick
	}
	return int(number(statParent)), used, ok
}

// below sums up the usage of everything below a process; the shim itself does not belong to the container.
func (t processTable) below(shim int) usage {
	var total usage
	for _, pid := range t.children[shim] {
		total.add(t.tree(pid))
	}
	return total
}

// tree sums up the usage of a process and of everything below it.
func (t processTable) tree(root int) usage {
	total := t.usage[root]
	for _, pid := range t.children[root] {
		total.add(t.tree(pid))
	}
	return total
}

// stats returns what a container uses now; nil if it isn't running.
func (c *container) stats(table processTable) *runtimeapi.ContainerStats {
	main, err := c.running()
	if err != nil {
		return nil
	}
	used := table.below(main.shim.command.Process.Pid)
	now := time.Now().UnixNano()
	return &runtimeapi.ContainerStats{
		Attributes: &runtimeapi.ContainerAttributes{
			Id: c.id, Metadata: c.config.GetMetadata(), Labels: c.config.GetLabels(), Annotations: c.config.GetAnnotations(),
		},
		Cpu:    used.cpu(now),
		Memory: used.memory(now),
		WritableLayer: &runtimeapi.FilesystemUsage{
			Timestamp:  now,
			FsId:       &runtimeapi.FilesystemIdentifier{Mountpoint: c.sandbox.mountpoint},
			UsedBytes:  &runtimeapi.UInt64Value{},
			InodesUsed: &runtimeapi.UInt64Value{},
		},
	}
}

func (u usage) cpu(now int64) *runtimeapi.CpuUsage {
	return &runtimeapi.CpuUsage{Timestamp: now, UsageCoreNanoSeconds: &runtimeapi.UInt64Value{Value: u.cpuNanoseconds}}
}

func (u usage) memory(now int64) *runtimeapi.MemoryUsage {
	return &runtimeapi.MemoryUsage{
		Timestamp:       now,
		WorkingSetBytes: &runtimeapi.UInt64Value{Value: u.residentBytes},
		UsageBytes:      &runtimeapi.UInt64Value{Value: u.residentBytes},
		RssBytes:        &runtimeapi.UInt64Value{Value: u.residentBytes},
		PageFaults:      &runtimeapi.UInt64Value{Value: u.minorFaults},
		MajorPageFaults: &runtimeapi.UInt64Value{Value: u.majorFaults},
	}
}
