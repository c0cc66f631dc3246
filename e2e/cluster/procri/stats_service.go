package procri

import (
	"context"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

func (r *runtimeService) ContainerStats(
	_ context.Context, request *runtimeapi.ContainerStatsRequest,
) (*runtimeapi.ContainerStatsResponse, error) {
	c, err := r.container(request.GetContainerId())
	if err != nil {
		return nil, err
	}
	table, err := readProcesses()
	if err != nil {
		return nil, err
	}
	used := c.stats(table)
	if used == nil {
		return nil, status.Errorf(codes.NotFound, "container %s is not running", c.id)
	}
	return &runtimeapi.ContainerStatsResponse{Stats: used}, nil
}

func (r *runtimeService) ListContainerStats(
	_ context.Context, request *runtimeapi.ListContainerStatsRequest,
) (*runtimeapi.ListContainerStatsResponse, error) {
	table, err := readProcesses()
	if err != nil {
		return nil, err
	}
	filter := request.GetFilter()
	response := &runtimeapi.ListContainerStatsResponse{}
	for _, c := range r.containersOf(filter.GetPodSandboxId()) {
		if filter.GetId() != "" && filter.GetId() != c.id || !matches(c.config.GetLabels(), filter.GetLabelSelector()) {
			continue
		}
		if used := c.stats(table); used != nil {
			response.Stats = append(response.Stats, used)
		}
	}
	return response, nil
}

func (r *runtimeService) PodSandboxStats(
	_ context.Context, request *runtimeapi.PodSandboxStatsRequest,
) (*runtimeapi.PodSandboxStatsResponse, error) {
	s, err := r.sandbox(request.GetPodSandboxId())
	if err != nil {
		return nil, err
	}
	table, err := readProcesses()
	if err != nil {
		return nil, err
	}
	return &runtimeapi.PodSandboxStatsResponse{Stats: r.sandboxStats(s, table)}, nil
}

func (r *runtimeService) ListPodSandboxStats(
	_ context.Context, request *runtimeapi.ListPodSandboxStatsRequest,
) (*runtimeapi.ListPodSandboxStatsResponse, error) {
	table, err := readProcesses()
	if err != nil {
		return nil, err
	}
	filter := request.GetFilter()
	response := &runtimeapi.ListPodSandboxStatsResponse{}
	for _, s := range r.allSandboxes() {
		if !s.ready() || filter.GetId() != "" && filter.GetId() != s.id || !matches(s.config.GetLabels(), filter.GetLabelSelector()) {
			continue
		}
		response.Stats = append(response.Stats, r.sandboxStats(s, table))
	}
	return response, nil
}

// sandboxStats sums up the containers of a pod.
func (r *runtimeService) sandboxStats(s *sandbox, table processTable) *runtimeapi.PodSandboxStats {
	now := time.Now().UnixNano()
	var total usage
	linux := &runtimeapi.LinuxPodSandboxStats{}
	for _, c := range r.containersOf(s.id) {
		used := c.stats(table)
		if used == nil {
			continue
		}
		linux.Containers = append(linux.Containers, used)
		if main, err := c.running(); err == nil {
			total.add(table.below(main.shim.command.Process.Pid))
		}
	}
	linux.Cpu, linux.Memory = total.cpu(now), total.memory(now)
	linux.Process = &runtimeapi.ProcessUsage{Timestamp: now, ProcessCount: &runtimeapi.UInt64Value{Value: total.processes}}
	return &runtimeapi.PodSandboxStats{
		Attributes: &runtimeapi.PodSandboxAttributes{
			Id: s.id, Metadata: s.config.GetMetadata(), Labels: s.config.GetLabels(), Annotations: s.config.GetAnnotations(),
		},
		Linux: linux,
	}
}
