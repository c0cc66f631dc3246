package procri

import (
	"os/signal"
	"runtime"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"
	"k8s.io/component-base/logs"
)

// Command is the `procri` command.
func Command() *cobra.Command {
	var config Config
	command := &cobra.Command{
		Use:   "procri",
		Short: "Run the containers of one node as processes of this machine",
		Long: "procri is a CRI runtime for the kubelet: a pod is a network namespace at the node's bridge, a container a process tree on\n" +
			"the machine's own file system. It must run as root, in the network and mount namespace of the kubelet.",
		Args:         cobra.NoArgs,
		SilenceUsage: true,
		RunE: func(command *cobra.Command, _ []string) error {
			// The main thread must never enter a pod's namespaces: see onOwnThread.
			runtime.LockOSThread()
			logs.InitLogs()
			defer logs.FlushLogs()
			ctx, stop := signal.NotifyContext(command.Context(), unix.SIGTERM, unix.SIGINT)
			defer stop()
			return Serve(ctx, config)
		},
	}
	flags := command.Flags()
	flags.StringVar(&config.Socket, "socket", "", "path of the unix socket to serve CRI at")
	flags.StringVar(&config.Root, "root", "", "folder for the runtime's own files")
	flags.StringVar(&config.Images, "images", "", "path of the image table, a JSON file")
	flags.StringVar(&config.Bridge, "bridge", "", "bridge that pods are connected to")
	flags.StringVar(&config.PodCIDR, "pod-cidr", "", "subnet of the pods; its first address is the bridge's")
	flags.StringVar(&config.StreamingAddress, "streaming-address", "127.0.0.1:0", "address for exec, attach and port-forward")
	flags.StringVar(&config.CDI, "cdi", "/var/run/cdi", "folder with CDI specifications of devices")
	flags.StringVar(&config.DNS, "dns", "", "name server for pods whose configuration names none")
	for _, name := range []string{"socket", "root", "images", "bridge", "pod-cidr"} {
		if err := command.MarkFlagRequired(name); err != nil {
			panic(err) // the flag is defined above
		}
	}
	return command
}
