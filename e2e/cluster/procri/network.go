package procri

import (
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// podInterface is the interface's name in the pod.
const podInterface = "eth0"

// linkDigits is the number of a sandbox id's digits in the name of its link; Linux allows 15 characters.
const linkDigits = 11

// network connects pods to the node's bridge.
type network struct {
	bridge  string
	subnet  *net.IPNet
	gateway net.IP
}

// linkName is the name of the node's end of a sandbox's link.
func linkName(sandbox string) string {
	return "veth" + sandbox[:linkDigits]
}

// connect gives a new network namespace its loopback, its link to the bridge, its address and its default route.
func (n *network) connect(ns *namespaces, sandbox string, address net.IP) error {
	bridge, err := netlink.LinkByName(n.bridge)
	if err != nil {
		return fmt.Errorf("bridge %s: %w", n.bridge, err)
	}
	attributes := netlink.NewLinkAttrs()
	attributes.Name = linkName(sandbox)
	attributes.MTU = bridge.Attrs().MTU
	attributes.MasterIndex = bridge.Attrs().Index
	link := &netlink.Veth{LinkAttrs: attributes, PeerName: podInterface, PeerNamespace: netlink.NsFd(int(ns.network.Fd()))}
	if err := netlink.LinkAdd(link); err != nil {
		return fmt.Errorf("link %s: %w", attributes.Name, err)
	}
	if err := netlink.LinkSetUp(link); err != nil {
		return fmt.Errorf("link %s: %w", attributes.Name, err)
	}
	return ns.do(func() error { return n.configure(address) })
}

// configure runs inside the pod's network namespace.
func (n *network) configure(address net.IP) error {
	if err := loopbackUp(); err != nil {
		return err
	}
	link, err := netlink.LinkByName(podInterface)
	if err != nil {
		return fmt.Errorf("%s: %w", podInterface, err)
	}
	if err := netlink.AddrAdd(link, &netlink.Addr{IPNet: &net.IPNet{IP: address, Mask: n.subnet.Mask}}); err != nil {
		return fmt.Errorf("address %s: %w", address, err)
	}
	if err := netlink.LinkSetUp(link); err != nil {
		return fmt.Errorf("%s: %w", podInterface, err)
	}
	if err := netlink.RouteAdd(&netlink.Route{LinkIndex: link.Attrs().Index, Gw: n.gateway}); err != nil {
		return fmt.Errorf("default route via %s: %w", n.gateway, err)
	}
	return nil
}

func loopbackUp() error {
	loopback, err := netlink.LinkByName("lo")
	if err != nil {
		return fmt.Errorf("loopback: %w", err)
	}
	if err := netlink.LinkSetUp(loopback); err != nil {
		return fmt.Errorf("loopback: %w", err)
	}
	return nil
}

// disconnect removes a sandbox's link at once; the kernel would take some time to do so after the namespace's end.
func (n *network) disconnect(sandbox string) error {
	link, err := netlink.LinkByName(linkName(sandbox))
	if _, missing := err.(netlink.LinkNotFoundError); missing {
		return nil
	}
	if err != nil {
		return fmt.Errorf("link of %s: %w", sandbox, err)
	}
	if err := netlink.LinkDel(link); err != nil {
		return fmt.Errorf("remove link of %s: %w", sandbox, err)
	}
	return nil
}

// ready returns the reason why the node can't take pods, or nil if it can.
func (n *network) ready() error {
	link, err := netlink.LinkByName(n.bridge)
	if err != nil {
		return fmt.Errorf("bridge %s: %w", n.bridge, err)
	}
	if link.Attrs().Flags&net.FlagUp == 0 {
		return fmt.Errorf("bridge %s is down", n.bridge)
	}
	return nil
}

// podSysctls are set in every pod that has its own network, as in other runtimes: no process there needs privileges for low ports.
var podSysctls = map[string]string{"net.ipv4.ip_unprivileged_port_start": "0"}

// setSysctls writes kernel parameters in the namespaces; those of the network and IPC namespace are the calling thread's own.
func (n *namespaces) setSysctls(parameters map[string]string) error {
	return n.do(func() error {
		for name, value := range parameters {
			path := filepath.Join("/proc/sys", strings.ReplaceAll(name, ".", "/"))
			if err := os.WriteFile(path, []byte(value), 0); err != nil {
				return fmt.Errorf("sysctl %s: %w", name, err)
			}
		}
		return nil
	})
}

// dial opens a TCP connection to a port of the pod's loopback.
func (n *namespaces) dial(port int32) (net.Conn, error) {
	var connection net.Conn
	err := n.do(func() error {
		var failure error
		for _, host := range []string{"127.0.0.1", "::1"} {
			// A single numeric address is dialled by the calling thread itself, which is in the namespace.
			connection, failure = net.Dial("tcp", net.JoinHostPort(host, fmt.Sprint(port)))
			if failure == nil {
				return nil
			}
		}
		return failure
	})
	return connection, err
}

// namespaceFlags returns the namespaces that a sandbox gets of its own.
func namespaceFlags(hostNetwork, hostIPC bool) int {
	flags := 0
	if !hostNetwork {
		flags |= unix.CLONE_NEWNET | unix.CLONE_NEWUTS
	}
	if !hostIPC {
		flags |= unix.CLONE_NEWIPC
	}
	return flags
}
