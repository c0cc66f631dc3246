package procri

import (
	"errors"
	"os"
	"path/filepath"
	"testing"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

func TestCDIDevicesGiveTheirEnvironment(t *testing.T) {
	folder := t.TempDir()
	text := `{"cdiVersion": "0.6.0", "kind": "dra.net/device", "devices": [
		{"name": "nic-0", "containerEdits": {"env": ["NIC=0", "RAIL=a=b"]}},
		{"name": "nic-1", "containerEdits": {"env": ["NIC=1"]}}]}`
	if err := os.WriteFile(filepath.Join(folder, "dra.net.json"), []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	config := &runtimeapi.ContainerConfig{CDIDevices: []*runtimeapi.CDIDevice{{Name: "dra.net/device=nic-0"}}}
	if err := addDevices(config, folder); err != nil {
		t.Fatal(err)
	}
	found := map[string]string{}
	for _, variable := range config.GetEnvs() {
		found[variable.GetKey()] = string(variable.GetValue())
	}
	if len(found) != 2 || found["NIC"] != "0" || found["RAIL"] != "a=b" {
		t.Errorf("environment %v", found)
	}
}

func TestAnUnknownCDIDeviceIsNamed(t *testing.T) {
	config := &runtimeapi.ContainerConfig{CDIDevices: []*runtimeapi.CDIDevice{{Name: "dra.net/device=nic-9"}}}
	if err := addDevices(config, filepath.Join(t.TempDir(), "none")); !errors.Is(err, errConfig) {
		t.Errorf("error %v", err)
	}
}
