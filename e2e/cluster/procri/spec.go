package procri

import (
	"cmp"
	"errors"
	"fmt"
	"maps"
	"math"
	"os"
	"os/user"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/tandem-inference/tandem/e2e/cluster/procri/shim"
)

const (
	// defaultPath is the PATH of a container whose image and pod name none.
	defaultPath = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
	// defaultMemlock is how much memory a container may lock, the same as in common runtimes.
	defaultMemlock = 8 << 20
	// unlimited is the kernel's RLIM_INFINITY.
	unlimited = math.MaxUint64
)

// errConfig is the root of the errors in a container's configuration.
var errConfig = errors.New("invalid container configuration")

// buildSpec translates a container's configuration. The pod adds its host name and mounts (its resolv.conf and the like).
func buildSpec(
	config *runtimeapi.ContainerConfig, image Image, hostname string, podMounts []shim.Mount,
) (*shim.Spec, error) {
	security := config.GetLinux().GetSecurityContext()
	process, err := buildProcess(config, image, hostname)
	if err != nil {
		return nil, err
	}
	mounts, err := buildMounts(config, image, podMounts)
	if err != nil {
		return nil, err
	}
	bounding, err := boundingSet(security.GetCapabilities(), security.GetPrivileged())
	if err != nil {
		return nil, fmt.Errorf("%w: %w", errConfig, err)
	}
	spec := &shim.Spec{
		Open:            closedFolders(process.User, image),
		Mounts:          mounts,
		Scratch:         image.Scratch,
		ReadonlyRoot:    security.GetReadonlyRootfs(),
		FreshProc:       security.GetNamespaceOptions().GetPid() != runtimeapi.NamespaceMode_NODE,
		Memlock:         defaultMemlock,
		Bounding:        bounding,
		NoNewPrivileges: security.GetNoNewPrivs(),
		Process:         *process,
	}
	if holds(bounding, ipcLock) {
		spec.Memlock = unlimited
	}
	if resources := config.GetLinux().GetResources(); resources != nil {
		adjustment := resources.GetOomScoreAdj()
		spec.OOMScoreAdj = &adjustment
	}
	return spec, nil
}

// buildProcess translates what runs, as which user, where, and with which environment.
func buildProcess(config *runtimeapi.ContainerConfig, image Image, hostname string) (*shim.Process, error) {
	command := config.GetCommand()
	if len(command) == 0 {
		command = image.Entrypoint
	}
	arguments := slices.Concat(command, config.GetArgs())
	if len(arguments) == 0 {
		return nil, fmt.Errorf("%w: neither the pod nor the image names a command: set the container's command", errConfig)
	}
	process := &shim.Process{Args: arguments, Dir: config.GetWorkingDir(), Terminal: config.GetTty()}
	if process.Dir == "" {
		process.Dir = image.WorkingDir
	}
	if process.Dir == "" {
		process.Dir = "/"
	}
	if !filepath.IsAbs(process.Dir) {
		return nil, fmt.Errorf("%w: working directory %q is not absolute", errConfig, process.Dir)
	}
	security := config.GetLinux().GetSecurityContext()
	home, err := setUser(process, security, image)
	if err != nil {
		return nil, err
	}
	for _, name := range security.GetCapabilities().GetAddAmbientCapabilities() {
		number, err := capabilityNumber(name)
		if err != nil {
			return nil, fmt.Errorf("%w: %w", errConfig, err)
		}
		process.Ambient = append(process.Ambient, uintptr(number))
	}
	process.Env = buildEnv(config, image, map[string]string{"PATH": defaultPath, "HOME": home, "HOSTNAME": hostname})
	return process, nil
}

// setUser sets the process's user and groups, and returns the user's home. Names and groups are the machine's.
func setUser(
	process *shim.Process, security *runtimeapi.LinuxContainerSecurityContext, image Image,
) (home string, err error) {
	account := &user.User{Uid: strconv.FormatInt(image.User, 10)}
	switch {
	case security.GetRunAsUser() != nil:
		account.Uid = strconv.FormatInt(security.GetRunAsUser().GetValue(), 10)
	case security.GetRunAsUsername() != "":
		named, err := user.Lookup(security.GetRunAsUsername())
		if err != nil {
			return "", fmt.Errorf("%w: %w", errConfig, err)
		}
		account = named
	}
	// A number without an account is as good as any, but has no groups and no home.
	if known, err := user.LookupId(account.Uid); err == nil {
		account = known
	}
	number, err := strconv.ParseUint(account.Uid, 10, 32)
	if err != nil {
		return "", fmt.Errorf("%w: user %s: %w", errConfig, account.Uid, err)
	}
	process.User = uint32(number)
	if group, err := strconv.ParseUint(account.Gid, 10, 32); err == nil {
		process.Group = uint32(group)
	}
	if security.GetRunAsGroup() != nil {
		process.Group = uint32(security.GetRunAsGroup().GetValue())
	}
	for _, group := range security.GetSupplementalGroups() {
		process.Groups = append(process.Groups, uint32(group))
	}
	merge := security.GetSupplementalGroupsPolicy() == runtimeapi.SupplementalGroupsPolicy_Merge
	if merge && account.Username != "" {
		groups, err := account.GroupIds()
		if err != nil {
			return "", fmt.Errorf("groups of %s: %w", account.Username, err)
		}
		for _, text := range groups {
			if group, err := strconv.ParseUint(text, 10, 32); err == nil && !slices.Contains(process.Groups, uint32(group)) {
				process.Groups = append(process.Groups, uint32(group))
			}
		}
	}
	if account.HomeDir == "" {
		return "/", nil
	}
	return account.HomeDir, nil
}

