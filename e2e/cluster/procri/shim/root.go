package shim

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"syscall"
)

// hostRoot is the path of the machine's own root while the container's is built.
const hostRoot = "/.procri-host"

// maxLinks bounds the symbolic links in one path.
const maxLinks = 40

// everybody is the permission to pass through a folder and list it.
const everybody = 0o055

// root is the container's file system while it is built.
//
// It is a small tmpfs with a bind of the machine's system, of the image's files, and empty folders where the machine has something else. If a mount point is missing further down, the deepest existing folder is covered by another tmpfs with a bind of each of its
// entries (a scaffold), and the rest is created in that. So the machine's file system is never written to.
type root struct {
	// own holds the folders that lie on one of our tmpfs, where entries can be created freely.
	own map[string]bool
	// scaffolds are the roots of the tmpfs mounts, to be made read-only at the end, even if a volume covers them by then.
	scaffolds []*os.File
	// mounted lists the mounts by their targets, the latest last.
	mounted []mounted
}

// mounted is one mount of the container, below which missing folders are real if it is a volume.
type mounted struct {
	target string
	volume bool
}

// buildRoot moves the shim, which must have a mount namespace of its own, into the container's root.
func buildRoot(spec *Spec) error {
	if err := mount("", "/", "", syscall.MS_REC|syscall.MS_SLAVE, ""); err != nil {
		return err
	}
	if err := mount("tmpfs", spec.NewRoot, "tmpfs", 0, "mode=755"); err != nil {
		return err
	}
	// Unbindable, because the bind of the folder that holds NewRoot must not take it along.
	if err := mount("", spec.NewRoot, "", syscall.MS_UNBINDABLE, ""); err != nil {
		return err
	}
	if err := bindEntries("/", spec); err != nil {
		return err
	}
	// Opened here, where links still lead through the machine.
	files, err := openImage(spec.Mounts)
	defer closeAll(files)
	if err != nil {
		return err
	}
	old := filepath.Join(spec.NewRoot, hostRoot)
	if err := os.Mkdir(old, 0o700); err != nil {
		return err
	}
	if err := syscall.PivotRoot(spec.NewRoot, old); err != nil {
		return fmt.Errorf("pivot to %s: %w", spec.NewRoot, err)
	}
	if err := os.Chdir("/"); err != nil {
		return err
	}
	r := &root{own: map[string]bool{"/": true}}
	defer r.close()
	if err := r.fill(spec, files); err != nil {
		return err
	}
	if err := syscall.Unmount(hostRoot, syscall.MNT_DETACH); err != nil {
		return fmt.Errorf("leave the machine's root: %w", err)
	}
	if err := os.Remove(hostRoot); err != nil {
		return err
	}
	if !spec.ReadonlyRoot {
		return nil
	}
	for _, scaffold := range r.scaffolds {
		if err := readonlyAt(int(scaffold.Fd()), "", atEmptyPath); err != nil {
			return err
		}
	}
	return readonly("/", false)
}

// bindEntries binds the machine's system, entry by entry, into the new root.
func bindEntries(from string, spec *Spec) error {
	entries, err := os.ReadDir(from)
	if err != nil {
		return err
	}
	for _, entry := range entries {
		if !isSystem(entry.Name()) {
			continue
		}
		target := filepath.Join(spec.NewRoot, entry.Name())
		if entry.Name() == "proc" && spec.FreshProc {
			if err := os.Mkdir(target, 0o555); err != nil {
				return err
			}
			flags := uintptr(syscall.MS_NOSUID | syscall.MS_NODEV | syscall.MS_NOEXEC)
			if err := mount("proc", target, "proc", flags, ""); err != nil {
				return err
			}
			continue
		}
		if err := bindEntry(from, entry.Name(), target); err != nil {
			return err
		}
		isLink := entry.Type()&os.ModeSymlink != 0
		if !isLink && !slices.Contains(ownEntries, entry.Name()) {
			if err := readonly(target, true); err != nil {
				return err
			}
		}
	}
	return nil
}

// bindEntry makes target show what name in the folder is, with everything mounted below it.
func bindEntry(folder, name, target string) error {
	source := filepath.Join(folder, name)
	info, err := os.Lstat(source)
	if errors.Is(err, os.ErrNotExist) {
		return nil // it was removed after the folder was read
	}
	if err != nil {
		return err
	}
	switch {
	case info.Mode()&os.ModeSymlink != 0:
		link, err := os.Readlink(source)
		if err != nil {
			return err
		}
		return os.Symlink(link, target)
	case info.IsDir():
		err = os.Mkdir(target, 0o755)
	default:
		err = touch(target)
	}
	if err != nil {
		return err
	}
	return mount(source, target, "", syscall.MS_BIND|syscall.MS_REC, "")
}

// fill binds the image's files and the container's mounts, and creates its working directory.
func (r *root) fill(spec *Spec, files map[string]*os.File) error {
	if err := r.makeFolders(spec.Scratch); err != nil {
		return err
	}
	if err := r.bindImage(spec.Mounts, files); err != nil {
		return err
	}
	for _, folder := range spec.Open {
		if err := r.open(folder); err != nil {
			return fmt.Errorf("open %s: %w", folder, err)
		}
	}
	visible, err := openImage(spec.Mounts)
	defer closeAll(visible)
	if err != nil {
		return err
	}
	for _, wanted := range spec.Mounts {
		if wanted.Image {
			err = r.restore(wanted, visible[wanted.Target])
		} else {
			err = r.bind(wanted)
		}
		if err != nil {
			return fmt.Errorf("mount %s at %s: %w", wanted.Source, wanted.Target, err)
		}
	}
	if _, err := r.reach(spec.Process.Dir, true); err != nil {
		return fmt.Errorf("working directory %s: %w", spec.Process.Dir, err)
	}
	return nil
}

