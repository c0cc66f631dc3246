package procri

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"syscall"
	"testing"

	"github.com/vishvananda/netlink"
)

const (
	// serverArgument makes the test binary a procri instead of a test run.
	serverArgument = "procri-under-test"
	// nodeVariable is set in the process that has a network and mount namespace for the tests.
	nodeVariable = "PROCRI_TEST_NODE"
	testBridge   = "pods"
	testSubnet   = "10.77.5.0/28"
)

// TestMain runs the tests in a network and a mount namespace of their own, which play the node.
func TestMain(m *testing.M) {
	if len(os.Args) > 1 && os.Args[1] == serverArgument {
		command := Command()
		command.SetArgs(os.Args[2:])
		if err := command.Execute(); err != nil {
			os.Exit(1)
		}
		os.Exit(0)
	}
	if os.Getenv(nodeVariable) == "" {
		os.Exit(runOnNode())
	}
	if err := buildNode(); err != nil {
		fmt.Fprintln(os.Stderr, "node:", err)
		os.Exit(1)
	}
	os.Exit(m.Run())
}

func runOnNode() int {
	command := exec.Command("/proc/self/exe", os.Args[1:]...)
	command.Env = append(os.Environ(), nodeVariable+"=1")
	command.Stdin, command.Stdout, command.Stderr = os.Stdin, os.Stdout, os.Stderr
	command.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNET | syscall.CLONE_NEWNS}
	err := command.Run()
	if failure := (*exec.ExitError)(nil); errors.As(err, &failure) {
		return failure.ExitCode()
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "node (are you root?):", err)
		return 1
	}
	return 0
}

func buildNode() error {
	if err := syscall.Mount("", "/", "", syscall.MS_REC|syscall.MS_PRIVATE, ""); err != nil {
		return err
	}
	if err := loopbackUp(); err != nil {
		return err
	}
	attributes := netlink.NewLinkAttrs()
	attributes.Name = testBridge
	bridge := &netlink.Bridge{LinkAttrs: attributes}
	if err := netlink.LinkAdd(bridge); err != nil {
		return err
	}
	address, err := netlink.ParseAddr("10.77.5.1/28")
	if err != nil {
		return err
	}
	if err := netlink.AddrAdd(bridge, address); err != nil {
		return err
	}
	return netlink.LinkSetUp(bridge)
}
