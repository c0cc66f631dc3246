package dradriver

import (
	"os/signal"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"
)

// Config is the configuration that the command line gives.
type Config struct {
	// Kubeconfig is how to reach the API server, as someone who may write ResourceSlices.
	Kubeconfig string
	// Node is the name of the node whose devices these are.
	Node string
	// Kubelet is the root folder of the node's kubelet.
	Kubelet string
	// Driver is the name of the driver, such as dra.net.
	Driver string
	// Devices is the path of a JSON file with a list of devices, in the form of a ResourceSlice.
	Devices string
	// CDI is the folder that the node's container runtime reads CDI specifications from.
	CDI string
}

// Command is the `dra-driver` command.
func Command() *cobra.Command {
	var config Config
	command := &cobra.Command{
		Use:          "dra-driver",
		Short:        "Offer the devices in a file to pods that claim them",
		Args:         cobra.NoArgs,
		SilenceUsage: true,
		RunE: func(command *cobra.Command, _ []string) error {
			ctx, stop := signal.NotifyContext(command.Context(), unix.SIGTERM, unix.SIGINT)
			defer stop()
			return Serve(ctx, config)
		},
	}
	flags := command.Flags()
	flags.StringVar(&config.Kubeconfig, "kubeconfig", "", "path of a kubeconfig")
	flags.StringVar(&config.Node, "node", "", "name of the node")
	flags.StringVar(&config.Kubelet, "kubelet", "", "root folder of the node's kubelet")
	flags.StringVar(&config.Driver, "driver", "", "name of the driver")
	flags.StringVar(&config.Devices, "devices", "", "JSON file with the devices")
	flags.StringVar(&config.CDI, "cdi", "", "folder for CDI specifications")
	for _, name := range []string{"kubeconfig", "node", "kubelet", "driver", "devices", "cdi"} {
		if err := command.MarkFlagRequired(name); err != nil {
			panic(err) // the flag is defined above
		}
	}
	return command
}
