package procri

import (
	"errors"
	"os"
	"path/filepath"
	"slices"
	"testing"

	"golang.org/x/sys/unix"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/tandem-inference/tandem/e2e/cluster/procri/shim"
)

func TestCommandIsKubernetes(t *testing.T) {
	image := Image{Entrypoint: []string{"entry", "point"}, WorkingDir: "/image"}
	for _, c := range []struct {
		command, args, want []string
	}{
		{nil, nil, []string{"entry", "point"}},
		{nil, []string{"a"}, []string{"entry", "point", "a"}},
		{[]string{"c"}, nil, []string{"c"}},
		{[]string{"c"}, []string{"a"}, []string{"c", "a"}},
	} {
		process, err := buildProcess(&runtimeapi.ContainerConfig{Command: c.command, Args: c.args}, image, "pod")
		check(t, err)
		if !slices.Equal(process.Args, c.want) {
			t.Errorf("%v and %v give %v", c.command, c.args, process.Args)
		}
		equal(t, process.Dir, "/image")
	}
	_, err := buildProcess(&runtimeapi.ContainerConfig{}, Image{}, "pod")
	if !errors.Is(err, errConfig) {
		t.Fatalf("no command at all: %v", err)
	}
}

func TestPodVariablesWin(t *testing.T) {
	t.Setenv("OF_PROCRI", "1")
	config := &runtimeapi.ContainerConfig{Envs: []*runtimeapi.KeyValue{
		{Key: "A", Value: []byte("first")}, {Key: "A", Value: []byte("second")}, {Key: "PATH", Value: []byte("/p")},
	}}
	got := buildEnv(config, Image{Env: map[string]string{"A": "image", "B": "image"}}, map[string]string{"HOME": "/h", "PATH": defaultPath})
	if want := []string{"A=second", "B=image", "HOME=/h", "PATH=/p"}; !slices.Equal(got, want) {
		t.Fatalf("got %v", got)
	}
}

func TestMountsAreOrderedAndUnique(t *testing.T) {
	folder := t.TempDir()
	at := func(path string) *runtimeapi.Mount { return &runtimeapi.Mount{HostPath: folder, ContainerPath: path} }
	config := &runtimeapi.ContainerConfig{
		Mounts: []*runtimeapi.Mount{at("/a/b/c"), at("/dev/shm"), at("/a")},
		Devices: []*runtimeapi.Device{
			{HostPath: "/dev/null", ContainerPath: "/dev/null"}, {HostPath: "/dev/null", ContainerPath: "/dev/other/null"},
		},
	}
	mounts, err := buildMounts(config, Image{}, []shim.Mount{{Source: "/pod", Target: "/dev/shm"}})
	check(t, err)
	var targets []string
	for _, mount := range mounts {
		targets = append(targets, mount.Target)
	}
	if want := []string{"/a", "/dev/shm", "/a/b/c", "/dev/other/null"}; !slices.Equal(targets, want) {
		t.Fatalf("got %v", targets)
	}
	equal(t, mounts[1].Source, folder)
	_, err = buildMounts(&runtimeapi.ContainerConfig{Mounts: []*runtimeapi.Mount{
		{ContainerPath: "/i", Image: &runtimeapi.ImageSpec{Image: "x"}},
	}}, Image{}, nil)
	if !errors.Is(err, errConfig) {
		t.Fatalf("an image volume: %v", err)
	}
}

func TestFilesOfTheImageComeAfterWhatIsAroundThem(t *testing.T) {
	folder := t.TempDir()
	linked := filepath.Join(folder, "deep", "down", "link")
	check(t, os.MkdirAll(filepath.Dir(linked), 0o755))
	check(t, os.Symlink(folder, linked))
	files := []string{folder + "/app", folder + "/cache", folder + "/app/lib"}
	var mounts []*runtimeapi.Mount
	for _, target := range []string{folder + "/app/lib/extra", linked, folder + "/cache"} {
		mounts = append(mounts, &runtimeapi.Mount{HostPath: folder, ContainerPath: target})
	}
	sorted, err := buildMounts(&runtimeapi.ContainerConfig{Mounts: mounts}, Image{Files: files}, nil)
	check(t, err)
	var targets []string
	for _, mount := range sorted {
		targets = append(targets, mount.Target)
		equal(t, mount.Image, mount.Source == "")
	}
	if want := []string{linked, files[0], files[1], files[2], files[2] + "/extra"}; !slices.Equal(targets, want) {
		t.Fatalf("got %v", targets)
	}
	if sorted[2].Image {
		t.Fatal("the image's folder hides the volume at the same place")
	}
}

func TestBoundingSet(t *testing.T) {
	bit := func(names ...string) (mask uint64) {
		for _, name := range names {
			number, err := capabilityNumber(name)
			check(t, err)
			mask |= 1 << number
		}
		return mask
	}
	for _, c := range []struct {
		add, drop []string
		want      uint64
	}{
		{nil, nil, bit(defaultCapabilities...)},
		{[]string{"IPC_LOCK"}, nil, bit(append([]string{"IPC_LOCK"}, defaultCapabilities...)...)},
		{[]string{"cap_sys_ptrace"}, []string{"ALL"}, bit("SYS_PTRACE")},
		{[]string{"ALL"}, []string{"SYS_ADMIN"}, everyCapability &^ bit("SYS_ADMIN")},
		{nil, []string{"all"}, 0},
	} {
		got, err := boundingSet(&runtimeapi.Capability{AddCapabilities: c.add, DropCapabilities: c.drop}, false)
		check(t, err)
		if got != c.want {
			t.Errorf("add %v, drop %v: %x, want %x", c.add, c.drop, got, c.want)
		}
	}
	if _, err := boundingSet(&runtimeapi.Capability{AddCapabilities: []string{"FLY"}}, false); err == nil {
		t.Error("an unknown capability was accepted")
	}
	privileged, err := boundingSet(nil, true)
	check(t, err)
	equal(t, privileged, everyCapability)
}

func TestStopSignals(t *testing.T) {
	for wanted, want := range map[runtimeapi.Signal]unix.Signal{
		runtimeapi.Signal_RUNTIME_DEFAULT: unix.SIGTERM, runtimeapi.Signal_SIGINT: unix.SIGINT, runtimeapi.Signal_SIGUSR1: unix.SIGUSR1,
	} {
		equal(t, stopSignal(wanted), want)
	}
}

func TestResolvConf(t *testing.T) {
	equal(t, resolvConf(nil, "10.0.0.10"), "nameserver 10.0.0.10\n")
	equal(t, resolvConf(nil, ""), "")
	equal(t, resolvConf(&runtimeapi.DNSConfig{Servers: []string{"1.1.1.1"}, Searches: []string{"a", "b"}, Options: []string{"ndots:5"}}, "x"),
		"search a b\nnameserver 1.1.1.1\noptions ndots:5\n")
}
