package procri

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// cdiSpec is what procri reads of a specification of the Container Device Interface: the environment that a device gives to a container.
// Device files are the machine's, which every container sees.
type cdiSpec struct {
	Kind    string `json:"kind"`
	Devices []struct {
		Name  string `json:"name"`
		Edits struct {
			Env []string `json:"env"`
		} `json:"containerEdits"`
	} `json:"devices"`
}

// addDevices adds what the container's CDI devices, by names such as dra.net/device=nic-0, give to its environment.
func addDevices(config *runtimeapi.ContainerConfig, folder string) error {
	if len(config.GetCDIDevices()) == 0 {
		return nil
	}
	known, err := readCDI(folder)
	if err != nil {
		return err
	}
	for _, wanted := range config.GetCDIDevices() {
		env, found := known[wanted.GetName()]
		if !found {
			return fmt.Errorf("%w: no file in %s describes the CDI device %s", errConfig, folder, wanted.GetName())
		}
		for _, variable := range env {
			name, value, _ := strings.Cut(variable, "=")
			config.Envs = append(config.Envs, &runtimeapi.KeyValue{Key: name, Value: []byte(value)})
		}
	}
	return nil
}

// readCDI returns the environment of every device in a folder of specifications, by the device's full name.
func readCDI(folder string) (map[string][]string, error) {
	known := map[string][]string{}
	entries, err := os.ReadDir(folder)
	if errors.Is(err, os.ErrNotExist) {
		return known, nil
	}
	if err != nil {
		return nil, err
	}
	for _, entry := range entries {
		if filepath.Ext(entry.Name()) != ".json" {
			continue
		}
		data, err := os.ReadFile(filepath.Join(folder, entry.Name()))
		if err != nil {
			return nil, err
		}
		var spec cdiSpec
		if err := json.Unmarshal(data, &spec); err != nil {
			return nil, fmt.Errorf("%s: %w", entry.Name(), err)
		}
		for _, device := range spec.Devices {
			known[spec.Kind+"="+device.Name] = device.Edits.Env
		}
	}
	return known, nil
}