// buildEnv returns the whole environment, which contains nothing of procri's own.
func buildEnv(config *runtimeapi.ContainerConfig, image Image, defaults map[string]string) []string {
	variables := maps.Clone(defaults)
	if config.GetTty() {
		variables["TERM"] = "xterm"
	}
	maps.Copy(variables, image.Env)
	for _, variable := range config.GetEnvs() {
		variables[variable.GetKey()] = string(variable.GetValue())
	}
	env := make([]string, 0, len(variables))
	for name, value := range variables {
		env = append(env, name+"="+value)
	}
	slices.Sort(env)
	return env
}

// buildMounts lists the mounts in an order in which none hides an earlier one. The image's files come after a volume around them.
func buildMounts(config *runtimeapi.ContainerConfig, image Image, podMounts []shim.Mount) ([]shim.Mount, error) {
	var mounts []shim.Mount
	for _, path := range image.Files {
		mounts = append(mounts, shim.Mount{Target: path, Image: true, Readonly: true})
	}
	for _, path := range image.Shared {
		mounts = append(mounts, shim.Mount{Target: path, Image: true})
	}
	for _, path := range image.Hidden {
		// The program itself, whatever its names: a link to it may lead through a folder that containers don't see.
		program, err := filepath.EvalSymlinks(path)
		if err != nil {
			continue // the machine does not have it either
		}
		if info, err := os.Stat(program); err == nil && info.Mode().IsRegular() {
			mounts = append(mounts, shim.Mount{Source: os.DevNull, Target: program})
		}
	}
	mounts = append(mounts, podMounts...)
	for _, wanted := range config.GetMounts() {
		if wanted.GetImage().GetImage() != "" {
			return nil, fmt.Errorf("%w: image volume at %s: images have no files here", errConfig, wanted.GetContainerPath())
		}
		source, err := resolveSource(wanted.GetHostPath())
		if err != nil {
			return nil, err
		}
		mounts = append(mounts, shim.Mount{
			Source:            source,
			Target:            filepath.Join("/", wanted.GetContainerPath()),
			Readonly:          wanted.GetReadonly(),
			RecursiveReadonly: wanted.GetRecursiveReadOnly(),
			Follow:            wanted.GetPropagation() != runtimeapi.MountPropagation_PROPAGATION_PRIVATE,
		})
	}
	for _, device := range config.GetDevices() {
		// The machine's /dev is there already.
		if device.GetContainerPath() == device.GetHostPath() && strings.HasPrefix(device.GetHostPath(), "/dev/") {
			continue
		}
		mounts = append(mounts, shim.Mount{Source: device.GetHostPath(), Target: device.GetContainerPath()})
	}
	return inOrder(mounts), nil
}

// inOrder sorts mounts from the outside to the inside. Of those at the same place the last is kept: a container's mount replaces the
// pod's, and both replace the image's files.
func inOrder(mounts []shim.Mount) []shim.Mount {
	places := make([]string, len(mounts))
	last := map[string]int{}
	for i, mount := range mounts {
		places[i] = placeOf(mount.Target)
		if !mount.Image {
			last[places[i]] = i
		}
	}
	kept := slices.Collect(maps.Values(last))
	for i, mount := range mounts {
		// Two names of one file are both kept: a volume can cover the link that makes them one.
		if _, replaced := last[places[i]]; mount.Image && !replaced {
			kept = append(kept, i)
		}
	}
	slices.SortFunc(kept, func(a, b int) int {
		return cmp.Or(cmp.Compare(strings.Count(places[a], "/"), strings.Count(places[b], "/")), cmp.Compare(a, b))
	})
	sorted := make([]shim.Mount, len(kept))
	for i, index := range kept {
		sorted[i] = mounts[index]
	}
	return sorted
}

// placeOf follows the links in that part of a path which exists on the machine: /var/run/x and /run/x are often one place.
func placeOf(path string) string {
	resolved, err := filepath.EvalSymlinks(path)
	switch {
	case err == nil:
		return resolved
	case path == "/" || path == ".":
		return path
	default:
		return filepath.Join(placeOf(filepath.Dir(path)), filepath.Base(path))
	}
}

// resolveSource follows the links in a path on the machine. A missing folder is created, as in other runtimes for host paths.
func resolveSource(path string) (string, error) {
	resolved, err := filepath.EvalSymlinks(path)
	if errors.Is(err, os.ErrNotExist) {
		if err := os.MkdirAll(path, 0o755); err != nil {
			return "", err
		}
		resolved, err = filepath.EvalSymlinks(path)
	}
	return resolved, err
}
