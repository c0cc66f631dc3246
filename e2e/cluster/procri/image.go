package procri

import (
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"strings"
	"sync"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// errNoImage reports a name that is not in the table.
var errNoImage = errors.New("image not found")

// anyTag at the end of a table name stands for every tag and digest.
const anyTag = ":*"

// Image is one entry of the image table.
type Image struct {
	// Name is the name that pods use; it may end in `:*`.
	Name string `json:"name"`
	// Entrypoint runs unless the pod names a command; if it is empty, the pod must name one.
	Entrypoint []string `json:"entrypoint"`
	// Env is the image's environment.
	Env map[string]string `json:"env"`
	// WorkingDir is where processes start unless the pod says otherwise; empty stands for the root.
	WorkingDir string `json:"workingDir"`
	// Files are the folders and files of the machine that the image consists of, beside its system. They stay where they are, under every
	// volume of a pod, and can only be read.
	Files []string `json:"files"`
	// Shared are folders of the machine that every container of the image can write, as far as their permissions allow.
	Shared []string `json:"shared"`
	// Scratch are folders that every user may write; each container has its own, which are empty when it starts.
	Scratch []string `json:"scratch"`
	// Hidden are programs of the machine's system that the image does not have.
	Hidden []string `json:"hidden"`
	// User is the number of the user that processes run as unless the pod says otherwise.
	User int64 `json:"user"`
}

// imageTable finds images in a JSON file, which is read again at each use.
type imageTable struct {
	path string
	mu   sync.Mutex
	// names maps the ids given out to the full names that they stand for.
	names map[string]string
}

func newImageTable(path string) *imageTable {
	return &imageTable{path: path, names: map[string]string{}}
}

func (t *imageTable) load() ([]Image, error) {
	data, err := os.ReadFile(t.path)
	if err != nil {
		return nil, fmt.Errorf("image table: %w", err)
	}
	var table struct {
		Images []Image `json:"images"`
	}
	if err := json.Unmarshal(data, &table); err != nil {
		return nil, fmt.Errorf("image table %s: %w", t.path, err)
	}
	return table.Images, nil
}

// find returns the entry for a name or an id, and its full name.
func (t *imageTable) find(reference string) (Image, string, error) {
	images, err := t.load()
	if err != nil {
		return Image{}, "", err
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	name := reference
	if known, isID := t.names[reference]; isID {
		name = known
	}
	for _, image := range images {
		if image.matches(name) {
			t.names[imageID(name)] = name
			return image, name, nil
		}
	}
	return Image{}, "", fmt.Errorf("%w: %s is not in %s", errNoImage, reference, t.path)
}

// list returns the full names of the known images: those without a pattern, and those asked for since the start.
func (t *imageTable) list() (map[string]Image, error) {
	images, err := t.load()
	if err != nil {
		return nil, err
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	known := map[string]Image{}
	for _, image := range images {
		if !strings.HasSuffix(image.Name, anyTag) {
			known[image.Name] = image
		}
		for _, name := range t.names {
			if image.matches(name) {
				known[name] = image
			}
		}
	}
	return known, nil
}

func (i Image) matches(name string) bool {
	if i.Name == name {
		return true
	}
	repository, pattern := strings.CutSuffix(i.Name, anyTag)
	if !pattern {
		return false
	}
	rest, found := strings.CutPrefix(name, repository)
	return found && (rest == "" || rest[0] == '@' || rest[0] == ':' && !strings.Contains(rest, "/"))
}

// imageID stays the same when the entry changes, so that a container asked for before a change can be created after it.
func imageID(name string) string {
	sum := sha256.Sum256([]byte(name))
	return "sha256:" + hex.EncodeToString(sum[:])
}

// describe returns the image as CRI sees it. The kubelet considers an image without a size broken.
func (i Image) describe(name string) *runtimeapi.Image {
	image := &runtimeapi.Image{
		Id: imageID(name), Size: 1, Uid: &runtimeapi.Int64Value{Value: i.User}, Spec: &runtimeapi.ImageSpec{Image: name}, Pinned: true,
	}
	if strings.Contains(name, "@") {
		image.RepoDigests = []string{name}
	} else {
		image.RepoTags = []string{name}
	}
	return image
}
