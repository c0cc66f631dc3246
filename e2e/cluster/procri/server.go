package procri

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
	"k8s.io/cri-streaming/pkg/streaming"
)

// Folders below the root.
const (
	sandboxFolder = "sandboxes"
	recordFolder  = "containers"
	addressFolder = "addresses"
	// rootFolder is empty; each container mounts its root on it in its own mount namespace.
	rootFolder = "rootfs"
)

const (
	// messageLimit is the kubelet's limit for CRI messages, in bytes.
	messageLimit = 16 << 20
	// closeGrace is how long containers have to end when procri is asked to end.
	closeGrace = 2 * time.Second
)

// Config is the configuration that the command line gives.
type Config struct {
	// Socket is the path of the unix socket that the kubelet connects to.
	Socket string
	// Root is the folder below which procri writes everything.
	Root string
	// Images is the path of the image table.
	Images string
	// Bridge is the name of the node's bridge, which has the first address of PodCIDR.
	Bridge string
	// PodCIDR is the subnet from which pods get their addresses.
	PodCIDR string
	// StreamingAddress is the address and port, for the kubelet to connect to, of the streams of exec, attach and port-forward.
	StreamingAddress string
	// CDI is the folder with the specifications of devices that pods can be given.
	CDI string
	// DNS is the name server of pods whose configuration names none.
	DNS string
}

// Serve runs the runtime until the context is done, and then ends every container.
func Serve(ctx context.Context, config Config) error {
	service, images, err := newServices(config)
	if err != nil {
		return err
	}
	streamListener, err := net.Listen("tcp", config.StreamingAddress)
	if err != nil {
		return fmt.Errorf("streaming server: %w", err)
	}
	streamConfig := streaming.DefaultConfig
	streamConfig.Addr = streamListener.Addr().String()
	if service.streaming, err = streaming.NewServer(streamConfig, &streams{runtime: service}); err != nil {
		return errors.Join(err, streamListener.Close())
	}
	listener, err := listenUnix(config.Socket)
	if err != nil {
		return errors.Join(err, streamListener.Close())
	}
	server := grpc.NewServer(grpc.MaxRecvMsgSize(messageLimit), grpc.MaxSendMsgSize(messageLimit))
	runtimeapi.RegisterRuntimeServiceServer(server, service)
	runtimeapi.RegisterImageServiceServer(server, images)

	streamServer := &http.Server{Handler: service.streaming}
	failed := make(chan error, 2)
	go func() { failed <- streamServer.Serve(streamListener) }()
	go func() { failed <- server.Serve(listener) }()
	select {
	case <-ctx.Done():
	case err = <-failed:
	}
	failures := service.close(closeGrace)
	server.Stop()
	failures = append(failures, err, streamServer.Close())
	return errors.Join(append(failures, clean(config.Root))...)
}

// newServices prepares the root folder and both halves of CRI.
func newServices(config Config) (*runtimeService, *imageService, error) {
	_, subnet, err := net.ParseCIDR(config.PodCIDR)
	if err != nil {
		return nil, nil, fmt.Errorf("--pod-cidr: %w", err)
	}
	if config.Root, err = filepath.Abs(config.Root); err != nil {
		return nil, nil, err
	}
	if err := clean(config.Root); err != nil {
		return nil, nil, fmt.Errorf("clean up after an earlier procri: %w", err)
	}
	for _, folder := range []string{sandboxFolder, recordFolder, rootFolder} {
		if err := os.MkdirAll(filepath.Join(config.Root, folder), 0o755); err != nil {
			return nil, nil, err
		}
	}
	addresses, err := newAddresses(filepath.Join(config.Root, addressFolder), subnet)
	if err != nil {
		return nil, nil, err
	}
	mountpoint, err := mountpointOf(config.Root)
	if err != nil {
		return nil, nil, err
	}
	images := newImageTable(config.Images)
	service := &runtimeService{
		images: images, network: &network{bridge: config.Bridge, subnet: subnet, gateway: gateway(subnet)}, addresses: addresses,
		folder: config.Root, cdi: config.CDI, mountpoint: mountpoint, dns: config.DNS,
		sandboxes: map[string]*sandbox{}, containers: map[string]*container{},
	}
	return service, &imageService{images: images, mountpoint: mountpoint}, nil
}

// clean removes the mounts, sandbox files and records of a procri that has ended. Its processes and namespaces ended with it.
func clean(root string) error {
	sandboxes, err := filepath.Glob(filepath.Join(root, sandboxFolder, "*"))
	if err != nil {
		return err
	}
	records, err := filepath.Glob(filepath.Join(root, recordFolder, "*"))
	if err != nil {
		return err
	}
	var failures []error
	for _, folder := range sandboxes {
		failures = append(failures, unmount(filepath.Join(folder, "shm")), os.RemoveAll(folder))
	}
	for _, record := range records {
		failures = append(failures, os.Remove(record))
	}
	return errors.Join(failures...)
}

// listenUnix replaces the socket of a procri that has ended, but not of one that is alive.
func listenUnix(path string) (net.Listener, error) {
	if probe, err := net.Dial("unix", path); err == nil {
		return nil, errors.Join(fmt.Errorf("%s: another runtime is serving on this socket", path), probe.Close())
	}
	if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, err
	}
	return net.Listen("unix", path)
}

// mountpointOf finds the mount that a folder is on.
func mountpointOf(folder string) (string, error) {
	data, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return "", err
	}
	var stat unix.Stat_t
	if err := unix.Stat(folder, &stat); err != nil {
		return "", err
	}
	device := fmt.Sprintf("%d:%d", unix.Major(stat.Dev), unix.Minor(stat.Dev))
	best := "/"
	for line := range strings.Lines(string(data)) {
		fields := strings.Fields(line)
		if len(fields) < 5 || fields[2] != device {
			continue
		}
		mount := fields[4]
		if len(mount) > len(best) && (folder == mount || strings.HasPrefix(folder, mount+"/")) {
			best = mount
		}
	}
	return best, nil
}