func (r *root) bind(wanted Mount) error {
	source := filepath.Join(hostRoot, wanted.Source)
	info, err := os.Stat(source)
	if err != nil {
		return err
	}
	target, err := r.reach(wanted.Target, info.IsDir())
	if err != nil {
		return err
	}
	if err := mount(source, target, "", syscall.MS_BIND|syscall.MS_REC, ""); err != nil {
		return err
	}
	delete(r.own, target)
	r.mounted = append(r.mounted, mounted{target: target, volume: true})
	if !wanted.Follow {
		if err := mount("", target, "", syscall.MS_REC|syscall.MS_PRIVATE, ""); err != nil {
			return err
		}
	}
	if wanted.Readonly || wanted.RecursiveReadonly {
		return readonly(target, wanted.RecursiveReadonly)
	}
	return nil
}

// open lets everybody pass through a folder.
func (r *root) open(folder string) error {
	path, err := r.reach(folder, true)
	if err != nil {
		return err
	}
	info, err := os.Stat(path)
	if err != nil || info.Mode().Perm()&everybody == everybody {
		return err
	}
	return r.scaffold(path, everybody)
}

// reach returns the path without symbolic links and creates its missing parts: folders, and at the end a file unless a folder is wanted.
func (r *root) reach(path string, folder bool) (string, error) {
	pending := split(path)
	current := "/"
	for links := 0; len(pending) > 0; {
		name := pending[0]
		pending = pending[1:]
		if name == ".." {
			current = filepath.Dir(current)
			continue
		}
		next := filepath.Join(current, name)
		info, err := os.Lstat(next)
		switch {
		case errors.Is(err, os.ErrNotExist):
			if err := r.create(current, next, folder || len(pending) > 0); err != nil {
				return "", err
			}
		case err != nil:
			return "", err
		case info.Mode()&os.ModeSymlink != 0:
			if links++; links > maxLinks {
				return "", syscall.ELOOP
			}
			link, err := os.Readlink(next)
			if err != nil {
				return "", err
			}
			if filepath.IsAbs(link) {
				current = "/"
			}
			pending = append(split(link), pending...)
			continue
		}
		current = next
	}
	return current, nil
}

// create makes a folder or an empty file in parent without touching the machine's file system; in a volume it is real.
func (r *root) create(parent, path string, folder bool) error {
	if !r.own[parent] && r.inVolume(parent) {
		if err := makeEntry(path, folder); !errors.Is(err, syscall.EROFS) {
			return err
		}
	}
	if !r.own[parent] {
		if err := r.scaffold(parent, 0); err != nil {
			return err
		}
	}
	if folder {
		r.own[path] = true
	}
	return makeEntry(path, folder)
}

// inVolume says whether a path lies in a volume, and not in files of the image that were bound into that volume.
func (r *root) inVolume(path string) bool {
	for _, m := range slices.Backward(r.mounted) {
		if path == m.target || strings.HasPrefix(path, m.target+"/") {
			return m.volume
		}
	}
	return false
}

func (r *root) close() {
	for _, scaffold := range r.scaffolds {
		_ = scaffold.Close() // read only
	}
}

// scaffold covers a folder with a tmpfs that shows the same entries and adds to the folder's permissions.
func (r *root) scaffold(path string, permissions uint32) error {
	// The descriptor reaches the folder below the tmpfs.
	below, err := os.Open(path)
	if err != nil {
		return err
	}
	defer func() { _ = below.Close() }() // read only
	info, err := below.Stat()
	if err != nil {
		return err
	}
	names, err := below.Readdirnames(-1)
	if err != nil {
		return err
	}
	stat := info.Sys().(*syscall.Stat_t)
	options := fmt.Sprintf("mode=%o,uid=%d,gid=%d", stat.Mode&0o7777|permissions, stat.Uid, stat.Gid)
	if err := mount("tmpfs", path, "tmpfs", 0, options); err != nil {
		return err
	}
	folder := fmt.Sprintf("/proc/self/fd/%d", below.Fd())
	for _, name := range names {
		if err := bindEntry(folder, name, filepath.Join(path, name)); err != nil {
			return err
		}
	}
	runtime.KeepAlive(below)
	r.own[path] = true
	if path == "/dev" || strings.HasPrefix(path, "/dev/") {
		return nil
	}
	own, err := os.Open(path)
	if err != nil {
		return err
	}
	r.scaffolds = append(r.scaffolds, own)
	return nil
}

func split(path string) []string {
	var names []string
	for name := range strings.SplitSeq(path, "/") {
		if name != "" && name != "." {
			names = append(names, name)
		}
	}
	return names
}

func makeEntry(path string, folder bool) error {
	if folder {
		return os.Mkdir(path, 0o755)
	}
	return touch(path)
}

func touch(path string) error {
	file, err := os.OpenFile(path, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o644)
	if err != nil {
		return err
	}
	return file.Close()
}
