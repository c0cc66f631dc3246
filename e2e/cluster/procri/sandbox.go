package procri

import (
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/tandem-inference/tandem/e2e/cluster/procri/shim"
)

// shmSize is the size of a pod's /dev/shm, the same as in common runtimes.
const shmSize = "64m"

// sandbox is one pod: namespaces, an address and a few files. Its containers are kept by the runtime.
type sandbox struct {
	id      string
	config  *runtimeapi.PodSandboxConfig
	handler string
	created time.Time
	folder  string
	// mountpoint is the mount that procri's files are on.
	mountpoint string
	namespaces *namespaces
	// address is nil if the pod uses the node's network.
	address net.IP
	// pause is process 1 of a PID namespace that the pod's containers share; nil if they don't.
	pause *shimProcess
	// find looks up another container of the pod, for containers that share its processes.
	find func(container string) (*container, error)

	mu    sync.Mutex
	state runtimeapi.PodSandboxState
}

func (s *sandbox) options() *runtimeapi.NamespaceOption {
	return s.config.GetLinux().GetSecurityContext().GetNamespaceOptions()
}

func (s *sandbox) hostNetwork() bool {
	return s.options().GetNetwork() == runtimeapi.NamespaceMode_NODE
}

func (s *sandbox) hostIPC() bool { return s.options().GetIpc() == runtimeapi.NamespaceMode_NODE }

// hostname is the pod's host name, or the node's if the pod uses the node's network.
func (s *sandbox) hostname() string {
	if name := s.config.GetHostname(); name != "" {
		return name
	}
	var names unix.Utsname
	if err := unix.Uname(&names); err != nil {
		return ""
	}
	return unix.ByteSliceToString(names.Nodename[:])
}

// open creates the namespaces and the files. close takes them down, also after an error.
func (s *sandbox) open(network *network, addresses *addresses, fallbackDNS string) error {
	flags := namespaceFlags(s.hostNetwork(), s.hostIPC())
	var err error
	if s.namespaces, err = newNamespaces(flags, s.config.GetHostname()); err != nil {
		return err
	}
	if err := s.writeFiles(fallbackDNS); err != nil {
		return err
	}
	if !s.hostNetwork() {
		if s.address, err = addresses.take(s.id); err != nil {
			return err
		}
		if err := network.connect(s.namespaces, s.id, s.address); err != nil {
			return err
		}
		if err := s.namespaces.setSysctls(podSysctls); err != nil {
			return err
		}
	}
	if err := s.namespaces.setSysctls(s.config.GetLinux().GetSysctls()); err != nil {
		return err
	}
	if s.options().GetPid() == runtimeapi.NamespaceMode_POD {
		// It never gets a start message, so it only reaps until the sandbox ends.
		if s.pause, err = startShim(s.namespaces, true); err != nil {
			return err
		}
	}
	return nil
}

// writeFiles creates the files and the shared memory that containers see instead of the machine's.
func (s *sandbox) writeFiles(fallbackDNS string) error {
	if err := os.MkdirAll(s.folder, 0o755); err != nil {
		return err
	}
	resolver := resolvConf(s.config.GetDnsConfig(), fallbackDNS)
	if err := os.WriteFile(s.file("resolv.conf"), []byte(resolver), 0o644); err != nil {
		return err
	}
	if err := os.WriteFile(s.file("hostname"), []byte(s.config.GetHostname()+"\n"), 0o644); err != nil {
		return err
	}
	if s.hostIPC() {
		return nil
	}
	if err := os.Mkdir(s.file("shm"), 0o777); err != nil {
		return err
	}
	flags := uintptr(unix.MS_NOSUID | unix.MS_NODEV | unix.MS_NOEXEC)
	if err := unix.Mount("shm", s.file("shm"), "tmpfs", flags, "mode=1777,size="+shmSize); err != nil {
		return fmt.Errorf("shared memory: %w", err)
	}
	return nil
}

func (s *sandbox) file(name string) string { return filepath.Join(s.folder, name) }

// resolvConf writes out the pod's DNS configuration.
func resolvConf(dns *runtimeapi.DNSConfig, fallback string) string {
	var text strings.Builder
	servers := dns.GetServers()
	if len(servers) == 0 && fallback != "" {
		servers = []string{fallback}
	}
	if searches := dns.GetSearches(); len(searches) > 0 {
		fmt.Fprintf(&text, "search %s\n", strings.Join(searches, " "))
	}
	for _, server := range servers {
		fmt.Fprintf(&text, "nameserver %s\n", server)
	}
	if options := dns.GetOptions(); len(options) > 0 {
		fmt.Fprintf(&text, "options %s\n", strings.Join(options, " "))
	}
	return text.String()
}

// mounts lists what every container of the pod sees instead of the machine's files.
func (s *sandbox) mounts() []shim.Mount {
	mounts := []shim.Mount{{Source: s.file("resolv.conf"), Target: "/etc/resolv.conf"}}
	if !s.hostNetwork() {
		mounts = append(mounts, shim.Mount{Source: s.file("hostname"), Target: "/etc/hostname"})
	}
	if !s.hostIPC() {
		mounts = append(mounts, shim.Mount{Source: s.file("shm"), Target: "/dev/shm"})
	}
	return mounts
}

// selectPID chooses the PID namespace of a container: its own, the pod's, another container's or the node's.
func (s *sandbox) selectPID(c *container, ns *namespaces) (own bool, err error) {
	options := c.config.GetLinux().GetSecurityContext().GetNamespaceOptions()
	var process int
	switch options.GetPid() {
	case runtimeapi.NamespaceMode_NODE:
		return false, nil
	case runtimeapi.NamespaceMode_POD:
		if s.pause == nil {
			return true, nil
		}
		process = s.pause.command.Process.Pid
	case runtimeapi.NamespaceMode_TARGET:
		target, err := s.find(options.GetTargetId())
		if err != nil {
			return false, err
		}
		main, err := target.running()
		if err != nil {
			return false, err
		}
		process = main.pid
	default:
		return true, nil
	}
	ns.pid, err = os.Open(fmt.Sprintf("/proc/%d/ns/pid", process))
	return false, err
}

// ready reports whether containers can start in the sandbox.
func (s *sandbox) ready() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.state == runtimeapi.PodSandboxState_SANDBOX_READY
}

// retire prevents containers from starting in the sandbox from now on.
func (s *sandbox) retire() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.state = runtimeapi.PodSandboxState_SANDBOX_NOTREADY
}

// close takes the sandbox down; its containers must have ended. Closing twice is harmless.
func (s *sandbox) close(network *network, addresses *addresses) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.state = runtimeapi.PodSandboxState_SANDBOX_NOTREADY
	var failures []error
	if s.pause != nil {
		s.pause.kill()
		s.pause = nil
	}
	if s.namespaces != nil {
		if s.namespaces.network != nil {
			failures = append(failures, network.disconnect(s.id))
		}
		failures = append(failures, s.namespaces.close())
	}
	if s.address != nil {
		failures = append(failures, addresses.release(s.address))
	}
	failures = append(failures, unmount(s.file("shm")), os.RemoveAll(s.folder))
	return errors.Join(failures...)
}

// unmount detaches a mount. A path that is not a mount, or does not exist, is no error.
func unmount(path string) error {
	err := unix.Unmount(path, unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW)
	if errors.Is(err, unix.EINVAL) || errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("unmount %s: %w", path, err)
	}
	return nil
}
