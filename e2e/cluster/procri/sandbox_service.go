package procri

import (
	"context"
	"errors"
	"path/filepath"
	"slices"
	"sync"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
	"k8s.io/klog/v2"
)

func (r *runtimeService) RunPodSandbox(
	_ context.Context, request *runtimeapi.RunPodSandboxRequest,
) (*runtimeapi.RunPodSandboxResponse, error) {
	config := request.GetConfig()
	if config.GetMetadata() == nil {
		return nil, status.Error(codes.InvalidArgument, "the sandbox has no metadata")
	}
	if request.GetRuntimeHandler() != "" {
		return nil, status.Errorf(codes.InvalidArgument, "unknown runtime handler %q", request.GetRuntimeHandler())
	}
	for _, port := range config.GetPortMappings() {
		if port.GetHostPort() != 0 {
			return nil, status.Errorf(codes.InvalidArgument, "host port %d is not supported here: use a Service", port.GetHostPort())
		}
	}
	users := config.GetLinux().GetSecurityContext().GetNamespaceOptions().GetUsernsOptions()
	if users != nil && users.GetMode() == runtimeapi.NamespaceMode_POD {
		return nil, status.Error(codes.InvalidArgument, "user namespaces are not supported")
	}
	s := &sandbox{
		id: newID(), config: config, handler: request.GetRuntimeHandler(), created: time.Now(), mountpoint: r.mountpoint,
		find: r.container, state: runtimeapi.PodSandboxState_SANDBOX_READY,
	}
	s.folder = filepath.Join(r.folder, sandboxFolder, s.id)
	if err := s.open(r.network, r.addresses, r.dns); err != nil {
		return nil, errors.Join(err, s.close(r.network, r.addresses))
	}
	r.mu.Lock()
	closing := r.closing
	if !closing {
		r.sandboxes[s.id] = s
	}
	r.mu.Unlock()
	if closing {
		return nil, errors.Join(status.Error(codes.Unavailable, "procri is ending"), s.close(r.network, r.addresses))
	}
	klog.InfoS("Sandbox started", "sandbox", s.id, "pod", klog.KRef(config.GetMetadata().GetNamespace(), config.GetMetadata().GetName()),
		"address", s.address)
	return &runtimeapi.RunPodSandboxResponse{PodSandboxId: s.id}, nil
}

// StopPodSandbox kills whatever is still running; the kubelet has given the containers their grace before.
func (r *runtimeService) StopPodSandbox(
	_ context.Context, request *runtimeapi.StopPodSandboxRequest,
) (*runtimeapi.StopPodSandboxResponse, error) {
	s, err := r.sandbox(request.GetPodSandboxId())
	if status.Code(err) == codes.NotFound {
		return &runtimeapi.StopPodSandboxResponse{}, nil
	}
	if err != nil {
		return nil, err
	}
	return &runtimeapi.StopPodSandboxResponse{}, r.stopSandbox(s, 0)
}

func (r *runtimeService) stopSandbox(s *sandbox, grace time.Duration) error {
	s.retire()
	var stops sync.WaitGroup
	for _, c := range r.containersOf(s.id) {
		stops.Go(func() { c.stop(grace) })
	}
	stops.Wait()
	return s.close(r.network, r.addresses)
}

func (r *runtimeService) RemovePodSandbox(
	ctx context.Context, request *runtimeapi.RemovePodSandboxRequest,
) (*runtimeapi.RemovePodSandboxResponse, error) {
	id := request.GetPodSandboxId()
	s, err := r.sandbox(id)
	if status.Code(err) == codes.NotFound {
		return &runtimeapi.RemovePodSandboxResponse{}, nil
	}
	if err != nil {
		return nil, err
	}
	if err := r.stopSandbox(s, 0); err != nil {
		return nil, err
	}
	for _, c := range r.containersOf(id) {
		if _, err := r.RemoveContainer(ctx, &runtimeapi.RemoveContainerRequest{ContainerId: c.id}); err != nil {
			return nil, err
		}
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	delete(r.sandboxes, id)
	return &runtimeapi.RemovePodSandboxResponse{}, nil
}

func (r *runtimeService) PodSandboxStatus(
	_ context.Context, request *runtimeapi.PodSandboxStatusRequest,
) (*runtimeapi.PodSandboxStatusResponse, error) {
	s, err := r.sandbox(request.GetPodSandboxId())
	if err != nil {
		return nil, err
	}
	brief := s.describe()
	network := &runtimeapi.PodSandboxNetworkStatus{}
	if s.address != nil {
		network.Ip = s.address.String()
	}
	info, err := verbose(request.GetVerbose(), map[string]any{"config": s.config, "address": network.Ip})
	if err != nil {
		return nil, err
	}
	return &runtimeapi.PodSandboxStatusResponse{
		Status: &runtimeapi.PodSandboxStatus{
			Id: s.id, Metadata: brief.Metadata, State: brief.State, CreatedAt: brief.CreatedAt, Network: network,
			Linux:  &runtimeapi.LinuxPodSandboxStatus{Namespaces: &runtimeapi.Namespace{Options: s.options()}},
			Labels: brief.Labels, Annotations: brief.Annotations, RuntimeHandler: s.handler,
		},
		Info:      info,
		Timestamp: time.Now().UnixNano(),
	}, nil
}

func (r *runtimeService) ListPodSandbox(
	_ context.Context, request *runtimeapi.ListPodSandboxRequest,
) (*runtimeapi.ListPodSandboxResponse, error) {
	filter := request.GetFilter()
	response := &runtimeapi.ListPodSandboxResponse{}
	for _, s := range r.allSandboxes() {
		brief := s.describe()
		if filter.GetId() != "" && filter.GetId() != s.id ||
			filter.GetState() != nil && filter.GetState().GetState() != brief.State ||
			!matches(brief.Labels, filter.GetLabelSelector()) {
			continue
		}
		response.Items = append(response.Items, brief)
	}
	return response, nil
}

// allSandboxes lists the sandboxes, oldest first.
func (r *runtimeService) allSandboxes() []*sandbox {
	r.mu.Lock()
	defer r.mu.Unlock()
	found := make([]*sandbox, 0, len(r.sandboxes))
	for _, s := range r.sandboxes {
		found = append(found, s)
	}
	slices.SortFunc(found, func(a, b *sandbox) int { return a.created.Compare(b.created) })
	return found
}

func (s *sandbox) describe() *runtimeapi.PodSandbox {
	s.mu.Lock()
	defer s.mu.Unlock()
	return &runtimeapi.PodSandbox{
		Id: s.id, Metadata: s.config.GetMetadata(), State: s.state, CreatedAt: s.created.UnixNano(),
		Labels: s.config.GetLabels(), Annotations: s.config.GetAnnotations(), RuntimeHandler: s.handler,
	}
}

// PortForward returns the URL at which the streaming server waits for the client.
func (r *runtimeService) PortForward(
	_ context.Context, request *runtimeapi.PortForwardRequest,
) (*runtimeapi.PortForwardResponse, error) {
	if _, err := r.sandbox(request.GetPodSandboxId()); err != nil {
		return nil, err
	}
	return r.streaming.GetPortForward(request)
}

// UpdatePodSandboxResources accepts everything: procri enforces no resources.
func (r *runtimeService) UpdatePodSandboxResources(
	context.Context, *runtimeapi.UpdatePodSandboxResourcesRequest,
) (*runtimeapi.UpdatePodSandboxResourcesResponse, error) {
	return &runtimeapi.UpdatePodSandboxResourcesResponse{}, nil
}
