package procri

import (
	"encoding/json"
	"errors"
	"os"
	"path/filepath"
	"testing"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

func TestImageNames(t *testing.T) {
	for _, c := range []struct {
		pattern, name string
		want          bool
	}{
		{"r.io/a:1", "r.io/a:1", true}, {"r.io/a:1", "r.io/a:2", false}, {"r.io/a:*", "r.io/a:2", true},
		{"r.io/a:*", "r.io/a@sha256:00", true}, {"r.io/a:*", "r.io/ab:2", false}, {"r.io/a:*", "r.io/a/b:2", false},
		{"r.io/a:*", "r.io/a", true}, {"r.io/a:*", "r.io/a:1@sha256:00", true}, {"r.io:*", "r.io:5000/a", false},
	} {
		if got := (Image{Name: c.pattern}).matches(c.name); got != c.want {
			t.Errorf("%s matches %s: %t", c.pattern, c.name, got)
		}
	}
}

func TestImageTableIsReadAgain(t *testing.T) {
	path := filepath.Join(t.TempDir(), "images.json")
	table := newImageTable(path)
	if _, _, err := table.find("a:1"); err == nil || errors.Is(err, errNoImage) {
		t.Fatalf("a missing table: %v", err)
	}
	check(t, os.WriteFile(path, []byte(`{"images": [{"name": "a:1", "user": 7}]}`), 0o644))
	image, name, err := table.find("a:1")
	check(t, err)
	equal(t, image.User, 7)
	_, byID, err := table.find(imageID(name))
	check(t, err)
	equal(t, byID, "a:1")
	check(t, os.WriteFile(path, []byte(`{"images": [{"name": "b:*"}]}`), 0o644))
	if _, _, err := table.find("a:1"); !errors.Is(err, errNoImage) {
		t.Fatalf("an image that has gone: %v", err)
	}
	check(t, os.WriteFile(path, []byte(`{"images": [`), 0o644))
	if _, _, err := table.find("b:1"); err == nil || errors.Is(err, errNoImage) {
		t.Fatalf("a broken table: %v", err)
	}
}

func TestImageService(t *testing.T) {
	n := startNode(t)
	spec := func(name string) *runtimeapi.ImageSpec { return &runtimeapi.ImageSpec{Image: name} }
	pulled, err := n.images.PullImage(n.context(), &runtimeapi.PullImageRequest{Image: spec("tandem.local/echo:9")})
	check(t, err)
	_, err = n.images.PullImage(n.context(), &runtimeapi.PullImageRequest{Image: spec("tandem.local/other:1")})
	equal(t, status.Code(err), codes.NotFound)
	found, err := n.images.ImageStatus(n.context(), &runtimeapi.ImageStatusRequest{Image: spec("tandem.local/echo:9")})
	check(t, err)
	equal(t, found.Image.Id, pulled.ImageRef)
	missing, err := n.images.ImageStatus(n.context(), &runtimeapi.ImageStatusRequest{Image: spec("tandem.local/other:1")})
	check(t, err)
	if missing.Image != nil {
		t.Fatal("an unknown image has a status")
	}
	list, err := n.images.ListImages(n.context(), &runtimeapi.ListImagesRequest{})
	check(t, err)
	equal(t, len(list.Images), 2)
	_, err = n.images.ImageFsInfo(n.context(), &runtimeapi.ImageFsInfoRequest{})
	check(t, err)
	pod, _ := n.pod(nil)
	got := n.output(pod, "", func(c *runtimeapi.ContainerConfig) { c.Image, c.Command = spec(pulled.ImageRef), nil })
	equal(t, got, "from image: /bin/sh\n")
	_, err = n.runtime.CreateContainer(n.context(), &runtimeapi.CreateContainerRequest{
		PodSandboxId: pod, Config: &runtimeapi.ContainerConfig{Image: spec("tandem.local/other:1")},
	})
	equal(t, status.Code(err), codes.NotFound)
}

// TestVolumesDoNotHideTheImage mounts volumes over and in the folders of an image that lies below them, behind a link and a closed folder.
func TestVolumesDoNotHideTheImage(t *testing.T) {
	n := startNode(t)
	home := t.TempDir()
	app, link, out := filepath.Join(home, "closed", "app"), filepath.Join(home, "link"), filepath.Join(home, "out")
	check(t, os.MkdirAll(filepath.Join(app, "bin"), 0o755))
	check(t, os.Mkdir(filepath.Join(app, "data"), 0o755))
	check(t, os.WriteFile(filepath.Join(app, "bin", "run"), []byte("#!/bin/sh\n. \"$1\"\n"), 0o755))
	check(t, os.Chmod(filepath.Join(home, "closed"), 0o700))
	check(t, os.Symlink(filepath.Join(home, "closed"), link))
	check(t, os.Mkdir(out, 0o755))
	check(t, os.WriteFile(filepath.Join(out, "script"), []byte(`
		ls $APP; echo $APP/data/*; touch $APP/new 2>&1 | grep -c . ; touch $HOME/new /tmp/new; ls /tmp/missing-on-the-machine`), 0o644))
	image := Image{
		Name: "tandem.local/app:1", Entrypoint: []string{link + "/app/bin/run"}, User: 65532,
		Env: map[string]string{"APP": link + "/app"}, Files: []string{app, link + "/app", home + "/gone"},
	}
	table, err := json.Marshal(map[string]any{"images": []Image{image}})
	check(t, err)
	n.writeImages(string(table))
	pod, _ := n.pod(nil)
	for name, readonly := range map[string]bool{"a writable root": false, "a read-only root": true} {
		volume, data := t.TempDir(), t.TempDir()
		check(t, os.Chmod(volume, 0o777))
		check(t, os.WriteFile(filepath.Join(data, "from-a-volume"), nil, 0o644))
		got := n.output(pod, "", func(c *runtimeapi.ContainerConfig) {
			c.Image.Image, c.Command, c.Args = image.Name, nil, []string{"/missing/script"}
			c.Envs = []*runtimeapi.KeyValue{{Key: "HOME", Value: []byte("/tmp")}}
			c.Linux.SecurityContext.ReadonlyRootfs = readonly
			c.Mounts = []*runtimeapi.Mount{
				{HostPath: data, ContainerPath: link + "/app/data"}, {HostPath: volume, ContainerPath: "/tmp"},
				{HostPath: data, ContainerPath: "/tmp/missing-on-the-machine"}, {HostPath: out, ContainerPath: "/missing"},
			}
		})
		equal(t, got, "bin\ndata\n"+link+"/app/data/from-a-volume\n1\nfrom-a-volume\n")
		if !exists(filepath.Join(volume, "new")) || exists("/tmp/missing-on-the-machine") {
			t.Errorf("%s: the volume at /tmp is not the pod's", name)
		}
	}
	entries, err := os.ReadDir(app)
	check(t, err)
	equal(t, len(entries), 2)
}
