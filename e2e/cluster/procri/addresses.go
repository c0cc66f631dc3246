package procri

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
)

// lastFile records the last address given out, so that the next pod does not get the address of one that has just ended.
const lastFile = "last"

// addresses gives out the addresses of the pod subnet. Each one in use is a file that holds the id of its sandbox.
type addresses struct {
	folder string
	subnet *net.IPNet
	mu     sync.Mutex
}

// newAddresses treats every address as free, because no sandbox outlives its procri.
func newAddresses(folder string, subnet *net.IPNet) (*addresses, error) {
	if subnet.IP.To4() == nil {
		return nil, fmt.Errorf("pod subnet %s: only IPv4 is supported", subnet)
	}
	if ones, bits := subnet.Mask.Size(); bits-ones < 2 {
		return nil, fmt.Errorf("pod subnet %s is too small", subnet)
	}
	if err := os.MkdirAll(folder, 0o755); err != nil {
		return nil, err
	}
	entries, err := os.ReadDir(folder)
	if err != nil {
		return nil, err
	}
	for _, entry := range entries {
		if entry.Name() == lastFile {
			continue
		}
		if err := os.Remove(filepath.Join(folder, entry.Name())); err != nil {
			return nil, err
		}
	}
	return &addresses{folder: folder, subnet: subnet}, nil
}

// gateway is the first address of a subnet, the bridge's.
func gateway(subnet *net.IPNet) net.IP {
	return addressAt(subnet, 1)
}

func addressAt(subnet *net.IPNet, index uint32) net.IP {
	address := make(net.IP, net.IPv4len)
	binary.BigEndian.PutUint32(address, binary.BigEndian.Uint32(subnet.IP.To4())+index)
	return address
}

// take reserves the next free address after the last one given out.
func (a *addresses) take(sandbox string) (net.IP, error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	ones, bits := a.subnet.Mask.Size()
	// All but the network's own address, the gateway's and the broadcast address.
	const first = 2
	count := uint32(1)<<(bits-ones) - first - 1
	start := uint32(0)
	if index, known := a.last(); known && index >= first {
		start = index - first + 1
	}
	for step := range count {
		index := first + (start+step)%count
		address := addressAt(a.subnet, index)
		file, err := os.OpenFile(filepath.Join(a.folder, address.String()), os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o644)
		if errors.Is(err, os.ErrExist) {
			continue
		}
		if err != nil {
			return nil, err
		}
		_, err = file.WriteString(sandbox)
		if err = errors.Join(err, file.Close()); err != nil {
			return nil, err
		}
		return address, os.WriteFile(filepath.Join(a.folder, lastFile), []byte(address.String()), 0o644)
	}
	return nil, fmt.Errorf("pod subnet %s has no free address", a.subnet)
}

func (a *addresses) last() (uint32, bool) {
	data, err := os.ReadFile(filepath.Join(a.folder, lastFile))
	if err != nil {
		return 0, false // nothing given out yet
	}
	address := net.ParseIP(strings.TrimSpace(string(data))).To4()
	if address == nil || !a.subnet.Contains(address) {
		return 0, false // another subnet's
	}
	return binary.BigEndian.Uint32(address) - binary.BigEndian.Uint32(a.subnet.IP.To4()), true
}

// release frees an address. Freeing one twice is harmless.
func (a *addresses) release(address net.IP) error {
	a.mu.Lock()
	defer a.mu.Unlock()
	err := os.Remove(filepath.Join(a.folder, address.String()))
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	return err
}
