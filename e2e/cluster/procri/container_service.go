package procri

import (
	"context"
	"errors"
	"maps"
	"path/filepath"
	"slices"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
	"k8s.io/klog/v2"
)

func (r *runtimeService) CreateContainer(
	_ context.Context, request *runtimeapi.CreateContainerRequest,
) (*runtimeapi.CreateContainerResponse, error) {
	s, err := r.sandbox(request.GetPodSandboxId())
	if err != nil {
		return nil, err
	}
	if !s.ready() {
		return nil, status.Errorf(codes.FailedPrecondition, "sandbox %s has ended", s.id)
	}
	config := request.GetConfig()
	image, name, err := r.images.find(config.GetImage().GetImage())
	if errors.Is(err, errNoImage) && config.GetImage().GetUserSpecifiedImage() != "" {
		// An earlier procri gave out this id.
		image, name, err = r.images.find(config.GetImage().GetUserSpecifiedImage())
	}
	if errors.Is(err, errNoImage) {
		return nil, status.Error(codes.NotFound, err.Error())
	}
	if err != nil {
		return nil, err
	}
	if err := addDevices(config, r.cdi); err != nil {
		return nil, status.Error(codes.FailedPrecondition, err.Error())
	}
	spec, err := buildSpec(config, image, s.hostname(), s.mounts())
	if errors.Is(err, errConfig) {
		return nil, status.Error(codes.InvalidArgument, err.Error())
	}
	if err != nil {
		return nil, err
	}
	spec.NewRoot = filepath.Join(r.folder, rootFolder)
	c := &container{
		id: newID(), sandbox: s, config: config, image: name, spec: spec, created: time.Now(), ended: make(chan struct{}),
		state: runtimeapi.ContainerState_CONTAINER_CREATED,
	}
	c.record = filepath.Join(r.folder, recordFolder, c.id+".json")
	if err := c.save(); err != nil {
		return nil, err
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	r.containers[c.id] = c
	return &runtimeapi.CreateContainerResponse{ContainerId: c.id}, nil
}

func (r *runtimeService) StartContainer(
	_ context.Context, request *runtimeapi.StartContainerRequest,
) (*runtimeapi.StartContainerResponse, error) {
	c, err := r.container(request.GetContainerId())
	if err != nil {
		return nil, err
	}
	if err := c.start(); err != nil {
		return nil, err
	}
	klog.InfoS("Container started", "container", c.id, "name", c.config.GetMetadata().GetName(), "sandbox", c.sandbox.id)
	return &runtimeapi.StartContainerResponse{}, nil
}

func (r *runtimeService) StopContainer(
	_ context.Context, request *runtimeapi.StopContainerRequest,
) (*runtimeapi.StopContainerResponse, error) {
	c, err := r.container(request.GetContainerId())
	if status.Code(err) == codes.NotFound {
		return &runtimeapi.StopContainerResponse{}, nil
	}
	if err != nil {
		return nil, err
	}
	c.stop(time.Duration(request.GetTimeout()) * time.Second)
	return &runtimeapi.StopContainerResponse{}, nil
}

func (r *runtimeService) RemoveContainer(
	_ context.Context, request *runtimeapi.RemoveContainerRequest,
) (*runtimeapi.RemoveContainerResponse, error) {
	c, err := r.container(request.GetContainerId())
	if status.Code(err) == codes.NotFound {
		return &runtimeapi.RemoveContainerResponse{}, nil
	}
	if err != nil {
		return nil, err
	}
	if err := c.remove(); err != nil {
		return nil, err
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	delete(r.containers, c.id)
	return &runtimeapi.RemoveContainerResponse{}, nil
}

func (r *runtimeService) ListContainers(
	_ context.Context, request *runtimeapi.ListContainersRequest,
) (*runtimeapi.ListContainersResponse, error) {
	filter := request.GetFilter()
	response := &runtimeapi.ListContainersResponse{}
	for _, c := range r.containersOf(filter.GetPodSandboxId()) {
		full := c.describe()
		if filter.GetId() != "" && filter.GetId() != c.id ||
			filter.GetState() != nil && filter.GetState().GetState() != full.State ||
			!matches(full.Labels, filter.GetLabelSelector()) {
			continue
		}
		response.Containers = append(response.Containers, &runtimeapi.Container{
			Id: c.id, PodSandboxId: c.sandbox.id, Metadata: full.Metadata, Image: full.Image, ImageRef: full.ImageRef,
			ImageId: full.ImageId, State: full.State, CreatedAt: full.CreatedAt, Labels: full.Labels, Annotations: full.Annotations,
		})
	}
	slices.SortFunc(response.Containers, func(a, b *runtimeapi.Container) int { return int(a.CreatedAt - b.CreatedAt) })
	return response, nil
}

func (r *runtimeService) ContainerStatus(
	_ context.Context, request *runtimeapi.ContainerStatusRequest,
) (*runtimeapi.ContainerStatusResponse, error) {
	c, err := r.container(request.GetContainerId())
	if err != nil {
		return nil, err
	}
	pid := 0
	if main, err := c.running(); err == nil {
		pid = main.pid
	}
	info, err := verbose(request.GetVerbose(), map[string]any{"pid": pid, "sandboxID": c.sandbox.id, "spec": c.spec})
	if err != nil {
		return nil, err
	}
	return &runtimeapi.ContainerStatusResponse{Status: c.describe(), Info: info}, nil
}

// describe returns the container as CRI sees it.
func (c *container) describe() *runtimeapi.ContainerStatus {
	c.mu.Lock()
	defer c.mu.Unlock()
	description := &runtimeapi.ContainerStatus{
		Id: c.id, Metadata: c.config.GetMetadata(), State: c.state, CreatedAt: c.created.UnixNano(),
		ExitCode: int32(c.exitCode), Reason: c.reason, Message: c.message,
		Image:    &runtimeapi.ImageSpec{Image: c.image, UserSpecifiedImage: c.config.GetImage().GetUserSpecifiedImage()},
		ImageRef: imageID(c.image), ImageId: imageID(c.image),
		Labels: maps.Clone(c.config.GetLabels()), Annotations: maps.Clone(c.config.GetAnnotations()),
		Mounts: c.config.GetMounts(), LogPath: c.logPath(), StopSignal: c.config.GetStopSignal(),
		Resources: &runtimeapi.ContainerResources{Linux: c.config.GetLinux().GetResources()},
		User: &runtimeapi.ContainerUser{Linux: &runtimeapi.LinuxContainerUser{
			Uid: int64(c.spec.Process.User), Gid: int64(c.spec.Process.Group), SupplementalGroups: c.groups(),
		}},
	}
	if !c.started.IsZero() {
		description.StartedAt = c.started.UnixNano()
	}
	if !c.finished.IsZero() {
		description.FinishedAt = c.finished.UnixNano()
	}
	return description
}

func (c *container) groups() []int64 {
	groups := make([]int64, len(c.spec.Process.Groups))
	for i, group := range c.spec.Process.Groups {
		groups[i] = int64(group)
	}
	return groups
}

// UpdateContainerResources records the new resources, but procri enforces none.
func (r *runtimeService) UpdateContainerResources(
	_ context.Context, request *runtimeapi.UpdateContainerResourcesRequest,
) (*runtimeapi.UpdateContainerResourcesResponse, error) {
	c, err := r.container(request.GetContainerId())
	if err != nil {
		return nil, err
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if linux := c.config.GetLinux(); linux != nil && request.GetLinux() != nil {
		linux.Resources = request.GetLinux()
	}
	return &runtimeapi.UpdateContainerResourcesResponse{}, nil
}

func (r *runtimeService) ReopenContainerLog(
	_ context.Context, request *runtimeapi.ReopenContainerLogRequest,
) (*runtimeapi.ReopenContainerLogResponse, error) {
	c, err := r.container(request.GetContainerId())
	if err != nil {
		return nil, err
	}
	if _, err := c.running(); err != nil {
		return nil, err
	}
	return &runtimeapi.ReopenContainerLogResponse{}, c.log.reopen()
}

func (r *runtimeService) ExecSync(
	ctx context.Context, request *runtimeapi.ExecSyncRequest,
) (*runtimeapi.ExecSyncResponse, error) {
	c, err := r.container(request.GetContainerId())
	if err != nil {
		return nil, err
	}
	if request.GetTimeout() > 0 {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, time.Duration(request.GetTimeout())*time.Second)
		defer cancel()
	}
	stdout, stderr, code, err := c.execSync(ctx, request.GetCmd())
	if errors.Is(err, context.DeadlineExceeded) {
		return nil, status.Errorf(codes.DeadlineExceeded, "command %q timed out after %d s", request.GetCmd(), request.GetTimeout())
	}
	if err != nil {
		return nil, err
	}
	return &runtimeapi.ExecSyncResponse{Stdout: stdout, Stderr: stderr, ExitCode: int32(code)}, nil
}

// Exec returns the URL at which the streaming server waits for the client.
func (r *runtimeService) Exec(_ context.Context, request *runtimeapi.ExecRequest) (*runtimeapi.ExecResponse, error) {
	c, err := r.container(request.GetContainerId())
	if err != nil {
		return nil, err
	}
	if _, err := c.running(); err != nil {
		return nil, status.Error(codes.FailedPrecondition, err.Error())
	}
	return r.streaming.GetExec(request)
}

// Attach returns the URL at which the streaming server waits for the client.
func (r *runtimeService) Attach(_ context.Context, request *runtimeapi.AttachRequest) (*runtimeapi.AttachResponse, error) {
	c, err := r.container(request.GetContainerId())
	if err != nil {
		return nil, err
	}
	if _, err := c.running(); err != nil {
		return nil, status.Error(codes.FailedPrecondition, err.Error())
	}
	return r.streaming.GetAttach(request)
}
