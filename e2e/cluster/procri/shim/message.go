package shim

// Name is the argument with which any program that links this package runs as a shim.
const Name = "procri-init"

// Socket is the descriptor at which the shim finds its end of the socket pair.
const Socket = 3

// MainID is the process number of the container's main process; exec processes have higher ones.
const MainID = 0

// Kind says what a message asks for.
type Kind string

const (
	// Start builds the container and starts its main process. Descriptors: standard input, output and error, or one terminal.
	Start Kind = "start"
	// Exec starts one more process. Descriptors as for Start.
	Exec Kind = "exec"
	// Signal sends a signal to the process ID names; for an exec process, to its whole process group.
	Signal Kind = "signal"
	// Kill ends the shim and every process below it.
	Kill Kind = "kill"
)

// Message is a message from procri to the shim.
type Message struct {
	Kind    Kind     `json:"kind"`
	ID      uint32   `json:"id"`
	Spec    *Spec    `json:"spec,omitempty"`
	Process *Process `json:"process,omitempty"`
	Signal  int      `json:"signal,omitempty"`
}

// Event says what a reply reports.
type Event string

const (
	// Started reports a running process. The credentials on the socket carry its process number, translated by the kernel.
	Started Event = "started"
	// Exited reports the end of a process.
	Exited Event = "exited"
	// Failed reports a process that could not be started.
	Failed Event = "failed"
)

// Reply is a message from the shim to procri.
type Reply struct {
	Event Event  `json:"event"`
	ID    uint32 `json:"id"`
	// ExitCode is the exit status, or 128 and the number of the signal that ended the process.
	ExitCode int    `json:"exitCode,omitempty"`
	Error    string `json:"error,omitempty"`
}

// Spec describes a container.
type Spec struct {
	// NewRoot is an empty directory of the machine; the container's root is mounted on it, in the container's mount namespace only.
	NewRoot string `json:"newRoot"`
	// Open lists folders that everybody may pass through in the container, parents first; they may contain symbolic links.
	Open []string `json:"open,omitempty"`
	// Mounts are bound in this order.
	Mounts []Mount `json:"mounts,omitempty"`
	// Scratch lists folders that are empty and that everybody may write.
	Scratch []string `json:"scratch,omitempty"`
	// ReadonlyRoot makes everything but Mounts, /dev, /proc and /sys read-only. The machine's system always is.
	ReadonlyRoot bool `json:"readonlyRoot,omitempty"`
	// FreshProc mounts a /proc of the PID namespace that the shim is in.
	FreshProc bool `json:"freshProc,omitempty"`
	// OOMScoreAdj is written before the main process starts.
	OOMScoreAdj *int64 `json:"oomScoreAdj,omitempty"`
	// Memlock is the limit of locked memory in bytes.
	Memlock uint64 `json:"memlock"`
	// Bounding is the mask of the capabilities that processes can have at all.
	Bounding uint64 `json:"bounding"`
	// NoNewPrivileges prevents processes from gaining privileges by exec.
	NoNewPrivileges bool    `json:"noNewPrivileges,omitempty"`
	Process         Process `json:"process"`
}

// Mount is one bind mount.
type Mount struct {
	// Source is a path on the machine without symbolic links; an image's files have none.
	Source string `json:"source,omitempty"`
	// Target is a path in the container; its missing parts are created without touching the machine's file system.
	Target string `json:"target"`
	// Readonly makes the mount itself read-only, RecursiveReadonly everything mounted below it too.
	Readonly          bool `json:"readonly,omitempty"`
	RecursiveReadonly bool `json:"recursiveReadonly,omitempty"`
	// Image says that Target is a path on the machine too, which belongs to the image: it is bound again if a volume around it has
	// covered it.
	Image bool `json:"image,omitempty"`
	// Follow lets later mounts of the machine below Source appear in the container.
	Follow bool `json:"follow,omitempty"`
}

// Process is one process of a container.
type Process struct {
	Args []string `json:"args"`
	// Env is the whole environment.
	Env []string `json:"env"`
	Dir string   `json:"dir"`
	// User, Group and Groups are numbers.
	User   uint32   `json:"user"`
	Group  uint32   `json:"group"`
	Groups []uint32 `json:"groups,omitempty"`
	// Ambient lists the capabilities that a process of a user other than root keeps.
	Ambient []uintptr `json:"ambient,omitempty"`
	// Terminal says that the one descriptor sent is the process's controlling terminal.
	Terminal bool `json:"terminal,omitempty"`
}
