package procri

import (
	"os"
	"path/filepath"
	"slices"
	"testing"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

func TestImageInAClosedHome(t *testing.T) {
	n := startNode(t)
	base, err := os.MkdirTemp("/var/tmp", "procri")
	check(t, err)
	t.Cleanup(func() { check(t, os.RemoveAll(base)) })
	check(t, os.Chmod(base, 0o755))
	home := filepath.Join(base, "home")
	check(t, os.MkdirAll(filepath.Join(home, "private", "bin"), 0o755))
	check(t, os.Symlink("/bin/sh", filepath.Join(home, "private", "bin", "shell")))
	script := filepath.Join(base, "script")
	body := "#!" + filepath.Join(home, "private", "bin", "shell") + "\nid -u\ncat " + filepath.Join(home, "secret") + " 2>/dev/null || echo closed\n"
	check(t, os.WriteFile(script, []byte(body), 0o755))
	check(t, os.WriteFile(filepath.Join(home, "secret"), []byte("secret\n"), 0o600))
	for _, folder := range []string{filepath.Join(home, "private"), home} {
		check(t, os.Chmod(folder, 0o700))
	}
	image := Image{Entrypoint: []string{script}}
	if got, want := closedFolders(65532, image), []string{home, filepath.Join(home, "private")}; !slices.Equal(got, want) {
		t.Fatalf("closed: %v, want %v", got, want)
	}
	equal(t, len(closedFolders(0, image)), 0)

	files := `"` + script + `", "` + filepath.Join(home, "private") + `"`
	n.writeImages(`{"images": [{"name": "tandem.local/home:1", "entrypoint": ["` + script + `"], "user": 65532, "files": [` + files + `]}]}`)
	pod, _ := n.pod(nil)
	for _, readonly := range []bool{false, true} {
		got := n.output(pod, "", func(c *runtimeapi.ContainerConfig) {
			c.Image.Image, c.Command, c.Linux.SecurityContext.ReadonlyRootfs = "tandem.local/home:1", nil, readonly
		})
		equal(t, got, "65532\nclosed\n")
	}
	info, err := os.Stat(home)
	check(t, err)
	equal(t, info.Mode().Perm(), 0o700)
}
