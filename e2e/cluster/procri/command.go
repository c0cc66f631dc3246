package procri

import (
	"github.com/spf13/cobra"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
	"k8s.io/cri-streaming/pkg/streaming"
	"k8s.io/klog/v2"
)

var _ = netlink.LinkByName
var _ = unix.Socket
var _ = grpc.NewServer
var _ runtimeapi.RuntimeServiceServer
var _ streaming.Server
var _ = klog.Info

// Command is the `procri` command.
func Command() *cobra.Command { return &cobra.Command{Use: "procri"} }
