package shim

import (
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"
	"syscall"
)

// systemEntries are the entries of the machine's root that containers see, beside /lib and its like: a system to run programs on.
var systemEntries = []string{"bin", "sbin", "usr", "etc", "dev", "proc", "sys", "nix"}

// ownEntries are those of them that can be written.
var ownEntries = []string{"dev", "proc", "sys"}

// emptyFolders are the others of a usual root, with their permissions; whose own they are on the machine is not for containers.
var emptyFolders = []struct {
	path string
	mode os.FileMode
}{
	{"/home", 0o755}, {"/media", 0o755}, {"/mnt", 0o755}, {"/opt", 0o755}, {"/root", 0o755}, {"/run", 0o755}, {"/srv", 0o755},
	{"/tmp", 0o777 | os.ModeSticky}, {"/var", 0o755}, {"/var/cache", 0o755}, {"/var/lib", 0o755}, {"/var/log", 0o755},
	{"/var/tmp", 0o777 | os.ModeSticky},
}

// scratchMode are the permissions of a folder like /tmp.
const scratchMode = 0o777 | os.ModeSticky

// isSystem says whether containers see an entry of the machine's root.
func isSystem(name string) bool {
	return slices.Contains(systemEntries, name) || strings.HasPrefix(name, "lib")
}

// makeFolders makes what a usual root has beside the system, and the image's scratch folders.
func (r *root) makeFolders(scratch []string) error {
	for _, folder := range emptyFolders {
		if err := os.Mkdir(folder.path, folder.mode); err != nil {
			return err
		}
		// Again, because the umask was subtracted.
		if err := os.Chmod(folder.path, folder.mode); err != nil {
			return err
		}
		r.own[folder.path] = true
	}
	if err := os.Symlink("/run", "/var/run"); err != nil {
		return err
	}
	for _, folder := range scratch {
		path, err := r.reach(folder, true)
		if err != nil {
			return fmt.Errorf("scratch folder %s: %w", folder, err)
		}
		if !r.own[path] {
			return fmt.Errorf("scratch folder %s belongs to the machine's system: choose one elsewhere, as in /var/cache", folder)
		}
		if err := os.Chmod(path, scratchMode); err != nil {
			return err
		}
	}
	return nil
}

// bindImage binds the image's files where they are on the machine.
func (r *root) bindImage(mounts []Mount, files map[string]*os.File) error {
	for _, wanted := range mounts {
		if !wanted.Image {
			continue
		}
		if err := r.restore(wanted, files[wanted.Target]); err != nil {
			return fmt.Errorf("image's file %s: %w", wanted.Target, err)
		}
	}
	return nil
}

// openImage opens the image's files before any volume can cover them; those that the machine does not have are left out.
func openImage(mounts []Mount) (map[string]*os.File, error) {
	files := map[string]*os.File{}
	for _, wanted := range mounts {
		if !wanted.Image {
			continue
		}
		file, err := os.Open(wanted.Target)
		if errors.Is(err, os.ErrNotExist) {
			continue
		}
		if err != nil {
			return files, err
		}
		files[wanted.Target] = file
	}
	return files, nil
}

func closeAll(files map[string]*os.File) {
	for _, file := range files {
		_ = file.Close() // read only
	}
}

// restore binds a file or folder of the image where it is on the machine, unless it can be seen there.
func (r *root) restore(wanted Mount, file *os.File) error {
	if file == nil {
		return nil
	}
	before, err := file.Stat()
	if err != nil {
		return err
	}
	if now, err := os.Stat(wanted.Target); err == nil && os.SameFile(before, now) {
		return nil
	}
	target, err := r.reach(wanted.Target, before.IsDir())
	if err != nil {
		return err
	}
	if err := mount(fmt.Sprintf("/proc/self/fd/%d", file.Fd()), target, "", syscall.MS_BIND|syscall.MS_REC, ""); err != nil {
		return err
	}
	delete(r.own, target)
	r.mounted = append(r.mounted, mounted{target: target})
	if wanted.Readonly {
		return readonly(target, true)
	}
	return nil
}
