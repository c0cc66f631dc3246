package procri

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"sync"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
	"k8s.io/cri-streaming/pkg/streaming"
)

// The names and versions that the runtime reports of itself.
const (
	runtimeName    = "procri"
	runtimeVersion = "0.1.0"
	criVersion     = "v1"
)

// runtimeService is the runtime half of CRI. Methods that are not here answer Unimplemented: checkpoints, metrics and the event stream,
// which the kubelet can do without.
type runtimeService struct {
	runtimeapi.UnimplementedRuntimeServiceServer
	images     *imageTable
	network    *network
	addresses  *addresses
	streaming  streaming.Server
	folder     string
	cdi        string
	mountpoint string
	dns        string

	mu         sync.Mutex
	sandboxes  map[string]*sandbox
	containers map[string]*container
	// closing is true once procri is about to end.
	closing bool
}

func newID() string {
	id := make([]byte, 32)
	_, _ = rand.Read(id) // never fails
	return hex.EncodeToString(id)
}

// sandbox finds a sandbox by its id; the error is CRI's NotFound.
func (r *runtimeService) sandbox(id string) (*sandbox, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if found, known := r.sandboxes[id]; known {
		return found, nil
	}
	return nil, status.Errorf(codes.NotFound, "no sandbox %s", id)
}

// container finds a container by its id; the error is CRI's NotFound.
func (r *runtimeService) container(id string) (*container, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if found, known := r.containers[id]; known {
		return found, nil
	}
	return nil, status.Errorf(codes.NotFound, "no container %s", id)
}

// containersOf lists the containers of a sandbox, or all for an empty id.
func (r *runtimeService) containersOf(sandboxID string) []*container {
	r.mu.Lock()
	defer r.mu.Unlock()
	var found []*container
	for _, c := range r.containers {
		if sandboxID == "" || c.sandbox.id == sandboxID {
			found = append(found, c)
		}
	}
	return found
}

func (r *runtimeService) Version(context.Context, *runtimeapi.VersionRequest) (*runtimeapi.VersionResponse, error) {
	return &runtimeapi.VersionResponse{
		Version: "0.1.0", RuntimeName: runtimeName, RuntimeVersion: runtimeVersion, RuntimeApiVersion: criVersion,
	}, nil
}

func (r *runtimeService) Status(
	_ context.Context, request *runtimeapi.StatusRequest,
) (*runtimeapi.StatusResponse, error) {
	network := &runtimeapi.RuntimeCondition{Type: runtimeapi.NetworkReady, Status: true}
	if err := r.network.ready(); err != nil {
		network.Status, network.Reason, network.Message = false, "NoBridge", err.Error()
	}
	response := &runtimeapi.StatusResponse{
		Status: &runtimeapi.RuntimeStatus{
			Conditions: []*runtimeapi.RuntimeCondition{{Type: runtimeapi.RuntimeReady, Status: true}, network},
		},
		RuntimeHandlers: []*runtimeapi.RuntimeHandler{
			{Features: &runtimeapi.RuntimeHandlerFeatures{RecursiveReadOnlyMounts: true}},
		},
		Features: &runtimeapi.RuntimeFeatures{SupplementalGroupsPolicy: true},
	}
	if request.GetVerbose() {
		response.Info = map[string]string{"root": r.folder, "podSubnet": r.network.subnet.String()}
	}
	return response, nil
}

// RuntimeConfig names a cgroup driver because the kubelet asks for one; procri makes no cgroups.
func (r *runtimeService) RuntimeConfig(
	context.Context, *runtimeapi.RuntimeConfigRequest,
) (*runtimeapi.RuntimeConfigResponse, error) {
	linux := &runtimeapi.LinuxRuntimeConfiguration{CgroupDriver: runtimeapi.CgroupDriver_CGROUPFS}
	return &runtimeapi.RuntimeConfigResponse{Linux: linux}, nil
}

// UpdateRuntimeConfig accepts the pod subnet that the control plane gave the node, but the one on the command line counts.
func (r *runtimeService) UpdateRuntimeConfig(
	context.Context, *runtimeapi.UpdateRuntimeConfigRequest,
) (*runtimeapi.UpdateRuntimeConfigResponse, error) {
	return &runtimeapi.UpdateRuntimeConfigResponse{}, nil
}

// verbose is the Info of a status response: one JSON document, as in other runtimes.
func verbose(wanted bool, info map[string]any) (map[string]string, error) {
	if !wanted {
		return nil, nil
	}
	data, err := json.Marshal(info)
	if err != nil {
		return nil, err
	}
	return map[string]string{"info": string(data)}, nil
}

// matches reports whether labels have everything that a selector asks for.
func matches(labels, selector map[string]string) bool {
	for name, value := range selector {
		if labels[name] != value {
			return false
		}
	}
	return true
}

// close ends every container, then every sandbox, and prevents new ones from starting.
func (r *runtimeService) close(grace time.Duration) []error {
	r.mu.Lock()
	r.closing = true
	sandboxes := make([]*sandbox, 0, len(r.sandboxes))
	for _, s := range r.sandboxes {
		sandboxes = append(sandboxes, s)
	}
	r.mu.Unlock()
	failures := make([]error, len(sandboxes))
	var stops sync.WaitGroup
	for i, s := range sandboxes {
		stops.Go(func() {
			if err := r.stopSandbox(s, grace); err != nil {
				failures[i] = fmt.Errorf("sandbox %s: %w", s.id, err)
			}
		})
	}
	stops.Wait()
	return failures
}
