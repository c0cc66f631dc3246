package procri

import (
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// machineFiles makes a folder of the machine outside its system, with an image's folder, one that images share, and what is in no image.
func machineFiles(t *testing.T) (base string, image Image) {
	t.Helper()
	base, err := os.MkdirTemp("/var/tmp", "procri")
	check(t, err)
	t.Cleanup(func() { check(t, os.RemoveAll(base)) })
	check(t, os.Chmod(base, 0o755))
	for _, folder := range []string{"app", "shared", ".cache/models", ".triton"} {
		check(t, os.MkdirAll(filepath.Join(base, folder), 0o777))
		check(t, os.Chmod(filepath.Join(base, folder), 0o777))
		check(t, os.WriteFile(filepath.Join(base, folder, "file"), []byte("of the machine\n"), 0o666))
	}
	return base, Image{
		Name: "tandem.local/whole:1", User: 65532, Env: map[string]string{"HOME": "/var/cache/app", "PATH": defaultPath},
		Files: []string{base + "/app"}, Shared: []string{base + "/shared"}, Scratch: []string{"/var/cache/app"},
	}
}

func (n *node) writeImage(image Image) {
	n.t.Helper()
	table, err := json.Marshal(map[string]any{"images": []Image{image}})
	check(n.t, err)
	n.writeImages(string(table))
}

func use(image Image, user int64, readonly bool) func(*runtimeapi.ContainerConfig) {
	return func(c *runtimeapi.ContainerConfig) {
		c.Image.Image = image.Name
		c.Linux.SecurityContext.RunAsUser = &runtimeapi.Int64Value{Value: user}
		c.Linux.SecurityContext.ReadonlyRootfs = readonly
	}
}

func TestContainersSeeTheirImageAndNoOtherFilesOfTheMachine(t *testing.T) {
	n := startNode(t)
	base, image := machineFiles(t)
	n.writeImage(image)
	pod, _ := n.pod(nil)
	for _, user := range []int64{0, 65532} {
		got := n.output(pod, "ls -A "+base+"; cat "+base+"/app/file; ls -A /home /root /opt /srv /mnt /tmp /run | grep -v : | grep .", use(image, user, false))
		equal(t, got, "app\nshared\nof the machine\n")
	}
}

func TestContainersCanNotChangeTheMachine(t *testing.T) {
	n := startNode(t)
	base, image := machineFiles(t)
	n.writeImage(image)
	pod, _ := n.pod(nil)
	for _, path := range []string{"/etc/new", "/usr/new", base + "/app/new"} {
		got := n.output(pod, "touch "+path+" 2>/dev/null || echo refused", use(image, 0, false))
		equal(t, got, "refused\n")
	}
	got := n.output(pod, "touch /tmp/new /var/tmp/new /new "+base+"/shared/new && echo done", use(image, 0, false))
	equal(t, got, "done\n")
	for path, want := range map[string]bool{"/tmp/new": false, "/var/tmp/new": false, "/new": false, base + "/shared/new": true} {
		equal(t, exists(path), want)
	}
}

func TestScratchFoldersAreEachContainersOwn(t *testing.T) {
	n := startNode(t)
	_, image := machineFiles(t)
	n.writeImage(image)
	pod, _ := n.pod(nil)
	script := "ls -A ~ /tmp | grep -v : | grep .; touch ~/new /tmp/new 2>/dev/null && echo written; stat -c %a ~ /tmp"
	for range 2 {
		equal(t, n.output(pod, script, use(image, 65532, false)), "written\n1777\n1777\n")
	}
	equal(t, n.output(pod, script, use(image, 65532, true)), "1777\n1777\n")
}

func TestAHomeThatTheImageDoesNotDeclareIsClosed(t *testing.T) {
	n := startNode(t)
	_, image := machineFiles(t)
	image.Env, image.Scratch = nil, nil
	n.writeImage(image)
	pod, _ := n.pod(nil)
	got := n.output(pod, "echo $HOME; mkdir ~/.cache 2>/dev/null || echo closed", use(image, 65532, false))
	equal(t, got, "/\nclosed\n")
}

func TestProgramsThatTheImageDoesNotHaveAreHidden(t *testing.T) {
	n := startNode(t)
	_, image := machineFiles(t)
	// A program that every machine has plays the compiler; a link to it, and a name that is not there, do no harm.
	program, err := exec.LookPath("yes")
	check(t, err)
	link := filepath.Join(t.TempDir(), "link")
	check(t, os.Symlink(program, link))
	image.Hidden = []string{program, link, "/usr/bin/no-such-compiler", "/usr/bin"}
	n.writeImage(image)
	pod, _ := n.pod(nil)
	for _, user := range []int64{0, 65532} {
		got := n.output(pod, "command -v yes || echo none; yes 2>/dev/null | head -1; ls /usr/bin/env", use(image, user, false))
		equal(t, got, "none\n/usr/bin/env\n")
	}
	if out, err := exec.Command("sh", "-c", "yes | head -1").Output(); err != nil || strings.TrimSpace(string(out)) != "y" {
		t.Fatal("the machine lost its program")
	}
}

func TestScratchFoldersAreNotTheMachines(t *testing.T) {
	n := startNode(t)
	_, image := machineFiles(t)
	image.Scratch = []string{"/usr/share"}
	n.writeImage(image)
	pod, _ := n.pod(nil)
	id := n.create(pod, "true", use(image, 0, false))
	_, err := n.runtime.StartContainer(n.context(), &runtimeapi.StartContainerRequest{ContainerId: id})
	if err == nil || !strings.Contains(err.Error(), "/usr/share belongs to the machine's system") {
		t.Fatalf("start: %v", err)
	}
}
