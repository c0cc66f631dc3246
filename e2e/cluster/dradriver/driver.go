package dradriver

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	resourceapi "k8s.io/api/resource/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/tools/clientcmd"
	"k8s.io/dynamic-resource-allocation/kubeletplugin"
	"k8s.io/dynamic-resource-allocation/resourceslice"
	"k8s.io/klog/v2"
)

// Serve offers the devices until the context is done.
func Serve(ctx context.Context, config Config) error {
	devices, err := readDevices(config.Devices)
	if err != nil {
		return err
	}
	rest, err := clientcmd.BuildConfigFromFlags("", config.Kubeconfig)
	if err != nil {
		return err
	}
	client, err := kubernetes.NewForConfig(rest)
	if err != nil {
		return err
	}
	plugins := filepath.Join(config.Kubelet, "plugins", config.Driver)
	for _, folder := range []string{plugins, config.CDI} {
		if err := os.MkdirAll(folder, 0o755); err != nil {
			return err
		}
	}
	d := &driver{config: config}
	if err := d.writeCDI(devices); err != nil {
		return err
	}
	helper, err := kubeletplugin.Start(ctx, d,
		kubeletplugin.KubeClient(client),
		kubeletplugin.DriverName(config.Driver),
		kubeletplugin.NodeName(config.Node),
		kubeletplugin.PluginDataDirectoryPath(plugins),
		kubeletplugin.RegistrarDirectoryPath(filepath.Join(config.Kubelet, "plugins_registry")),
	)
	if err != nil {
		return err
	}
	defer helper.Stop()
	pool := resourceslice.Pool{Slices: []resourceslice.Slice{{Devices: devices}}}
	resources := resourceslice.DriverResources{Pools: map[string]resourceslice.Pool{config.Node: pool}}
	if err := helper.PublishResources(ctx, resources); err != nil {
		return err
	}
	<-ctx.Done()
	return nil
}

func readDevices(path string) ([]resourceapi.Device, error) {
	data, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	var devices []resourceapi.Device
	if err := json.Unmarshal(data, &devices); err != nil {
		return nil, fmt.Errorf("devices in %s: %w", path, err)
	}
	return devices, nil
}

// driver answers the kubelet. It keeps nothing: what a claim holds is in the claim.
type driver struct {
	config Config
}

// kind is the kind of the driver's devices in CDI.
func (d *driver) kind() string {
	return d.config.Driver + "/device"
}

// PrepareResourceClaims names the CDI devices of the claims. Devices of other drivers are theirs to prepare.
func (d *driver) PrepareResourceClaims(
	_ context.Context, claims []*resourceapi.ResourceClaim,
) (map[types.UID]kubeletplugin.PrepareResult, error) {
	prepared := map[types.UID]kubeletplugin.PrepareResult{}
	for _, claim := range claims {
		var result kubeletplugin.PrepareResult
		if claim.Status.Allocation != nil {
			for _, given := range claim.Status.Allocation.Devices.Results {
				if given.Driver != d.config.Driver {
					continue
				}
				result.Devices = append(result.Devices, kubeletplugin.Device{
					Requests:     []string{given.Request},
					PoolName:     given.Pool,
					DeviceName:   given.Device,
					CDIDeviceIDs: []string{d.kind() + "=" + given.Device},
				})
			}
		}
		prepared[claim.UID] = result
	}
	return prepared, nil
}

// UnprepareResourceClaims has nothing to undo.
func (d *driver) UnprepareResourceClaims(
	_ context.Context, claims []kubeletplugin.NamespacedObject,
) (map[types.UID]error, error) {
	undone := map[types.UID]error{}
	for _, claim := range claims {
		undone[claim.UID] = nil
	}
	return undone, nil
}

// HandleError logs; what can be tried again is.
func (d *driver) HandleError(_ context.Context, err error, msg string) {
	klog.ErrorS(err, msg)
}

// writeCDI writes a specification by which a container gets the variable CLAIMED_<device>=<driver> for each of its devices.
func (d *driver) writeCDI(devices []resourceapi.Device) error {
	type edits struct {
		Env []string `json:"env"`
	}
	type device struct {
		Name  string `json:"name"`
		Edits edits  `json:"containerEdits"`
	}
	spec := struct {
		Version string   `json:"cdiVersion"`
		Kind    string   `json:"kind"`
		Devices []device `json:"devices"`
	}{Version: "0.6.0", Kind: d.kind()}
	for _, each := range devices {
		variable := "CLAIMED_" + strings.NewReplacer("-", "_", ".", "_").Replace(each.Name)
		spec.Devices = append(spec.Devices, device{each.Name, edits{[]string{variable + "=" + d.config.Driver}}})
	}
	data, err := json.MarshalIndent(spec, "", "  ")
	if err != nil {
		return err
	}
	return os.WriteFile(filepath.Join(d.config.CDI, d.config.Driver+".json"), data, 0o644)
}
